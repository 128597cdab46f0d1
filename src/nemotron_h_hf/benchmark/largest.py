"""The largest batch that fits: doubling until one does not, then bisection between the last two."""

from collections.abc import Callable

MOST_ROWS = 1 << 16


def largest_batch(fits: Callable[[int], bool], most: int = MOST_ROWS, resolution: float = 1 / 32) -> int:
    """The largest number of rows found for which `fits` says True; 0 if not even one row fits.

    Args:
        fits: tries a number of rows; it must be monotonic (what fits, fits with fewer rows).
        most: rows that are enough.
        resolution: the search ends when the uncertainty is this share of the rows, or one row.
    """
    fitting, failing = 0, None
    rows = 1
    while failing is None and fitting < most:
        if fits(rows):
            fitting, rows = rows, min(2 * rows, most)
        else:
            failing = rows
    while failing is not None and failing - fitting > max(1, int(fitting * resolution)):
        middle = (fitting + failing) // 2
        if fits(middle):
            fitting = middle
        else:
            failing = middle
    return fitting
