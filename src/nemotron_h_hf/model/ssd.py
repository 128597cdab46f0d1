"""Mamba-2's ops in plain PyTorch: causal convolution, state-space scan, one-token steps, gated norm. Any device, forward and backward.

The recurrence (Dao & Gu 2024, arXiv 2405.21060), for each head, with a_t = dt_t * A < 0:

    S_t = exp(a_t) * S_{t-1} + dt_t * x_t (outer) B_t        y_t = S_t @ C_t + D * x_t

The scan cuts the sequence in chunks of q tokens. Inside a chunk the recurrence is a masked matrix product; between chunks
only the state S travels. B and C are shared by the heads of a group, so the large products run per group with the heads of
the group next to each other as columns, and B and C are never repeated. Chunks are worked on in segments of a few hundred
tokens, each with the state of the one before, so the (length, chunk, heads) tensors exist for one segment only; when
gradients are needed a segment of a long sequence is recomputed in the backward pass instead of kept.

Documents packed in one row are told apart by `seq_idx` (b, l): non-decreasing integers. Nothing crosses a change of it.
Padding needs no code here: a token with dt = 0 leaves the state as it is.

While a graph is traced (torch.compile, torch.export) nothing loops over the length in Python, which would fix it: the convolution
is PyTorch's, and the states of all chunks come from one product with the decays between chunks (section 6 of the paper).

    b batch, l length, h heads, p head_dim, g groups, r heads per group, n state, c chunks, q tokens in a chunk,
    d channels, k conv taps
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 64  # longer chunks only add work here: the products inside a chunk grow with its length
SEGMENT_TOKENS = 512  # tokens scanned at a time: bounds the memory, and keeps the work in a CPU's cache
CONV_TOKENS = 64  # tokens convolved at a time: few enough to stay in a CPU's cache
KEPT_TOKENS = 2048  # up to this length all segments are kept for the backward pass, beyond it they are recomputed


def wide(x: Tensor) -> Tensor:
    """The dtype that the recurrence, the step sizes and the norms are computed in: fp32, or float64 for float64 inputs."""
    return x if x.dtype == torch.float64 else x.float()


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Products inside stay in the dtypes that they are given, as `wide` chose them, also under `torch.autocast`."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def discretize(dt: Tensor, dt_bias: Tensor, limit: tuple[float, float]) -> Tensor:
    """Step sizes: clamp(softplus(dt + dt_bias), *limit), in fp32 for any input dtype. dt (..., h), dt_bias (h)."""
    steps = F.softplus(wide(dt) + wide(dt_bias))
    return steps if limit == (0.0, float("inf")) else steps.clamp(*limit)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None = None, seq_idx: Tensor | None = None
) -> Tensor:
    """Depthwise causal convolution, then SiLU.

    Args:
        x: (b, l, d) inputs.
        weight, bias: (d, k) taps, the last one for the current token, and (d) or None.
        initial_state: (b, d, k) the k inputs before x (the oldest is not needed), or None for zeros.
        seq_idx: (b, l) documents of a packed row, or None.

    Returns:
        (b, l, d) in x's dtype.
    """
    if torch.compiler.is_compiling():
        return _traced_conv(x, weight, bias, initial_state, seq_idx)
    taps = weight.to(x.dtype).t().contiguous()  # (k, d)
    bias = taps.new_zeros(()) if bias is None else bias.to(x.dtype)
    earlier = len(taps) - 1
    before = x.new_zeros(x.shape[0], earlier, x.shape[2]) if initial_state is None else initial_state[..., 1:].mT
    same = None
    if seq_idx is not None:
        same = torch.stack([_same_document(seq_idx, earlier - tap) for tap in range(earlier + 1)]).to(x.dtype)
    convolved = convolved_at_once if under_func() else _CausalConv.apply
    return convolved(x, taps, bias, before.to(x.dtype), same)


def under_func() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp) is at work: it takes neither checkpoints nor our own backward passes."""
    return torch._C._are_functorch_transforms_active()


def convolved_at_once(x: Tensor, taps: Tensor, bias: Tensor, before: Tensor, same: Tensor | None) -> Tensor:
    """`_CausalConv` in operations that autograd and torch.func know, any number of times."""
    rows = torch.cat([before, x], dim=1)
    met = rows.unfold(1, taps.shape[0], 1)  # (b, l, d, k)
    met = met if same is None else met * same.permute(1, 2, 3, 0)
    return F.silu((met * taps.t()).sum(-1) + bias)


def _traced_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None
) -> Tensor:
    """`causal_conv` in operations that leave the length open."""
    weight, earlier, l = weight.to(x.dtype), weight.shape[1] - 1, x.shape[1]
    before = x.new_zeros(x.shape[0], earlier, x.shape[2]) if initial_state is None else initial_state[..., 1:].mT
    rows = torch.cat([before.to(x.dtype), x], dim=1)  # (b, k - 1 + l, d)
    if seq_idx is None:
        bias = None if bias is None else bias.to(x.dtype)
        return F.silu(F.conv1d(rows.mT, weight[:, None], bias, groups=x.shape[2]).mT)
    total = x.new_zeros(()) if bias is None else bias.to(x.dtype)
    for tap in range(earlier + 1):
        same = _same_document(seq_idx, earlier - tap).to(x.dtype)
        total = total + rows.narrow(1, tap, l) * same * weight[:, tap]
    return F.silu(total)


class _CausalConv(torch.autograd.Function):
    """Convolution and SiLU, block by block. Keeps only its inputs; the gradients of slices and of in-place sums that
    autograd would make are as long as the sequence and several per tap.

    x (b, l, d), taps (k, d), bias (d) or (), before (b, k - 1, d), same (k, b, l, 1) or None.
    """

    @staticmethod
    def forward(ctx, x: Tensor, taps: Tensor, bias: Tensor, before: Tensor, same: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, taps, bias, before, same)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for start in range(0, x.shape[1], CONV_TOKENS):
            met = _met_by_taps(x, before, same, start)
            out[:, start : start + CONV_TOKENS] = F.silu(_weighted_sum(met, taps, bias), inplace=True)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # this gradient will be differentiated
            *inputs, same = ctx.saved_tensors
            wanted = [tensor for tensor, needed in zip(inputs, ctx.needs_input_grad) if needed]
            out = convolved_at_once(*inputs, same)
            found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:-1]), None
        x, taps, bias, before, same = ctx.saved_tensors
        (b, l, d), earlier = x.shape, len(taps) - 1
        grad_rows = x.new_zeros(b, earlier + l, d)  # of before and x, end to end
        in_block, fp32 = (b, min(l, CONV_TOKENS), d), wide(taps)  # sums over the whole length
        sums, sum_of_bias = fp32.new_zeros(earlier + 1, *in_block), fp32.new_zeros(in_block)
        for start in range(0, l, CONV_TOKENS):
            met = _met_by_taps(x, before, same, start)
            end = start + met[0].shape[1]
            grad_sum = torch.ops.aten.silu_backward(grad[:, start:end], _weighted_sum(met, taps, bias))
            sum_of_bias[:, : end - start] += grad_sum
            for tap in range(earlier + 1):
                sums[tap, :, : end - start].addcmul_(grad_sum, met[tap])
                to_row = grad_sum if same is None else grad_sum * same[tap, :, start:end]
                grad_rows[:, start + tap : end + tap].addcmul_(to_row, taps[tap])
        grad_taps = sums.sum((1, 2)).to(x.dtype)
        grad_bias = sum_of_bias.sum((0, 1)).to(x.dtype) if bias.dim() else None
        return grad_rows[:, earlier:], grad_taps, grad_bias, grad_rows[:, :earlier], None


def _met_by_taps(x: Tensor, before: Tensor, same: Tensor | None, start: int) -> list[Tensor]:
    """For each tap the inputs (b, <= CONV_TOKENS, d) that it meets for the block of tokens from `start`."""
    end, earlier = min(start + CONV_TOKENS, x.shape[1]), before.shape[1]
    rows = x[:, start - earlier : end] if start >= earlier else torch.cat([before, x[:, :end]], dim=1)[:, start:]
    met = [rows[:, tap : tap + end - start] for tap in range(earlier + 1)]
    return met if same is None else [rows * same[tap, :, start:end] for tap, rows in enumerate(met)]


def _weighted_sum(met: list[Tensor], taps: Tensor, bias: Tensor) -> Tensor:
    total = torch.addcmul(bias, met[0], taps[0])
    for rows, tap in zip(met[1:], taps[1:]):
        total.addcmul_(rows, tap)
    return total


def conv_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token of `causal_conv`: x (b, d), state (b, d, k) of the k inputs before it -> output (b, d), new state."""
    state = torch.cat([state[..., 1:], x.to(state.dtype)[..., None]], dim=-1)
    out = (state.to(x.dtype) * weight.to(x.dtype)).sum(-1)
    if bias is not None:
        out = out + bias.to(x.dtype)
    return F.silu(out), state


def conv_window(x: Tensor, taps: int, initial_state: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The last k inputs of each row, the state that `causal_conv` continues from.

    Args:
        x: (b, l, d) inputs, real tokens first.
        taps: k.
        initial_state: (b, d, k) inputs before x, or None for zeros.
        lengths: (b) how many inputs of each row are real, or None for all.

    Returns:
        (b, d, k).
    """
    before = x.new_zeros(x.shape[0], taps, x.shape[2]) if initial_state is None else initial_state.transpose(1, 2)
    if lengths is None:
        return torch.cat([before.to(x.dtype), x[:, -taps:]], dim=1)[:, -taps:].transpose(1, 2)
    rows = torch.cat([before.to(x.dtype), x], dim=1)  # (b, k + l, d)
    window = lengths[:, None] + torch.arange(taps, device=x.device)  # (b, k)
    return rows.gather(1, window[..., None].expand(-1, -1, x.shape[2])).transpose(1, 2)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    """RMSNorm over groups of channels of x * silu(gate), in fp32. x, gate (..., d), weight (d) -> (..., d) in gate's dtype."""
    gated = times(F.silu(wide(gate)), wide(x))
    groups = gated.view(*gated.shape[:-1], -1, group_size)
    normed = times(groups, inverse_rms(groups, eps))
    return times(normed.flatten(-2), wide(weight)).to(gate.dtype)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, kept as 1. The norm reads x once and makes nothing of its size."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(length.new_full((), eps), length, length, value=1 / x.shape[-1]).rsqrt()


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
    """The whole recurrence over a sequence, chunk by chunk.

    Args:
        x: (b, l, h, p).
        dt: (b, l, h) step sizes from `discretize`, fp32; 0 marks padding.
        A: (h), negative, fp32.
        B, C: (b, l, g, n).
        D: (h).
        chunk_size: q at most (the result does not depend on it); any length l is allowed.
        initial_state: (b, h, p, n) fp32, or None for zeros; it belongs to the document of the first token.
        seq_idx: (b, l) documents of a packed row, or None.

    Returns:
        y (b, l, h, p) and the last state (b, h, p, n), both in fp32.
    """
    b, l, h, p = x.shape
    n = B.shape[-1]
    state = wide(x).new_zeros(b, h, p, n) if initial_state is None else wide(initial_state)
    if torch.compiler.is_compiling():
        with no_autocast(x):
            return _scan_segment(x, dt, A, B, C, D, min(chunk_size, CHUNK_TOKENS), state, seq_idx, None)
    chunk_size = min(chunk_size, CHUNK_TOKENS, l)
    segment = SEGMENT_TOKENS // chunk_size * chunk_size
    recompute = l > KEPT_TOKENS and torch.is_grad_enabled() and any(t.requires_grad for t in (x, dt, A, B, C, D, state))
    recompute = recompute and not under_func()
    outputs, document = [], None
    parts = zip(*(t.split(segment, dim=1) for t in (x, dt, B, C)))  # the gradient of a slice would be as long as x
    for number, (x_part, dt_part, B_part, C_part) in enumerate(parts):
        documents = None if seq_idx is None else seq_idx[:, number * segment : (number + 1) * segment]
        args = (x_part, dt_part, A, B_part, C_part, D, chunk_size, state, documents, document)
        with no_autocast(x):
            if recompute:
                y, state = checkpoint(_scan_segment, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                y, state = _scan_segment(*args)
        outputs.append(y)
        document = None if seq_idx is None else documents[:, -1]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state


def scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of `scan`: x (b, h, p), dt (b, h), B, C (b, g, n), state (b, h, p, n) -> y (b, h, p), new state, in fp32.

    Without gradients an fp32 state is updated in place: new memory for it would take longer than the arithmetic.
    """
    b, h, p = x.shape
    g, n = B.shape[1:]
    x32, by_group = wide(x), (b, g, h // g)
    state = times(wide(state), torch.exp(dt * A)[..., None, None])
    inputs, B = (dt[..., None] * x32).view(*by_group, p, 1), wide(B).view(b, g, 1, 1, n)
    state.view(*by_group, p, n).addcmul_(inputs, B)
    with no_autocast(x):
        y = torch.matmul(wide(C).view(b, g, 1, n), state.view(b, g, -1, n).transpose(-1, -2)).view(b, h, p)
    return torch.addcmul(y, wide(D)[:, None], x32), state


def final_state(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, initial_state: Tensor) -> Tensor:
    """The state after a few tokens, without outputs: shapes as in `scan`; for replaying recorded tokens after a roll-back."""
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    total = torch.cumsum(dt * A, dim=1)  # (b, l, h)
    weights = dt * torch.exp(total[:, -1:] - total)
    columns = (wide(x) * weights[..., None]).view(b, l, g, -1)
    with no_autocast(x):
        added = torch.einsum("blgn,blgk->bgkn", wide(B), columns).reshape(b, h, p, n)
    return wide(initial_state) * torch.exp(total[:, -1])[..., None, None] + added


def times(a: Tensor, b: Tensor) -> Tensor:
    """a * b, in a's memory where no gradient will ask for a."""
    return a * b if torch.is_grad_enabled() else a.mul_(b)


def _same_document(seq_idx: Tensor, back: int) -> Tensor:
    """(b, l, 1) whether the token `back` places before belongs to the same document; the initial state counts as the first's."""
    earlier = torch.cat([seq_idx[:, :1].expand(-1, back), seq_idx], dim=1)[:, : seq_idx.shape[1]]
    return (earlier == seq_idx)[..., None]


def _scan_segment(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    q: int,
    state: Tensor,
    seq_idx: Tensor | None,
    document: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`scan` of one segment. `document` (b) is the one that `state` belongs to, None for that of the first token."""
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    r, c = h // g, _num_chunks(l, q)
    x, dt, B, C = (_padded(t, c * q - l) for t in (x, dt, B, C))
    seq_idx = None if seq_idx is None else torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, c * q - l)], dim=1)
    x, dt = wide(x).view(b, c, q, h, p), dt.view(b, c, q, h)
    B = wide(B).view(b, c, q, g, n).transpose(2, 3).contiguous()  # (b, c, g, q, n)
    C = wide(C).view(b, c, q, g, n).transpose(2, 3).contiguous()
    total = torch.cumsum(dt * A, dim=2)  # (b, c, q, h): log decay from the chunk's start through each token

    # 1. Inside a chunk: y_i += sum over j <= i of (C_i . B_j) exp(total_i - total_j) dt_j x_j
    by_head = total.transpose(2, 3)  # (b, c, h, q)
    log_decay = by_head[..., :, None] - by_head[..., None, :]  # (b, c, h, q, q), above 0 only where j > i
    hidden = torch.ones(q, q, dtype=torch.bool, device=x.device).triu(1)
    if seq_idx is not None:
        chunk_docs = seq_idx.view(b, c, q)
        hidden = (hidden | (chunk_docs[..., :, None] != chunk_docs[..., None, :]))[:, :, None]
    products = (C @ B.transpose(-1, -2)).masked_fill_(hidden, 0)  # (b, c, g, q, q), r times fewer than decays
    with torch.no_grad():  # its gradient would change nothing: what it cuts meets products that are 0
        log_decay.clamp_(max=0)
    decay = log_decay.exp_().view(b, c, g, r, q, q)
    scores = times(decay, products[:, :, :, None]).view(b, c, h, q, q)
    heads = x.transpose(2, 3).clone(memory_format=torch.contiguous_format)  # a copy even where it is contiguous already
    x_dt = times(heads, dt.transpose(2, 3)[..., None])  # (b, c, h, q, p)
    inside = (scores @ x_dt).transpose(2, 3)  # (b, c, q, h, p)

    # 2. What each chunk adds to the state, and how much of the state it is given survives it
    to_end, from_start = total[:, :, -1:] - total, total
    survives = total[:, :, -1]  # (b, c, h)
    if seq_idx is not None:
        last = chunk_docs[:, :, -1]
        given = torch.cat([chunk_docs[:, :1, 0] if document is None else document[:, None], last[:, :-1]], dim=1)
        to_end = to_end.masked_fill((chunk_docs != last[..., None])[..., None], -torch.inf)
        from_start = from_start.masked_fill((chunk_docs != given[..., None])[..., None], -torch.inf)
        survives = survives.masked_fill((last != given)[..., None], -torch.inf)
    columns = (x_dt * torch.exp(to_end).transpose(2, 3)[..., None]).view(b, c, g, r, q, p)
    columns = columns.transpose(3, 4).reshape(b, c, g, q, r * p)
    added = B.transpose(-1, -2) @ columns  # (b, c, g, n, r*p)

    # 3. The recurrence over chunks
    state = state.view(b, g, r * p, n).transpose(-1, -2)  # (b, g, n, r*p)
    if torch.compiler.is_compiling():
        given_states, state = _states_of_chunks(state, added, survives, r)
    else:
        keep = torch.exp(survives).view(b, c, g, r, 1).expand(-1, -1, -1, -1, p).reshape(b, c, g, 1, r * p)
        states = []
        for added_by_chunk, kept in zip(added.unbind(1), keep.unbind(1)):
            states.append(state)
            state = torch.addcmul(added_by_chunk, state, kept)
        given_states = torch.stack(states, dim=1)

    # 4. From the state that a chunk is given: y_i += exp(total_i) C_i . S, and the skip D x
    carried = (C @ given_states).transpose(2, 3).reshape(b, c, q, h, p)
    y = times(carried, torch.exp(from_start)[..., None]).add_(inside).addcmul_(x, wide(D)[:, None])
    y = y.reshape(b, c * q, h, p)  # a copy with one head per group
    return _first(y, l), state.transpose(-1, -2).reshape(b, h, p, n)


def _num_chunks(l: int, q: int) -> int:
    """Chunks of q tokens for l; of an exported program two at least, as one would be a special case, a guard on the length."""
    chunks = (l + q - 1) // q
    return torch.sym_max(chunks, 2) if torch.compiler.is_exporting() else chunks


def _padded(t: Tensor, pad: int) -> Tensor:
    """(b, l, ...) with `pad` zeros behind the tokens; a graph pads by nothing rather than ask how many."""
    return F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)) if torch.compiler.is_compiling() or pad else t


def _first(y: Tensor, l: int) -> Tensor:
    """The first l tokens of (b, ..); a slice in an exported program would guard on the length."""
    return y.index_select(1, torch.arange(l, device=y.device)) if torch.compiler.is_exporting() else y[:, :l]


def _states_of_chunks(state: Tensor, added: Tensor, survives: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The state that each chunk is given and the last one, without a loop over chunks.

    state (b, g, n, r*p), added (b, c, g, n, r*p), survives (b, c, h): log of what a chunk keeps of its state, -inf at a new
    document -> (b, c, g, n, r*p), (b, g, n, r*p).
    """
    b, c, g, n, width = added.shape
    entering = torch.cat([state[:, None], added], dim=1)  # before chunk 0, 1, ...: (b, c + 1, g, n, r*p)
    sources = entering.unflatten(-1, (r, width // r)).permute(0, 2, 4, 1, 3, 5).flatten(-2)  # (b, g, r, c + 1, n*p)
    survives = survives.mT.contiguous()  # (b, h, c)
    survives = torch.cat([survives.new_zeros(b, survives.shape[1], 1), survives], dim=2)  # (b, h, c + 1)
    ends = survives == -torch.inf  # sums of -inf would be nan: documents are counted apart from the decay
    total, document = survives.masked_fill(ends, 0).cumsum(2), ends.int().cumsum(2)
    order = torch.arange(total.shape[-1], device=added.device)
    kept = (order[:, None] >= order) & (document[..., :, None] == document[..., None, :])  # (b, h, to, from)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~kept, -torch.inf).exp()
    states = decay.unflatten(1, (g, r)) @ sources  # (b, g, r, c + 1, n*p)
    states = states.unflatten(-1, (n, width // r)).permute(0, 3, 1, 4, 2, 5).flatten(-2)  # (b, c + 1, g, n, r*p)
    return states[:, :-1], states[:, -1]
