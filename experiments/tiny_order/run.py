"""Why `pretrain` ended behind `train-tiny` at equal tokens: the differences between the two, one at a time (arms.py).

    python experiments/tiny_order/text.py
    python experiments/tiny_order/run.py --output runs/tiny_order --device cuda --workers 12 --minutes 9
    python experiments/tiny_order/run.py --output runs/tiny_order --runs loop:0:1001472 whole:0:1001472

A run is ARM:SEED:TOKENS; those that are done are not repeated. OUTPUT/results.json has all of them: held-out bits per byte
(the 37 files, windows of 1,024 and 2,048 tokens), the training loss over the last tenth, and the settings. Each worker is one
process; a small model leaves most of a GPU idle.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import torch
import transformers

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tiny")]

import arms  # noqa: E402
import plain_loop  # noqa: E402
import text  # noqa: E402
from bits_per_byte import bits_per_byte  # noqa: E402
from tiny_models import TrainTinyArguments, build_model, round_to_bfloat16  # noqa: E402

from nemotron_h_hf import EMBEDDED_MODEL  # noqa: E402
from nemotron_h_hf.scripts import pretrain  # noqa: E402
from nemotron_h_hf.training import optimizer  # noqa: E402

SHORT, EARLY = 2_498_560, 1_001_472
CORE = ("loop", "loop_whole", "all_rows", "whole")
DEFAULT = [
    *((arm, 0, SHORT) for arm in (*CORE, "windows", "published")),
    *((arm, 1, SHORT) for arm in CORE),
    *((arm, 0, SHORT) for arm in ("loop_published", "loop_ends", "loop_decay", "joined", "fp32", "loop_dealt")),
    *((arm, 2, SHORT) for arm in CORE),
    *((arm, 0, EARLY) for arm in (*CORE, "windows", "published")),
    *((arm, 0, SHORT) for arm in ("plain", "no_decay")),
]
CONFIG = Path("docs/results/tiny/pretrain.yaml")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path(".carry/stdlib.jsonl.xz"), help="written by text.py")
    parser.add_argument("--output", type=Path, default=Path("runs/tiny_order"))
    parser.add_argument("--runs", nargs="+", metavar="ARM:SEED:TOKENS", help="default: those of the published table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mamba", default="auto", help="who computes the Mamba layers (auto)")
    parser.add_argument("--workers", type=int, default=1, help="processes (1)")
    parser.add_argument("--minutes", type=float, default=1e4, help="stop after so long; what is done is kept")
    parser.add_argument("--limit", type=int, help="held-out files to measure on, of 37: for a look")
    arguments = parser.parse_args()
    runs = [tuple(run.split(":")) for run in arguments.runs] if arguments.runs else DEFAULT
    runs = [(arm, int(seed), int(tokens)) for arm, seed, tokens in runs]
    deadline = time.monotonic() + 60 * arguments.minutes
    arguments.output.mkdir(parents=True, exist_ok=True)
    prepare(arguments)
    todo = [run for run in runs if not (arguments.output / f"{name_of(run)}.json").is_file()]
    context = get_context("spawn")
    queue = context.Queue()
    for run in todo:
        queue.put(run)
    workers = [context.Process(target=work, args=(queue, arguments), daemon=True) for _ in range(arguments.workers)]
    for _ in workers:
        queue.put(None)
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
    for worker in workers:
        if worker.is_alive():
            worker.kill()
    return report(arguments.output, runs)


def name_of(run: tuple[str, int, int]) -> str:
    return "-".join(map(str, run))


def prepare(arguments: argparse.Namespace) -> None:
    """Texts and tokens, once for all workers."""
    path = arguments.output / "tokens.pt"
    if path.is_file():
        return
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(EMBEDDED_MODEL)
    train, held_out = text.load(arguments.text)
    ids = {
        part: tokenizer([d.text for d in documents], add_special_tokens=False, verbose=False)["input_ids"]
        for part, documents in (("train", train), ("held_out", held_out))
    }
    texts = [document.text for document in train]
    torch.save({**ids, "sizes": [len(d.text.encode()) for d in held_out], "texts": texts}, path)


def work(queue, arguments: argparse.Namespace) -> None:
    """One worker: runs until there are none."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    data = torch.load(arguments.output / "tokens.pt", weights_only=True)
    while (run := queue.get()) is not None:
        started = time.monotonic()
        try:
            result = one(run, data, arguments)
        except Exception:  # the others continue
            result = {"error": traceback.format_exc()}
            print(result["error"], file=sys.stderr, flush=True)
        result |= {"arm": run[0], "seed": run[1], "tokens": run[2], "seconds": round(time.monotonic() - started, 1)}
        name = "failed-" + name_of(run) if "error" in result else name_of(run)
        (arguments.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({key: result.get(key) for key in ("arm", "seed", "tokens", "bpb_2048", "bpb_1024", "train_loss",
                                                           "seconds")}), flush=True)  # fmt: skip


def one(run: tuple[str, int, int], data: dict, arguments: argparse.Namespace) -> dict:
    """Train and measure."""
    folder = arguments.output / name_of(run)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    train = run_loop if run[0] in arms.LOOPS else run_pretrain
    model, log, settings = train(run, data, folder, arguments)
    losses = [row["loss"] for row in map(json.loads, log.read_text(encoding="utf-8").splitlines()) if "loss" in row]
    tail = losses[-max(1, len(losses) // 10) :]
    result = {"train_loss": round(mean(tail), 4), "losses": [round(loss, 3) for loss in losses], "settings": settings}
    result |= measure(model, data, arguments)
    shutil.rmtree(folder)
    return result | {"device": device_name(arguments.device), "torch": torch.__version__,
                     "transformers": transformers.__version__, "python": platform.python_version()}  # fmt: skip


def run_loop(run: tuple[str, int, int], data: dict, folder: Path, arguments: argparse.Namespace) -> tuple:
    """The loop of `train-tiny` on the stream of an arm."""
    arm, seed, tokens = run
    stream, may_shuffle = arms.LOOPS[arm](data["train"], 0, seed, tokens)
    tiny = TrainTinyArguments(max_tokens=tokens, seed=seed)
    settings = plain_loop.LoopSettings(tokens, batch_size=2, seed=seed, save_steps=10**9)
    usual = plain_loop.batch_of_step, plain_loop.make_optimizers
    try:
        if not may_shuffle:
            plain_loop.batch_of_step = batch_in_order
        if arm == "loop_decay":
            plain_loop.make_optimizers = decay_everywhere
        model = build_model(tiny).to(arguments.device)
        model.set_mamba_implementation(arguments.mamba)
        plain_loop.train(model, stream, settings, folder)
    finally:
        plain_loop.batch_of_step, plain_loop.make_optimizers = usual
    return model, folder / plain_loop.LOG_FILE, {"loop": "train-tiny", **vars(settings)}


def batch_in_order(stream: torch.Tensor, settings: plain_loop.LoopSettings, step: int) -> torch.Tensor:
    size = settings.tokens_per_step
    return stream[step * size : (step + 1) * size].view(settings.batch_size, -1).long()


def decay_everywhere(model: torch.nn.Module, settings: plain_loop.LoopSettings) -> list[torch.optim.Optimizer]:
    """As pretrain's: weight decay acts on the embedding too."""
    both = optimizer.make_optimizer(model, "muon", settings.learning_rate, settings.weight_decay)
    assert isinstance(both.parts[0], torch.optim.Muon)
    return [both]


def run_pretrain(run: tuple[str, int, int], data: dict, folder: Path, arguments: argparse.Namespace) -> tuple:
    """`nemotron-h pretrain` on the documents in an arm's order."""
    arm, seed, tokens = run
    order_of, flags = arms.PRETRAIN[arm]
    order = order_of(len(data["texts"]), seed)
    path = folder / "text.jsonl"
    column = "text"
    if arm in ("windows", "joined"):
        column, records = "input_ids", list(ready_ids(arm, order, data, seed, tokens))
    else:
        records = [data["texts"][i] for i in order]
    path.write_text("".join(json.dumps({column: record}) + "\n" for record in records), encoding="utf-8")
    sources = {"python": {"path": str(path), "column": column, "shuffle_window": 0}}
    words = ["--config", str(CONFIG), "--sources", json.dumps(sources), *flags, "--total_tokens", str(tokens),
             "--seed", str(seed), "--save_steps", "1000000",
             "--warmup_tokens", str(min(102_400, tokens // 4)), "--use_cpu", str(arguments.device == "cpu"),
             "--mamba", arguments.mamba, "--disable_tqdm", "true",
             "--output_dir", str(folder)]  # fmt: skip
    usual = optimizer.decays
    try:
        if arm == "no_decay":
            optimizer.decays = lambda name, parameter: usual(name, parameter) and "embeddings" not in name
        pretrain.main(words)
    finally:
        optimizer.decays = usual
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = model.to(arguments.device)
    return (
        model,
        folder / "metrics.jsonl",
        {"command": "nemotron-h pretrain", "flags": flags, "order": order_of.__name__},
    )


def ready_ids(arm: str, order: Sequence[int], data: dict, seed: int, tokens: int):
    """Documents that are token ids already: the rows of `loop` as it takes them, or one of all documents laid end to end."""
    stream = arms.stream_of(data["train"], order, 0, closed=arm == "joined")
    if arm == "joined":
        yield stream[: tokens + 1].tolist()
        return
    settings = plain_loop.LoopSettings(tokens, batch_size=2, seed=seed)
    for step in range(settings.total_steps):
        yield from plain_loop.batch_of_step(stream, settings, step).tolist()


def measure(model: torch.nn.Module, data: dict, arguments: argparse.Namespace) -> dict:
    """Held-out bits per byte of the weights rounded to bfloat16, computed in fp32."""
    round_to_bfloat16(model.eval())
    documents = list(zip(data["held_out"], data["sizes"], strict=True))[: arguments.limit]
    return {
        f"bpb_{window}": round(bits_per_byte(model, documents, 0, window, window // 2), 4) for window in (1024, 2048)
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu"


def report(output: Path, runs: Sequence[tuple[str, int, int]]) -> int:
    """results.json, and a table."""
    found = {name_of(run): output / f"{name_of(run)}.json" for run in runs}
    results = [json.loads(path.read_text(encoding="utf-8")) for path in found.values() if path.is_file()]
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for result in results:
        print(f"{result['arm']:16} seed {result['seed']} {result['tokens']:>9,} tokens: "
              f"{result['bpb_2048']:.4f} (window 1,024: {result['bpb_1024']:.4f}), training loss {result['train_loss']:.4f}, "
              f"{result['seconds']:.0f} s")  # fmt: skip
    print(f"{len(results)} of {len(runs)} runs done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
