"""What is told about a running system: metrics, logs, traces. Never a prompt, and never a job id as a label."""
