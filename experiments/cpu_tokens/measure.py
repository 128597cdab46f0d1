"""One token on a CPU: CPU time of ours, of the same model op by op in PyTorch, and of reading weights and caches once.

    python experiments/cpu_tokens/measure.py                # docs/results/cpu_tokens/cpu_tokens.json; some minutes

One thread. CPU time, not wall-clock time: other programs on the machine count less. Ways take turns; medians of nine rounds.
The model is the shape of `nemotron-h bench cpu`, 189 million random weights; keys and values of a context are random too.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from nemotron_h_hf import HybridCache, NemotronHConfig, NemotronHForCausalLM
from nemotron_h_hf.benchmark.models import SHAPES, SMALL
from nemotron_h_hf.environment import machine, versions

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "cpu_tokens"
SHAPE = SHAPES[SMALL]
CASES = ((1, 1024), (1, 16384), (8, 1024))  # rows, tokens in the cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = NemotronHForCausalLM(NemotronHConfig(**SHAPE)).float().eval()
    found = []
    for kind in ("fp32", "bf16", "int8"):
        stored = as_stored(model, kind)
        for rows, context in CASES:
            found.append({"weights": kind, "rows": rows, "context": context, **measure(stored, rows, context, rounds)})
            print(json.dumps(found[-1]), flush=True)
    document = {
        "unit": "milliseconds of CPU time, one thread",
        "machine": machine(),
        "versions": versions(),
        "tokens": found,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "cpu_tokens.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def as_stored(model: NemotronHForCausalLM, kind: str) -> NemotronHForCausalLM:
    if kind == "bf16":
        return copy.deepcopy(model).bfloat16()
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        model = copy.deepcopy(model)
        quantize_(model, Int8WeightOnlyConfig())
    return model


@torch.no_grad()
def measure(model: NemotronHForCausalLM, rows: int, context: int, rounds: int) -> dict[str, dict[str, float]]:
    ids, cache = torch.randint(3, 32000, (rows, 4)), HybridCache(model.config)
    model(ids, past_key_values=cache)
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None and layer.keys.numel():
            shape = rows, layer.keys.shape[1], context, layer.keys.shape[3]
            layer.keys, layer.values = (torch.randn(shape).to(layer.keys.dtype) for _ in range(2))

    def token(implementation: str) -> Callable[[], None]:
        def step() -> None:
            model.set_mamba_implementation(implementation)
            model(ids[:, :1], past_key_values=cache)

        return step

    ways = {"ours": token("auto"), "op by op": token("torch")}
    for way in ways.values():
        way()
        way()
    ways["reading once"] = reader(model, cache)
    samples: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            samples[name].append(1e3 * (time.process_time() - start))
    times = {
        name: {"median": round(median(taken), 2), "least": round(min(taken), 2), "most": round(max(taken), 2)}
        for name, taken in samples.items()
    }
    return {**times, "times reading": round(times["ours"]["median"] / times["reading once"]["median"], 2)}


def reader(model: nn.Module, cache: HybridCache) -> Callable[[], None]:
    """Adds up every byte that a token needs, four at a time; embeddings are one row."""
    held = [p for name, p in model.named_parameters() if p.dim() > 1 and "embeddings" not in name]
    tensors = [p.qdata if type(p).__name__ == "Int8Tensor" else p.data for p in held]
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None and layer.keys.numel():
            tensors += [layer.keys, layer.values]
        elif getattr(layer, "recurrent_states", None) is not None and layer.recurrent_states[0] is not None:
            tensors.append(layer.recurrent_states[0])
    words = [as_words(t) for t in tensors]
    return lambda: [t.sum() for t in words]


def as_words(t: Tensor) -> Tensor:
    """The bytes as fp32, of some value."""
    return torch.ones(t.numel() * t.element_size() // 4)


if __name__ == "__main__":
    main()
