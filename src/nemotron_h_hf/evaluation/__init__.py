"""What a checkpoint can do: held-out bits per byte, long-context questions made offline, lm-evaluation-harness tasks."""
