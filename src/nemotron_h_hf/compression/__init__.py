"""Making models smaller: what matters in them, and what training costs on many GPUs.

importance.py       scores of channels, neurons, heads and experts, from activations
depth.py            scores of layers, by removing them one by one
scaling.py          memory and communication on many GPUs, by formula
scaling_table.py    the tables of docs/scaling.md
"""
