"""Speed and memory: a gate before timing, models measured alternately, floors, reports and plots.

`bench cpu`:
cpu_run.py        the parts and their order
sides.py          our model, transformers' own, and the floor
gate.py           nothing is timed that computes something else
timing.py         wall-clock time, measured alternately
memory.py         peak memory of one job in its own process
report.py         figures, targets, table, machine
plot.py           the plot

On any device:
device_run.py     one run: its arguments and parts
suite.py          everything within ten minutes
jobs.py           decode, prefill, throughput, train, memory
models.py         the models compared
vllm_peer.py      vLLM on a model of the same shape
caches.py         caches at the length where decoding is timed
largest.py        the largest batch that fits
devices.py        clock, memory and rates of the device
work.py           floors and predicted memory
device_gate.py    the gate
records.py        results in a JSON file that is always whole
summary.py        the table
device_plot.py    the plot
"""
