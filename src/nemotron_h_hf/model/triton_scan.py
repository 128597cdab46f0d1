"""`ssd.scan` in Triton, forward and backward.

For one head, with a_t = dt_t * A, u_t = dt_t * x_t, and L_i the sum of a from the chunk's start through token i, a chunk
of q tokens that is given the state S (p x n) has

    y_i   = exp(L_i) S C_i + sum over j <= i of exp(L_i - L_j) (C_i . B_j) u_j + D x_i
    S'    = exp(L_q) S + sum over j of exp(L_q - L_j) u_j (outer) B_j                     (S' is given to the next chunk)

Forward, three launches: `add_states` writes the sum in S' for all chunks at once, `pass_states` goes through the chunks,
`outputs` has each y. Backward, four: with G the gradient of S',

    dS    = exp(L_q) G + sum over i of exp(L_i) dy_i (outer) C_i                           (G of the chunk before)
    du_j  = exp(L_q - L_j) G B_j + sum over i >= j of exp(L_i - L_j) (C_i . B_j) dy_i
    dB_j  = exp(L_q - L_j) u_j G + sum over i >= j of exp(L_i - L_j) (dy_i . u_j) C_i      (summed over a group's heads)
    dC_i  = exp(L_i) dy_i S      + sum over j <= i of exp(L_i - L_j) (dy_i . u_j) B_j      (summed over a group's heads)
    dx_j  = dt_j du_j + D dy_j                   dD = sum of dy . x
    ddt_j = x_j . du_j + A da_j                  dA = sum of dt_j da_j

dS has the form of S', so the first two kernels serve again, from the last chunk to the first. A decay a_t stands on
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
from .triton_scan_kernels import add_states, input_gradients, outputs, pass_states, projection_gradients

MAX_HEAD_DIM = 256
# What fits the registers of a Hopper SM, by the compiler's report: larger chunks in fp32 or with gradients spill.
CHUNK_TOKENS, CHUNK_TOKENS_GRADIENT, CHUNK_TOKENS_FP32 = 128, 64, 32
STATE_BLOCK = 128  # columns of the state at a time
NARROW_BLOCK = (
    64  # the same, in the kernel that holds the most; half as many of a state wider than 128: registers suffice so
)
PASS_BLOCK = 1024  # elements of the state that one program carries through the chunks


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
    if x.dtype == torch.float32:
        return CHUNK_TOKENS_FP32
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return CHUNK_TOKENS_GRADIENT if gradient else CHUNK_TOKENS


class Scan(torch.autograd.Function):
    """Keeps the states that the chunks were given: (b, c, h, p, n) fp32, 1/q of what a state per token would take."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial_state, seq_idx, q):
        y, states, keep, last = forward(x, dt, A, B, C, D, initial_state, seq_idx, q)
        ctx.save_for_backward(x, dt, A, B, C, D, seq_idx, states, keep)
        ctx.q = q
        return y, last

    @staticmethod
    def backward(ctx, dy, dlast):
        x, dt, A, B, C, D, seq_idx, states, keep = ctx.saved_tensors
        *gradients, dinitial = backward(x, dt, A, B, C, D, seq_idx, states, keep, dy, dlast, ctx.q)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (b, l, h, p), the given states (b, c, h, p, n), how much of each survives its chunk (b, c, h), the last state."""
    (b, l, h, p), n = x.shape, B.shape[-1]
    chunks = triton.cdiv(l, q)
    states = x.new_empty(b, chunks, h, p, n, dtype=torch.float32)
    keep = x.new_empty(b, chunks, h, dtype=torch.float32)
    last = x.new_empty(b, h, p, n, dtype=torch.float32)
    y = x.new_empty(b, l, h, p)
    block = min(padded(n), STATE_BLOCK)
    sizes = _sizes(x, B, seq_idx, q)
    with on(x):
        add_states[(h * triton.cdiv(n, block), chunks, b)](
            x, B, dt, A, seq_idx, states, keep, l, chunks, *_strides(x, B), **sizes, BN=block, GRADIENT=False,
            num_warps=4,
        )  # fmt: skip
        _pass(states, keep, initial_state, last, backward=False)
        outputs[(h, chunks, b)](
            x, dt, A, B, C, D, seq_idx, states, y, l, chunks, *_strides(x, B, C), **sizes, BN=block
        )  # fmt: skip
    return y, states, keep, last


def backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    seq_idx: Tensor | None,
    states: Tensor,
    keep: Tensor,
    dy: Tensor,
    dlast: Tensor,
    q: int,
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D and of the initial state."""
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    chunks, dy = keep.shape[1], dy.contiguous()
    dstates, dinitial = torch.empty_like(states), states.new_empty(b, h, p, n)
    dx, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, B, C))
    ddt, dA, dD = dt.new_empty(b, l, h), torch.empty_like(keep), torch.empty_like(keep)
    block, narrow = min(padded(n), STATE_BLOCK), min(padded(n), NARROW_BLOCK // (2 if n > 128 else 1))
    sizes, strides = _sizes(x, B, seq_idx, q), _strides(x, B, C)
    with on(x):
        add_states[(h * triton.cdiv(n, block), chunks, b)](
            dy, C, dt, A, seq_idx, dstates, keep, l, chunks, *_strides(dy, C), **sizes, BN=block, GRADIENT=True,
            num_warps=4,
        )  # fmt: skip
        _pass(dstates, keep, dlast.contiguous(), dinitial, backward=True)
        input_gradients[(h, chunks, b)](
            x, dt, A, B, C, D, seq_idx, states, dy, dstates, dx, ddt, dA, dD, l, chunks, *strides, **sizes, BN=narrow
        )
        projection_gradients[(g * triton.cdiv(n, block), chunks, b)](
            x, dt, A, B, C, seq_idx, states, dy, dstates, dB, dC, l, chunks, *strides, **sizes, BN=block
        )
    return dx, ddt, dA.sum((0, 1)).to(A.dtype), dB, dC, dD.sum((0, 1)).to(D.dtype), dinitial


def _pass(states: Tensor, keep: Tensor, first: Tensor | None, last: Tensor, backward: bool) -> None:
    b, chunks, h, p, n = states.shape
    block = min(padded(p * n), PASS_BLOCK)
    first = None if first is None else first.contiguous()
    pass_states[(triton.cdiv(p * n, block), h, b)](
        states, keep, first, last, chunks, H=h, SIZE=p * n, BLOCK=block, FIRST=first is not None, BACKWARD=backward,
        num_warps=4,
    )  # fmt: skip


def _sizes(x: Tensor, B: Tensor, seq_idx: Tensor | None, q: int) -> dict[str, object]:
    """The compile-time values of a launch; none of them depends on the length or the batch."""
    (h, p), (g, n) = x.shape[2:], B.shape[2:]
    known = {"H": h, "P": p, "R": h // g, "N": n, "Q": q, "BP": padded(p), "DOCUMENTS": seq_idx is not None}
    return known | products(x.dtype)


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of batch, token and head (or group) of each."""
    return [stride for t in tensors for stride in t.stride()[:3]]
