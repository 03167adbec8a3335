"""The older place of what is now `diator.brokers`."""
