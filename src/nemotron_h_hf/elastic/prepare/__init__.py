"""Makes a parent: scores, weights in their order, the loss of every budget."""
