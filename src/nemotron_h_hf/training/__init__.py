"""Training and measuring: loops, optimizers and evaluations that are handed a model."""
