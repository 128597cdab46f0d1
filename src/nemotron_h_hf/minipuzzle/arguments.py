"""What `nemotron-h minipuzzle` is told, as flags or as keys of a YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from ..compression.candidates import KINDS
from ..compression.layer_scores import MEASURES, OF_WIDTHS, REDUCTIONS
from ..elastic.budgets import CHOICE_FIELDS
from ..errors import require
from ..memory_model import PRECISIONS, Deployment
from ..training.arguments import ModelArguments, NemotronHTrainingArguments, as_mapping, flag, nearest
from ..training.data_arguments import DataArguments, RowArguments
from ..training.distillation import DistillationArguments
from ..units import parse_need, parse_tokens

STAGES = ("scores", "candidates", "ranked", "benchmarked", "tournament", "student")
SIZES = tuple(name for name in CHOICE_FIELDS if name != "num_key_value_heads")  # which would take query heads along
SET_HERE = {"teacher", "model", "data", "eval_data", "output_dir", "total_tokens", "teacher_cache", "cache_teacher", "config",
            "column", "sources", "phases", "top_k", "sequence_length", "tokenizer", "seed"}  # fmt: skip
"""Options of `distill` that the stages give themselves."""


REMOVAL = "removal"  # the least important layer goes, and again, by the logits of what is left
OF_DISTILL = (DataArguments, RowArguments, DistillationArguments, ModelArguments, NemotronHTrainingArguments)


@dataclass
class MiniPuzzleArguments:
    """All of them."""

    _argument_group_name = "minipuzzle"

    teacher: str | None = flag(None, "folder or hub id; only read. Also the first word of the command")
    work: str | None = flag(None, "folder of the stages' files; new, empty, or that of this run. Also the second word")
    output: str | None = flag(None, "folder for the student; without it the run ends after the tournament")
    until: str | None = flag(None, "the last stage to run; default: all", STAGES)

    data: list[str] | None = flag(None, "text: .jsonl, or whole files, or patterns; default: Python's standard library")
    held_out: list[str] | None = flag(None, "other text, for ranking; default: some documents of the data")
    column: str = flag("text", "of .jsonl records")
    sequence_length: int = flag(1024, "tokens of a row, in all stages")
    batch_size: int = flag(4, "rows at a time, but in distillation")
    layer_samples: int = flag(128, "rows that layers are scored on")
    width_samples: int = flag(1024, "rows that neurons are scored on")
    ranking_tokens: str | None = flag(
        None, "held-out tokens that candidates are ranked on; default: 1M, of the standard library 128K"
    )

    layer_score: str = flag(
        "hidden", "what becomes of the model without the layer; removal: one by one, scored anew, L^2 3/8 forwards",
        (*MEASURES, REMOVAL),
    )  # fmt: skip
    reduce: str = flag("rank", "of the samples: mean of ranks, or of errors", REDUCTIONS)
    more_scores: list[str] = field(
        default_factory=list, metadata={"help": f"other layer scores to keep for comparison: {', '.join(MEASURES)}"}
    )
    neuron_score: str = flag("after", "MLP neurons by what is after or before the activation", ("after", "before"))

    budget: str | None = flag(None, "bytes at a context: 31.7GiB@1M")
    max_parameters: str | None = flag(None, "limit on parameters, such as 47B")
    max_active_parameters: str | None = flag(None, "limit on those that a token uses")
    max_kv_bytes_per_token: int | None = flag(None, "limit on what a token adds to the cache")
    max_seconds: float | None = flag(None, "limit on the time of a table, with latency")
    latency: str | None = flag(
        None, "JSON file: seconds of a layer by kind, and by size where it matters (docs/compress.md)"
    )
    weights: str = flag("bf16", "precision of the weights, for bytes", tuple(PRECISIONS))
    kv: str = flag("bf16", "of the KV cache", tuple(PRECISIONS))
    state: str = flag("fp32", "of the SSM state", tuple(PRECISIONS))
    conv: str | None = flag(None, "of the convolution state; default: as the SSM state", tuple(PRECISIONS))
    sequences: int = flag(1, "sequences at once, for bytes")

    sizes: dict | str | None = flag(None, "sizes to try, '{intermediate_size: [24576, 25600]}'; default: eighths of it")
    counts: dict | str | None = flag(None, "least and most layers of a kind, '{attention: [4, 10]}'; default: 1 to all")
    keep: str = flag("largest", "candidates that nothing can be added to, or all that fit", ("largest", "all"))
    mixed_widths: bool = flag(False, "one more candidate: a width for each MLP layer, by a knapsack; needs SciPy")
    controls: int = flag(
        1, "random choices to compare with, next to reversed, depth alone and width alone; 0: none of all"
    )

    top: int = flag(130, "candidates that go from ranking to benchmarks")
    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "needle and other names of nemotron-h eval, lm-eval tasks, or module:function taking model and "
                  "tokenizer; default: none, the ranking decides"},
    )  # fmt: skip
    task_limit: int | None = flag(None, "questions of each task")
    task_length: str = flag("1Ki", "tokens of long-context questions")
    task_path: str | None = flag(None, "folder with tasks of your own for lm-eval, YAML files")
    finalists: int = flag(3, "candidates that are distilled")
    min_distance: int = flag(2, "layers and sizes in which finalists differ at least")

    short_tokens: str = flag("2M", "of each round of short distillation")
    rounds: int = flag(1, "rounds; after each the better half stays")
    distill_controls: bool = flag(False, "distil the controls in the first round too; they cannot win")
    long_tokens: str = flag("0", "of the winner's long distillation; 0: none")
    top_k: int = flag(
        0, "the tournament reads so many of the teacher's logits from a cache made once; 0: the live teacher"
    )
    distill: dict | str | None = flag(None, "options of nemotron-h distill, '{learning_rate: 1e-4, fp8: true}'")
    launch: str | None = flag(None, "command that distillation is started by, 'accelerate launch --config_file FILE'")
    family: str | None = flag(
        None, "also write the teacher with the finalists as budgets, an elastic parent, to this folder"
    )

    stream: bool = flag(False, "read one layer at a time, for a teacher larger than memory; up to candidates")
    dtype: str = flag("auto", "to measure in; auto: as stored", ("auto", "float32", "bfloat16"))
    device: str | None = flag(None, "to measure on; default: cuda where there is one")
    seed: int = flag(0, "of the order of documents, of controls and of distillation")

    def __post_init__(self) -> None:
        require(self.teacher is not None, "teacher", None, "a folder or hub id")
        require(self.work is not None, "work", None, "a folder")
        for name in ("sizes", "counts", "distill"):
            value = as_mapping(getattr(self, name), name) or {}
            require(isinstance(value, dict), name, value, "a mapping")
            setattr(self, name, value)
        for name in ("sequence_length", "batch_size", "layer_samples", "width_samples", "top", "finalists", "rounds"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("controls", "min_distance", "top_k"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.layer_samples <= self.width_samples, "layer_samples", self.layer_samples,
                f"at most width_samples={self.width_samples}")  # fmt: skip
        require(
            (self.max_seconds is None) == (self.latency is None), "latency", self.latency, "a file, with max_seconds"
        )
        self.ranking_tokens = self.ranking_tokens or ("1M" if self.data else "128K")
        for name in ("ranking_tokens", "short_tokens", "long_tokens", "task_length"):
            setattr(self, name, parse_tokens(getattr(self, name), name))
        rows = self.ranking_tokens // self.sequence_length
        require(rows >= 1, "ranking_tokens", self.ranking_tokens, f"a row's {self.sequence_length} or more")
        for field_name, values in self.sizes.items():
            require(field_name in SIZES, "sizes", field_name, ", ".join(SIZES))
            counts = isinstance(values, list) and values and all(type(size) is int and size > 0 for size in values)
            require(counts, f"sizes.{field_name}", values, "a list of positive integers")
        for name in self.counts:
            require(name in KINDS, "counts", name, ", ".join(KINDS))
        known = {item.name for kind in OF_DISTILL for item in fields(kind)} - SET_HERE
        for name in self.distill:
            allowed = f"options of nemotron-h distill that minipuzzle does not set itself{nearest(name, sorted(known))}"
            require(name in known, "distill", name, allowed)
        for name in self.more_scores:
            require(name in MEASURES, "more_scores", name, ", ".join(MEASURES))
        of_widths = self.layer_score in OF_WIDTHS
        require(of_widths or not self.mixed_widths, "mixed_widths", True, f"false with layer_score {self.layer_score}")
        early = self.until in ("scores", "candidates") and not self.mixed_widths
        require(
            early or not self.stream,
            "stream",
            True,
            "false; or true with until scores or candidates, without mixed_widths",
        )
        require(self.until != "student" or self.output is not None, "output", None, "a folder, with until student")
        if self.budget is not None:
            _check_need(self.budget)
        require(bool(self.limits()), "budget", None, "a need such as 31.7GiB@1M, or one of the other limits")

    @property
    def deployment(self) -> Deployment:
        """Precisions and context that bytes are counted for."""
        num_tokens = 0 if self.budget is None else parse_need(self.budget)[1]
        return Deployment(self.weights, self.kv, self.state, self.conv, num_tokens, self.sequences)

    def limits(self) -> dict[str, float]:
        """Name of a cost -> the most."""
        found = {
            "bytes": None if self.budget is None else parse_need(self.budget)[0],
            "parameters": _count(self.max_parameters, "max_parameters"),
            "active_parameters": _count(self.max_active_parameters, "max_active_parameters"),
            "kv_bytes_per_token": self.max_kv_bytes_per_token,
            "seconds": self.max_seconds,
        }
        return {name: most for name, most in found.items() if most is not None}


def _check_need(budget: str) -> None:
    try:
        parse_need(budget)
    except ValueError:
        require(False, "budget", budget, "bytes at a context, such as 31.7GiB@1M or 4MiB")


def _count(text: str | None, name: str) -> int | None:
    return None if text is None else parse_tokens(text, name)
