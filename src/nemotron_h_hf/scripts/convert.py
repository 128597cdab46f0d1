"""Convert checkpoints between Megatron and Hugging Face: no Megatron, no GPU, one tensor in memory at a time.

    nemotron-h convert run/ model/                                  # Megatron of any format to Hugging Face
    nemotron-h convert run/ model/ --dry-run                        # the plan, tensor by tensor; nothing is written
    nemotron-h convert run/ model/ --config nemotron-h-8b --dtype bfloat16 --tokenizer tokenizer/ --verify
    nemotron-h convert model/ run/                                  # to torch_dist, which loads at any parallelism
    nemotron-h convert model/ run/ --format torch --tp 4 --pp 2 --ep 8
    nemotron-h convert model/ run/ --format torch --pp 14,14,12,12  # layers of each pipeline stage

An interrupted conversion resumes when the same command is given again. What was done is in the target's
conversion_report.json and conversion_report.txt. Nothing in a checkpoint is executed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nemotron_h_hf.conversion import convert


def main(argv: Sequence[str] | None = None) -> int:
    """Convert, with a progress bar on a terminal, and print the summary (or the whole plan of a dry run)."""
    arguments = parse(argv)
    report = convert(**vars(arguments), progress=sys.stderr.isatty(), say=lambda line: print(line, file=sys.stderr))
    print(report.table() if arguments.dry_run else "\n".join(report.summary()))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; the names are those of `nemotron_h_hf.conversion.Options`."""
    parser = argparse.ArgumentParser(
        prog="nemotron-h convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", metavar="SRC", help="Megatron run, iteration or weights folder, or Hugging Face folder"
    )
    parser.add_argument("target", metavar="DST", help="new folder, or that of the same conversion interrupted")
    parser.add_argument("--to", choices=("hf", "megatron"), help="the other kind than SRC, if not given")
    parser.add_argument("--format", choices=("torch_dist", "torch"), help="of a Megatron DST (torch_dist)")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks of --format torch (1)")
    parser.add_argument("--pp", type=_stages, default=1, help="pipeline stages, or the layers of each: 14,12 (1)")
    parser.add_argument("--ep", type=int, default=1, help="expert-parallel ranks of --format torch (1)")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="of DST (as in SRC)")
    parser.add_argument("--config", help="preset or config.json for what a Megatron SRC does not say")
    parser.add_argument("--max-shard-size", default="5GB", help="of the files of DST, in GB (10^9) or GiB (2^30) (5GB)")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="folder whose tokenizer files are copied to a Hugging Face DST"
    )
    parser.add_argument(
        "--vocab-divisible-by",
        type=int,
        default=128,
        help="a Megatron DST pads the vocabulary to this times --tp (128)",
    )
    parser.add_argument(
        "--core", choices=("auto", "0.16", "0.19"), default="auto", help="names of --format torch (auto)"
    )
    parser.add_argument("--allow-unused", metavar="NAME", action="append", default=[], help="tensors of SRC to ignore")
    parser.add_argument(
        "--allow-missing", metavar="NAME", action="append", default=[], help="tensors that SRC may lack"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument(
        "--verify", dest="verify_output", action="store_true", help="read everything that was written again"
    )
    parser.add_argument("--verify-logits", metavar="REF", help="compare a probe with this Hugging Face checkpoint")
    return parser.parse_args(argv)


def _stages(text: str) -> int | list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: allowed is a number of stages, or the layers of each: 14,12"
        ) from None
    return counts[0] if len(counts) == 1 else counts


if __name__ == "__main__":
    sys.exit(main())
