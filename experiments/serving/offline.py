"""`Engine.generate` against lm-evaluation-harness's own batches: the same greedy requests, as `generate_until` tasks make them.

    python experiments/serving/offline.py

32 prompts of 60 to 700 tokens of Python, up to 64 new tokens, an end at an empty line. The harness sorts requests by length and
pads batches on the left; a batch goes on until its last row has ended. Both sides in one process, taking turns, one thread,
fp32; processor seconds, medians of five. Writes docs/results/serving/offline.json. Needs the `eval` extra.
"""

import json
import statistics
import time
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHForCausalLM
from nemotron_h_hf.environment import machine, versions
from nemotron_h_hf.serving.engine import Engine
from nemotron_h_hf.serving.requests import Request

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "serving"
TEXT = Path(json.__file__).read_text() + Path(statistics.__file__).read_text()
PROMPTS = [TEXT[1500 * i :][: 150 + 61 * i] for i in range(32)]
UNTIL, MOST = "\n\n", 64


def main() -> None:
    """Measure, and write the report."""
    torch.set_num_threads(1)
    model = NemotronHForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    sides = {f"harness, batches of {size}": harness(model, tokenizer, size) for size in (1, 8, 32)}
    sides |= {f"engine, {size} rows": engine(model, tokenizer, size) for size in (1, 8, 32)}
    answers, seconds = {}, {name: [] for name in sides}
    for _ in range(6):
        for name, run in sides.items():
            started = time.process_time()
            answers[name] = run()
            seconds[name].append(time.process_time() - started)
    first = answers["harness, batches of 1"]
    report = {
        "command": "python experiments/serving/offline.py", "machine": machine(), "versions": versions(),
        "processor_seconds": {
            name: {"median": statistics.median(it[1:]), "least": min(it[1:]), "most": max(it[1:])} for name, it in seconds.items()
        },
        "answers_equal_to_the_first": {name: sum(a == b for a, b in zip(it, first)) for name, it in answers.items()},
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    (RESULTS / "offline.json").write_text(json.dumps(report, indent=1) + "\n")


def harness(model, tokenizer, size):
    """The harness's model of transformers."""
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
    settings = {"until": [UNTIL], "max_gen_toks": MOST, "do_sample": False}
    asked = [Instance("generate_until", {}, (prompt, dict(settings)), i) for i, prompt in enumerate(PROMPTS)]
    return lambda: wrapped.generate_until(asked, disable_tqdm=True)


def engine(model, tokenizer, size):
    """Ours, anew each time: nothing is kept of the turn before."""
    asked = [
        Request(tokens=tokenizer(prompt)["input_ids"], max_tokens=MOST, stop=(UNTIL,), temperature=0)
        for prompt in PROMPTS
    ]
    return lambda: [answer.text for (answer,) in Engine(model, tokenizer, max_batch=size).generate(asked)]


if __name__ == "__main__":
    main()
