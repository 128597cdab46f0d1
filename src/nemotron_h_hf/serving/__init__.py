"""Every budget of one parent behind an OpenAI API, from one memory image.

engine.py        turns: decode steps of running batches, pieces of prompts; requests in, pieces out
jobs.py          a request on its way
requests.py      what is asked, and what comes back
budgets.py       the models that answer, by name
admission.py     whether caches fit
batch.py         the running rows of one budget
row.py           one continuation; sampling.py, text.py, thinking.py
prefix_cache.py  states of prompts that were read before

    from nemotron_h_hf.serving.engine import Engine
"""
