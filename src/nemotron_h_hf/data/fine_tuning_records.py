"""Records for fine-tuning, in the layouts that data sets have, to token ids and labels.

{"messages": [{"role": "user", "content": ...}, ...], "tools": [...]}    loss on assistant turns
{"prompt": "...", "completion": "..."}                                   loss on the completion and the end token
{"prompt": [messages], "completion": [messages]}                         one conversation
{"text": "..."}, or the text itself                                      loss on everything
"""

from collections.abc import Mapping
from typing import Any

from .chat import IGNORED, encode_conversation
from .documents import document_encoder


def encode_record(record: Mapping[str, Any] | str, tokenizer: Any) -> dict[str, list[int]]:
    """`input_ids` and `labels` (not shifted, -100 where there is nothing to learn) of one record.

    A prompt is encoded as a model gets it to continue, with the special tokens that the tokenizer puts in front, and the
    completion ends with its end token. A text begins and ends as in pretraining.

    Raises:
        ValueError: for a record of no known layout, or a conversation that cannot be encoded.
    """
    record = {"text": record} if isinstance(record, str) else record
    if not isinstance(record, Mapping):
        raise ValueError(f"a record is a {type(record).__name__}: allowed is text or a mapping")
    if "messages" in record:
        return encode_conversation(record["messages"], tokenizer, record.get("tools"))
    if "prompt" in record and "completion" in record:
        return _prompt_and_completion(record["prompt"], record["completion"], tokenizer, record.get("tools"))
    if "text" in record:
        ids = document_encoder(tokenizer)(record["text"])
        return {"input_ids": ids, "labels": list(ids)}
    raise ValueError(
        f"a record has {', '.join(record) or 'nothing'}: allowed are messages, prompt and completion, or text"
    )


def _prompt_and_completion(prompt: Any, completion: Any, tokenizer: Any, tools: Any) -> dict[str, list[int]]:
    if isinstance(prompt, list) and isinstance(completion, list):
        return encode_conversation([*prompt, *completion], tokenizer, tools)
    pair = {"prompt": prompt, "completion": completion}
    given = _opening(_text(pair, "prompt"), tokenizer)
    learned = tokenizer(_text(pair, "completion"), add_special_tokens=False, verbose=False)["input_ids"]
    learned = [*learned, tokenizer.eos_token_id]
    return {"input_ids": given + learned, "labels": [IGNORED] * len(given) + learned}


def _opening(text: str, tokenizer: Any) -> list[int]:
    """Ids as a prompt has them; an end token that the tokenizer itself appends is taken off."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    plain = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    appended = len(ids) > len(plain) and ids[-1] == tokenizer.eos_token_id and ids[-1:] != plain[-1:]
    return ids[:-1] if appended else ids


def _text(record: Mapping[str, Any], name: str) -> str:
    if not isinstance(record[name], str):
        raise ValueError(f"{name} is a {type(record[name]).__name__}: allowed is text")
    return record[name]
