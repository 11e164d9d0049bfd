"""What `omnirt bench` measures: each bench compares two things side by side in one run, and prints a table."""
