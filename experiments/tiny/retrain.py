"""The embedded model trained again, with `nemotron-h pretrain` (train-tiny has its own loop), and what it reaches.

    python experiments/tiny/retrain.py train --runs long --threads 1                # an hour of one core; resumable
    python experiments/tiny/retrain.py train --runs short early early_pieces --threads 1
    python experiments/tiny/retrain.py report          # pretrain.json and the runs' logs, of the runs that are done

long reads twice what the first embedded model has read, short as much. early and early_pieces read a fifth of long, the one
whole documents, the other pieces of all documents in random order: does it matter that long has read half of the documents
instead of half of each? Figures are those of train-tiny's report: held-out bits per byte, and sampled functions that parse.
runs/tiny-pretrain/NAME/checkpoint is what can be put into the box.
"""

import argparse
import json
import random
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from tiny_models import TrainTinyArguments, evaluate, save_checkpoint
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from nemotron_h_hf import EMBEDDED_MODEL, whole_files
from nemotron_h_hf.data.stdlib_text import Document, as_jsonl, corpus_digest, read_documents, split_documents
from nemotron_h_hf.scripts import pretrain

FOLDER, OUTPUT = Path(__file__).parents[2] / "docs" / "results" / "tiny", Path("runs/tiny-pretrain")
TEXT, PIECES = OUTPUT / "train.jsonl", OUTPUT / "pieces.jsonl"
PIECE_CHARACTERS = 3000  # a row of 1,024 tokens, nearly
RUNS = {
    "long": [],
    "short": ["--total_tokens", "2498560"],
    "early": ["--total_tokens", "1001472"],
    "early_pieces": [
        "--total_tokens",
        "1001472",
        "--shuffle_rows",
        "0",
        "--sources",
        f"{{python: {{path: {PIECES}}}}}",
    ],
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
    """The training documents, one per line; and pieces of them, shuffled."""
    documents, _ = split_documents(read_documents())
    whole_files.write_text(TEXT, as_jsonl(documents))
    pieces = [piece for document in documents for piece in pieces_of(document)]
    random.Random(0).shuffle(pieces)
    whole_files.write_text(PIECES, as_jsonl(pieces))
    print(f"{TEXT}: {len(documents):,} documents, fingerprint {corpus_digest(documents)}", flush=True)


def pieces_of(document: Document) -> list[Document]:
    """Whole lines up to PIECE_CHARACTERS."""
    pieces, size = [[]], 0
    for line in document.text.splitlines(keepends=True):
        if size + len(line) > PIECE_CHARACTERS and pieces[-1]:
            pieces.append([])
            size = 0
        pieces[-1].append(line)
        size += len(line)
    return [Document(document.name, "".join(lines)) for lines in pieces]


def train(runs: Sequence[str]) -> None:
    """The runs that are not finished, one after the other."""
    if not (TEXT.is_file() and PIECES.is_file()):
        write_text()
    for name in runs:
        if not (OUTPUT / name / "model").is_dir():
            words = ["--config", str(FOLDER / "pretrain.yaml"), *RUNS[name], "--output_dir", str(OUTPUT / name)]
            print(f"nemotron-h pretrain {shlex.join(words)}", flush=True)
            pretrain.main(words)


def report(runs: Sequence[str]) -> None:
    """Checkpoints in bfloat16, their figures into pretrain.json with those that are there, the logs."""
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
