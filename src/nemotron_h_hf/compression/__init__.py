"""Making models smaller: what matters in them.

importance.py       scores of channels, neurons, heads and experts, from activations
depth.py            scores of layers, by removing them one by one
"""
