"""The architecture and what runs it. Flat and self-contained: these files travel with a checkpoint for trust_remote_code.

configuration_nemotron_h.py    reads every spelling of the configuration, writes one
configuration_checks.py        what its fields may be
block_configs.py               the layout of the released Puzzle model: sizes by layer
presets.py                     released shapes
modeling_nemotron_h.py         the stack of blocks and the heads
blocks.py                      one layer: norm, mixer, residual; attention and MLP
mamba2.py                      the Mamba-2 mixer
moe.py                         router, routed, shared and latent experts
padding.py                     padding and packed documents of a batch
cache.py                       HybridCache: keys and values, convolution and SSM states, roll-back
generation.py                  what generate() needs: caches, masks, prompts
mtp.py                         multi-token prediction
speculation.py                 drafts by multi-token prediction, verified by the model
arguments.py                   what callers may pass to a forward
loss.py                        next-token loss in chunks

configuration_nemotron_h_vl.py       the vision-language model: tower, projector and language model
modeling_nemotron_h_vl.py            pixel shuffle, projector, joining of picture and text
image_processing_nemotron_h_vl.py    tiles and thumbnails
image_reading_vl.py                  pictures of any kind as tensors, checked
processing_nemotron_h_vl.py          tags and image tokens in the prompt
names_vl.py                          released names of vision checkpoints

ssd.py                         Mamba-2's ops in plain PyTorch, the reference for all others
kernels.py                     chooses the implementation of each op, per call
convolution.py                 the convolution of a Mamba layer
linear.py                      the product of a Linear, fast for few rows on a CPU
plain.py                       when a layer may be computed without calling its module
forks.py                       child processes forked after computing
numba_compile.py               compiling with Numba, and the threads of what it compiled
numba_loops.py                 compiled: products of few rows, a Mamba layer's token, attention of a token
numba_dot.py                   sums of products of bfloat16 in the processor's instruction
numba_run.py                   what these loops are given, and their calls
numba_scan_loops.py            compiled: the scan of a sequence, forward and backward
numba_scan.py                  what these loops are given, and the gradients
token.py                       one token per row through many blocks in one compiled call
triton_conv.py                 Triton: the convolution
triton_scan.py                 Triton: the scan, its maths and launches
triton_scan_kernels.py         Triton: the kernels of the scan
triton_norm.py                 Triton: the gated norm
triton_decode.py               Triton: one token of a Mamba layer
triton_attention.py            Triton: attention of one new token over a cache
triton_relu2.py                Triton: the squared ReLU
triton_launch.py               Triton: what every launch needs
decode_graph.py                one token per row, replayed from a CUDA graph

loading.py                     checks before loading, names of stored tensors
json_files.py                  JSON files, with errors that name the file
weights.py                     reads safetensors headers, indexes and rows; names in files and in modules; dtypes
saving.py                      saves all or nothing: staged inside the target, then renamed
peft_support.py                LoRA on out_proj
"""
