"""The text of a row as its tokens come: no half letters, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}  # how byte-level vocabularies write them


class Text:
    """Turns tokens into text that may be shown. `stopped` says that a stop text was reached."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), keep_special: bool = False
    ) -> None:
        self.tokenizer, self.stop, self.keep_special = tokenizer, stop, keep_special
        self.stream = DecodeStream(skip_special_tokens=not keep_special)
        self.tokens: list[int] = []
        self.decoded = 0  # letters that the stream has given
        self.held, self.stopped = "", False

    def add(self, token: int) -> str:
        """The text that this token lets be shown."""
        self.tokens.append(token)
        return self._release(self.stream.step(self.tokenizer.backend_tokenizer, token) or "")

    def finish(self) -> str:
        """What is left: half letters as the tokenizer shows them, and what did not become a stop text."""
        whole = self.tokenizer.backend_tokenizer.decode(self.tokens, skip_special_tokens=not self.keep_special)
        shown = self._release(whole[self.decoded :])
        shown, self.held = shown + ("" if self.stopped else self.held), ""
        return shown

    def _release(self, new: str) -> str:
        self.decoded += len(new)
        if self.stopped:
            return ""
        self.held += new
        found = [place for place in map(self.held.find, self.stop) if place >= 0]
        if found:
            self.stopped = True
            return self.held[: min(found)]
        keep = max((_begun(self.held, stop) for stop in self.stop), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown


def _begun(text: str, stop: str) -> int:
    """Letters at the end of the text that a stop text may begin with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """UTF-8 of one token, which may be a part of a letter."""
    text, word = tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token)
    is_part = "\ufffd" in text and all(letter in BYTES for letter in word)
    return bytes(BYTES[letter] for letter in word) if is_part else text.encode()


def token_text(data: bytes) -> str:
    """A token's bytes as text, or as OpenAI writes those that are none."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
