"""The jobs that are timed on one model: decoding through `generate()`, prefill, throughput, a training step, memory.

b rows, l length
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache

from .. import NemotronHForCausalLM
from ..model.arguments import CACHE_NAME
from ..training.fp8 import convert_to_fp8
from .caches import PREFILL_TOKENS, RoomyGrowingLayer, RoomyLayer, empty_cache, filled_cache, prefill
from .devices import give_memory_back, peak_flops, run_within, synchronize
from .gate import greedy, random_ids
from .largest import largest_batch
from .models import Side, name_of
from .records import Measurement
from .turns import Bench, Job, take_turns
from .work import run_bytes

WARM_STEPS = 4  # before the samples: compilation, the capture of a graph, its first replay
ROOM_STEP = 64  # room of caches is a multiple of this


class Clock(StoppingCriteria):
    """Looks at the clock after every token of `generate()`, and never stops it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        synchronize(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def decode(
    bench: Bench, side: Side, rows: int, context: int, steps: int, variant: str, row: Cache | None = None
) -> Job:
    """Single tokens of a batch through plain `generate()`, after `context` tokens; a sample is one step.

    Args:
        variant: "eager"; "graphs", which is what plain `generate()` does on a GPU; or "compiled", with a static cache.
        row: one row's cache after `context` tokens, if there is one already.
    """
    floor = bench.floor(side.costs.decode(rows, context))
    found = Measurement("decode", side.name, variant, rows, context, floor_seconds=floor)
    room, filled = decode_room(context, steps), row
    found.predicted_bytes = run_bytes(side.config, rows, room, 1, name_of(bench.dtype))

    def prepare() -> float:
        nonlocal filled
        filled = one_row(side, context) if row is None else row
        return 0.0

    def sample() -> list[float]:
        cache = filled_cache(side, filled, rows, room, static=variant == "compiled")
        times = generate_steps(side, cache, rows, context, steps, variant)
        found.warm_up_seconds = found.warm_up_seconds or times[WARM_STEPS] - times[0]
        return [after - before for before, after in zip(times[WARM_STEPS:], times[WARM_STEPS + 1 :])]

    return Job(found, sample, prepare, lambda found: {"tokens_per_second": rows / found.median})


def generate_steps(side: Side, cache: Cache, rows: int, context: int, steps: int, variant: str) -> list[float]:
    """The clock after each of the tokens that `generate()` makes from a filled cache."""
    clock = Clock(side.device)
    side.model.generate(
        random_ids(side.model, rows, context + 1),
        **{CACHE_NAME: cache},
        max_new_tokens=steps + WARM_STEPS + 1,
        stopping_criteria=StoppingCriteriaList([clock]),
        **greedy(variant),
    )
    return clock.times


def one_row(side: Side, context: int) -> Cache:
    """The cache of one prompt."""
    cache = empty_cache(side, context, static=False)
    prefill(side.model, random_ids(side.model, 1, context), cache)
    return cache


def prefill_prompts(bench: Bench, side: Side, rows: int, length: int, whole: bool = False) -> Job:
    """Prompts with new caches; in parts of bounded memory, or `whole`."""
    found = Measurement("prefill", side.name, "whole" if whole else "in parts", rows, length)
    found.floor_seconds = bench.floor(side.costs.prefill(rows, length))
    part = length if whole else min(length, PREFILL_TOKENS)
    at_once = part if whole else pass_tokens(side, rows, part)
    found.predicted_bytes = run_bytes(side.config, rows, length, at_once, name_of(bench.dtype))
    ids = random_ids(side.model, rows, length)

    def read(tokens: int) -> float:
        return timed(
            bench.device, lambda: prefill(side.model, ids[:, :tokens], empty_cache(side, length, static=False), part)
        )

    def sample() -> list[float]:
        if not whole or side.name != "ours":
            return [read(length)]
        side.model.model.tokens_per_pass = {bench.device.type: rows * length}
        try:
            return [read(length)]
        finally:
            del side.model.model.tokens_per_pass

    def figures(found: Measurement) -> dict[str, float]:
        return {
            "tokens_per_second": rows * length / found.median,
            "share_of_matrix_rate": side.costs.prefill(rows, length)[1] / found.median / bench.rates.flops_per_second,
        }

    return Job(found, sample, lambda: read(min(length, part)), figures)


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds until everything that `work` asks of the device is done."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def throughput(bench: Bench, side: Side, tokens_in: int, tokens_out: int, steps: int, most_rows: int) -> Measurement:
    """Whole requests per second at the largest batch that fits: rows prefilled one after the other, decoded together.

    Prefill is timed on one row and decoding on `steps` tokens of the whole batch, in the middle of the output; a batch then
    takes rows x prefill + tokens_out x step.
    """
    found = Measurement("throughput", side.name, "largest batch", 0, tokens_in)
    middle, room = (
        tokens_in + tokens_out // 2,
        max(room_for(tokens_in + tokens_out), decode_room(tokens_in + tokens_out // 2, steps)),
    )
    variant = "graphs" if side.name == "ours" and bench.device.type == "cuda" else "eager"
    (alone,) = take_turns(bench, [prefill_prompts(bench, side, 1, tokens_in)], num_runs=1)
    row, _, found.failure = run_within(lambda: one_row(side, middle), bench.device, bench.budget_bytes)
    found.failure = found.failure or alone.failure
    if found.failure:
        return found

    def fits(rows: int) -> bool:
        def job() -> None:
            cache = filled_cache(side, row, rows, room, static=False)
            generate_steps(side, cache, rows, middle, 1, variant)
            part = random_ids(side.model, 1, min(tokens_in, PREFILL_TOKENS))
            prefill(side.model, part, empty_cache(side, part.shape[1], static=False))

        failure = run_within(job, bench.device, bench.budget_bytes)[2]
        bench.say(f"throughput, {side.name}: {rows} rows {'do not fit' if failure else 'fit'}")
        return failure is None

    found.rows = largest_batch(fits, most_rows)
    if not found.rows:
        found.failure = "out of memory: not one row fits"
        return found
    (decoded,) = take_turns(bench, [decode(bench, side, found.rows, middle, steps, variant, row=row)], num_runs=1)
    found.failure, found.predicted_bytes, found.peak_bytes = (
        decoded.failure,
        decoded.predicted_bytes,
        decoded.peak_bytes,
    )
    if decoded.seconds:
        found.seconds = [found.rows * alone.median + tokens_out * seconds for seconds in decoded.seconds]
        found.floor_seconds = found.rows * alone.floor_seconds + tokens_out * decoded.floor_seconds
        found.figures = {
            "output_tokens_per_second": found.rows * tokens_out / found.median,
            "all_tokens_per_second": found.rows * (tokens_in + tokens_out) / found.median,
            "prefill_seconds_per_row": alone.median,
            "step_seconds": decoded.median,
        }
    return found


def train(
    bench: Bench, side: Side, length: int, compiled: bool = False, fp8: bool = False, with_step: bool = True
) -> Job:
    """Forward and backward of one row, and a step of AdamW; weights, gradients and moments in the dtype of the run.

    Args:
        fp8: converts the model, for good.
        with_step: else forward and backward alone, of sides that share their weights.
    """
    variant = f"{'fp8' if fp8 else name_of(bench.dtype)} {'compiled' if compiled else 'eager'}"
    found = Measurement("train", side.name, variant, 1, length, floor_seconds=bench.floor(side.costs.train(1, length)))
    model, ids, optimizer = side.model, random_ids(side.model, 1, length), None
    called = torch.compile(model) if compiled else model

    def step() -> None:
        accumulate_gradients(called, model, ids)
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()

    def prepare() -> float:
        nonlocal optimizer
        if fp8:
            convert_to_fp8(model, skip_first=0, skip_last=0)  # a slice has too few layers to leave eight products out
        if with_step:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=bench.device.type == "cuda")
        model.train()
        return timed(bench.device, step) + timed(bench.device, step)

    def figures(found: Measurement) -> dict[str, float]:
        flops, peak = side.costs.train(1, length)[1], peak_flops(bench.device)
        rates = {"share_of_matrix_rate": flops / found.median / bench.rates.flops_per_second}
        rates |= {"mfu": flops / found.median / peak} if peak else {}
        return {"tokens_per_second": length / found.median, **rates}

    return Job(found, lambda: [timed(bench.device, step)], prepare, figures)


def accumulate_gradients(called: nn.Module, model: nn.Module, ids: Tensor) -> None:
    """Forward with labels and backward; `called` is the model, or what compiles it."""
    options = {"skip_logits": True} if isinstance(model, NemotronHForCausalLM) else {}  # as our Trainer asks
    called(input_ids=ids, labels=ids, use_cache=False, **options).loss.backward()


def memory(bench: Bench, side: Side, context: int, whole: bool) -> Measurement:
    """Peak of one sequence of `context` tokens next to the prediction: the last part of its prompt, then a few tokens.

    Args:
        whole: compute the whole prompt; otherwise what comes before its last part is taken as read, with room and zeros.
    """
    found = Measurement("memory", side.name, "whole prompt" if whole else "last part", 1, context)
    part, room = min(context, PREFILL_TOKENS), room_for(context + WARM_STEPS)
    found.predicted_bytes = run_bytes(side.config, 1, room, pass_tokens(side, 1, part), name_of(bench.dtype))
    ids = random_ids(side.model, 1, context if whole else 2 * part)

    @torch.no_grad()
    def job() -> float:
        cache = empty_cache(side, room, static=False)
        start = time.perf_counter()
        if not whole and context > part:
            prefill(side.model, ids[:, :part], cache)
            skip_ahead(cache, context - 2 * part)
        prefill(side.model, ids[:, -part:] if not whole else ids, cache)
        for _ in range(WARM_STEPS):
            side.model(ids[:, :1], **{CACHE_NAME: cache}, use_cache=True)
        synchronize(bench.device)
        return time.perf_counter() - start

    seconds, found.peak_bytes, found.failure = run_within(job, bench.device, bench.budget_bytes)
    if found.failure is None:
        found.seconds = [seconds]
        held = found.predicted_bytes["weights"] if bench.device.type == "cpu" else 0  # a CPU's peak is what came on top
        if found.peak_bytes is not None:
            found.figures["measured_over_predicted"] = (found.peak_bytes + held) / found.predicted_bytes["total"]
    give_memory_back(bench.device)
    return found


def pass_tokens(side: Side, rows: int, part: int) -> int:
    """Tokens of each row that go through the layers at once: our model splits what is longer by itself."""
    if side.name != "ours":
        return part
    return min(part, side.model.model.pass_length(rows, side.device))


def skip_ahead(cache: Cache, tokens: int) -> None:
    """Count `tokens` more tokens as seen; their keys and values are what the memory holds (zeros)."""
    for layer in cache.layers:
        if isinstance(layer, (RoomyLayer, RoomyGrowingLayer)):
            layer.skip(tokens)


def decode_room(context: int, steps: int) -> int:
    """The length of a cache for `decode`."""
    return room_for(context + steps + WARM_STEPS + 2)


def room_for(tokens: int) -> int:
    """The length of a cache for so many tokens."""
    return -(-tokens // ROOM_STEP) * ROOM_STEP
