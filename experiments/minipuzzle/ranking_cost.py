"""What ranking costs as budgets of one memory image, next to cutting and loading each candidate.

    OMP_NUM_THREADS=1 python experiments/minipuzzle/ranking_cost.py --layers 28 --candidates 8

Both sides rank the same candidates of a random model with the paper's scheme of layers on the same random tokens, by turns,
and find the same figures. Seconds are those of the processor, which a busy machine changes least; memory is the peak over what
was resident before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from nemotron_h_hf import NemotronHConfig, NemotronHElasticForCausalLM, NemotronHForCausalLM
from nemotron_h_hf.compression.candidates import costs_of, find_candidates
from nemotron_h_hf.compression.ranking import Progress, Tally, predict, rank, targets_of
from nemotron_h_hf.cost import num_parameters
from nemotron_h_hf.elastic.cut.cutting import slice_checkpoint
from nemotron_h_hf.environment import machine, reset_peak, status_bytes, versions
from nemotron_h_hf.memory_model import Deployment

OUTPUT = Path(__file__).parents[2] / "docs" / "results" / "minipuzzle" / "ranking_cost.json"


def main() -> None:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = teacher_config(arguments.layers, arguments.hidden)
    model = NemotronHForCausalLM(config).eval()
    ids = torch.randint(3, config.vocab_size, (arguments.tokens // 512, 512))
    batches = [{"input_ids": row[None]} for row in ids]
    candidates = choose(config, arguments.candidates)
    seconds: dict[str, list[float]] = {"views": [], "alone": []}
    memory: dict[str, list[int]] = {"views": [], "alone": []}
    expected: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder, "parent"))
        parent = NemotronHElasticForCausalLM.from_model(model)
        for _ in range(arguments.repeats):
            for name, run in (("views", as_views), ("alone", cut_and_loaded)):
                reset_peak()
                before, start = status_bytes("VmRSS"), time.process_time()
                found = run(parent, candidates, batches, Path(folder))
                seconds[name].append((time.process_time() - start) / len(candidates))
                memory[name].append(status_bytes("VmHWM") - before)
                expected = expected or found
                assert all(found[one].correct == expected[one].correct for one in found)
    result = {
        "parameters": num_parameters(config), "pattern": config.hybrid_override_pattern, "tokens": ids.numel(),
        "candidates": [one.name for one in candidates],
        "seconds_per_candidate": {name: {"median": statistics.median(each), "all": each} for name, each in seconds.items()},
        "extra_bytes": memory, "weights_bytes": 4 * num_parameters(config), "machine": machine(), "versions": versions(),
    }  # fmt: skip
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("seconds_per_candidate", "extra_bytes")}, indent=1))


def teacher_config(layers: int, hidden: int) -> NemotronHConfig:
    """M-M-M-M*- over and over, in fp32."""
    pattern = ("M-M-M-M*-" * layers)[:layers]
    return NemotronHConfig(
        vocab_size=2048, hidden_size=hidden, intermediate_size=4 * hidden, hybrid_override_pattern=pattern, head_dim=64,
        num_attention_heads=hidden // 64, num_key_value_heads=1, mamba_num_heads=hidden // 32, mamba_head_dim=64, n_groups=2,
        ssm_state_size=64, chunk_size=64, dtype="float32",
    )  # fmt: skip


def choose(config: NemotronHConfig, count: int) -> list:
    """Candidates of at most 4/5 of the parameters, evenly spaced among all; importance falls toward the middle, as in the paper."""
    middle = config.num_hidden_layers / 2
    importance = {layer: abs(layer - middle) for layer in range(config.num_hidden_layers)}
    own = config.intermediate_size
    sizes = {"intermediate_size": [own // 2, 3 * own // 4, own]}
    limits = {"parameters": 0.8 * num_parameters(config)}
    found = find_candidates(config, importance, sizes, {}, costs_of(Deployment()), limits).candidates
    return found[:: max(1, len(found) // count)][:count]


@torch.no_grad()
def as_views(parent, candidates, batches, folder) -> dict[str, Tally]:
    """Our way."""
    models: dict[str, torch.nn.Module] = {}

    def model_of(sizes):
        return models.setdefault(str(sizes), parent.submodel(sizes))

    progress = Progress()
    for _ in rank(parent, model_of, candidates, batches, progress):
        pass
    return progress.tallies


@torch.no_grad()
def cut_and_loaded(parent, candidates, batches, folder) -> dict[str, Tally]:
    """Each cut out of the parent's files, loaded and run; the parent predicts once, as on the other side."""
    known = [predict(parent.lm_head, parent.model(**batch, use_cache=False)[0], targets_of(batch)) for batch in batches]
    tallies = {}
    for one in candidates:
        target = folder / "cut"
        slice_checkpoint(folder / "parent", one.sizes, target, verify=False)
        model, tally = NemotronHForCausalLM.from_pretrained(target).eval(), Tally()
        for batch, parents in zip(batches, known):
            targets = targets_of(batch)
            tally.add(predict(model.lm_head, model.model(**batch, use_cache=False)[0], targets), parents, targets)
        tallies[one.name] = tally
        for path in target.iterdir():
            path.unlink()
        target.rmdir()
    return tallies


if __name__ == "__main__":
    main()
