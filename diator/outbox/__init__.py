"""A transactional outbox and inbox."""
