"""Megatron checkpoints to Hugging Face and back: no Megatron, no GPU, bounded memory, nothing unpickled.

from nemotron_h_hf.conversion import convert, read_megatron, write_megatron

convert("run/", "model/")                                  # Megatron, any format, to Hugging Face
convert("model/", "run/", format="torch", tp=2, pp=2)      # and back
weights = read_megatron("run/")                            # a lazy mapping: weights["decoder.final_norm.weight"]

names.py               the table of tensors: Megatron's name, ours, shape, layout, parallel cut
vision.py              names and shapes of multimodal checkpoints
vision_config.py       their arguments to a configuration, and back
layouts.py             how elements are arranged on the two sides
config.py              arguments, names and shapes to a configuration
formats.py             which format a folder is
torch_dist.py          reads distributed checkpoints
legacy.py              reads the older rank files
sharded_run.py         reads checkpoints that FSDP wrote in parts
source_checkpoint.py   a checkpoint as one lazy mapping
torchzip.py            torch.save's files in pieces
unpickle.py            pickles without executing them
plan.py                what will be done, tensor by tensor
options.py             what may be asked of a conversion
convert.py             both directions in one call
read_ahead.py          reads the next tensor while one is written
write_hf.py            writes Hugging Face checkpoints
write_megatron.py      what both Megatron formats share
write_torch_dist.py    writes distributed checkpoints
write_legacy.py        writes rank files
report.py              what was planned and done
verify.py              reads the output again
"""

from .convert import convert, write_megatron
from .formats import read_megatron
from .options import Options

__all__ = ["Options", "convert", "read_megatron", "write_megatron"]
