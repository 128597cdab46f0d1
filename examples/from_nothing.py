"""A tokenizer and a small model from nothing but text: this Python's standard library.

python examples/from_nothing.py                    # a look: two minutes in a temporary folder
python examples/from_nothing.py runs/tiny          # the whole recipe: about 25 minutes on one core; the same command resumes
python examples/from_nothing.py runs/tiny --total_tokens 10M --learning_rate 3e-3      # any flags of `nemotron-h pretrain`

In the folder: train.jsonl and tokenizer/, then what `nemotron-h pretrain` writes under run/. At the end come the bits per
byte of run/model on files of the library that were held out.
"""

import sys
import tempfile
from pathlib import Path

from nemotron_h_cli import main
from nemotron_h_hf.data.byte_bpe import train_tokenizer
from nemotron_h_hf.data.stdlib_text import as_jsonl, read_documents, split_documents
from nemotron_h_hf.tokenizer_files import save_tokenizer
from nemotron_h_hf.whole_files import write_text

RECIPE = Path(__file__).parent / "recipes" / "pretrain_tiny.yaml"
LOOK = ["--total_tokens", "16384", "--sequence_length", "256", "--shuffle_rows", "0", "--warmup_tokens", "10%"]


def train(folder: Path, flags: list[str]) -> int:
    """Text, tokenizer, model, bits per byte; what is there already is kept."""
    text, tokenizer, run = folder / "train.jsonl", folder / "tokenizer", folder / "run"
    if not text.is_file():
        documents, _ = split_documents(read_documents())
        save_tokenizer(train_tokenizer((d.text for d in documents), 2048, 4096), tokenizer)
        write_text(text, as_jsonl(documents))
    sources = f"{{python: {{path: {text}}}}}"
    words = ["--config", str(RECIPE), "--sources", sources, "--tokenizer", str(tokenizer), "--output_dir", str(run)]
    if main(["pretrain", *words, *flags]):
        return 1
    limit = ["--limit", "2"] if flags == LOOK else []
    return main(["eval", "--model", str(run / "model"), "--tasks", "bpb", "--output", str(run / "eval"), *limit])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(train(Path(sys.argv[1]), sys.argv[2:]))
    with tempfile.TemporaryDirectory() as look:
        sys.exit(train(Path(look), LOOK))
