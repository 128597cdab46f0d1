"""A deeper teacher than the embedded model, compressed as the paper compresses the 56B: hours on a CPU, resumable.

    OMP_NUM_THREADS=1 python experiments/minipuzzle/deep.py teacher runs/deep
    OMP_NUM_THREADS=1 python experiments/minipuzzle/deep.py search runs/deep --seeds 0 1 2
    OMP_NUM_THREADS=1 python experiments/minipuzzle/deep.py long runs/deep --seeds 0 1 2
    OMP_NUM_THREADS=1 python experiments/minipuzzle/deep.py speed runs/deep
    python experiments/minipuzzle/deep.py report runs/deep

The 56B's scheme scaled down: 28 layers, three of them attention, 2.1 M parameters, the embedded model's tokenizer, trained with
`nemotron-h pretrain` on the standard library for 10 M tokens. The limits are the paper's: 16 % fewer parameters, and 31.68 of
45.73 parts of the bytes, at a context where the KV cache has about as large a share of them as the 56B's has at 1M tokens.

teacher   pretraining
search    `nemotron-h minipuzzle`: scores, candidates, ranking, finalists and controls distilled for a two-hundredth of the teacher's
          tokens each, the winner for a tenth of them
long      the winner for three tenths
speed     prompts and decoding of both at growing contexts, by turns
report    docs/results/minipuzzle/deep

A command given again goes on; seeds may be shared among processes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

from nemotron_h_cli import run as command
from nemotron_h_hf import EMBEDDED_MODEL, NemotronHConfig, NemotronHForCausalLM
from nemotron_h_hf.cost import num_parameters
from nemotron_h_hf.data.stdlib_text import as_jsonl, read_documents, split_documents
from nemotron_h_hf.environment import machine
from nemotron_h_hf.inputs import read_json
from nemotron_h_hf.memory_model import Deployment, memory
from nemotron_h_hf.whole_files import whole_file, write_json, write_text

sys.path.insert(0, str(Path(__file__).parent))

import run as choices  # noqa: E402

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "minipuzzle" / "deep"
PATTERN = "M-M-M*-M-M-M-M*-M-M-M-M*-M-M"
SIZES = {
    "hidden_size": 96, "intermediate_size": 384, "head_dim": 32, "num_attention_heads": 3, "num_key_value_heads": 1,
    "mamba_num_heads": 3, "mamba_head_dim": 64, "n_groups": 1, "ssm_state_size": 16, "chunk_size": 64,
    "hybrid_override_pattern": PATTERN,
}  # fmt: skip
TOKENS, LEARNING_RATE = 10_000_000, "4e-3"
CONTEXT, CONTEXT_NAME = 8192, "8Ki"
SHARE, BYTES_SHARE = 0.84, 31.68 / 45.73
RECIPE = {
    "sequence_length": 256, "batch_size": 8, "dtype": "float32", "more_scores": ["logits", "cosine"],
    "sizes": {"intermediate_size": [192, 240, 288, 336, 384]},
    "counts": {"attention": [1, 3], "mamba": [9, 13], "mlp": [8, 12]}, "mixed_widths": True, "finalists": 3, "state": "bf16",
    "distill": {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "warmup_tokens": "10%", "decay_tokens": "50%",
                "save_steps": 100, "save_total_limit": 1, "logging_steps": 20, "report_to": "none"},
}  # fmt: skip
SAMPLES = {"width_samples": 256, "layer_samples": 64, "ranking_tokens": 32768}
"""Of the whole experiment; fewer for fewer tokens, for a look."""
PARTS = {"search": 0.1, "long": 0.3}
"""Step -> tokens of the winner's distillation, in parts of the teacher's."""
SHORT = 0.005
CONTEXTS, STEPS, ROUNDS = (1024, 4096, 16384, 65536), 32, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("teacher", "search", "long", "speed", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the teacher (10M); fewer for a look")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="of speed")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    steps = {"teacher": teacher, "search": search, "long": go_on, "speed": speed, "report": report}
    steps[arguments.step](arguments)


def teacher(arguments: argparse.Namespace) -> None:
    """Train it."""
    text = arguments.folder / "text.jsonl"
    if not text.is_file():
        text.write_text(as_jsonl(split_documents(read_documents())[0]))
    command(["pretrain", "--model", EMBEDDED_MODEL, "--init", "random", "--config_overrides", json.dumps(SIZES), "--sources",
             json.dumps({"code": {"path": str(text)}}), "--total_tokens", str(arguments.tokens), "--sequence_length", "512",
             "--per_device_train_batch_size", "4", "--learning_rate", LEARNING_RATE, "--warmup_tokens", "2%", "--decay_tokens",
             "40%", "--min_lr_ratio", "0.05", "--optimizer", "muon", "--use_cpu", "--save_steps", "250", "--save_total_limit",
             "1", "--logging_steps", "20", "--report_to", "none", "--output_dir", str(arguments.folder / "teacher")])  # fmt: skip


def search(arguments: argparse.Namespace) -> None:
    """All stages for each seed."""
    for seed in arguments.seeds:
        minipuzzle(arguments, "search", seed)


def go_on(arguments: argparse.Namespace) -> None:
    """The winners' longer distillation: the work folder of `search` once more, without its student."""
    for seed in arguments.seeds:
        if not (work := work_of(arguments, "long", seed)).is_dir():
            started = work.with_name(f"{work.name}.part")
            shutil.rmtree(started, ignore_errors=True)
            shutil.copytree(
                work_of(arguments, "search", seed), started, ignore=shutil.ignore_patterns("student.json", "distill")
            )
            started.rename(work)
        minipuzzle(arguments, "long", seed)


def minipuzzle(arguments: argparse.Namespace, step: str, seed: int) -> None:
    work, trained = work_of(arguments, step, seed), teacher_of(arguments)
    config = NemotronHConfig.from_pretrained(trained)
    deployment = Deployment(state=RECIPE["state"], num_tokens=CONTEXT)
    samples = {name: max(8, int(count * min(1, arguments.tokens / TOKENS))) for name, count in SAMPLES.items()}
    samples["ranking_tokens"] = max(2048, samples["ranking_tokens"])
    recipe = {
        **RECIPE, **samples, "max_parameters": str(int(SHARE * num_parameters(config))),
        "budget": f"{BYTES_SHARE * memory(config, deployment).total / 1024:.0f}KiB@{CONTEXT_NAME}",
        "short_tokens": str(max(2048, int(SHORT * arguments.tokens))), "long_tokens": str(int(PARTS[step] * arguments.tokens)),
    }  # fmt: skip
    write_json(arguments.folder / f"{step}.yaml", recipe)
    command(["minipuzzle", str(trained), str(work), "--config", str(arguments.folder / f"{step}.yaml"), "--seed", str(seed),
             "--distill_controls", "--output", str(work.with_name(f"{work.name}-student"))])  # fmt: skip


def work_of(arguments: argparse.Namespace, step: str, seed: int) -> Path:
    return arguments.folder / f"{step}-{seed}"


def teacher_of(arguments: argparse.Namespace) -> Path:
    path = arguments.folder / "teacher" / "model"
    if not path.is_dir():
        raise SystemExit(f"{path} is missing: run `deep.py teacher {arguments.folder}` first")
    return path


# Speed


@torch.no_grad()
def speed(arguments: argparse.Namespace) -> None:
    """Seconds of a prompt and of STEPS tokens behind it, both models by turns, in fp32 on one thread."""
    torch.set_num_threads(1)
    folders = {"teacher": teacher_of(arguments), "student": arguments.folder / f"search-{arguments.seeds[0]}-student"}
    models = {
        side: NemotronHForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for side, path in folders.items()
    }
    found = []
    for context in arguments.contexts:
        seconds: dict[str, dict[str, list[float]]] = {side: {"prompt": [], "decode": []} for side in models}
        prompt = torch.randint(
            3, models["teacher"].config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0)
        )
        for _ in range(ROUNDS):
            for side, model in models.items():
                first, last = timed(model, prompt)
                seconds[side]["prompt"].append(first)
                seconds[side]["decode"].append(last)
        found.append({"context": context, "seconds": seconds})
        print(json.dumps(found[-1]), flush=True)
    write_json(arguments.folder / "speed.json", {"rows": found, "decoded": STEPS, "threads": 1, "machine": machine()})


def timed(model: NemotronHForCausalLM, prompt: torch.Tensor) -> tuple[float, float]:
    start = time.perf_counter()
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    middle, token = time.perf_counter(), prompt[:, -1:]
    for _ in range(STEPS):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    return middle - start, time.perf_counter() - middle


# Report


def report(arguments: argparse.Namespace) -> None:
    """results.json, tables.md and pictures of what is done."""
    works = {
        step: [
            work for seed in arguments.seeds if ((work := work_of(arguments, step, seed)) / "student.json").is_file()
        ]
        for step in PARTS
    }
    found = choices.collect(works["search"])
    found["students"] = {step: [student(work) for work in folders] for step, folders in works.items()}
    speeds = arguments.folder / "speed.json"
    found["speed"] = read_json(speeds) if speeds.is_file() else None
    found["recipe"] = read_json(arguments.folder / "search.yaml")
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / "results.json", found)
    write_text(arguments.output / "tables.md", tables(found))
    choices.draw(arguments.output / "results.png", found)
    draw(arguments, found)
    print(tables(found))


def student(work: Path) -> dict:
    """What one distillation made of the winner, next to the teacher on the same text."""
    found = read_json(work / "student.json")
    sides = {side: {name: found[side][name] for name in ("parameters", "bytes", "pattern", "accuracy", "loss")}
             for side in ("teacher", "student")}  # fmt: skip
    return {"name": found["name"], "sizes": found["sizes"], "trained_tokens": found["trained_tokens"], **sides,
            "before_distillation": found["before_distillation"]}  # fmt: skip


def tables(found: dict) -> str:
    """Students, choices, kinds, order of the finalists, speed."""
    lines = ["| distilled on | seeds | parameters | bytes at the context | loss above the teacher's | accuracy, student - teacher |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for students in found["students"].values():
        if students:
            lines.append(student_row(students))
    lines += ["", choices.table(found), "", "| kind | mean rank by seed, 0 is the least important |", "|---|---|"]
    lines += [
        f"| {kind} | {', '.join(f'{rank:.1f}' for rank in ranks)} |" for kind, ranks in found["ranks_by_kind"].items()
    ]
    lines += ["", "| seed | finalists before distillation | after it |", "|---|---|---|"]
    for seed, one in enumerate(found["finalists"]):
        lines.append(f"| {seed} | {', '.join(one['before'])} | {', '.join(one['after'])} |")
    if found["speed"]:
        lines += ["", "| context | prompt, teacher over student | decoding, teacher over student |", "|---|---|---|"]
        lines += [
            f"| {row['context']:,} | {ratio(row, 'prompt')} | {ratio(row, 'decode')} |"
            for row in found["speed"]["rows"]
        ]
    return "\n".join(lines) + "\n"


def student_row(students: list[dict]) -> str:
    sides = [(one["student"], one["teacher"]) for one in students]
    parts = {name: [own[name] / teacher[name] for own, teacher in sides] for name in ("parameters", "bytes")}
    above = {name: [own[name] - teacher[name] for own, teacher in sides] for name in ("loss", "accuracy")}
    cells = [f"{students[0]['trained_tokens']:,} tokens", str(len(students))]
    cells += [spread(values, ".2f") for values in parts.values()] + [
        spread(values, "+.3f") for values in above.values()
    ]
    return f"| {' | '.join(cells)} |"


def spread(values: list[float], form: str) -> str:
    return f"{statistics.fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def ratio(row: dict, what: str) -> str:
    """Of medians, with the least and the most of the rounds."""
    first, second = (row["seconds"][side][what] for side in ("teacher", "student"))
    rounds = [a / b for a, b in zip(first, second, strict=True)]
    return f"{statistics.median(first) / statistics.median(second):.2f} ({min(rounds):.2f} to {max(rounds):.2f})"


def draw(arguments: argparse.Namespace, found: dict) -> None:
    """layers.png: mean rank of every layer and the seeds whose winner keeps it (the paper's figures 7 and 8)."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    colours = {"M": "#2a9d8f", "*": "#e76f51", "-": "#8d99ae"}
    ranks = [
        read_json(work_of(arguments, "search", seed) / "scores.json")["importance"]["hidden"]["rank"]
        for seed in arguments.seeds
    ]
    for layer, letter in enumerate(PATTERN):
        axes.bar(layer, statistics.fmean(one[str(layer)] for one in ranks), color=colours[letter],
                 label=choices.KINDS[letter] if PATTERN.index(letter) == layer else None)  # fmt: skip
        kept = sum(layer in one["sizes"]["layers"] for one in found["students"]["search"])
        axes.text(layer, 0, f"{kept}", ha="center", va="bottom", fontsize=7)
    axes.set(
        xlabel="layer; the number in a bar counts the seeds whose winner keeps it",
        ylabel="mean rank (0: least important)",
    )
    axes.legend()
    with whole_file(arguments.output / "layers.png") as part:
        figure.savefig(part, format="png", dpi=130)


if __name__ == "__main__":
    main()
