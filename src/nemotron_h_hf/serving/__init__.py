"""Every budget of one parent behind an OpenAI API, from one memory image.

engine.py        turns: decode steps of running batches, pieces of prompts; requests in, pieces out
jobs.py          a request on its way
requests.py      what is asked, and what comes back
budgets.py       the models that answer, by name
admission.py     whether caches fit
batch.py         the running rows of one budget
row.py           one continuation
sampling.py      its next token
text.py          its text, as it comes
thinking.py      where its thinking ends
prefix_cache.py  states of prompts that were read before
heap.py          freed memory goes back to the system

server.py        uvicorn, and an orderly end
api.py           OpenAI's routes
protocol.py      their bodies
chat.py          conversations: messages to prompts, text to reasoning, content and tool calls
answers.py       pieces to answers, whole or in chunks
responses.py     those of /v1/responses
pieces.py        from the engine's thread to an event loop
limits.py        size of bodies, API keys
failures.py      errors as clients know them
metrics.py       Prometheus

    from nemotron_h_hf.serving.engine import Engine
"""
