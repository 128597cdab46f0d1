"""Making models smaller: what matters in them (importance, depth), and what they cost on many GPUs (scaling)."""
