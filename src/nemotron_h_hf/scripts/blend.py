"""Show what a blend of sources will give: tokens per source and phase, planned and, with --read, as really read.

    nemotron-h blend --config run.yaml                        # the plan, from the weights alone; opens no file
    nemotron-h blend --config run.yaml --total_tokens 15T     # for another length of the run
    nemotron-h blend --config run.yaml --read 1M              # read and tokenise a million tokens of it
    nemotron-h blend --config sft.yaml --read 1M --records    # whole records, as sft reads them

FILE is a configuration of `nemotron-h pretrain` (with --records: of sft, distill or elastic-train). These of its keys are used:

    total_tokens: 100M
    sources:
      web:  {path: data/web/*.jsonl}
      code: {path: data/code/**/*.py}
    phases:
      - {until: 60%, weights: {web: 0.6, code: 0.4}}
      - {weights: {web: 0.3, code: 0.7}}

Reading shrinks all phases in proportion, to reach every source: wrong columns, damaged files, sources that are
smaller than their share, and sources of which the run will see only a few documents, show up before the run.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tqdm import tqdm

from nemotron_h_hf import EMBEDDED_MODEL
from nemotron_h_hf.command_line import option, read_options
from nemotron_h_hf.data.bad_data import left_out_lines
from nemotron_h_hf.data.blend import Blend
from nemotron_h_hf.data.blended_rows import sources_and_phases
from nemotron_h_hf.data.documents import document_encoder
from nemotron_h_hf.data.fine_tuning_records import encode_record
from nemotron_h_hf.data.phases import Phase, Span, check_keys, phases_from, resolve_phases
from nemotron_h_hf.data.sources import Source, sources_from
from nemotron_h_hf.elastic.train.arguments import ElasticArguments
from nemotron_h_hf.inputs import load_tokenizer, read_yaml
from nemotron_h_hf.training.adapters import AdapterArguments
from nemotron_h_hf.training.arguments import ModelArguments, NemotronHTrainingArguments
from nemotron_h_hf.training.data_arguments import (
    DataArguments,
    LongContextArguments,
    PretrainDataArguments,
    RowArguments,
    set_chat_template,
)
from nemotron_h_hf.training.distillation import DistillationArguments
from nemotron_h_hf.training.vision import VisionArguments
from nemotron_h_hf.units import parse_tokens

DEFAULT_SEED = 42  # transformers.TrainingArguments'
# Argument classes of the commands whose configurations are read, without and with --records.
TEXT = (PretrainDataArguments,)
RECORDS = (
    DataArguments, RowArguments, LongContextArguments, AdapterArguments, DistillationArguments, ElasticArguments,
    VisionArguments,
)  # fmt: skip


@dataclass(frozen=True)
class BlendArguments:
    """What the command line says."""

    config: str = option(None, "YAML with sources, phases and total_tokens", required=True, metavar="FILE")
    read: str | None = option(None, "read and tokenise N tokens (1M) or a share of the run (1%%)", metavar="N")
    total_tokens: str | None = option(
        None, "length of the run, instead of the file's", "--total_tokens", "--total-tokens", metavar="N"
    )
    tokenizer: str | None = option(
        None, "folder or hub id; default: the file's tokenizer or model, or the embedded one"
    )
    data_seed: int | None = option(None, "of the order, instead of the file's", "--seed", "--data_seed", "--data-seed")
    records: bool = option(False, "read whole records, as sft, distill and elastic-train do")
    on_bad_data: str | None = option(
        None, "instead of the file's", "--on_bad_data", "--on-bad-data", choices=("skip", "error")
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan, and what reading gave if that was asked for."""
    arguments = read_options(BlendArguments, argv, "blend", __doc__)
    config = read_yaml(arguments.config, "config")
    place = f"config {arguments.config}" + ("" if arguments.records else " (without --records)")
    check_keys(place, config, names_of(RECORDS if arguments.records else TEXT))
    config |= {name: value for name, value in vars(arguments).items() if value is not None}
    if config.get("total_tokens") is None:
        raise ValueError("total_tokens is not in the configuration; give --total_tokens, for instance 100M")
    total = parse_tokens(config["total_tokens"], "total_tokens")
    sources, phases = read_blend(config)
    spans = resolve_phases(phases, [source.name for source in sources], total)
    print(f"{total:,} tokens, {len(spans)} phases, {len(sources)} sources\n")
    print(plan_table(sources, spans))
    if arguments.read is not None:
        blend = read(sources, spans, parse_tokens(arguments.read, "read", total), total, config)
        print(f"\nread: {blend.tokens:,} tokens, phases in proportion\n")
        print(reading_table(blend, spans))
    return 0


def names_of(kinds: Sequence[type]) -> list[str]:
    """The flags of a command's argument classes and of those that all training commands have."""
    return sorted({item.name for kind in (*kinds, ModelArguments, NemotronHTrainingArguments) for item in fields(kind)})


def read_blend(config: Mapping[str, Any]) -> tuple[list[Source], list[Phase]]:
    """Sources and phases of a configuration; without phases all sources weigh the same."""
    if config["records"]:
        return sources_and_phases(config.get("data"), config.get("sources"), config.get("phases"))
    sources = sources_from(config.get("sources"))
    alike = [Phase({source.name: 1.0 for source in sources})]
    return sources, phases_from(config["phases"]) if config.get("phases") else alike


def read(sources: Sequence[Source], spans: Sequence[Span], num_tokens: int, total: int, config: Mapping) -> Blend:
    """A blend that was read to its end, with the phases shrunk to `num_tokens`."""
    ends = [round(span.end * num_tokens / total) for span in spans]
    if any(end <= start for start, end in zip([0, *ends], ends)):
        raise ValueError(f"read is {num_tokens:,} tokens; more are needed for {len(spans)} phases to have one each")
    phases = [Phase(span.weights, until=end) for span, end in zip(spans, ends)]
    name = config.get("tokenizer") or config.get("model") or EMBEDDED_MODEL
    tokenizer = load_tokenizer(name)
    encode = document_encoder(tokenizer)
    if config["records"]:
        set_chat_template(tokenizer, config.get("chat_template"))
        encode = lambda record: encode_record(record, tokenizer)  # noqa: E731
    seed = next((config[key] for key in ("data_seed", "seed") if config.get(key) is not None), DEFAULT_SEED)
    blend = Blend(sources, phases, encode, num_tokens, seed, config.get("on_bad_data") or "skip")
    with tqdm(total=num_tokens, unit="tok", unit_scale=True, file=sys.stderr, disable=None) as bar:
        for _ in blend:
            bar.update(min(blend.tokens, num_tokens) - bar.n)
    return blend


def plan_table(sources: Sequence[Source], spans: Sequence[Span]) -> str:
    """Tokens of each source in each phase and in the run, with shares."""
    columns = [[(span.end - span.start) * span.weights.get(source.name, 0) for source in sources] for span in spans]
    columns.append([sum(tokens) for tokens in zip(*columns)])
    heads = [f"phase {n}" for n in range(1, len(spans) + 1)] + ["run"]
    rows = [["", *heads], ["until token", *(f"{span.end:,}" for span in spans), ""]]
    for place, source in enumerate(sources):
        rows.append([source.name, *(_amount(column[place], sum(column)) for column in columns)])
    rows.append(["tokens", *(f"{round(sum(column)):,}" for column in columns)])
    return table(rows)


def reading_table(blend: Blend, spans: Sequence[Span]) -> str:
    """What each source gave, phase by phase, what the run of `spans` will see of it, and what had to be left out."""
    report = blend.report()
    sums = [sum(entry["tokens_by_phase"][n] for entry in report.values()) for n in range(len(blend.spans))]
    heads = [f"phase {n}" for n in range(1, len(sums) + 1)]
    rows = [["", *heads, "documents", "tokens each", "the run sees documents", "epochs begun"]]
    for name, entry in report.items():
        shares = [
            f"{_amount(tokens, whole)} (plan {span.weights[name]:.1%})" if name in span.weights else "-"
            for tokens, whole, span in zip(entry["tokens_by_phase"], sums, blend.spans)
        ]
        each = entry["tokens"] / max(entry["documents"], 1)
        planned = sum((span.end - span.start) * span.weights.get(name, 0) for span in spans)
        seen = _seen(planned / each if each else 0, entry["num_records"])
        rows.append([name, *shares, f"{entry['documents']:,}", f"{each:,.0f}", seen, str(entry["epoch"] + 1)])
    lines = [table(rows)]
    left_out = left_out_lines(blend.left_out())
    if left_out:
        lines += ["", "left out:", *(f"  {line}" for line in left_out)]
    return "\n".join(lines)


def _seen(documents: float, num_records: int | None) -> str:
    """How many documents a run takes, of how many there are."""
    if num_records is None:
        return f"about {round(documents):,} of an unknown number"
    if documents > num_records:
        return f"all {num_records:,}, {documents / max(num_records, 1):,.1f} times"
    return f"about {round(documents):,} of {num_records:,} ({documents / max(num_records, 1):.1%})"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left and the others to the right."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))] for row in rows
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _amount(tokens: float, whole: float) -> str:
    return f"{round(tokens):,} {tokens / max(whole, 1):6.1%}" if tokens else "-"


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    sys.exit(main())
