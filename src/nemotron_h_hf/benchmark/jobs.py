"""The jobs that are timed on one model: decoding through `generate()`, prefill, throughput, a training step, memory.

b rows, l length
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache

from .. import NemotronHForCausalLM
from ..model.arguments import CACHE_NAME
from ..training.fp8 import convert_to_fp8
from .caches import PREFILL_TOKENS, RoomyGrowingLayer, RoomyLayer, empty_cache, filled_cache, prefill
from .device_gate import greedy, random_ids
from .devices import Rates, give_memory_back, peak_flops, run_within, synchronize
from .largest import largest_batch
from .models import Side, name_of
from .records import Measurement
from .work import run_bytes

WARM_STEPS = 4  # before the samples: compilation, the capture of a graph, its first replay
ROOM_STEP = 64  # room of caches is a multiple of this


@dataclass(frozen=True)
class Bench:
    """Where and how everything is measured.

    Args:
        budget_bytes: what a job may take beyond what is held before it, on a CPU; None for all there is.
        say: told about progress.
    """

    device: torch.device
    dtype: torch.dtype
    rates: Rates
    num_runs: int
    budget_bytes: int | None
    say: Callable[[str], None]

    def floor(self, work: tuple[float, float]) -> float:
        """Seconds that these bytes and operations take at least."""
        return self.rates.floor_seconds(*work)


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
) -> Measurement:
    """Single tokens of a batch through plain `generate()`, after `context` tokens; a sample is one step.

    Args:
        variant: "eager"; "graphs", which is what plain `generate()` does on a GPU; or "compiled", with a static cache.
        row: one row's cache after `context` tokens, if there is one already.
    """
    found = Measurement(
        "decode", side.name, variant, rows, context, floor_seconds=bench.floor(side.costs.decode(rows, context))
    )
    room = decode_room(context, steps)
    found.predicted_bytes = run_bytes(side.config, rows, room, 1, name_of(bench.dtype))

    def fill() -> Cache:
        return filled_cache(
            side, one_row(side, context) if row is None else row, rows, room, static=variant == "compiled"
        )

    cache, _, found.failure = run_within(fill, bench.device, bench.budget_bytes)
    if found.failure is None:
        job = lambda: generate_steps(side, cache, rows, context, steps, variant)  # noqa: E731
        times, peak, found.failure = run_within(job, bench.device, bench.budget_bytes)
    if found.failure is None:
        found.seconds = [after - before for before, after in zip(times[WARM_STEPS:], times[WARM_STEPS + 1 :])]
        found.warm_up_seconds = times[WARM_STEPS] - times[0]
        found.peak_bytes = peak if bench.device.type == "cuda" else None
        found.figures["tokens_per_second"] = rows / found.median
    return found


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


def prefill_prompts(bench: Bench, side: Side, rows: int, length: int, whole: bool = False) -> Measurement:
    """Prompts with new caches; in parts of bounded memory, or `whole`."""
    found = Measurement("prefill", side.name, "whole" if whole else "in parts", rows, length)
    found.floor_seconds = bench.floor(side.costs.prefill(rows, length))
    part = length if whole else min(length, PREFILL_TOKENS)
    at_once = part if whole else pass_tokens(side, rows, part)
    found.predicted_bytes = run_bytes(side.config, rows, length, at_once, name_of(bench.dtype))
    before = side.model.model.__dict__.get("tokens_per_pass")
    if whole and side.name == "ours":
        side.model.model.tokens_per_pass = {bench.device.type: rows * length}
    ids = random_ids(side.model, rows, length)

    def job(tokens: int) -> float:
        synchronize(bench.device)
        start = time.perf_counter()
        prefill(side.model, ids[:, :tokens], empty_cache(side, length, static=False), part)
        synchronize(bench.device)
        return time.perf_counter() - start

    try:
        found.warm_up_seconds, _, found.failure = run_within(lambda: job(part), bench.device, bench.budget_bytes)
        for _ in range(bench.num_runs):
            seconds, peak, failure = run_within(lambda: job(length), bench.device, bench.budget_bytes)
            found.failure = found.failure or failure
            if found.failure:
                break
            found.seconds.append(seconds)
            found.peak_bytes = max(peak, found.peak_bytes or 0) if bench.device.type == "cuda" else None
    finally:
        if whole and side.name == "ours" and before is None:
            del side.model.model.tokens_per_pass
    if found.seconds:
        _, flops = side.costs.prefill(rows, length)
        found.figures["tokens_per_second"] = rows * length / found.median
        found.figures["share_of_matrix_rate"] = flops / found.median / bench.rates.flops_per_second
    return found


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
    alone = prefill_prompts(replace(bench, num_runs=1), side, 1, tokens_in)
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
    decoded = decode(bench, side, found.rows, middle, steps, variant, row=row)
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


def train(bench: Bench, side: Side, length: int, compiled: bool, fp8: bool = False) -> Measurement:
    """Forward, backward and a step of AdamW on one row; weights, gradients and moments in the dtype of the run."""
    variant = f"{'fp8' if fp8 else name_of(bench.dtype)} {'compiled' if compiled else 'eager'}"
    found = Measurement("train", side.name, variant, 1, length, floor_seconds=bench.floor(side.costs.train(1, length)))
    model, ids = side.model.train(), random_ids(side.model, 1, length)
    if fp8:
        convert_to_fp8(model, skip_first=0, skip_last=0)  # a slice has too few layers to leave eight products out
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=bench.device.type == "cuda")
    called = torch.compile(model) if compiled else model
    options = {"skip_logits": True} if isinstance(model, NemotronHForCausalLM) else {}  # as our Trainer asks

    def step() -> float:
        synchronize(bench.device)
        start = time.perf_counter()
        called(input_ids=ids, labels=ids, use_cache=False, **options).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(bench.device)
        return time.perf_counter() - start

    for number in range(bench.num_runs + 2):
        seconds, peak, found.failure = run_within(step, bench.device, bench.budget_bytes)
        if found.failure:
            break
        if number < 2:
            found.warm_up_seconds += seconds
        else:
            found.seconds.append(seconds)
            found.peak_bytes = peak if bench.device.type == "cuda" else None
    side.model.eval()
    if found.seconds:
        _, flops = side.costs.train(1, length)
        found.figures["tokens_per_second"] = length / found.median
        found.figures["share_of_matrix_rate"] = flops / found.median / bench.rates.flops_per_second
        if peak := peak_flops(bench.device):
            found.figures["mfu"] = flops / found.median / peak
    return found


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
