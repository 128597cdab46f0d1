"""A byte-level BPE tokenizer trained on our own text and saved as an ordinary `PreTrainedTokenizerFast`.

Every one of the 256 bytes has a token, so any text survives encode and decode. `<|endoftext|>` opens and closes a
document (it is both bos and eos, and encoding plain text adds neither); `<|pad|>` only fills rows.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `vocab_size` tokens (256 bytes, two special ones, the rest merges), given enough text."""
    if vocab_size < 258:
        raise ValueError(f"vocab_size={vocab_size}: allowed is 258 (256 bytes and two special tokens) or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        padding_side="left",  # generation continues the last column of every row
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
