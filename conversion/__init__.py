"""Megatron checkpoints to Hugging Face and back: no Megatron, no GPU, bounded memory, nothing unpickled.

from nemotron_h_hf.conversion import convert, read_megatron, write_megatron

convert("run/", "model/")                                  # Megatron, any format, to Hugging Face
convert("model/", "run/", format="torch", tp=2, pp=2)      # and back
weights = read_megatron("run/")                            # a lazy mapping: weights["decoder.final_norm.weight"]
"""

from .convert import convert, write_megatron
from .formats import read_megatron

__all__ = ["convert", "read_megatron", "write_megatron"]
