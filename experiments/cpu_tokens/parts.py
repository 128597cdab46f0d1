"""Prompts on a CPU by the length of their parts: is there one length that is best for all models and prompts?

    python experiments/cpu_tokens/parts.py           # docs/results/cpu_tokens/parts.json, parts.md; a quarter of an hour

Two threads, fp32. Parts of several lengths take turns on the same prompt; `whole` is one part. Also the memory beyond the weights, each
length in a process of its own. Models: the embedded one, the 189 million parameters of `nemotron-h bench cpu`, and a block of each kind
of twice that width.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHConfig, NemotronHForCausalLM
from nemotron_h_hf.benchmark.memory import footprint, measure_apart
from nemotron_h_hf.benchmark.models import SHAPES, SMALL
from nemotron_h_hf.environment import machine, versions
from nemotron_h_hf.whole_files import write_json, write_text

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "cpu_tokens"
SHAPE = SHAPES[SMALL]
WIDE = {
    **SHAPE,
    "hybrid_override_pattern": "M*-",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "mamba_num_heads": 64,
}
PROMPTS = {"embedded": (4096, 16384), "189M": (4096, 8192), "wide": (4096,)}
PARTS = (256, 512, 1024, 2048, 4096)
WHOLE = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shrink", type=int, default=1, help="prompts this many times shorter, for a look (1)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    rows = [
        row for name, prompts in PROMPTS.items()
        for length in prompts for row in measure(name, length // arguments.shrink, arguments.rounds)
    ]  # fmt: skip
    content = {"command": "python experiments/cpu_tokens/parts.py", "machine": machine(), "versions": versions(),
               "rounds": arguments.rounds, "rows": rows}  # fmt: skip
    write_json(arguments.output / "parts.json", content)
    write_text(arguments.output / "parts.md", table(rows))
    print(table(rows))


def build(name: str) -> NemotronHForCausalLM:
    if name == "embedded":
        return NemotronHForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    torch.manual_seed(0)
    return NemotronHForCausalLM(NemotronHConfig(**{"189M": SHAPE, "wide": WIDE}[name])).float().eval()


def measure(name: str, length: int, rounds: int) -> list[dict]:
    """A row for each length of parts."""
    model, samples = build(name), {}
    ways = [part for part in PARTS if part < length] + [WHOLE]
    for round_ in range(rounds + 1):
        for part in ways if round_ % 2 else ways[::-1]:
            start = time.perf_counter()
            read(model, length, part)
            samples.setdefault(part, []).extend([time.perf_counter() - start] if round_ else [])  # the first warms up
    del model
    found = []
    for part in ways:
        taken = measure_apart(memory_of, name, length, part)
        found.append({"model": name, "prompt": length, "part": part if part != WHOLE else "whole", "seconds": samples[part],
                      "tokens_per_second": round(length / median(samples[part]), 1), "extra_bytes": taken.extra_bytes})  # fmt: skip
        print(json.dumps(found[-1]), flush=True)
    return found


@torch.no_grad()
def read(model: NemotronHForCausalLM, length: int, part: int) -> object:
    model.model.tokens_per_pass = {"cpu": part}
    ids = torch.randint(3, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    return model(ids, use_cache=True, logits_to_keep=1)


def memory_of(name: str, length: int, part: int) -> object:
    """Of one prompt, in a process of its own."""
    torch.set_num_threads(2)
    model = build(name)
    read(model, 300, 256)  # loads what is loaded on first use
    return footprint(lambda: read(model, length, part), None)


def table(rows: list[dict]) -> str:
    """Tokens per second as a share of the best of a line, and MiB."""
    parts = [*PARTS, "whole"]
    lines = [
        f"| model | prompt | best, tokens/s | {' | '.join(str(part) for part in parts)} |",
        "|---" * (len(parts) + 3) + "|",
    ]
    for model, prompt in dict.fromkeys((row["model"], row["prompt"]) for row in rows):
        line = {row["part"]: row for row in rows if (row["model"], row["prompt"]) == (model, prompt)}
        best = max(row["tokens_per_second"] for row in line.values())
        cells = [
            f"{line[part]['tokens_per_second'] / best:.2f}, {line[part]['extra_bytes'] / 2**20:,.0f} MiB"
            if part in line
            else "–"
            for part in parts
        ]
        lines.append(f"| {model} | {prompt:,} | {best:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
