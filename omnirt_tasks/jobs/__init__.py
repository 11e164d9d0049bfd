"""The job record and everything that may happen to it."""
