"""From a request for a size to a child of a parent.

    resolve(config, "6b")          a name in config.elastic
    resolve(config, 0.5)           at most half of the parent's parameters; also "0.5" and "50%"
    resolve(config, "7GiB@32Ki")    weights and the cache of one sequence of 32 * 1024 tokens in at most 7 GiB
    resolve(config, {"hidden_size": 3072, "layers": [0, 1, 2]})        sizes, also as JSON; or a `Budget`

Of several children that fit a fraction or a need, it is the one with the lowest loss (search.py).
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers.utils import logging

from ..model.configuration_nemotron_h import NemotronHConfig
from .budgets import Budget, read_elastic
from .child import Child, child_of
from .search import rank_budgets

logger = logging.get_logger(__name__)

Request = str | float | Mapping[str, Any] | Budget


def resolve(parent: NemotronHConfig, request: Request, dtype: torch.dtype | str | None = None) -> Child:
    """The child that is asked for.

    Args:
        dtype: of the weights and the KV cache, for needs in bytes; default the parent's, else bfloat16.

    Raises:
        ValueError: for a name, form or size that is not allowed, or when nothing is small enough.
    """
    if isinstance(request, str) and request.lstrip().startswith("{"):
        request = _read_json(request)
    if isinstance(request, Mapping):
        request = Budget.from_dict(request.get("name", "custom"), {k: v for k, v in request.items() if k != "name"})
    if isinstance(request, Budget):
        return child_of(parent, request)
    if isinstance(request, str) and request in (named := read_elastic(parent).budgets):
        return child_of(parent, named[request])
    best = rank_budgets(parent, request, dtype, limit=1)[0]
    say = logger.info if best.budget.trained else logger.warning_once
    say(f"budget={request!r}: {best.describe()}; {best.budget.describe()}")
    return best.child


def _read_json(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"budget={text!r}: allowed is JSON with the sizes of a budget; {error}") from None
