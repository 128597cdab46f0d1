"""Half of a model's blocks, healed with a teacher and without: runs, results.json and distillation.png.

    python experiments/distillation/compare.py train --threads 1     # 100,000 tokens a run; resumes if it was stopped
    python experiments/distillation/compare.py report --threads 1    # held-out bits per byte, results.json, the picture

The teacher is the embedded model, M-M*-M- (2,375,094 parameters). The student keeps four of its seven layers, M-*-, with
their weights, embeddings and head (1,603,154 parameters; the blocks alone fall to half). With the teacher it learns by
`nemotron-h distill` (forward KL alone, temperature 1), without by `nemotron-h pretrain`; text, rows and their order, initial
weights, optimizer and schedule are the same for one seed, which `report` checks on the cross-entropy of the first step. Each
command is printed before it runs.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHConfig, whole_files
from nemotron_h_hf.data.stdlib_text import as_jsonl, corpus_digest, read_documents, split_documents
from nemotron_h_hf.scripts import distill, eval, pretrain
from nemotron_h_hf.tokenizer_files import save_tokenizer
from nemotron_h_hf.training.starting_point import load_config

FOLDER, RUNS = Path(__file__).parents[2] / "docs" / "results" / "distillation", Path("runs/distillation")
TEXT = RUNS / "train.jsonl"
SIDES = {
    "teacher": (distill.main, "distill", ["--data", str(TEXT)]),
    "alone": (pretrain.main, "pretrain", ["--sources", f"{{data: {{path: {TEXT}}}}}"]),
}
LABELS = {"teacher": "with the teacher", "alone": "next-token loss"}
KEPT_LAYERS, PATTERN = (0, 1, 3, 6), "M-*-"
COMMON = ["--model", str(RUNS / "student"), "--sequence_length", "1024", "--per_device_train_batch_size", "2",
          "--optimizer", "muon", "--learning_rate", "2e-3", "--warmup_tokens", "10%", "--decay_tokens", "30%",
          "--min_lr_ratio", "0.1", "--logging_steps", "2", "--logging_first_step", "true", "--save_steps", "10",
          "--save_total_limit", "1", "--use_cpu"]  # fmt: skip
EVALUATION = ["--tasks", "bpb", "--limit", "10", "--stride", "1920"]
SEEDS, TOKENS, TOKENS_PER_STEP = (0, 1, 2), "100K", 2048
WINDOW = 5  # log lines averaged in the picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("train", "report"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="which runs (0 1 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    {"train": train, "report": report}[arguments.step](arguments.seeds)


def train(seeds: Sequence[int]) -> None:
    """Both runs of each seed, unless they were finished before."""
    if not TEXT.is_file():
        write_text()
    if not (RUNS / "student").is_dir():
        write_student()
    for seed in seeds:
        for side, (command, name, source) in SIDES.items():
            folder = RUNS / f"{side}-{seed}"
            if not (folder / "model").is_dir():
                words = [*source, *COMMON, "--total_tokens", TOKENS, "--seed", str(seed), "--output_dir", str(folder)]
                print(f"nemotron-h {name} {shlex.join(words)}", flush=True)
                command(words)


def write_text() -> None:
    """The training documents that the embedded model saw, one per line."""
    documents, _ = split_documents(read_documents())
    whole_files.write_text(TEXT, as_jsonl(documents))
    print(f"{len(documents):,} documents, fingerprint {corpus_digest(documents)}", flush=True)


def write_student() -> None:
    """Some layers of the embedded model, and all that is not a layer."""
    teacher = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    config = load_config(EMBEDDED_MODEL, NemotronHConfig.from_preset, {"hybrid_override_pattern": PATTERN})
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    student.model.layers = torch.nn.ModuleList(teacher.model.layers[number] for number in KEPT_LAYERS)
    rest = {name: tensor for name, tensor in teacher.state_dict().items() if ".layers." not in name}
    student.load_state_dict(rest, strict=False)
    student.save_pretrained(RUNS / "student")
    save_tokenizer(AutoTokenizer.from_pretrained(EMBEDDED_MODEL), RUNS / "student")


def report(seeds: Sequence[int]) -> None:
    """Bits per byte of every student on the held-out files, and the logs, into results.json; draw."""
    runs = {side: [read_log(side, seed) for seed in seeds] for side in SIDES}
    for seed, taught, alone in zip(seeds, runs["teacher"], runs["alone"], strict=True):
        if abs(taught[0][1] - alone[0][1]) > 1e-4:
            raise ValueError(f"seed {seed}: cross-entropy of the first step is {taught[0][1]} and {alone[0][1]}")
    results = {
        "tokens": 100_000 // TOKENS_PER_STEP * TOKENS_PER_STEP,
        "seeds": list(seeds),
        "held_out_bits_per_byte": {
            "teacher": bits_per_byte(EMBEDDED_MODEL, "teacher"),
            "student before": bits_per_byte(RUNS / "student", "student"),
        }
        | {LABELS[side]: [bits_per_byte(*student_of(side, seed)) for seed in seeds] for side in SIDES},
        "cross_entropy_over_tokens": runs,
    }
    (FOLDER / "results.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    print(json.dumps(results["held_out_bits_per_byte"], indent=2))
    draw(runs)


def read_log(side: str, seed: int) -> list[tuple[int, float]]:
    """(tokens, cross-entropy in nats per token) of the training rows; the mean of two steps, of one in the first line."""
    lines = (RUNS / f"{side}-{seed}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    return [(row["tokens"], row["cross_entropy" if side == "teacher" else "loss"]) for row in rows]


def student_of(side: str, seed: int) -> tuple[Path, str]:
    return RUNS / f"{side}-{seed}" / "model", f"{side}-{seed}"


def bits_per_byte(model: Path | str, name: str) -> float:
    """On the first ten held-out files, by `nemotron-h eval`."""
    folder = RUNS / "eval" / name
    eval.main(["--model", str(model), *EVALUATION, "--output", str(folder)])
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["bpb"]["bits_per_byte"]


def draw(runs: dict[str, list[list[tuple[int, float]]]]) -> None:
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for (side, logs), colour in zip(runs.items(), ("tab:orange", "tab:blue"), strict=True):
        for number, log in enumerate(logs):
            tokens, losses = zip(*log, strict=True)
            pieces = [losses[max(0, i - WINDOW + 1) : i + 1] for i in range(len(losses))]
            label = LABELS[side] if number == 0 else None
            axes.plot([count / 1e3 for count in tokens], [sum(piece) / len(piece) for piece in pieces],
                      color=colour, alpha=0.7, label=label)  # fmt: skip
    axes.set(xlabel="training tokens (thousands)", ylabel="cross-entropy with the text (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(FOLDER / "distillation.png")


if __name__ == "__main__":
    main()
