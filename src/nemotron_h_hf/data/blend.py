"""Documents from several sources in the proportions of each phase, exact to one document, resumable anywhere.

Which source is next is decided as in fair queueing (WF2Q, Bennett and Zhang 1996). With T tokens handed out in a phase, a
source of weight w and c tokens so far is owed w*T - c. Of the sources that are not ahead of their share, the one whose
next document is due first, at (c + its length) / w, comes next. At every moment of a phase each source is therefore within
one (longest) document of its share; always taking the source owed most would drift further.

Phases end by the tokens of documents, or, where documents stay whole, by the tokens of the rows that they fill.

The state is small and JSON-able: token counts, and the place of each source's next document.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .bad_data import BadData
from .phases import Phase, Span, resolve_phases
from .readers import Record
from .sources import Source, SourceStream

logger = logging.getLogger(__name__)

Encoded = Any  # token ids, or a mapping with input_ids and perhaps labels


class Blend:
    """Iterates `(source name, encoded document)` until `total_tokens` were handed out (and `read_ahead`); resumes there.

    Args:
        sources: the sources that weights name.
        phases: their weights; see phases.py.
        encode: text (or the content of the source's column) -> token ids, or a dict with `input_ids` and `labels`, to
            which `origin` (file and line) is added. A ValueError that it raises counts as bad data.
        total_tokens: length of the run, for the phases and the end. The last document may reach beyond.
        seed: of the order of files and documents.
        on_bad_data: "skip" (with count and warning) or "error".
        max_document_tokens: longer documents are bad data; None for no limit.
        read_ahead: tokens that may be handed out beyond the run's, as more of the last phase: rows that are dealt out of a
            window are then drawn from a full one to the end.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        phases: Sequence[Phase],
        encode: Callable[[Any], Encoded],
        total_tokens: int,
        seed: int = 0,
        on_bad_data: str = "skip",
        max_document_tokens: int | None = None,
        read_ahead: int = 0,
    ):
        names = [source.name for source in sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources have the names {', '.join(names)}; each name is allowed once")
        self.total_tokens, self.read_ahead = total_tokens, read_ahead
        self.seed = seed
        self.spans: list[Span] = resolve_phases(phases, names, total_tokens)
        self.tokens = 0
        self._filled = 0
        self._phase_tokens = [dict.fromkeys(span.weights, 0) for span in self.spans]
        used = {name for span in self.spans for name in span.weights}
        self._feeds = {
            source.name: _Feed(SourceStream(source, seed, on_bad_data), encode, max_document_tokens)
            for source in sources
            if source.name in used
        }

    @property
    def phase(self) -> int:
        """Number of the current phase, from 0; after the end the last one."""
        place = max(self.tokens, self._filled)
        return next((i for i, span in enumerate(self.spans) if place < span.end), len(self.spans) - 1)

    @property
    def asks_filled(self) -> bool:
        """Whether the tokens of rows decide anything: where phases change."""
        return len(self.spans) > 1

    def __iter__(self) -> Iterator[tuple[str, Encoded]]:
        while (item := self.take()) is not None:
            yield item

    def take(self, filled: int = 0) -> tuple[str, Encoded] | None:
        """The next (source name, document), None after the last.

        Args:
            filled: tokens, padding included, of the rows that the documents so far fill; phases end by that if it is more
                than the tokens of the documents.
        """
        if self.tokens >= self.total_tokens + self.read_ahead:
            return None
        self._filled = max(self._filled, filled)
        phase = self.phase
        name = self._choose(self.spans[phase].weights, self._phase_tokens[phase])
        encoded, length = self._feeds[name].take()
        self._phase_tokens[phase][name] += length
        self.tokens += length
        return name, encoded

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: the next document is the one that follows the last one handed out."""
        return {
            "seed": self.seed,
            "tokens": self.tokens,
            "filled": self._filled,
            "phase_tokens": [dict(tokens) for tokens in self._phase_tokens],
            "spans": [[span.start, span.end, span.weights] for span in self.spans],
            "sources": {name: feed.state_dict() for name, feed in self._feeds.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly after the last document that `state` saw.

        Raises:
            ValueError: if the seed, the sources, their files, or the phases that have begun are not the state's.
        """
        if state["seed"] != self.seed:
            raise ValueError(f"seed is {self.seed}, the state was saved with {state['seed']}: allowed is that one")
        if set(state["sources"]) != set(self._feeds):
            raise ValueError(f"sources are {sorted(self._feeds)}, the state was saved with {sorted(state['sources'])}")
        begun = sum(start <= max(state["tokens"], state["filled"]) for start, _, _ in state["spans"])
        spans = [[span.start, span.end, span.weights] for span in self.spans]
        # the end of the phase that runs may move, where it begins and its weights may not
        if [s[::2] for s in spans[:begun]] != [s[::2] for s in state["spans"][:begun]]:
            raise ValueError(
                f"phases are {spans}, the state was saved with {state['spans']}; those begun may not change"
            )
        if spans != state["spans"]:
            logger.warning("phases that had not ended when the state was saved are changed: %s", spans)
        self.tokens, self._filled = state["tokens"], state["filled"]
        self._phase_tokens = [dict.fromkeys(span.weights, 0) for span in self.spans]
        for now, saved in zip(self._phase_tokens[:begun], state["phase_tokens"], strict=False):
            now.update(saved)
        for name, feed in self._feeds.items():
            feed.load_state_dict(state["sources"][name])

    def report(self) -> dict[str, dict[str, Any]]:
        """By source: `tokens`, `documents`, `epoch` (from 0), `tokens_by_phase`, `bad` (unusable records by kind), and
        `num_records` of the whole source, None where that is not known before it is read."""
        by_phase = {name: [tokens.get(name, 0) for tokens in self._phase_tokens] for name in self._feeds}
        return {
            name: {"tokens": sum(by_phase[name]), "tokens_by_phase": by_phase[name], **feed.report()}
            for name, feed in self._feeds.items()
        }

    def left_out(self) -> dict[str, dict[str, int]]:
        """By source, how many records could not be used, by kind of problem."""
        return {name: entry["bad"] for name, entry in self.report().items()}

    def _choose(self, weights: Mapping[str, float], tokens: Mapping[str, int]) -> str:
        """Of the sources not ahead of their share, the one whose next document is due first."""
        total = sum(tokens.values())
        ahead = {name: tokens[name] - weight * total for name, weight in weights.items()}
        limit = max(0.0, min(ahead.values()))  # rounding must not leave none
        return min(
            (name for name in weights if ahead[name] <= limit),
            key=lambda name: ((tokens[name] + self._feeds[name].next_length()) / weights[name], name),
        )


class _Feed:
    """Encoded documents of one source, of which the next is looked at before it is taken."""

    def __init__(self, stream: SourceStream, encode: Callable[[Any], Encoded], max_tokens: int | None):
        self.stream = stream
        self.encode = encode
        self.max_tokens = max_tokens
        self.documents = 0
        self.bad = BadData(stream.source.name, stream.bad.policy)  # found by encoding; the stream counts its own
        self._next: tuple[Encoded, int] | None = None
        self._before = self._here()  # the state before the document looked at

    def next_length(self) -> int:
        """Tokens of the next document."""
        if self._next is None:
            self._before = self._here()
            self._next = self._find()
        return self._next[1]

    def take(self) -> tuple[Encoded, int]:
        """The next document and its tokens."""
        self.next_length()
        taken, self._next = self._next, None
        self.documents += 1
        return taken

    def state_dict(self) -> dict[str, Any]:
        return self._here() if self._next is None else self._before

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self.documents = state["documents"]
        self.bad.counts = Counter(state["bad"])
        self._next = None

    def report(self) -> dict[str, Any]:
        bad = dict(self.stream.bad.counts + self.bad.counts)
        return {
            "documents": self.documents, "epoch": self.stream.epoch, "bad": bad, "num_records": self.stream.num_records,
        }  # fmt: skip

    def _here(self) -> dict[str, Any]:
        return {"stream": self.stream.state_dict(), "documents": self.documents, "bad": dict(self.bad.counts)}

    def _find(self) -> tuple[Encoded, int]:
        """The next document that can be used; a whole epoch without one is an error."""
        first_epoch = self.stream.epoch
        for record in self.stream:
            if self.stream.epoch > first_epoch + 1:
                break
            found = encoded_document(record, self.encode, self.bad, self.max_tokens)
            if found is not None:
                return found
        name = self.stream.source.name
        raise ValueError(f"source {name}: no usable document in a whole epoch; the last problem was: {self.bad.last}")


def encoded_document(
    record: Record, encode: Callable[[Any], Encoded], bad: BadData, max_tokens: int | None
) -> tuple[Encoded, int] | None:
    """A record's document, a mapping with its `origin`, and its tokens; None, with a report, if it cannot be used."""
    try:
        encoded = encode(record.value)
    except ValueError as error:
        return bad.report(record.origin, "cannot be encoded", str(error))
    named = isinstance(encoded, Mapping)
    length = len(encoded["input_ids"] if named else encoded)
    if length == 0:
        return bad.report(record.origin, "no tokens")
    if max_tokens is not None and length > max_tokens:
        return bad.report(record.origin, "too long", f"{length} tokens, allowed are {max_tokens}")
    return {**encoded, "origin": record.origin} if named else encoded, length
