"""Training text: where documents come from and how they become batches."""
