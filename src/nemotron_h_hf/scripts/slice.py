"""Cut a nested model out of an elastic parent: an ordinary checkpoint, written a tensor at a time.

    nemotron-h slice path/to/parent small/ --budget 6b            # a budget that the parent's config names
    nemotron-h slice owner/parent small/ --budget 50%             # the best one with at most half of the parameters
    nemotron-h slice path/to/parent small/ --budget 7GiB@32Ki      # weights and the cache of 32,768 tokens in 7 GiB
    nemotron-h slice path/to/parent --budget 7GiB@32Ki --candidates 5     # what else would fit; writes nothing
    nemotron-h slice path/to/parent small/ --budget '{"hidden_size": 3072, "layers": [0, 1, 2, 5]}'

The parent is only read, and never built: peak memory is about its largest tensor. An interrupted cut resumes when the
same command is given again. Next to the weights are tokenizer, generation config, and elastic_manifest.json: parameters,
checksums, the parent's fingerprint, and with --verify how far the logits are from those of the masked parent.
`nemotron-h info PARENT` shows the budgets, `nemotron-h info small/ --checksums` checks what was written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nemotron_h_hf.command_line import argument, option, read_options
from nemotron_h_hf.elastic.cut.cutting import SliceReport, local_folder, read_parent, slice_checkpoint
from nemotron_h_hf.elastic.search import rank_budgets
from nemotron_h_hf.elastic.vision import sees, slice_vision
from nemotron_h_hf.environment import can_measure, status_bytes
from nemotron_h_hf.units import TOKENS_HELP, human_bytes, parse_bytes


@dataclass(frozen=True)
class SliceArguments:
    """What the command line says; `verify` None measures the residual of small parents alone."""

    parent: str = argument("folder or hub id of an elastic parent", metavar="PARENT")
    output: Path | None = argument("new folder, or that of this cut interrupted", nargs="?", metavar="OUT")
    budget: str = option(
        None, f"name, fraction, need such as 7GiB@32Ki ({TOKENS_HELP}), or sizes as JSON", required=True
    )
    max_shard_size: str | None = option(
        None, "of the files of OUT, 5GB (10^9) or 5GiB (2^30) (as in PARENT)", metavar="SIZE"
    )
    verify: bool | None = option(
        None, "compare logits with the masked parent's, which is loaded whole in fp32 (only up to 1 GiB of it)",
        action=argparse.BooleanOptionalAction,
    )  # fmt: skip
    uniform: bool = option(False, "if other readers cannot express the budget, cut the nearest that they can")
    candidates: int | None = option(None, "print the N best budgets that fit, write nothing", metavar="N")


def main(argv: Sequence[str] | None = None) -> int:
    """Cut, with a progress bar on a terminal, and say what was written; or list what fits."""
    arguments = parse(argv)
    folder = local_folder(arguments.parent)
    max_shard_bytes = (
        None if arguments.max_shard_size is None else parse_bytes(arguments.max_shard_size, "max_shard_size")
    )
    if arguments.candidates is not None:
        config = read_parent(folder)
        for candidate in rank_budgets(config, arguments.budget, limit=arguments.candidates):
            print(f"{candidate.budget.name}: {candidate.describe()}\n    {candidate.budget.to_dict()}")
        return 0
    if sees(folder):
        for name in ("uniform", "verify"):
            if getattr(arguments, name):
                raise ValueError(f"--{name}: allowed for a parent that is a text model, {arguments.parent} sees images")
        print(slice_vision(folder, arguments.budget, arguments.output, max_shard_bytes))
        return 0
    with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty(), desc="slice") as bar:

        def progress(num_bytes: int, total: int) -> None:
            bar.total = total
            bar.update(num_bytes)

        report = slice_checkpoint(
            arguments.parent,
            arguments.budget,
            arguments.output,
            max_shard_bytes=max_shard_bytes,
            verify=arguments.verify,
            uniform=arguments.uniform,
            progress=progress,
        )
    print("\n".join(summary(arguments.output, report)))
    return 0


def parse(argv: Sequence[str] | None) -> SliceArguments:
    """Read and check the command line."""
    arguments = read_options(SliceArguments, argv, "slice", __doc__)
    if (arguments.output is None) == (arguments.candidates is None):
        raise ValueError("give OUT, or --candidates N to write nothing")
    if arguments.candidates is not None and arguments.candidates < 1:
        raise ValueError(f"--candidates={arguments.candidates}: allowed is 1 or more")
    return arguments


def summary(output: Path, report: SliceReport) -> list[str]:
    """What was written, one line each."""
    if report.already_there:
        return [f"{output} is already there and whole: budget {report.budget.name!r}, checked again"]
    share = report.num_parameters / report.parent_parameters
    lines = [
        f"{output} holds budget {report.budget.name!r}: {report.num_parameters:,} parameters, {share:.1%} of the parent's "
        f"{report.parent_parameters:,}",
        f"read {human_bytes(report.bytes_read)} of {human_bytes(report.parent_bytes)}, wrote "
        f"{human_bytes(report.bytes_written)} in {len(report.files)} files ({len(report.files_kept)} kept from before), "
        f"{report.seconds:.1f} s",
    ]
    if can_measure():
        lines.append(f"peak memory of this process {human_bytes(status_bytes('VmHWM'))}")
    if not report.budget.trained:
        lines.append("the parent was not trained with this budget")
    if report.residual is None:
        lines.append("logits were not compared with the masked parent's (--verify does)")
    else:
        found = report.residual
        lines.append(
            f"logits are within {found['max_difference_of_logits']:.1e} of the masked parent's, the largest is "
            f"{found['largest_logit']:.3g}"
        )
    lines += report.limits
    if report.nearest is not None:
        sizes = {key: value for key, value in report.nearest.to_dict().items() if key not in ("trained", "loss")}
        lines.append(f"the nearest that they express (--uniform): {report.nearest_parameters:,} parameters, {sizes}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
