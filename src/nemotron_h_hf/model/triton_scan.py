"""`ssd.scan` in Triton, forward and backward.

For one head, with a_t = dt_t * A, u_t = dt_t * x_t, and L_i the sum of a from the chunk's start through token i, a chunk
of q tokens that is given the state S (p x n) has

    y_i   = exp(L_i) S C_i + sum over j <= i of exp(L_i - L_j) (C_i . B_j) u_j + D x_i
    S'    = exp(L_q) S + sum over j of exp(L_q - L_j) u_j (outer) B_j                     (S' is given to the next chunk)

Forward, three launches: `prepare` writes dt, L and C_i . B_j as the next two read them, `pass_states` goes through the
chunks with S in registers and writes what each is given, `outputs` has each y. Backward, four: with G the gradient of S',

    dS    = exp(L_q) G + sum over i of exp(L_i) dy_i (outer) C_i                           (G of the chunk before)
    du_j  = exp(L_q - L_j) G B_j + sum over i >= j of exp(L_i - L_j) (C_i . B_j) dy_i
    dB_j  = exp(L_q - L_j) u_j G + sum over i >= j of exp(L_i - L_j) (dy_i . u_j) C_i      (summed over a group's heads)
    dC_i  = exp(L_i) dy_i S      + sum over j <= i of exp(L_i - L_j) (dy_i . u_j) B_j      (summed over a group's heads)
    dx_j  = dt_j du_j + D dy_j                   dD = sum of dy . x
    ddt_j = x_j . du_j + A da_j                  dA = sum of dt_j da_j

dS has the form of S', so `prepare` and `pass_states` serve again, the latter from the last chunk to the first. A decay a_t stands on
every way from before t to t or later, so da_t is the sum of what flows on those ways: with F_ij = exp(L_i - L_j)
(C_i . B_j)(dy_i . u_j),

    da_t  = sum over j < t <= i of F_ij                        inside the chunk
          + sum over i >= t of exp(L_i) dy_i . S C_i           from the state to a token
          + sum over j < t of exp(L_q - L_j) u_j . G B_j       from a token to the state
          + exp(L_q) <G, S>                                    from state to state

The first line is sum over i >= t of (row i of F - column i of F) without the diagonal: differences of fp32 sums of the
same numbers within one chunk. The shorter formula dy . y - u . du over the whole sequence is not used: it subtracts large
sums that were rounded apart.

Documents: a factor exp(L ...) between tokens (or a token and a state) of different documents is 0. A state belongs to the
document of the last token that made it, the initial state to that of the first token.

    b batch, l length, h heads, p head_dim, g groups, n state, c chunks, q tokens in a chunk
"""

import torch
from torch import Tensor

from .triton_launch import last_contiguous, on, padded, products, triton
from .triton_scan_kernels import input_gradients, outputs, pass_states, prepare, projection_gradients

MAX_HEAD_DIM = 256
# A larger chunk means fewer states to write and read, and more pairs of tokens. A kernel of the backward pass holds all
# pairs of a chunk, those of the forward pass BLOCK_TOKENS squared: what fits the registers of a Hopper SM.
CHUNK_TOKENS = 128
BLOCK_TOKENS, BLOCK_TOKENS_FP32 = 64, 32
STATE_BLOCK = 128  # columns of the state at a time
NARROW_BLOCK = 64  # the same where more is held; of a state wider than 128 half as many in the backward pass


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssd.scan`; y comes in x's dtype, the last state in fp32.

    Raises:
        ValueError: for a head_dim over 256.
    """
    if x.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"mamba_head_dim={x.shape[-1]}: the Triton kernels take up to {MAX_HEAD_DIM}")
    if seq_idx is not None:
        seq_idx = seq_idx.int().contiguous()
    inputs = last_contiguous(x), dt.contiguous(), A, last_contiguous(B), last_contiguous(C), D, initial_state
    return Scan.apply(*inputs, seq_idx, min(padded(chunk_size), _chunk_tokens(x, inputs)))


def _chunk_tokens(x: Tensor, inputs: tuple[Tensor | None, ...]) -> int:
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return _block_tokens(x) if gradient else CHUNK_TOKENS


def _block_tokens(x: Tensor) -> int:
    return BLOCK_TOKENS_FP32 if x.dtype == torch.float32 else BLOCK_TOKENS


class Scan(torch.autograd.Function):
    """Keeps the states that the chunks were given: (b, c, h, p, n) in x's dtype, 1/q of what a state per token would take."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial_state, seq_idx, q):
        y, states, last = forward(x, dt, A, B, C, D, initial_state, seq_idx, q)
        ctx.save_for_backward(x, dt, A, B, C, D, seq_idx, states)
        ctx.q = q
        return y, last

    @staticmethod
    def backward(ctx, dy, dlast):
        *gradients, dinitial = backward(*ctx.saved_tensors, dy, dlast, ctx.q)
        return *gradients, dinitial if ctx.needs_input_grad[6] else None, None, None


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    q: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, h, p), the states that chunks are given (b, c, h, p, n) in x's dtype, the last state in fp32."""
    (b, l, h, p), n = x.shape, B.shape[-1]
    chunks, part = triton.cdiv(l, q), min(q, _block_tokens(x))
    y = x.new_empty(b, l, h, p)
    sizes = _sizes(x, B, seq_idx, q)
    with on(x):
        prepared = _prepare(dt, A, B, C, q, part)
        states, last = _pass(x, B, prepared, seq_idx, initial_state, sizes, backward=False)
        outputs[(h * (q // part), chunks, b)](
            x, C, D, *prepared, seq_idx, states, y, l, chunks, *_strides(x, C), **sizes, BQ=part,
            BN=min(padded(n), STATE_BLOCK),
        )  # fmt: skip
    return y, states, last


def backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    seq_idx: Tensor | None,
    states: Tensor,
    dy: Tensor,
    dlast: Tensor,
    q: int,
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D and of the initial state."""
    (b, l, h, _), (g, n) = x.shape, B.shape[2:]
    chunks, dy = states.shape[1], dy.contiguous()
    dx, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, B, C))
    ddt, (dA, dD) = dt.new_empty(b, l, h), A.new_empty(2, b, chunks, h, dtype=torch.float32)
    block, narrow = min(padded(n), STATE_BLOCK), min(padded(n), NARROW_BLOCK // (2 if n > 128 else 1))
    sizes, strides = _sizes(x, B, seq_idx, q), _strides(x, B, C)
    with on(x):
        step, total, matches = prepared = _prepare(dt, A, B, C, q, q)
        dstates, dinitial = _pass(dy, C, prepared, seq_idx, dlast, sizes, backward=True)
        input_gradients[(h, chunks, b)](
            x, A, B, C, D, *prepared, seq_idx, states, dy, dstates, dx, ddt, dA, dD, l, chunks, *strides, **sizes,
            BN=narrow,
        )  # fmt: skip
        projection_gradients[(g * triton.cdiv(n, block), chunks, b)](
            x, B, C, step, total, seq_idx, states, dy, dstates, dB, dC, l, chunks, *strides, **sizes, BN=block
        )
    return dx, ddt, dA.sum((0, 1)).to(A.dtype), dB, dC, dD.sum((0, 1)).to(D.dtype), dinitial


def _prepare(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, q: int, part: int) -> tuple[Tensor, Tensor, Tensor]:
    """dt and its sums with A (b, c, h, q), and the products of C and B (b, c, g, q, q), in fp32."""
    (b, l, h), (g, n) = dt.shape, B.shape[2:]
    chunks = triton.cdiv(l, q)
    step, total = dt.new_empty(2, b, chunks, h, q, dtype=torch.float32)
    matches = dt.new_empty(b, chunks, g, q, q, dtype=torch.float32)
    prepare[(g * (q // part), chunks, b)](
        dt, A, B, C, step, total, matches, l, chunks, *_strides(B, C), H=h, R=h // g, N=n, Q=q, BQ=part,
        BN=min(padded(n), STATE_BLOCK), BR=triton.next_power_of_2(h // g), **products(B.dtype), num_warps=4,
    )  # fmt: skip
    return step, total, matches


def _pass(
    x: Tensor,
    B: Tensor,
    prepared: tuple[Tensor, Tensor, Tensor],
    seq_idx: Tensor | None,
    first: Tensor | None,
    sizes: dict[str, object],
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """What each chunk is given (b, c, h, p, n) in x's dtype, and what the last one leaves (b, h, p, n) in fp32."""
    (b, l, h, p), n = x.shape, B.shape[-1]
    step, total, _ = prepared
    chunks, block = step.shape[1], min(padded(n), NARROW_BLOCK)
    states, last = x.new_empty(b, chunks, h, p, n), x.new_empty(b, h, p, n, dtype=torch.float32)
    first = None if first is None else first.contiguous()
    pass_states[(triton.cdiv(n, block), h, b)](
        x, B, step, total, seq_idx, states, first, last, l, chunks, *_strides(x, B), **sizes, BN=block,
        FIRST=first is not None, BACKWARD=backward,
    )  # fmt: skip
    return states, last


def _sizes(x: Tensor, B: Tensor, seq_idx: Tensor | None, q: int) -> dict[str, object]:
    """The compile-time values of a launch; none of them depends on the length or the batch."""
    (h, p), (g, n) = x.shape[2:], B.shape[2:]
    known = {"H": h, "P": p, "R": h // g, "N": n, "Q": q, "BP": padded(p), "DOCUMENTS": seq_idx is not None}
    return known | products(x.dtype)


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of batch, token and head (or group) of each."""
    return [stride for t in tensors for stride in t.stride()[:3]]
