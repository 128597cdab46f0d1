"""Speed and memory: a gate before timing, models measured in turns, floors, tables and plots.

run.py            one run: its arguments, single parts, suites
cpu_suite.py      `bench cpu`: everything on a CPU
gpu_suite.py      everything within ten minutes on one GPU
turns.py          jobs timed in turns
jobs.py           decode, prefill, throughput, train, memory
linears.py        the model's Linear layers alone
models.py         the models compared
llama_cpp_peer.py llama.cpp on the same weights
vllm_peer.py      vLLM on a model of the same shape
gate.py           nothing is timed that computes something else
caches.py         caches at the length where decoding is timed
largest.py        the largest batch that fits
devices.py        clock, memory and rates of the device
memory.py         peak memory of one job in its own process
work.py           floors and predicted memory
records.py        results and targets in a JSON file that is always whole
summary.py        the table
plot.py           the plot
"""
