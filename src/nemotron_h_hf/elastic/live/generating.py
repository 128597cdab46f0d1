"""Which nested model answers: a budget per call, a budget per row, or a small model that thinks and a large one that answers.

    parent.generate(**prompt, budget="6b")
    parent.generate(**prompts, budget=["6b", "12b", "6b"])                 one for each row
    parent.generate(**prompt, max_new_tokens=4096, tokenizer=tokenizer,
                    budget=BudgetSchedule("6b", "12b", at="</think>"))     the small one thinks, the large one answers

Rows of one budget run together. Prompts of a batch are padded on the left as usual; the result holds the prompts as they
were given, each row's new tokens, and `pad_token_id` to the end of the longest.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.utils import logging

from ...model.arguments import CACHE_NAME, CACHE_NAMES, cache_of
from ...model.cache import HybridCache
from ..child import Child
from ..resolve import Request
from .cache_carry import Carried, carry_cache, check_carry

logger = logging.get_logger(__name__)

# What has no one meaning for rows that several models make.
REFUSED = ("streamer", *CACHE_NAMES, "inputs_embeds", "return_dict_in_generate", "output_scores", "output_logits")
REFUSED_IN_SCHEDULES = (*REFUSED, "assistant_model", "num_mtp_tokens", "num_beams", "num_return_sequences", "stop_strings",
                        "max_length", "min_length", "min_new_tokens", "stopping_criteria", "max_time")  # fmt: skip


@dataclass
class BudgetSchedule:
    """`first` writes until it has written `after` tokens or the text or token `at` (whichever comes first), then `then`.

    The second model reads everything again, which is exact. With `carry_state` it takes over the first one's keys, values
    and states instead where their shapes allow; what that does to the next token is measured by reading again as well,
    logged and kept in `carried`, unless `measure=False`; only then is time saved (figures in cache_carry.py).

    Args:
        first, then: budgets, in any form that `submodel` takes.
        after: new tokens.
        at: a text (`generate` then needs `tokenizer=`), a token id, or a sequence of them.

    Raises:
        ValueError: if neither `after` nor `at` is given, or `after` is not positive.
    """

    first: Request
    then: Request
    after: int | None = None
    at: str | int | Sequence[int] | None = None
    carry_state: bool = False
    measure: bool = True
    carried: list[Carried] = field(default_factory=list, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.after is None and self.at in (None, "", (), []):
            raise ValueError("after=None and at=None: allowed is a number of tokens, a text or token ids, or both")
        if self.after is not None and self.after < 1:
            raise ValueError(f"after={self.after}: allowed is a positive number of tokens")


def generate_by(model: PreTrainedModel, child: Child, inputs: Tensor | None, kwargs: dict[str, Any]) -> Any:
    """As transformers', by a child under its parent's `generation_config`."""
    small = model.submodel_of(child)
    own, small.generation_config = small.generation_config, copy.deepcopy(model.generation_config)
    try:
        return small.generate(inputs, **kwargs)
    finally:
        small.generation_config = own


def generate_rows(model: PreTrainedModel, inputs: Tensor | None, budgets: Sequence, kwargs: dict[str, Any]) -> Tensor:
    """Each row of the batch by the model of its budget (or schedule); (rows, length) in the order of the prompts."""
    _refuse(REFUSED, model, kwargs, "with one budget for each row")
    prompts = _prompts(inputs, kwargs)
    if len(budgets) != len(prompts):
        raise ValueError(f"budget={list(budgets)!r}: allowed is one for each of the {len(prompts)} rows")
    rows_of: list[tuple[Any, list[int]]] = []
    for row, budget in enumerate(budgets):
        same = [rows for other, rows in rows_of if other == budget]
        same[0].append(row) if same else rows_of.append((budget, [row]))
    copies = _setting(model, kwargs, "num_return_sequences") or 1
    written: dict[int, Tensor] = {}
    for budget, rows in rows_of:
        own = {name: _select(value, rows, len(prompts)) for name, value in kwargs.items()}
        for row, result in zip(rows, model.generate(prompts[rows], budget=budget, **own).split(copies)):
            written[row] = result
    return _stack([one for row in range(len(prompts)) for one in written[row]], _pad(model, kwargs))


def generate_schedule(model: PreTrainedModel, inputs: Tensor | None, schedule: BudgetSchedule, kwargs: dict) -> Tensor:
    """The first model's tokens, then the second's: (b, length), rows as `BudgetSchedule` says."""
    _refuse(REFUSED_IN_SCHEDULES, model, kwargs, "with a BudgetSchedule")
    prompts, mask = _prompts(inputs, kwargs), kwargs.pop("attention_mask", None)
    pad, eos, total = _pad(model, kwargs), _eos(model, kwargs), _max_new_tokens(model, kwargs)
    if mask is None:  # as transformers guesses it
        mask = torch.ones_like(prompts) if pad in eos else (prompts != pad).long()
    source, target = model.resolve(schedule.first), model.resolve(schedule.then)
    if schedule.carry_state:
        _check_carried_rows(schedule, source, target, len(prompts))
    until = _Until(schedule.at, kwargs.get("tokenizer"))
    first = {**kwargs, "attention_mask": mask, "max_new_tokens": min(total, schedule.after or total), "use_cache": True,
             "stopping_criteria": StoppingCriteriaList([until] if until.criteria else [])}  # fmt: skip
    thought = generate_by(model, source, prompts, {**first, "return_dict_in_generate": True})
    width, texts = prompts.shape[1], thought.sequences
    news = [_cut(text[width:], eos, until.lengths.get(row)) for row, text in enumerate(texts)]
    going = [row for row, new in enumerate(news) if len(new) < total and not (len(new) and int(new[-1]) in eos)]
    if going:
        if schedule.carry_state:
            masks = torch.cat([mask, mask.new_ones(len(mask), texts.shape[1] - width)], dim=1)[going]
            second = _carry(model, schedule, source, target, cache_of(thought), texts[going], masks, going)
        else:
            second = _join([prompts[row][mask[row].bool()] for row in going], [news[row] for row in going], pad)
        second = {**kwargs, **second, "max_new_tokens": total - min(len(news[row]) for row in going)}
        reads = second.pop("inputs")
        answers = generate_by(model, target, reads, second)[:, reads.shape[1] :]
        for row, answer in zip(going, answers):
            news[row] = torch.cat([news[row], _cut(answer, eos, total - len(news[row]))])
    return _stack([torch.cat(pair) for pair in zip(prompts, news)], pad)


def _check_carried_rows(schedule: BudgetSchedule, source: Child, target: Child, num_rows: int) -> None:
    """Before anything is written, refuse what could not be taken over."""
    check_carry(source, target)
    if schedule.at is not None and num_rows > 1:
        raise ValueError(
            f"carry_state=True with at={schedule.at!r} for {num_rows} rows: allowed is one row, as rows switch at different "
            "tokens"
        )


def _join(prompts: list[Tensor], news: list[Tensor], pad: int) -> dict[str, Tensor]:
    """What the second model reads: each row's prompt and new tokens, padded on the left."""
    rows = [torch.cat(pair) for pair in zip(prompts, news)]
    texts = _stack(rows, pad, left=True)
    mask = _stack([torch.ones_like(row) for row in rows], 0, left=True)
    return {"inputs": texts, "attention_mask": mask}


def _carry(
    model: PreTrainedModel,
    schedule: BudgetSchedule,
    source: Child,
    target: Child,
    cache: HybridCache,
    texts: Tensor,
    mask: Tensor,
    rows: list[int],
) -> dict[str, Any]:
    """What the second model reads with the first one's cache, of the rows that continue; the effect is noted in the schedule."""
    cache.batch_select_indices(torch.tensor(rows, device=texts.device))
    cache = carry_cache(cache, source, target)
    if schedule.measure:
        second, num_tokens = model.submodel_of(target), int(cache.get_seq_length())
        settings = {"attention_mask": mask, "logits_to_keep": 1}
        with torch.no_grad():
            exact = second(texts, use_cache=False, **settings).logits[:, -1]
            taken = second(texts[:, num_tokens:], cache=cache.fork(), **settings).logits[:, -1]
        schedule.carried.append(Carried.between(exact, taken, num_tokens))
        logger.warning(f"{source.name} -> {target.name}: {schedule.carried[-1]}")
    return {"inputs": texts, "attention_mask": mask, CACHE_NAME: cache, "cache_implementation": None}


class _Until(StoppingCriteria):
    """Stops a row at a text or at token ids, and remembers how long the row was then."""

    def __init__(self, at: str | int | Sequence[int] | None, tokenizer: Any) -> None:
        self.lengths: dict[int, int] = {}  # row -> new tokens
        self.start: int | None = None
        self.criteria = at if at is None or isinstance(at, str) else [at] if isinstance(at, int) else list(at)
        if isinstance(at, str):
            if tokenizer is None:
                raise ValueError(f"tokenizer=None: the text at={at!r} needs generate(..., tokenizer=tokenizer)")
            self.criteria = StopStringCriteria(tokenizer, at)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.start = input_ids.shape[1] - 1 if self.start is None else self.start
        if isinstance(self.criteria, list):
            ids = torch.tensor(self.criteria, device=input_ids.device)
            written = input_ids[:, max(self.start, input_ids.shape[1] - len(ids)) :]
            done = (written == ids).all(-1) if written.shape[1] == len(ids) else written.new_zeros(len(written)).bool()
        else:
            done = self.criteria(input_ids, scores)
        for row in torch.nonzero(done).flatten().tolist():
            self.lengths.setdefault(row, input_ids.shape[1] - self.start)
        return done


def _prompts(inputs: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    prompts = kwargs.pop("input_ids", None) if inputs is None else inputs
    if prompts is None:
        raise ValueError("input_ids is missing: budgets for rows and schedules need a prompt")
    return prompts


def _refuse(names: Sequence[str], model: PreTrainedModel, kwargs: dict[str, Any], where: str) -> None:
    for name in names:
        stored = name != "max_length"  # max_new_tokens goes before one of generation_config
        value = _setting(model, kwargs, name) if stored else kwargs.get(name)
        says_nothing = value is None or (isinstance(value, int) and value == name.startswith("num_")) or value is False
        if not says_nothing:
            place, out = ("", "to leave it out") if name in kwargs else (" of generation_config", "None")
            raise ValueError(f"{name}={value!r}{place} {where}: allowed is {out}")


def _setting(model: PreTrainedModel, kwargs: dict[str, Any], name: str) -> Any:
    """What `generate` will use: its argument, else that of its generation_config, else of the model's."""
    given = kwargs.get("generation_config")
    found = [
        kwargs.get(name),
        None if given is None else vars(given).get(name),
        vars(model.generation_config).get(name),
    ]
    return next((value for value in found if value is not None), None)


def _pad(model: PreTrainedModel, kwargs: dict[str, Any]) -> int:
    pad = _setting(model, kwargs, "pad_token_id")
    return next(iter(_eos(model, kwargs)), 0) if pad is None else int(pad)


def _eos(model: PreTrainedModel, kwargs: dict[str, Any]) -> list[int]:
    eos = _setting(model, kwargs, "eos_token_id")
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _max_new_tokens(model: PreTrainedModel, kwargs: dict[str, Any]) -> int:
    number = _setting(model, kwargs, "max_new_tokens")
    if number is None or number < 1:
        raise ValueError(
            f"max_new_tokens={number}: allowed with a BudgetSchedule is a positive number, for both models together"
        )
    return number


def _select(value: Any, rows: list[int], num_rows: int) -> Any:
    """The rows of an argument that has one for each prompt."""
    if isinstance(value, Tensor) and value.dim() > 0 and len(value) == num_rows:
        return value[rows]
    return value


def _cut(new: Tensor, eos: list[int], most: int | None) -> Tensor:
    """A row's new tokens without the padding behind the end: up to the first end token, at most `most`."""
    new = new if most is None else new[:most]
    ends = torch.nonzero(torch.isin(new, new.new_tensor(eos))).flatten() if eos else new.new_zeros(0)
    return new[: int(ends[0]) + 1] if len(ends) else new


def _stack(rows: list[Tensor], pad: int, left: bool = False) -> Tensor:
    """Rows of different lengths under each other."""
    return torch.nn.utils.rnn.pad_sequence(rows, True, pad, "left" if left else "right")
