"""Questions of long_context.py put to a model: prompts to tokens, and greedy answers to text."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .answering import greedy_answers
from .long_context import Answer, Encode


def encoder(tokenizer: PreTrainedTokenizerBase, chat: bool = False) -> Encode:
    """(prompt, how the answer begins) -> tokens; `chat`: in the tokenizer's template."""

    def encode(prompt: str, answer_start: str) -> list[int]:
        if chat and prompt:
            turn = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + answer_start
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return tokenizer(prompt + answer_start, verbose=False)["input_ids"]

    return encode


def answerer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Answer:
    """(prompts, most tokens to write) -> what the model wrote after each."""
    stop_ids = end_tokens(model, tokenizer)

    def answer(prompts: list[list[int]], max_new_tokens: int) -> list[str]:
        written = greedy_answers(model, prompts, max_new_tokens, stop_ids)
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]

    return answer


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: those of the generation defaults and of the tokenizer."""
    configured = model.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return {token for token in [*several, tokenizer.eos_token_id] if token is not None}
