"""What a Nemotron-H checkpoint is and costs, without loading a weight.

    nemotron-h info                                   # the embedded model
    nemotron-h info nemotron-h-8b                     # a released shape, by preset
    nemotron-h info path/to/checkpoint --context 32768 --json

    nemotron-h info nemotron-h-47b --context 1M --weights fp4 --kv fp8 --state bf16     # what a deployment takes

    nemotron-h info path/to/slice --checksums         # reads every tensor, compares it with elastic_manifest.json

For a folder the headers of the safetensors files are read: dtypes and bytes are the stored ones, and files or tensors
that are missing, truncated or of another shape are named (exit status 1). The budgets of an elastic parent are shown side by
side.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHConfig, manifest
from nemotron_h_hf.checkpoint_summary import (
    LAYER_NAMES,
    BudgetFacts,
    Contents,
    Facts,
    describe,
    describe_budgets,
    disagreements,
    load_target,
)
from nemotron_h_hf.command_line import argument, option, read_options
from nemotron_h_hf.cost import BYTES_PER_ELEMENT
from nemotron_h_hf.memory_model import PRECISIONS, Deployment, memory
from nemotron_h_hf.model.loading import weight_files
from nemotron_h_hf.units import TOKENS_HELP, human_bytes, human_count, tokens
from nemotron_h_hf.vision_summary import VisionFacts

COLOURS = {"M": "\033[36m", "*": "\033[31;1m", "-": "\033[90m", "E": "\033[33m"}
RESET = "\033[0m"
MAX_PROBLEMS_SHOWN = 10
DEPLOYMENT = (
    "a deployment", "with any of these: the bytes of weights and caches, each in its own precision, at --context",
)  # fmt: skip
SIZE_LABELS = {
    "hidden_size": "hidden", "intermediate_size": "MLP width", "mamba_num_heads": "Mamba heads",
    "mamba_head_dim": "Mamba channels per head", "num_key_value_heads": "key/value heads", "num_attention_heads": "query heads",
    "n_routed_experts": "experts", "num_experts_per_tok": "experts per token", "moe_intermediate_size": "expert width",
    "moe_shared_expert_intermediate_size": "shared expert width",
}  # fmt: skip


@dataclass(frozen=True)
class InfoArguments:
    """What the command line says; `memory_gib` is that of the device the sequences should fit on."""

    target: str = argument("checkpoint folder, hub id or preset", nargs="?", default=EMBEDDED_MODEL)
    context: int = option(8192, f"tokens per sequence in the figures; {TOKENS_HELP} (8192)", type=tokens)
    memory_gib: float = option(80.0, "device memory to fit sequences in (80)")
    dtype: str | None = option(None, "of weights and KV cache (as stored)", choices=tuple(BYTES_PER_ELEMENT))
    json: bool = option(False, "print one JSON object instead")
    checksums: bool = option(False, "compare every tensor of a folder with elastic_manifest.json")
    weights: str | None = option(None, "of the weights (bf16)", choices=tuple(PRECISIONS), group=DEPLOYMENT)
    kv: str | None = option(None, "of the KV cache (bf16)", choices=tuple(PRECISIONS), group=DEPLOYMENT)
    state: str | None = option(None, "of the SSM state (fp32)", choices=tuple(PRECISIONS), group=DEPLOYMENT)
    conv: str | None = option(
        None, "of the convolution state (as the SSM state)", choices=tuple(PRECISIONS), group=DEPLOYMENT
    )
    sequences: int | None = option(None, "how many at once (1)", group=DEPLOYMENT)

    @cached_property
    def deployment(self) -> Deployment | None:
        """None if none of its options was given."""
        given = {name: getattr(self, name) for name in ("weights", "kv", "state", "conv", "sequences")}
        asked = {name: value for name, value in given.items() if value is not None}
        return Deployment(**asked, num_tokens=self.context) if asked else None


def main(argv: Sequence[str] | None = None) -> int:
    """Print the facts of one target; 1 if a folder's files are not what its configuration asks for."""
    arguments = parse(argv)
    config, contents = load_target(arguments.target)
    facts = describe(arguments.target, config, contents, arguments.dtype)
    problems = find_problems(config, contents)
    if contents is not None and not problems:
        problems = find_changes(Path(arguments.target), arguments.checksums)
    budgets = describe_budgets(config, facts.dtype)
    if arguments.json:
        report = as_json(facts, contents, problems, arguments, budgets)
        if arguments.deployment is not None:
            taken = memory(config.get_text_config(), arguments.deployment)
            report["deployment"] = {**asdict(arguments.deployment), "bytes": asdict(taken), "total_bytes": taken.total}
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(as_text(facts, contents, arguments, colour=sys.stdout.isatty())))
        if arguments.deployment is not None:
            print("\n".join(["", *deployment_lines(config.get_text_config(), arguments.deployment)]))
        if budgets:
            print("\n".join(["", *budget_lines(budgets, arguments.context)]))
        for line in shorten(problems):
            print(f"problem: {line}", file=sys.stderr)
    return 1 if problems else 0


def parse(argv: Sequence[str] | None) -> InfoArguments:
    """Read the command line."""
    arguments = read_options(InfoArguments, argv, "info", __doc__)
    if arguments.context < 1:
        raise ValueError(f"--context={arguments.context}: allowed is 1 or more")
    if not arguments.memory_gib > 0:
        raise ValueError(f"--memory-gib={arguments.memory_gib}: allowed is above 0")
    return arguments


def find_problems(config, contents: Contents | None) -> list[str]:
    """What is wrong with a folder's files: first the files themselves, then tensors against the configuration."""
    if contents is None:
        return []
    lines = [f"{file} is missing" for file in contents.missing_files]
    lines += list(contents.damaged_files.values())
    lines += [f"{name} is in the index but in no file" for name in contents.missing_tensors]
    quantised = getattr(config, "quantization_config", None)  # its tensors have other names and shapes
    return lines if lines or quantised else disagreements(config, contents)


def find_changes(folder: Path, checksums: bool) -> list[str]:
    """What differs from the manifest next to the weights; without `checksums`, by counts, shapes and fingerprint."""
    path = folder / manifest.NAME
    if not path.is_file():
        return [f"{folder} has no {manifest.NAME} to compare with"] if checksums else []
    try:
        manifest.check_manifest(path, weight_files(folder), full=checksums)
    except ValueError as error:
        return [str(error)]
    return []


def shorten(problems: list[str]) -> list[str]:
    """The first problems, and how many more there are."""
    rest = len(problems) - MAX_PROBLEMS_SHOWN
    return problems if rest <= 0 else [*problems[:MAX_PROBLEMS_SHOWN], f"... and {rest} more"]


def sequences_that_fit(facts: Facts, arguments: InfoArguments) -> int:
    """Sequences of `context` tokens whose caches fit next to the weights; activations are not counted."""
    free_bytes = int(arguments.memory_gib * 2**30) - facts.weight_bytes
    return max(0, free_bytes // max(1, facts.cache_bytes(arguments.context)))


def as_json(
    facts: Facts, contents: Contents | None, problems: list[str], arguments: InfoArguments, budgets: list[BudgetFacts]
) -> dict:
    """Everything that is printed, as plain numbers."""
    stored = None
    if contents is not None:
        stored = {
            "num_tensors": len(contents.tensors),
            "num_bytes": contents.num_bytes,
            "elements_by_dtype": contents.elements_by_dtype(),
            "missing_files": contents.missing_files,
            "damaged_files": contents.damaged_files,
        }
    return {
        **asdict(facts),
        "layer_counts": facts.layer_counts,
        "stored": stored,
        "problems": problems,
        "context": arguments.context,
        "cache_bytes_at_context": facts.cache_bytes(arguments.context),
        "memory_gib": arguments.memory_gib,
        "sequences_that_fit": sequences_that_fit(facts, arguments),
        "budgets": [
            {**asdict(budget), "cache_bytes_at_context": budget.facts.cache_bytes(arguments.context)}
            for budget in budgets
        ],
    }


def as_text(facts: Facts, contents: Contents | None, arguments: InfoArguments, colour: bool) -> list[str]:
    """The report for people, one string per line."""
    lines = [facts.target, "", draw_pattern(facts.pattern, colour), legend(facts, colour)]
    if facts.mtp_pattern:
        lines.append(f"multi-token prediction: {draw_pattern(facts.mtp_pattern, colour)}")
    lines += [] if facts.vision is None else ["", *vision_lines(facts.vision)]
    lines += ["", *expert_lines(facts)] if facts.expert_layers else []
    return [*lines, "", *parameter_lines(facts), "", *memory_lines(facts, contents, arguments)]


def vision_lines(vision: VisionFacts) -> list[str]:
    """Tower, projector and what a picture costs; the figures below it are the language model's."""
    return [
        f"vision ({vision.model_type})",
        f"  tower             {vision.tower}, {vision.tower_layers} layers of {vision.tower_width}, "
        f"{human_count(vision.tower_parameters)} parameters",
        f"  projector         {vision.projector}, {human_count(vision.projector_parameters)} parameters",
        f"  tokens per image  {vision.tokens_per_image}",
    ]


def draw_pattern(pattern: str, colour: bool) -> str:
    """The layers as one line of letters, first layer first."""
    return "".join(f"{COLOURS[letter]}{letter}{RESET}" if colour else letter for letter in pattern)


def legend(facts: Facts, colour: bool) -> str:
    """`24 x M Mamba-2, ...` for the kinds that occur."""
    letters = {name: letter for letter, name in LAYER_NAMES.items()}
    parts = [f"{count} x {draw_pattern(letters[name], colour)} {name}" for name, count in facts.layer_counts.items()]
    return f"{len(facts.pattern)} layers: {', '.join(parts)}; hidden {facts.hidden_size}, vocab {facts.vocab_size}"


def expert_lines(facts: Facts) -> list[str]:
    """A row for each layer with experts."""
    heads = ["layer", "experts", "per token", "width", "shared width", "latent", "parameters"]
    rows = []
    for sizes in facts.expert_layers:
        layer, *counts = ("-" if size is None else str(size) for size in sizes.values())
        of_mtp = int(layer) - len(facts.pattern)
        name = layer if of_mtp < 0 else f"mtp {of_mtp}"
        rows.append([name, *counts, f"{facts.parameters_by_layer[int(layer)]:,}"])
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    return ["experts by layer"] + ["  " + "  ".join(map(str.rjust, row, widths)) for row in [heads, *rows]]


def parameter_lines(facts: Facts) -> list[str]:
    """Parameters by kind, with shares."""
    rows = [(kind, count) for kind, count in facts.parameters.items() if count]
    lines = [f"  {kind:<12}{count:>18,}  {count / facts.num_parameters:6.1%}" for kind, count in rows]
    lines += [f"  {'total':<12}{facts.num_parameters:>18,}  = {human_count(facts.num_parameters)}"]
    if mtp := facts.parameters["mtp"]:
        without = facts.num_parameters - mtp
        lines += [f"  {'without mtp':<12}{without:>18,}  = {human_count(without)}"]
    if facts.parameters["moe_routed"]:
        active = facts.num_active_parameters
        lines += [f"  {'active':<12}{active:>18,}  = {human_count(active)} per token, embeddings included, without mtp"]
    return ["parameters", *lines]


def memory_lines(facts: Facts, contents: Contents | None, arguments: InfoArguments) -> list[str]:
    """Bytes of the weights and of one sequence."""
    stored = ""
    if contents is not None:
        shares = ", ".join(f"{human_count(count)} {name}" for name, count in contents.elements_by_dtype().items())
        stored = f" in {len(contents.tensors)} stored tensors: {shares}"
    context, dtype = arguments.context, facts.dtype
    return [
        f"memory ({dtype}; SSM state in float32)",
        f"  weights           {human_bytes(facts.weight_bytes):>12}{stored}",
        f"  KV cache          {human_bytes(facts.kv_bytes_per_token):>12} per token",
        f"  SSM state         {human_bytes(facts.ssm_state_bytes):>12} per sequence, at any length",
        f"  conv state        {human_bytes(facts.conv_state_bytes):>12} per sequence, at any length",
        f"  one sequence      {human_bytes(facts.cache_bytes(context)):>12} at {context:,} tokens",
        f"  sequences of {context:,} tokens that fit next to the weights in {arguments.memory_gib:g} GiB: "
        f"{sequences_that_fit(facts, arguments):,} (activations not counted)",
    ]


def deployment_lines(config: NemotronHConfig, deployment: Deployment) -> list[str]:
    """Bytes of each part to the hundredth of a GiB, as limits are close."""
    taken = memory(config, deployment)
    rows = {"weights": taken.weights, "KV cache": taken.kv, "SSM state": taken.state, "conv state": taken.conv,
            "total": taken.total}  # fmt: skip
    return [f"deployment ({deployment.describe()}; activations not counted)"] + [
        f"  {name:<12}{num_bytes / 2**30:>12,.2f} GiB" for name, num_bytes in rows.items()
    ]


def budget_lines(budgets: list[BudgetFacts], context: int) -> list[str]:
    """The parent and its budgets side by side, a column each."""
    columns = [budget_column(budget, budgets[0], context) for budget in budgets]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    rows = [[label, *(column.get(label, "") for column in columns)] for label in labels]
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return [f"budgets ({budgets[0].facts.dtype}; SSM state in float32; loss in nats per token of calibration text)"] + [
        f"  {line}" for line in lines
    ]


def budget_column(budget: BudgetFacts, parent: BudgetFacts, context: int) -> dict[str, str]:
    """What is said of one budget: label -> text."""
    facts, whole = budget.facts, parent.facts
    sizes = {
        label: str(size) if isinstance(size, int) else f"{min(size)}..{max(size)}"
        for field, label in SIZE_LABELS.items()
        if (size := budget.sizes.get(field)) is not None
    }
    state_bytes = facts.ssm_state_bytes + facts.conv_state_bytes
    return {
        "": facts.target,
        "layers": str(len(facts.pattern)),
        **{f"  {name}": str(facts.layer_counts.get(name, 0)) for name in whole.layer_counts},
        **sizes,
        "parameters": f"{facts.num_parameters:,}",
        "of the parent's": f"{facts.num_parameters / whole.num_parameters:.1%}",
        "weights": human_bytes(facts.weight_bytes),
        "KV per token": human_bytes(facts.kv_bytes_per_token),
        "state per sequence": human_bytes(state_bytes),
        f"all at {context:,} tokens": human_bytes(facts.weight_bytes + facts.cache_bytes(context)),
        "trained": "yes" if budget.trained else "" if budget is parent else "no",
        "loss": "" if budget.loss is None else f"{budget.loss:.3f}",
    }


if __name__ == "__main__":
    sys.exit(main())
