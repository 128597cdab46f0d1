"""Arguments of a forward: the two names of the cache, and what callers may pass beyond the named ones.

transformers 5.24 renamed `past_key_values` to `cache`. Our forwards take both, and answer under the installed name.
"""

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import ModelOutput

CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(MoeModelOutputWithPast)} else "past_key_values"

# What transformers, Accelerate, PEFT and TRL may pass to a model's forward without our naming it there.
PASSED_BY_CALLERS = frozenset(
    {
        "output_hidden_states",  # these three and return_dict: read by transformers' wrappers of our forwards
        "output_attentions",
        "output_router_logits",
        "return_dict",
        "is_causal",  # True or None
        "num_items_in_batch",  # Trainer, to every model whose forward has **kwargs
        "tokenizer",  # generate(stop_strings=...) hands its own on
        "assistant_tokenizer",
        "token_type_ids",  # tokenizers return them by default; the model has no segments
    }
)
# The arguments of it, and of packed rows, that are passed on to transformers' attention functions.
PASSED_TO_ATTENTION = frozenset({"output_attentions", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that was given, under whichever name.

    Raises:
        ValueError: for two different ones.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two different caches: allowed is one, under either name")
    return past_key_values if cache is None else cache


def name_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with their cache, if there is one, under the installed name."""
    rest = {name: value for name, value in arguments.items() if name not in CACHE_NAMES}
    cache = one_cache(*(arguments.get(name) for name in CACHE_NAMES))
    return rest if cache is None else {**rest, CACHE_NAME: cache}


def cache_of(output: ModelOutput) -> Cache | None:
    """The cache in the output of any model of transformers."""
    return output.get(CACHE_NAME)


def refuse_unknown(owner: object, arguments: Collection[str], allowed: Collection[str] = ()) -> None:
    """Raise a TypeError, as Python does, for an argument that nothing reads: ignoring it could change the result."""
    for name in arguments:
        if name not in allowed:
            raise TypeError(f"{type(owner).__name__}.forward() got an unexpected keyword argument {name!r}")
