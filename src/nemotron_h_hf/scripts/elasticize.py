"""Make a parent: the same model with its weights ordered, so the first rows and columns form smaller models.

    nemotron-h elasticize path/to/model parent --calibration 'text/*.jsonl'
    nemotron-h elasticize path/to/12b parent --calibration text.jsonl --budget 6b:hidden_size=3072,mamba_num_heads=96,depth=46
    nemotron-h elasticize path/to/12b parent --calibration text.jsonl --budgets budgets.yaml --choices hidden_size=4096,3072

Without --calibration the text is this Python's standard library, which suits the embedded model and no other. The command
scores every hidden channel, neuron, head and expert by its activations, and every layer by the change of the logits without
it. It puts the weights in that order, measures the loss of every budget and of every size that may be chosen on held-out
text, and writes all this to `elastic` in the new config.json. `nemotron-h info parent` shows the budgets;
`nemotron-h slice parent small --budget NAME` cuts one out.

A budget names sizes of the small model, as in its config; `depth` says how many layers stay. Sizes that differ by layer go
into a YAML file:

    6b: {hidden_size: 3072, mamba_num_heads: 96, depth: 46}
    9b: {intermediate_size: [15680, 12288, ...], layers: [0, 1, 2, ...]}

The new weights are written one tensor at a time. The model is loaded whole because it has to run; with --stream each
layer is read when it runs and dropped after, once per batch (a large --batch_size reads less). Ranking half of L layers
takes about 3/8 L^2 forwards over the few rows for depth (1,488 for 62 layers); --removals limits it, --depth_rows 0 skips
it. The same command given again resumes: measurements are kept in OUTPUT/.work until OUTPUT is whole.
In OUTPUT/importance: scores.json and a plot for each axis (matplotlib).

A vision-language model becomes a parent too: its language model is scored on text and put in order, and the rows of the
projector's last matrix with it; the tower is left as it is. What the command measures is the language model's loss on text.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar

from nemotron_h_hf import NemotronHConfig, NemotronHForCausalLM, NemotronHVLConfig
from nemotron_h_hf.data.packed_text import packed_rows
from nemotron_h_hf.data.stdlib_text import read_documents, split_documents
from nemotron_h_hf.elastic.cut.cutting import local_folder
from nemotron_h_hf.elastic.live.saving import write_manifest
from nemotron_h_hf.elastic.prepare.elasticize import Parent, elasticize
from nemotron_h_hf.elastic.prepare.permuting import permute_checkpoint, permute_model
from nemotron_h_hf.elastic.prepare.streaming import streamed
from nemotron_h_hf.elastic.vision import PROCESSOR_FILES, language_model_of
from nemotron_h_hf.evaluation.held_out import end_token
from nemotron_h_hf.evaluation.texts import read_texts
from nemotron_h_hf.inputs import load_tokenizer, read_device, read_yaml
from nemotron_h_hf.model.loading import weight_files
from nemotron_h_hf.model.saving import WORK_NAME, saving
from nemotron_h_hf.output_folders import is_made, note_made, stamps, writing
from nemotron_h_hf.resumable import check_room
from nemotron_h_hf.slicing import Kept
from nemotron_h_hf.tokenizer_files import TOKENIZER_FILES, copy_files
from nemotron_h_hf.whole_files import write_text


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, permute, write."""
    arguments = parse(argv)
    disable_progress_bar()
    source = local_folder(arguments.model)
    with writing(arguments.output, source) as output:
        made_from = {"command": "elasticize", "model": stamps(source), **vars(arguments), "output": None}
        if is_made(output, made_from):
            shutil.rmtree(output / WORK_NAME, ignore_errors=True)  # of a run that was killed right before its end
            print(f"{output} is already there and whole")
            return 0
        with saving(output) as staging:
            parent = make(arguments, source, output, staging)
            note_made(staging, made_from)
        shutil.rmtree(output / WORK_NAME)
    print("\n".join(as_text(Path(arguments.output), parent)))
    return 0


def make(arguments: argparse.Namespace, source: Path, output: Path, staging: Path) -> Parent:
    """Everything in `staging`; what is measured on the way in `output`/.work."""
    size = sum(Path(file).stat().st_size for file in weight_files(source))
    check_room(output, size)
    budgets, choices = read_budgets(arguments.budget, arguments.budgets), read_choices(arguments.choices)
    rows, held_out = make_rows(arguments, source)
    config = AutoConfig.from_pretrained(source)
    sees = isinstance(config, NemotronHVLConfig)
    if not sees and not isinstance(config, NemotronHConfig):
        raise ValueError(f"model={arguments.model!r} is a {config.model_type}: allowed is a Nemotron-H")
    if sees and arguments.stream:
        raise ValueError("stream=True: allowed is a text model; elasticize one before make-vl")
    model = load(source, config, arguments)
    checksums: dict[str, str] = {}

    def reordered(order: Kept) -> NemotronHForCausalLM:
        checksums.update(write_weights(source, config, order, staging, size))
        if arguments.stream:
            return load(staging, config, arguments)
        permute_model(model, order)
        return model

    parent = elasticize(
        model, rows, held_out, budgets, choices, rows[: arguments.depth_rows], arguments.removals,
        arguments.batch_size, output / WORK_NAME, reordered,
    )  # fmt: skip
    write_rest(config, parent, checksums, staging)
    return parent


def load(
    folder: Path, config: NemotronHConfig | NemotronHVLConfig, arguments: argparse.Namespace
) -> NemotronHForCausalLM:
    """The model to measure, whole or a layer at a time."""
    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    if arguments.stream:
        return streamed(copy.deepcopy(config), folder, None if dtype == "auto" else dtype, arguments.device)
    if isinstance(config, NemotronHVLConfig):
        seeing = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        return language_model_of(seeing).to(arguments.device)
    return NemotronHForCausalLM.from_pretrained(folder, dtype=dtype).to(arguments.device)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="nemotron-h elasticize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="folder or hub id; only read")
    add("output", help="folder for the parent; new or empty")
    add(
        "--calibration", nargs="+", metavar="FILE", help="text: .jsonl, or whole files; patterns such as 'text/*.jsonl'"
    )
    add("--column", default="text", help="of .jsonl records (%(default)s)")
    add(
        "--held_out",
        nargs="+",
        metavar="FILE",
        help="text for the losses; default: the next rows of the calibration text",
    )
    add("--rows", type=int, default=256, help="rows of text that width is scored on (%(default)s)")
    add("--held_out_rows", type=int, default=32, help="rows that losses are measured on (%(default)s)")
    add("--depth_rows", type=int, help="rows that depth is scored on; 0: not at all; default: 8, or all that there are")
    add("--removals", type=int, help="layers that are removed one after another to rank them; default: half of them")
    add("--sequence_length", type=int, default=1024, help="tokens of a row (%(default)s)")
    add("--batch_size", type=int, default=8, help="rows at a time (%(default)s)")
    add("--budget", action="append", default=[], metavar="NAME:FIELD=SIZE,...", help="may be given several times")
    add("--budgets", metavar="FILE", help="YAML or JSON: name -> sizes")
    add("--choices", action="append", metavar="FIELD=SIZE,...", help="sizes that may be combined; default: eighths")
    add("--stream", action="store_true", help="read the layers from disk as they run, one in memory at a time")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="to measure in; auto: as stored")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to measure on (%(default)s)")
    add("--seed", type=int, default=0, help="of the order of the documents (%(default)s)")
    arguments = parser.parse_args(argv)
    for name in ("rows", "held_out_rows", "sequence_length", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name}={getattr(arguments, name)}: allowed is 1 or more")
    if arguments.depth_rows is None:
        arguments.depth_rows = min(8, arguments.rows)
    if not 0 <= arguments.depth_rows <= arguments.rows:
        raise ValueError(f"depth_rows={arguments.depth_rows}: allowed is 0 to rows={arguments.rows}")
    read_device(arguments.device)
    return arguments


def read_budgets(named: Sequence[str], file: str | None) -> dict[str, dict[str, Any]]:
    """Budgets of the command line and of a file: name -> sizes.

    Raises:
        ValueError: for what cannot be read, or a name given twice.
    """
    found = {} if file is None else read_yaml(file, "budgets")
    if not all(isinstance(sizes, dict) for sizes in found.values()):
        raise ValueError(f"budgets: {file} is not a mapping of names to sizes")
    found = {str(name): sizes for name, sizes in found.items()}
    for text in named:
        name, _, sizes = text.partition(":")
        if not name or not sizes:
            raise ValueError(f"budget={text!r}: allowed is NAME:FIELD=SIZE,... such as 6b:hidden_size=3072,depth=46")
        if name in found:
            raise ValueError(f"budget: {name!r} is given twice")
        pairs = [pair.partition("=") for pair in sizes.split(",")]
        found[name] = {field.strip(): whole_number("budget", text, size) for field, _, size in pairs}
    return found


def read_choices(given: Sequence[str] | None) -> dict[str, list[int]] | None:
    """FIELD=SIZE,... -> field -> sizes; None if none were given."""
    if given is None:
        return None
    parts = [(text, *text.partition("=")[::2]) for text in given]
    return {
        field.strip(): [whole_number("choices", text, size) for size in sizes.split(",")]
        for text, field, sizes in parts
    }


def whole_number(flag: str, text: str, size: str) -> int:
    """A size in the text of a flag."""
    if not size.strip().isdigit():
        raise ValueError(f"{flag}={text!r}: allowed are whole numbers, not {size!r}")
    return int(size)


def make_rows(arguments: argparse.Namespace, source: Path) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Rows to score on, and held-out rows; documents in an order of the seed's."""
    tokenizer = load_tokenizer(source)
    if arguments.calibration is None:
        kept, rest = split_documents(read_documents())
        texts, others = [document.text for document in kept], [document.text for document in rest]
    else:
        texts = [text for _, text in read_texts(arguments.calibration, arguments.column)]
        others = [text for _, text in read_texts(arguments.held_out, arguments.column)] if arguments.held_out else None
    random.Random(arguments.seed).shuffle(texts)
    stream = iter(texts)
    end = end_token(tokenizer)
    rows = packed_rows(tokenizer, end, stream, "rows", arguments.rows, arguments.sequence_length)
    rest = stream if others is None else iter(others)
    return rows, packed_rows(tokenizer, end, rest, "held_out_rows", arguments.held_out_rows, arguments.sequence_length)


def write_weights(
    source: Path, config: NemotronHConfig | NemotronHVLConfig, order: Kept, staging: Path, num_bytes: int
) -> dict[str, str]:
    """Write the weights in their new order and the other files to a folder without config.json; returns checksums by name."""
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="weights") as bar:
        digests = permute_checkpoint(source, config, order, staging, bar.update)
    code = sorted(path.name for path in source.glob("*.py")) if "auto_map" in config.to_dict() else []
    copy_files(dict.fromkeys([*TOKENIZER_FILES, *PROCESSOR_FILES, *code]), source, staging)
    return {name: digest.sha256 for name, digest in digests.items()}


def write_rest(
    config: NemotronHConfig | NemotronHVLConfig, parent: Parent, checksums: dict[str, str], staging: Path
) -> None:
    """Manifest, importance, and last the config with its budgets."""
    write_manifest(staging, checksums)
    write_importance(staging / "importance", parent)
    config.get_text_config().elastic = parent.elastic.to_dict()
    write_text(staging / "config.json", config.to_json_string(use_diff=False))


def write_importance(folder: Path, parent: Parent) -> None:
    """Scores as JSON, and a plot for each axis where matplotlib is installed."""
    from nemotron_h_hf.elastic.prepare.scores import write_scores

    folder.mkdir()
    write_scores(folder / "scores.json", parent.importance, parent.removals)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: pip install 'nemotron-h-hf[plot]'", file=sys.stderr)
        return
    from nemotron_h_hf.elastic.prepare.scores_plot import draw_scores

    draw_scores(folder, parent)


def as_text(output: Path, parent: Parent) -> Iterator[str]:
    """What was made, for people."""
    elastic = parent.elastic
    yield f"{output} holds the parent, loss {elastic.calibration['loss']:.4f} on held-out text, and in it"
    for name, budget in elastic.budgets.items():
        sizes = ", ".join(f"{f}={v}" for f, v in budget.sizes().items())
        yield f"  {name:<10}loss {budget.loss:.4f}, not trained yet: {sizes}"


if __name__ == "__main__":
    sys.exit(main())
