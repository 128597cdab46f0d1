"""Records that cannot be used: each is reported with its place, counted by kind and skipped, or stops the run."""

import logging
from collections import Counter
from collections.abc import Mapping

from torch import distributed

logger = logging.getLogger(__name__)

POLICIES = ("skip", "error")
SHOWN_PER_KIND = 5  # in the log; all are counted


class BadData:
    """Counts of one source's unusable records by kind of problem.

    Args:
        source: the name used in the reports.
        policy: "skip" counts and continues, "error" raises at the first one.
    """

    def __init__(self, source: str, policy: str = "skip"):
        if policy not in POLICIES:
            raise ValueError(f"on_bad_data={policy!r}: allowed are {' and '.join(map(repr, POLICIES))}")
        self.source = source
        self.policy = policy
        self.counts: Counter[str] = Counter()
        self.last = ""

    def report(self, origin: str, problem: str, detail: str = "") -> None:
        """Note one unusable record.

        Args:
            origin: file and line, such as `web/a.jsonl:17`.
            problem: the kind of problem, under which it is counted.
            detail: what distinguishes this one, for the message alone.

        Raises:
            ValueError: under the policy "error".
        """
        self.last = f"source {self.source}: {origin}: {problem}" + (f" ({detail})" if detail else "")
        if self.policy == "error":
            raise ValueError(self.last)
        self.counts[problem] += 1
        if self.counts[problem] <= SHOWN_PER_KIND:
            silent = "; further ones of this kind are counted only" if self.counts[problem] == SHOWN_PER_KIND else ""
            logger.warning("%s; skipped%s", self.last, silent)


def left_out_lines(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Counts by source and kind of problem as a line for each source, such as `web: 7 x malformed JSON, 1 x too long`."""
    return [
        f"{source}: " + ", ".join(f"{count:,} x {problem}" for problem, count in problems.items())
        for source, problems in counts.items()
        if problems
    ]


def tell_left_out(counts: Mapping[str, Mapping[str, int]]) -> None:
    """Log these lines; of several processes the first does."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0:
        return
    for line in left_out_lines(counts):
        logger.warning("left out in all of source %s", line)
