"""The next token of one row, from its logits (v): penalties, bias, temperature, what is left to choose from, the draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .requests import Request, TokenScore

LEAST_TEMPERATURE = 1e-30  # fp32 has it, and no two different logits are near enough to be drawn both


def draw(logits: Tensor, request: Request, written: Mapping[int, int], generator: torch.Generator) -> int:
    """A token id.

    Args:
        logits: (v) fp32; changed in place.
        written: token id -> how often it is in the text.
        generator: the row's own, on the device of the logits.
    """
    penalise(logits, request, written)
    if request.temperature == 0:
        return int(logits.argmax())
    probabilities = narrowed(scaled(logits, request.temperature), request).softmax(-1)
    reached = probabilities.cumsum(-1, dtype=torch.float64)  # one number is drawn; torch.multinomial draws one for each
    drawn = torch.rand((), dtype=torch.float64, generator=generator, device=logits.device) * reached[-1]
    return int(torch.searchsorted(reached, drawn, right=True).clamp(max=len(logits) - 1))


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits by temperature, with 0 for the likeliest, so that none of them is infinite, however small the temperature."""
    below = (logits - logits.max()).nan_to_num(0.0, neginf=-torch.inf)  # of penalties a logit may be infinite
    return below / max(temperature, LEAST_TEMPERATURE)


def penalise(logits: Tensor, request: Request, written: Mapping[int, int]) -> None:
    """Penalties of what was there before, then the bias."""
    if request.repetition_penalty != 1:
        seen = torch.tensor(sorted({*request.tokens, *written}), device=logits.device)
        found = logits[seen]
        logits[seen] = torch.where(found > 0, found / request.repetition_penalty, found * request.repetition_penalty)
    if written and (request.presence_penalty or request.frequency_penalty):
        ids, counts = (torch.tensor(list(it), device=logits.device) for it in (written.keys(), written.values()))
        logits[ids] -= request.presence_penalty + request.frequency_penalty * counts
    if request.logit_bias:
        ids, biases = (torch.tensor(list(it), device=logits.device) for it in zip(*request.logit_bias.items()))
        logits[ids] += biases


def narrowed(logits: Tensor, request: Request) -> Tensor:
    """-inf where top_k, top_p or min_p leave nothing; the likeliest token always stays."""
    if request.top_k and request.top_k < len(logits):
        logits = logits.where(logits >= logits.topk(request.top_k).values[-1], -torch.inf)
    if request.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # of the likelier tokens
        logits = logits.scatter(0, order, ordered.where(before < request.top_p, -torch.inf))
    if request.min_p:
        probabilities = logits.softmax(-1)
        logits = logits.where(probabilities >= request.min_p * probabilities.max(), -torch.inf)
    return logits


def score(logits: Tensor, token: int, alternatives: int) -> TokenScore:
    """Log-probabilities of a token and of the likeliest ones."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(alternatives) if alternatives else (logprobs[:0], logprobs[:0].long())
    return TokenScore(token, float(logprobs[token]), list(zip(ids.tolist(), values.tolist())))


def seeds(request: Request, device: torch.device) -> Sequence[torch.Generator]:
    """One generator for each continuation."""
    generators = [torch.Generator(device) for _ in range(request.n)]
    for index, generator in enumerate(generators):
        if request.seed is None:
            generator.seed()
        else:
            generator.manual_seed(request.seed + index)
    return generators
