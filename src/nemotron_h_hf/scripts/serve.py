"""Serve a model, and every budget of an elastic parent, behind an OpenAI API, from one memory image.

    nemotron-h serve                                                       # the embedded model on 127.0.0.1:8000
    nemotron-h serve path/to/parent --budget 6b --max-batch 64 --cache-bytes 20GiB
    nemotron-h serve path/to/parent --host 0.0.0.0 --api-key-file keys.txt # one key on each line

Models are NAME, NAME:6b, NAME:7GiB@32Ki (the best that fits), NAME:6b>12b (the first thinks, the second answers); see
/v1/models. Needs the `serve` extra.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHElasticForCausalLM
from nemotron_h_hf.command_line import argument, option, read_options
from nemotron_h_hf.errors import require
from nemotron_h_hf.inputs import load_tokenizer, read_device
from nemotron_h_hf.serving.engine import Engine
from nemotron_h_hf.units import human_bytes, parse_bytes, tokens

DTYPES = ("auto", "float32", "bfloat16", "float16")
SHARE = 0.5  # of the free memory, for caches


@dataclass(frozen=True)
class ServeArguments:
    """What the command line says."""

    model: str = argument("checkpoint folder or hub id (the embedded model)", nargs="?", default=EMBEDDED_MODEL)
    budget: str | None = option(None, "serve this budget alone, read without the rest of its parent")
    name: str | None = option(None, "of the model in requests (the last part of MODEL)")
    host: str = option("127.0.0.1", "where to listen (127.0.0.1: this machine alone)")
    port: int = option(8000, "(8000); 0 takes a free one")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1")
    dtype: str = option("auto", "of the weights (auto: as stored)", choices=DTYPES)
    max_batch: int = option(32, "rows that run at once, of all budgets (32)")
    max_context: int | None = option(None, "tokens of prompt and answer together (as configured)", type=tokens)
    cache_bytes: str | None = option(None, "for all caches, such as 20GiB (half of what is free)")
    queue: int = option(256, "requests that may wait (256)")
    piece: int = option(512, "tokens of a prompt that are read between two steps (512)")
    api_key_file: str | None = option(None, "file with one key on each line; requests then need one of them")
    max_body: str = option("16MiB", "of a request (16MiB)")
    drain: float = option(30, "seconds that running requests have at the end (30)", type=float)


def main(argv: Sequence[str] | None = None) -> int:
    """Load, listen, end in order on SIGINT or SIGTERM."""
    arguments = parse(argv)
    try:
        from nemotron_h_hf.serving.limits import read_keys
        from nemotron_h_hf.serving.metrics import Metrics
        from nemotron_h_hf.serving.server import run
    except ImportError as error:
        raise ImportError(f"serving needs: pip install 'nemotron-h-hf[serve]' ({error.name} is missing)") from None
    keys = read_keys(arguments.api_key_file) if arguments.api_key_file else []
    disable_progress_bar()
    model, tokenizer = load(arguments), load_tokenizer(arguments.model)
    metrics = Metrics(name_of(arguments))
    engine = Engine(
        model,
        tokenizer,
        name=metrics.name,
        max_batch=arguments.max_batch,
        max_context=arguments.max_context,
        memory=memory_for_caches(arguments, model),
        queue=arguments.queue,
        piece=arguments.piece,
        watch=metrics.report,
    )
    metrics.of(engine)
    for entry in engine.budgets.describe():
        print(f"{entry['id']}: {entry['parameters']:,} parameters, {human_bytes(entry['bytes'])}", flush=True)
    most_body = parse_bytes(arguments.max_body, "--max-body")
    return run(engine, metrics, arguments.host, arguments.port, keys=keys, most_body=most_body, drain=arguments.drain)


def load(arguments: ServeArguments) -> PreTrainedModel:
    """The parent with its budgets, one budget of it alone, or a model that has none."""
    device = read_device(arguments.device)
    elastic = bool(AutoConfig.from_pretrained(arguments.model).elastic)
    require(
        elastic or arguments.budget is None, "--budget", arguments.budget, "to leave it out: the model names no budgets"
    )
    if elastic and arguments.budget is None:
        return NemotronHElasticForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).to(device)
    options = {} if arguments.budget is None else {"budget": arguments.budget}
    return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype, **options).to(device)


def name_of(arguments: ServeArguments) -> str:
    """The model's name in requests: as given, or the last part of its place."""
    name = arguments.name or Path(arguments.model.rstrip("/")).name
    require(bool(re.fullmatch(r"[\w.-]+", name)), "--name", name, "letters, digits, '.', '-' and '_'")
    return name


def memory_for_caches(arguments: ServeArguments, model: PreTrainedModel) -> int:
    """Bytes, as given or a share of what is free."""
    if arguments.cache_bytes is not None:
        return parse_bytes(arguments.cache_bytes, "--cache-bytes")
    if model.device.type == "cuda":
        return int(SHARE * torch.cuda.mem_get_info(model.device)[0])
    return int(SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def parse(argv: Sequence[str] | None) -> ServeArguments:
    """Read and check the command line."""
    arguments = read_options(ServeArguments, argv, "serve", __doc__)
    for name in ("max_batch", "piece"):
        require(getattr(arguments, name) >= 1, f"--{name.replace('_', '-')}", getattr(arguments, name), "1 or more")
    require(arguments.queue >= 0, "--queue", arguments.queue, "0 or more")
    require(0 <= arguments.port < 2**16, "--port", arguments.port, f"0 to {2**16 - 1}")
    require(0 <= arguments.drain < float("inf"), "--drain", arguments.drain, "seconds, 0 or more")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
