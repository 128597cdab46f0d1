"""What a checkpoint can do: held-out bits per byte, questions on long prompts, lm-evaluation-harness tasks.

    nemotron-h eval                                              # the embedded model: bpb and needle, 1Ki to 4Ki tokens
    nemotron-h eval --model runs/my/checkpoint --tasks bpb --text "held_out/*.jsonl"
    nemotron-h eval --model owner/name --tasks long --lengths 4Ki,32Ki,128Ki --device cuda --output runs/long
    nemotron-h eval --model owner/name --tasks mmlu_pro,gsm8k_cot --limit 100 --batch-size 8 --device cuda
    nemotron-h eval --model owner/name --tasks paper-reasoning --chat --device cuda
    nemotron-h eval --model owner/vl --tasks mmmu_val --device cuda            # a vision-language model and pictures
    nemotron-h eval --tasks my_task --include-path my_tasks      # your own task: YAML, local files

Any causal language model of transformers can be evaluated: for a Llama, use the same command with another --model
and --output. Text, questions and answers of bpb and the long-context tasks need no network: the text is that of this
Python unless --text or --haystack say otherwise. They are modelled on RULER in different words; their scores are for
comparing models with each other, not with published tables. Names that are not listed below are looked up in
lm-evaluation-harness (pip install 'nemotron-h-hf[eval]').

Every finished sample goes to OUTPUT/samples.jsonl at once. After an interruption the same command continues from there,
and one with more tasks, lengths or samples adds to it; another model, seed, text or window is refused. At the end come
a table, OUTPUT/results.json and OUTPUT/long_context.png with everything the folder holds.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHConfig
from nemotron_h_hf.command_line import option, read_options
from nemotron_h_hf.data.stdlib_text import TOPICS_FILE, read_documents, split_documents
from nemotron_h_hf.environment import machine, versions
from nemotron_h_hf.errors import require
from nemotron_h_hf.evaluation import harness, held_out, long_context, results_table, texts
from nemotron_h_hf.evaluation.asking import answerer, encoder
from nemotron_h_hf.evaluation.harness import HarnessOptions, HarnessTask
from nemotron_h_hf.evaluation.sample_records import Records, check_folder, claim
from nemotron_h_hf.inputs import load_tokenizer, read_device
from nemotron_h_hf.model.loading import plain_parts
from nemotron_h_hf.output_folders import writing
from nemotron_h_hf.units import TOKENS_HELP, parse_tokens
from nemotron_h_hf.whole_files import whole_file, write_json

LONG_NAMES = tuple(task.name for task in long_context.TASKS)
OWN_NAMES = ("bpb", "long", *LONG_NAMES, *harness.GROUPS)
DEFAULT_SAMPLES = 10
DTYPES = ("auto", "float32", "bfloat16", "float16")
BITS, LONG, HARNESS, HOW = ("bits per byte",), ("long-context tasks",), ("lm-evaluation-harness",), ("how",)


@dataclass(frozen=True)
class EvalArguments:
    """What the command line says; `limit` None is everything (`DEFAULT_SAMPLES` for questions made here)."""

    model: str = option(EMBEDDED_MODEL, "checkpoint folder or hub id (the embedded model)")
    tasks: tuple[str, ...] = option("bpb,needle", "names with commas between them, see below (bpb,needle)", type=str)
    output: Path = option(Path("runs/eval"), "folder for samples, results and plot (runs/eval)")
    limit: int | None = option(
        None, "at most so many documents (bpb), samples per task and length (long-context tasks, "
        f"{DEFAULT_SAMPLES} without it) or questions per task (harness)",
    )  # fmt: skip
    text: list[str] | None = option(
        None, "files or patterns in quotes: .jsonl has a document per line, others are one each (held-out files of this "
        "Python's standard library)", group=BITS, nargs="+", metavar="FILES",
    )  # fmt: skip
    column: str = option("text", "field of a .jsonl line that holds the text (text)", group=BITS)
    window: int = option(2048, "tokens per forward pass (2048)", group=BITS)
    stride: int = option(None, "tokens by which the window moves (half the window)", group=BITS)
    lengths: tuple[int, ...] = option(
        "1Ki,2Ki,4Ki", f"tokens of prompt and answer; {TOKENS_HELP} (1Ki,2Ki,4Ki)", group=LONG, type=str
    )
    depths: tuple[float, ...] = option(
        "0,25,50,75,100", "percent of the text before the needle (0,25,...,100)", group=LONG, type=str
    )
    haystack: list[str] | None = option(
        None, "text to hide things in (Python's language reference)", group=LONG, nargs="+", metavar="FILES"
    )
    batch_size: int = option(1, "requests at a time (1)", group=HARNESS)
    max_length: int | None = option(None, "tokens per request (the model's max_position_embeddings)", group=HARNESS)
    include_path: str | None = option(None, "folder with your own tasks in YAML files", group=HARNESS)
    allow_code: bool = option(False, "let tasks run code that the model wrote, on this machine", group=HARNESS)
    chat: bool = option(False, "put questions into the tokenizer's chat template", group=HOW)
    device: str = option(
        "cuda" if torch.cuda.is_available() else "cpu",
        "cpu, cuda, cuda:1, or auto to spread the model over all devices", group=HOW,
    )  # fmt: skip
    dtype: str = option(None, "of the weights (float32 on cpu, elsewhere as stored: auto)", group=HOW, choices=DTYPES)
    seed: int = option(0, "of the questions made here and the harness's choices (0)", group=HOW)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate what is asked for and missing, then report all that the folder holds."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(argv)
    with writing(arguments.output, arguments.model):
        return run(arguments, argv)


def run(arguments: EvalArguments, argv: Sequence[str]) -> int:
    """The work, in a folder that no other run writes to."""
    harness_tasks = [found for name in arguments.tasks for found in as_harness_tasks(name)]
    check_folder(arguments.output, "model.json")
    manager = None
    if harness_tasks:
        manager = harness.task_manager(arguments.include_path)
        harness.check_tasks(harness_tasks, manager, OWN_NAMES, arguments.allow_code)
    model, tokenizer = load(arguments)
    facts = model_facts(model, arguments)
    claim(arguments.output, "model.json", facts)
    records = Records(arguments.output / "samples.jsonl")
    if "bpb" in arguments.tasks:
        run_bits_per_byte(model, tokenizer, arguments, records)
    if set(arguments.tasks) & {"long", *LONG_NAMES}:
        run_long_context(model, tokenizer, arguments, records)
    if harness_tasks:
        run_harness(model, tokenizer, harness_tasks, manager, arguments, records)
    finish(arguments, records, facts, shlex.join(["nemotron-h", "eval", *argv]))
    return 0


def parse(argv: Sequence[str]) -> EvalArguments:
    """Read and check the command line."""
    return check(read_options(EvalArguments, argv, "eval", __doc__, epilog=task_help(), allow_abbrev=False))


def task_help() -> str:
    """The names of tasks, for --help."""
    rows = [("bpb", "bits per byte of held-out text"), ("long", "all long-context tasks, which are:")]
    rows += [(f"  {task.name}", task.about) for task in long_context.TASKS]
    rows += [(name, about) for name, (_, about) in harness.GROUPS.items()]
    rows.append(("(others)", "tasks of lm-evaluation-harness by name: mmlu, gpqa_diamond_zeroshot, aime25, ..."))
    return "\n".join(["tasks:", *(f"  {name:<20}{about}" for name, about in rows)])


def check(given: EvalArguments) -> EvalArguments:
    """Arguments with lists read and defaults filled in; `ValueError` naming the option that is out of range."""
    values = dict(vars(given))
    for name in ("limit", "window", "stride", "batch_size", "max_length"):
        if values[name] is not None and values[name] < 1:
            raise ValueError(f"--{name.replace('_', '-')}={values[name]}: allowed is 1 or more")
    values["tasks"] = tuple(dict.fromkeys(split(given.tasks, "--tasks")))
    values["lengths"] = tuple(dict.fromkeys(read_length(word) for word in split(given.lengths, "--lengths")))
    values["depths"] = tuple(dict.fromkeys(read_depth(word) for word in split(given.depths, "--depths")))
    values["stride"] = given.stride or max(1, given.window // 2)
    values["dtype"] = given.dtype or ("float32" if given.device == "cpu" else "auto")
    if values["stride"] >= given.window:
        raise ValueError(f"--stride={values['stride']}: allowed is below --window, {given.window}")
    return EvalArguments(**values)


def split(value: str, option: str) -> list[str]:
    """The words between commas."""
    words = [word.strip() for word in value.split(",") if word.strip()]
    if not words:
        raise ValueError(f"{option} is {value!r}; give at least one, with commas between")
    return words


def read_length(word: str) -> int:
    """Tokens, one or more."""
    num_tokens = parse_tokens(word, "--lengths")
    require(num_tokens >= 1, "--lengths", word, "1 or more")
    return num_tokens


def read_depth(word: str) -> float:
    """Percent as a share."""
    try:
        percent = float(word)
    except ValueError:
        percent = -1.0
    if not 0 <= percent <= 100:
        raise ValueError(f"--depths has {word!r}: allowed are numbers from 0 to 100, in percent")
    return percent / 100


def as_harness_tasks(name: str) -> Sequence[HarnessTask]:
    """What a name means to the harness: nothing for our own, several for a group."""
    if name in harness.GROUPS:
        return harness.GROUPS[name][0]
    return () if name in OWN_NAMES else (HarnessTask(name),)


def load(arguments: EvalArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, ready on its device, and its tokenizer."""
    disable_progress_bar()
    device = None if arguments.device == "auto" else read_device(arguments.device)
    tokenizer = load_tokenizer(arguments.model)
    if arguments.chat and not tokenizer.chat_template:
        raise ValueError(f"--chat: the tokenizer of {arguments.model} has no chat template")
    spread = {"device_map": "auto"} if device is None else {}
    sees = getattr(AutoConfig.from_pretrained(arguments.model), "vision_config", None) is not None
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model = auto.from_pretrained(arguments.model, dtype=arguments.dtype, **spread)
    return (model if device is None else model.to(device)).eval(), tokenizer


def model_facts(model: PreTrainedModel, arguments: EvalArguments) -> dict:
    """What was evaluated; a folder of results belongs to exactly this."""
    config = model.config
    return {
        "model": "embedded" if arguments.model == EMBEDDED_MODEL else arguments.model,
        "class": type(model).__name__,
        "pattern": config.hybrid_override_pattern if isinstance(config, NemotronHConfig) else None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights_digest(model),
    }


def weights_digest(model: PreTrainedModel) -> str:
    """A short fingerprint of a few values of every tensor; it changes when the model is trained further or cast."""
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        for part in plain_parts(tensor):
            values = part.flatten()[:: max(1, part.numel() // 64)]
            sha.update(f"{name} {tuple(part.shape)} {values.float().tolist()}".encode())
    return sha.hexdigest()[:16]


def run_bits_per_byte(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: EvalArguments, records: Records
) -> None:
    """Every document that has no record yet."""
    if arguments.text:
        documents = list(texts.read_texts(arguments.text, arguments.column))
    else:
        documents = [(document.name, document.text) for document in split_documents(read_documents())[1]]
    settings = {"text": texts.digest(text for _, text in documents)}
    settings |= {"window": arguments.window, "stride": arguments.stride}
    claim(arguments.output, "bpb.json", settings)
    chosen = documents[: arguments.limit]
    held_out.evaluate(model, tokenizer, chosen, arguments.window, arguments.stride, records)


def run_long_context(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: EvalArguments, records: Records
) -> None:
    """Every question that has no record yet."""
    if arguments.haystack:
        prose = texts.prose_of(text for _, text in texts.read_texts(arguments.haystack, arguments.column))
    else:
        prose = texts.prose_of(d.text for d in read_documents() if d.name.startswith(TOPICS_FILE))
    digest = texts.digest(" ".join(sentence) for sentence in prose.sentences)
    claim(arguments.output, "long_context.json", {"haystack": digest, "seed": arguments.seed, "chat": arguments.chat})
    plan = long_context.LongContextPlan(
        LONG_NAMES if "long" in arguments.tasks else arguments.tasks,
        arguments.lengths, arguments.depths, arguments.limit or DEFAULT_SAMPLES, arguments.seed,
    )  # fmt: skip
    encode = encoder(tokenizer, arguments.chat)
    long_context.evaluate(plan, prose, encode, answerer(model, tokenizer), records)


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[HarnessTask],
    manager: harness.TaskManager,
    arguments: EvalArguments,
    records: Records,
) -> None:
    """Every task that has no record yet."""
    options = HarnessOptions(
        arguments.limit,
        arguments.batch_size,
        arguments.max_length,
        arguments.chat,
        arguments.allow_code,
        arguments.seed,
    )
    settings = {name: value for name, value in asdict(options).items() if name in ("max_length", "chat", "seed")}
    claim(arguments.output, "harness.json", settings)
    harness.evaluate(model, tokenizer, tasks, manager, options, records, say)


def finish(arguments: EvalArguments, records: Records, facts: dict, command: str) -> None:
    """Table, JSON and plot of all records in the folder."""
    results = {
        "command": command,
        "model": facts,
        "settings": {**asdict(arguments), "model": facts["model"], "output": None},
        "machine": machine(),
        "versions": versions(),
        **results_table.collect(arguments.output, records),
    }
    print("\n".join([f"{facts['model']}, {facts['parameters']:,} parameters, {facts['dtype']}", ""]))
    print("\n".join(results_table.table(results)))
    write_json(arguments.output / "results.json", results)
    say(f"wrote {arguments.output / 'results.json'}")
    if "long_context" in results:
        plot(arguments.output / "long_context.png", results)


def plot(path: Path, results: dict) -> None:
    """The long-context results as a picture, under a temporary name first."""
    try:
        from nemotron_h_hf.evaluation.long_context_plot import draw
    except ImportError as error:
        say(f"no plot: {error.name} is not installed; pip install 'nemotron-h-hf[plot]'")
        return
    with whole_file(path) as part:
        draw(results["long_context"], f"{results['model']['model']} ({results['model']['dtype']})", part)
    say(f"wrote {path}")


def say(line: str) -> None:
    """Progress, apart from the result."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
