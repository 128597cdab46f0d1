"""What a checkpoint can do: held-out bits per byte, long-context questions made offline, lm-evaluation-harness tasks.

held_out.py           bits per byte, document by document
texts.py              text from files, and filler for long prompts
long_context.py       questions on long prompts: made, answered and scored
needles.py            questions about numbers hidden in a text
gathering.py          questions whose answer is spread over the prompt
answering.py          greedy answers that share one pass over a common prompt
asking.py             questions put to a model, answers as text
harness.py            lm-evaluation-harness tasks by name
sample_records.py     the folder of an evaluation, resumable
results_table.py      the table of results
long_context_plot.py  the long-context plot
"""
