"""The model in the box trained again, with `nemotron-h pretrain` (train-tiny is a loop of its own), and what it reaches.

    python docs/results/tiny/retrain.py train --runs long --threads 1                # an hour of one core; resumable
    python docs/results/tiny/retrain.py train --runs short short_in_order --threads 1
    python docs/results/tiny/retrain.py report          # pretrain.json and the runs' logs, of the runs that are done

long reads twice what the first model in the box has read, short as much, short_in_order without `shuffle_rows`. Figures are
those of train-tiny's report: held-out bits per byte, and sampled functions that parse. runs/tiny-pretrain/NAME/checkpoint is
what can be put into the box.
"""

import argparse
import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from nemotron_h_hf import EMBEDDED_MODEL, whole_files
from nemotron_h_hf.data.stdlib_text import as_jsonl, corpus_digest, read_documents, split_documents
from nemotron_h_hf.scripts import pretrain
from nemotron_h_hf.scripts.train_tiny import TrainTinyArguments, evaluate, save_checkpoint

FOLDER, OUTPUT = Path(__file__).parent, Path("runs/tiny-pretrain")
TEXT = OUTPUT / "train.jsonl"
RUNS = {
    "long": [],
    "short": ["--total_tokens", "2498560"],
    "short_in_order": ["--total_tokens", "2498560", "--shuffle_rows", "0"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("text", "train", "report"))
    parser.add_argument("--runs", nargs="+", choices=tuple(RUNS), default=tuple(RUNS))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    {"text": write_text, "train": train, "report": report}[arguments.step](arguments.runs)


def write_text(_: Sequence[str] = ()) -> None:
    """The training documents, one per line."""
    documents, _ = split_documents(read_documents())
    whole_files.write_text(TEXT, as_jsonl(documents))
    print(f"{TEXT}: {len(documents):,} documents, fingerprint {corpus_digest(documents)}", flush=True)


def train(runs: Sequence[str]) -> None:
    """The runs that are not finished, one after the other."""
    if not TEXT.is_file():
        write_text()
    for name in runs:
        if not (OUTPUT / name / "model").is_dir():
            words = ["--config", str(FOLDER / "pretrain.yaml"), *RUNS[name], "--output_dir", str(OUTPUT / name)]
            print(f"nemotron-h pretrain {shlex.join(words)}", flush=True)
            pretrain.main(words)


def report(runs: Sequence[str]) -> None:
    """Checkpoints in bfloat16, their figures into pretrain.json beside those that are there, the logs."""
    path = FOLDER / "pretrain.json"
    figures = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(EMBEDDED_MODEL)
    _, held_out = split_documents(read_documents())
    for name in runs:
        if not (OUTPUT / name / "model").is_dir():
            print(f"{OUTPUT / name}: not finished, left out")
            continue
        model = AutoModelForCausalLM.from_pretrained(OUTPUT / name / "model", dtype=torch.float32)
        figures[name] = evaluate(model, tokenizer, held_out, TrainTinyArguments())
        save_checkpoint(model, tokenizer, OUTPUT / name / "checkpoint")
        shutil.copyfile(OUTPUT / name / "metrics.jsonl", FOLDER / f"pretrain_{name}.jsonl")
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print(name, figures[name]["bits_per_byte"], figures[name]["parsing_share"], flush=True)


if __name__ == "__main__":
    main()
