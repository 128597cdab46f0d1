"""The engine: many requests to many budgets of one parent, one thread, one memory image.

    engine = Engine(parent, tokenizer)
    answers = engine.generate([Request(tokens=ids, budget="6b", max_tokens=64), ...])       # offline
    engine.start(); job = engine.submit(request, deliver); job.cancel(); engine.stop()      # a server's

One turn is: let go of what was cancelled, admit what fits, one decode step of one budget's running batch, one piece of one
prompt. Budgets take turns, prompts too; a prompt that is read joins its budget's batch with a copy of its cache for each
continuation. Rows never see each other: each has its own generator, stops and limits (row.py), and left padding is exact
because the model has no position embedding (`HybridCache.join`).

What goes wrong in a row ends that row's request. A batch that fails is read again row by row, each alone until it has written
a token, to find the request that fails.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..elastic.budgets import Budget
from ..elastic.child import Child
from ..errors import require
from ..model.cache import HybridCache
from .admission import Room
from .batch import Batch
from .budgets import Budgets
from .heap import give_back
from .jobs import Deliver, Job, Reading
from .prefix_cache import PrefixCache
from .requests import Answer, Busy, Piece, Request, Stopped, TooLarge
from .row import Row
from .sampling import seeds

logger = logging.getLogger(__name__)

Watch = Callable[[str, str, float], None]
TIDY = 1.0  # seconds between two looks at the heap


class Engine:
    """Serves one model and, if it is an elastic parent, all of its budgets.

    Args:
        model: `NemotronHElasticForCausalLM`, or another Nemotron-H model, which has no budgets.
        tokenizer: for text, stop texts and thinking; None gives tokens alone.
        name: of the model in requests.
        max_batch: rows that run at once, of all budgets together.
        max_context: tokens of prompt and answer together.
        memory: bytes for the caches of running rows; kept prompts use what they leave.
        queue: requests that may wait.
        piece: tokens of a prompt that are read in one turn.
        watch: called with (what, budget, value) for metrics.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str = "parent",
        max_batch: int = 32,
        max_context: int | None = None,
        memory: int = 2**30,
        queue: int = 256,
        piece: int = 512,
        watch: Watch = lambda what, budget, value: None,
    ) -> None:
        for field_name, value in (("max_batch", max_batch), ("memory", memory), ("piece", piece)):
            require(value >= 1, field_name, value, "a positive integer")
        self.budgets, self.tokenizer, self.watch = Budgets(model.eval(), name), tokenizer, watch
        self.max_batch, self.queue, self.piece = max_batch, queue, piece
        self.max_context = max_context or model.config.max_position_embeddings
        self.room, self.prefixes = Room(memory, str(model.dtype)), PrefixCache(memory)
        eos = model.generation_config.eos_token_id if model.generation_config.eos_token_id is not None else ()
        self.ends = {eos} if isinstance(eos, int) else set(eos)
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.reading: deque[Reading] = deque()
        self.batches: dict[Budget | tuple[Budget, Row], Batch] = {}
        self.seconds_per_request = 1.0
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = self._aborting = False
        self._swept, self._tidied = True, 0.0

    # From outside

    def submit(self, request: Request, deliver: Deliver, wait: bool = False) -> Job:
        """Queue a request.

        Raises:
            Busy: if the queue is full, unless `wait`.
            TooLarge: if it can never fit.
            ValueError: for a budget or a token that is not there.
        """
        job = Job(request, deliver, self.budgets.find(request.budget), None)
        if request.answer_budget is not None:
            require(self.tokenizer is not None, "answer_budget", request.answer_budget, "None without a tokenizer")
            job.answer = self.budgets.find(request.answer_budget)
        self._check(job)
        with self._wake:
            if self._stopping:
                raise Busy(10)
            if not wait and len(self.waiting) >= self.queue and (self.waiting or not self._fits(job)):
                raise Busy(self._seconds_to_wait())
            self.waiting.append(job)
            self._wake.notify()
        return job

    def generate(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """All of them, in their order: the continuations of each. In this thread, unless the engine's own is running.

        Raises:
            Exception: the first that a request failed with; the others are cancelled.
        """
        answers = [[Answer() for _ in range(request.n)] for request in requests]
        failures: list[Exception] = []
        done = threading.Event()
        left = [sum(request.n for request in requests)]

        def take(number: int, piece: Piece | Exception) -> None:
            if isinstance(piece, Exception):
                failures.append(piece)
            else:
                answers[number][piece.index].add(piece)
                left[0] -= piece.finish_reason is not None
            if failures or not left[0]:
                done.set()

        jobs: list[Job] = []
        try:
            for number, request in enumerate(requests):
                jobs.append(self.submit(request, lambda piece, number=number: take(number, piece), wait=True))
            while jobs and not done.is_set():
                if self._thread is None:
                    self.turn()
                else:
                    done.wait()
        finally:
            for job in jobs:
                job.cancel()
            if self._thread is None:
                self.turn()
        if failures:
            raise failures[0]
        return answers

    def start(self) -> None:
        """Run in a thread of its own."""
        self._stopping = self._aborting = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self, seconds: float = 0) -> None:
        """Take nothing new, give what is there so much time to finish, then cancel it."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(seconds)
            self._aborting = True
            self._thread.join()
            self._thread = None

    def is_alive(self) -> bool:
        """Whether the thread runs and takes requests."""
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    def status(self) -> dict:
        """Memory and batches now, for people and metrics."""
        rows: Counter[str] = Counter(
            self.budgets.label(row.child) for it in list(self.batches.values()) for row in it.rows
        )
        held = [it.cache for it in [*self.batches.values(), *self.reading]]
        caches = sum(cache.memory_bytes()["total"] for cache in held if cache is not None)
        return {
            "image_bytes": self.budgets.image_bytes(), "extra_bytes": self.budgets.extra_bytes(), "cache_bytes": caches,
            "prefix_bytes": self.prefixes.num_bytes, "reserved_bytes": self.room.reserved(), "memory_bytes": self.room.limit,
            "rows": dict(rows), "reading": len(self.reading), "waiting": len(self.waiting), "max_batch": self.max_batch,
        }  # fmt: skip

    # In the engine's thread

    def turn(self) -> bool:
        """One turn; whether there was anything to do."""
        with torch.inference_mode():
            self._drop_cancelled()
            self._admit()
            batch = self._next_batch()
            if batch is not None:
                self._decode(batch)
            if self.reading:
                self._read(self.reading.popleft())
        if time.monotonic() > self._tidied + TIDY:
            give_back()
            self._tidied = time.monotonic()
        return batch is not None or bool(self.reading) or bool(self.running)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self.waiting and not self.running:
                    if self._stopping:
                        return
                    self._wake.wait()
            try:
                self.turn()
            except Exception as error:  # of the engine itself: nothing that it holds can be trusted
                self._fail_all(error)

    def _check(self, job: Job) -> None:
        request, vocabulary = job.request, self.budgets.model.config.vocab_size
        for name, ids in (("prompt", request.tokens), ("logit_bias", request.logit_bias or [0])):
            least, most = min(ids), max(ids)
            require(0 <= least and most < vocabulary, name, [least, most], f"ids from 0 to {vocabulary - 1}")
        total = len(request.tokens) + request.max_tokens
        if total > self.max_context:
            raise TooLarge(
                f"max_tokens={request.max_tokens} after a prompt of {len(request.tokens)} tokens: allowed are "
                f"{self.max_context} tokens together"
            )
        if request.n > self.max_batch:
            raise TooLarge(f"n={request.n}: allowed is at most {self.max_batch}, the rows that run at once")
        needed = self.room.alone(job)
        if needed > self.room.limit:
            raise TooLarge(
                f"max_tokens={request.max_tokens} after {len(request.tokens)} tokens, n={request.n}: this takes {needed} "
                f"bytes of cache, allowed are {self.room.limit}"
            )

    def _seconds_to_wait(self) -> int:
        return max(1, round(self.seconds_per_request * len(self.waiting) / self.max_batch))

    def _drop_cancelled(self) -> None:
        for job in [job for job in self.running if job.cancelled or self._aborting]:
            self._forget(job)
            if not job.cancelled:
                self._deliver(job, Stopped())
        with self._wake:
            gone = [job for job in self.waiting if job.cancelled or self._aborting]
            self.waiting = deque(job for job in self.waiting if job not in gone) if gone else self.waiting
        for job in gone:
            if not job.cancelled:
                self._deliver(job, Stopped())
        if not self._swept:
            self._swept = True
            for batch in self.batches.values():
                batch.drop([row for row in batch.rows if row.job not in self.running])

    def _admit(self) -> None:
        """Start what waited longest, as long as it fits."""
        while self.waiting:
            with self._wake:
                job = self.waiting[0]
                if not self._fits(job):
                    return
                self.waiting.popleft()
                self.running.append(job)
                self.room.enter(job)
            self.prefixes.shrink(self.room.limit - self.room.reserved())
            self._guarded(job, self._begin, job)

    def _fits(self, job: Job) -> bool:
        rows = sum(it.request.n for it in list(self.running)) + job.request.n
        return rows <= self.max_batch and self.room.fits(job)

    def _begin(self, job: Job) -> None:
        self.watch("queue_seconds", self._label(job.child), time.monotonic() - job.since)
        generators = seeds(job.request, self.budgets.model.device)
        job.rows = [Row(job, i, self.tokenizer, self.ends, own) for i, own in enumerate(generators)]
        first = job.child
        if job.answer is not None and job.rows[0].thinking.closed:
            first = job.answer
        for row in job.rows:
            row.may_switch = job.answer not in (None, first)
        self._start_reading(job, job.rows, first)

    def _start_reading(self, job: Job, rows: list[Row], child: Child) -> None:
        """Read the tokens that the rows have in common for a model; what is kept of them need not be read."""
        reading = Reading(job, rows, child, list(rows[0].tokens))
        for row in rows:
            row.child = child
        reading.position, reading.cache = self.prefixes.longest(child.budget, reading.tokens)
        if len(reading.tokens) == len(job.request.tokens):
            job.num_cached = reading.position
        self.reading.append(reading)

    def _read(self, reading: Reading) -> None:
        """One piece; with the last one its rows join their batch."""
        job = reading.job
        if job.cancelled:
            return
        logits = self._guarded(job, self._read_piece, reading)
        if job not in self.running:
            return
        if reading.position < len(reading.tokens):
            self.reading.append(reading)
            return
        going = [row for row in reading.rows if self._advance(row, logits)]
        if going and job in self.running:
            self._guarded(job, self._join, going, reading)

    def _read_piece(self, reading: Reading) -> torch.Tensor:
        """Logits (v) after the next piece, which ends where a state is worth keeping."""
        tokens, start = reading.tokens, reading.position
        end = min([start + self.piece, *(place for place in self._places(reading) if place > start)])
        model = self._model(reading.child)
        if reading.cache is None:
            reading.cache = HybridCache(model.config)
        fed = torch.tensor([tokens[start:end]], device=model.device)
        logits = model(fed, cache=reading.cache, logits_to_keep=1).logits[0, -1].float()
        reading.position = end
        if end in self._places(reading)[:-1] or end % (4 * self.piece) == 0:
            self._keep(reading.child, tokens[:end], reading.cache.fork)
        return logits

    def _places(self, reading: Reading) -> list[int]:
        """Where reading must stop: marks, before the last token, the end."""
        length = len(reading.tokens)
        return sorted({*(mark for mark in reading.job.request.marks if 0 < mark < length), max(1, length - 1), length})

    def _keep(self, child: Child, tokens: Sequence[int], cache: Callable[[], HybridCache]) -> None:
        """Keep a copy of a state for later prompts, if there is memory for one."""
        self.prefixes.limit = self.room.limit - self.room.reserved()
        try:
            if not self.prefixes.has(child.budget, tokens):
                self.prefixes.put(child.budget, tokens, cache())
        except Exception as error:  # nobody waits for it
            logger.warning("a state is not kept: %s", type(error).__name__)
            self._free()

    def _join(self, rows: list[Row], reading: Reading) -> None:
        """Into the running batch of their budget; a row on probation has one of its own."""
        key = (reading.child.budget, rows[0]) if rows[0].on_probation else reading.child.budget
        self.batches.setdefault(key, Batch(self._model(reading.child))).join(rows, reading.cache)

    def _model(self, child: Child) -> PreTrainedModel:
        return self.budgets.model_of(child, self._in_use())

    def _in_use(self) -> set[Budget]:
        return {row.child.budget for job in self.running for row in job.rows}

    def _next_batch(self) -> Batch | None:
        """Of the batches with rows, the one that has waited longest."""
        for key in [key for key, batch in self.batches.items() if not batch.rows]:
            del self.batches[key]
        if not self.batches:
            return None
        key = next(iter(self.batches))
        batch = self.batches[key] = self.batches.pop(key)
        return batch

    def _decode(self, batch: Batch) -> None:
        started, rows, label = time.monotonic(), list(batch.rows), self._label(batch.rows[0].child)
        try:
            logits = batch.step()
        except Exception as error:
            self._step_failed(batch, error)
            return
        going = [row for row, own in zip(rows, logits) if self._advance(row, own)]
        self.watch("batch_rows", label, len(rows))
        self.watch("step_seconds", label, time.monotonic() - started)
        for row in rows:
            if row.finish_reason:
                self._keep(row.child, row.tokens[:-1], lambda row=row: batch.take(row))
        for row in [row for row in going if row.on_probation]:  # it was not the one
            row.on_probation = False
            self._join_others(batch, row)
        batch.drop([row for row in rows if row not in going])

    def _join_others(self, batch: Batch, row: Row) -> None:
        """A row that ran alone is among the others again."""
        others = self.batches.setdefault(row.child.budget, Batch(batch.model))
        others.join([row], batch.cache)
        batch.rows, batch.cache = [], None

    def _advance(self, row: Row, logits: torch.Tensor) -> bool:
        """Give a row its next token; whether it goes on in the same batch."""
        job = row.job
        if job not in self.running or job.cancelled:
            return False
        piece = self._guarded(job, row.advance, logits)
        if piece is None:
            return False
        self._measure(job, row)
        self._deliver(job, piece)
        if row.finish_reason is not None:
            self._finished(job, row)
            return False
        if row.switches():
            self._guarded(job, self._start_reading, job, [row], job.answer)
            return False
        return True

    def _deliver(self, job: Job, piece: Piece | Exception) -> None:
        try:
            job.deliver(piece)
        except Exception as error:  # the receiver has gone
            logger.warning("a receiver failed with %s: its request is cancelled", type(error).__name__)
            job.cancel()

    def _measure(self, job: Job, row: Row) -> None:
        now, label = time.monotonic(), self._label(row.child)
        if job.last is None:
            self.watch("first_token_seconds", label, now - job.since)
            self.watch("prompt_tokens", label, row.num_prompt)
            self.watch("cached_tokens", label, job.num_cached)
        elif job.request.n == 1:
            self.watch("token_seconds", label, now - job.last)
        self.watch("generated_tokens", label, 1)
        job.last = now

    def _finished(self, job: Job, row: Row) -> None:
        if all(it.finish_reason for it in job.rows):
            self.running.remove(job)
            self.room.leave(job)
            self.watch("requests", f"{self._label(row.child)}|{row.finish_reason}", 1)
            took = time.monotonic() - job.since
            self.seconds_per_request += 0.1 * (took - self.seconds_per_request)

    def _forget(self, job: Job, reason: str = "cancelled") -> None:
        """Work no more for a job."""
        if job not in self.running:
            return
        self.running.remove(job)
        self.room.leave(job)
        self.reading = deque(it for it in self.reading if it.job is not job)
        self._swept = False  # batches let its rows go before the next step
        self.watch("requests", f"{self._label(job.child)}|{reason}", 1)

    def _guarded(self, job: Job, function: Callable, *args):
        """Call a function for one job; what it raises ends that job alone."""
        try:
            return function(*args)
        except Exception as error:
            self._fail(job, error)
            return None

    def _fail(self, job: Job, error: Exception) -> None:
        logger.error("a request failed with %s", type(error).__name__, exc_info=logger.isEnabledFor(logging.DEBUG))
        if _is_out_of_memory(error):
            self._free()
        self._forget(job, "error")
        self._deliver(job, error)

    def _fail_all(self, error: Exception) -> None:
        for job in list(self.running):
            self._fail(job, error)
        with self._wake:
            waiting, self.waiting = self.waiting, deque()
        for job in waiting:
            self._deliver(job, error)
        self.batches.clear()
        self.reading.clear()

    def _step_failed(self, batch: Batch, error: Exception) -> None:
        """Of a failed batch, the only row fails, or all rows are read again to run alone until they have written a token."""
        rows, batch.rows, batch.cache = batch.rows, [], None
        if _is_out_of_memory(error):
            self._free()
        if len(rows) == 1:
            self._fail(rows[0].job, error)
            return
        logger.warning("a batch of %d rows failed with %s: each is tried alone", len(rows), type(error).__name__)
        for row in rows:
            row.on_probation = True
            self._guarded(row.job, self._start_reading, row.job, [row], row.child)

    def _free(self) -> None:
        self.prefixes.shrink(0)
        give_back()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _label(self, child: Child) -> str:
        return self.budgets.label(child)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
