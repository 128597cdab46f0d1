"""One token by `torch.compile` with a static cache beside ours: the start of the compiler, then both in turns.

    python experiments/cpu_tokens/compiled.py --threads 1 2      # docs/results/cpu_tokens/compiled.json; some minutes

The compiled forward is the model's own in PyTorch's operations (`set_mamba_implementation("torch")`), after a prompt of 1,024 tokens in
a static cache of 1,280. Its logits are compared with ours first.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from measure import SHAPE, as_stored

from nemotron_h_hf import HybridCache, NemotronHConfig, NemotronHForCausalLM
from nemotron_h_hf.environment import machine, versions
from nemotron_h_hf.whole_files import write_json

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "cpu_tokens"
PROMPT, ROOM, STEPS = 1024, 1280, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of both (1 2)")
    parser.add_argument("--rounds", type=int, default=7, help="of eight tokens each (7)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = NemotronHForCausalLM(NemotronHConfig(**SHAPE)).float().eval()
    found = []
    for kind in ("fp32", "bf16"):
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            torch.compiler.reset()
            found.append({"weights": kind, "threads": threads, **measure(as_stored(model, kind), arguments.rounds)})
            print(json.dumps(found[-1]), flush=True)
    content = {"command": "python experiments/cpu_tokens/compiled.py", "unit": "milliseconds of a token, wall clock",
               "machine": machine(), "versions": versions(), "tokens": found}  # fmt: skip
    write_json(arguments.output / "compiled.json", content)


@torch.no_grad()
def measure(model: NemotronHForCausalLM, rounds: int) -> dict:
    ids = torch.randint(3, SHAPE.get("vocab_size", 32000), (1, PROMPT))
    growing, static = HybridCache(model.config), HybridCache(model.config, max_cache_len=ROOM)
    for cache in (growing, static):
        model(ids, past_key_values=cache, logits_to_keep=1)
    compiled = torch.compile(
        lambda token, place: model(token, past_key_values=static, position_ids=place, logits_to_keep=1).logits
    )
    place = PROMPT

    def by_compiler() -> torch.Tensor:
        nonlocal place
        model.set_mamba_implementation("torch")
        place += 1
        return compiled(ids[:, :1], torch.tensor([[place - 1]]))

    def ours() -> torch.Tensor:
        model.set_mamba_implementation("auto")
        return model(ids[:, :1], past_key_values=growing, logits_to_keep=1).logits

    start = time.perf_counter()
    logits = by_compiler()
    seconds = time.perf_counter() - start
    error = float((logits - ours()).abs().max() / logits.float().std())
    times: dict[str, list[float]] = {"ours": [], "torch.compile": []}
    for number in range(rounds + 1):
        for name, step in (("ours", ours), ("torch.compile", by_compiler)):
            for _ in range(STEPS):
                start = time.perf_counter()
                step()
                if number:  # the first round warms up
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {"seconds to compile": round(seconds, 1), "logits": error} | {
        name: {"median": round(median(of), 2), "least": round(min(of), 2), "most": round(max(of), 2)}
        for name, of in times.items()
    }


if __name__ == "__main__":
    main()
