"""Making models smaller: what matters in them, and which smaller models fit.

importance.py       scores of channels, neurons, heads and experts, from activations
depth.py            scores of layers, by removing them one by one
observing.py        one pass of a model, seen from inside
layer_scores.py     scores of layers, from the change of the output without each
candidates.py       every smaller model that fits limits
mixed_widths.py     a width for each layer, by a knapsack
ranking.py          candidates on held-out text, as budgets of one memory image

The command that uses all of it, with its files and trainings, is ../minipuzzle.
"""
