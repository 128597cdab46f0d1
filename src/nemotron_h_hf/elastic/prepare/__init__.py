"""Makes a parent: scores, weights in order of importance, the loss of every budget.

elasticize.py     from a model to a parent
measuring.py      width scores, depth scores and losses; each is kept and not repeated
permuting.py      the weights in another order, the same function
defaults.py       sizes and budgets when none are named
streaming.py      layers read from disk as they run, one in memory at a time
scores.py         scores as a file
scores_plot.py    scores as a plot
"""
