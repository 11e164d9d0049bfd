"""What the tests share: waiting for events, settings as an environment, processes that end for sure."""
