"""Trains a parent with the models nested in it.

arguments.py        the flags
trainer.py          ElasticTrainer
router.py           from a budget to a distribution over sizes
choices.py          what the router may choose, as masks and as a budget
routed_model.py     a model that runs with the masks its router chooses
expected_cost.py    the expected cost of a choice, differentiable
latency.py          a table of times on this machine
budget_targets.py   how large the nested models shall be
curriculum.py       which budget each micro-step trains
trained_budgets.py  the end of a run: choices become budgets
"""
