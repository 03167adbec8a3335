"""What every conformance suite needs: the registry of scenarios, the runner, the report and the command line."""
