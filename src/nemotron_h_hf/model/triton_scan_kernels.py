"""The Triton kernels of the chunked scan; triton_scan.py has the mathematics and the launches.

One program works on one chunk of Q tokens of one head (or group). Decays are sums of dt * A from the chunk's start, taken
again in each kernel: a cumulative sum of Q numbers costs less than a launch and a trip through memory. Sums, decays and
states are fp32; operands of products are DOT, the inputs' dtype.

    b batch, l length, H heads, P head_dim, G groups, R heads per group, N state, c chunk, Q tokens in a chunk
    BP, BN blocks that hold P, and N or a part of it; i a token that reads, j one that is read, both rows of a chunk
"""

from .triton_launch import choices, tl, triton


@triton.jit
def product(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION)


@triton.jit
def rows(pointer, b, t, head, stride_b, stride_l, stride_h):
    """Addresses of the first element of (b, t, head) for a column of tokens t."""
    return pointer + b * stride_b + head * stride_h + t.to(tl.int64)[:, None] * stride_l


@triton.jit
def tile(pointers, columns, real, WIDTH: tl.constexpr):
    """(Q, block) of rows, with zeros where a token or a column does not exist."""
    return tl.load(pointers + columns[None, :], mask=real[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def steps(dt, A, b, t, head, l, H: tl.constexpr):
    """Step sizes (Q), and the log decay (Q) of each token; 0, no step at all, behind the end."""
    step = tl.load(dt + (b * l + t) * H + head, mask=t < l, other=0.0).to(tl.float32)
    return step, step * tl.load(A + head).to(tl.float32)


@triton.jit
def documents(seq_idx, b, c, t, l, Q: tl.constexpr):
    """Documents of the tokens (Q), of the state that the chunk is given, and of its last token."""
    row = seq_idx + b * l
    start = c * Q
    mine = tl.load(row + tl.minimum(t, l - 1))
    given = tl.load(row + tl.maximum(start - 1, 0))
    last = tl.load(row + tl.minimum(start + Q, l) - 1)
    return mine, given, last


@triton.jit
def reach(seq_idx, b, c, t, l, total, end, Q: tl.constexpr, DOCUMENTS: tl.constexpr):
    """What survives: of the given state until each token, of each token until the end, of the given state until the end."""
    from_start = tl.exp(total)
    to_end = tl.exp(end - total)
    through = tl.exp(end)
    if DOCUMENTS:
        mine, given, last = documents(seq_idx, b, c, t, l, Q)
        from_start = tl.where(mine == given, from_start, 0.0)
        to_end = tl.where(mine == last, to_end, 0.0)
        through = tl.where(given == last, through, 0.0)
    return from_start, to_end, through


@triton.jit
def between(seq_idx, b, t, l, total, Q: tl.constexpr, DOCUMENTS: tl.constexpr):
    """(i, j) what survives of token j until token i >= j, 0 elsewhere; the exponent is masked, as above the diagonal it is > 0."""
    token = tl.arange(0, Q)
    seen = token[:, None] >= token[None, :]
    if DOCUMENTS:
        mine = tl.load(seq_idx + b * l + tl.minimum(t, l - 1))
        seen = seen & (mine[:, None] == mine[None, :])
    return tl.exp(tl.where(seen, total[:, None] - total[None, :], float("-inf")))


@triton.jit(do_not_specialize=["l", "chunks"])
def add_states(
    x, B, dt, A, seq_idx, states, keep, l, chunks,
    xb, xl, xh, Bb, Bl, Bg,
    H: tl.constexpr, P: tl.constexpr, R: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, GRADIENT: tl.constexpr, DOCUMENTS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the state behind it; with GRADIENT, to the gradient of the state before it (x is dy, B is C).

    Grid (H * blocks of N, chunks, b). Writes states (b, c, H, P, N) and, without GRADIENT, keep (b, c, H).
    """
    blocks = (N + BN - 1) // BN
    head, c, b = tl.program_id(0) // blocks, tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, p, n = c * Q + tl.arange(0, Q), tl.arange(0, BP), tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    real = t < l
    step, log_decay = steps(dt, A, b, t, head, l, H)
    total, end = tl.cumsum(log_decay, 0), tl.sum(log_decay, 0)
    from_start, to_end, through = reach(seq_idx, b, c, t, l, total, end, Q, DOCUMENTS)
    weights = from_start if GRADIENT else step * to_end
    inputs = tile(rows(x, b, t, head, xb, xl, xh), p, real, P).to(tl.float32) * weights[:, None]
    directions = tile(rows(B, b, t, head // R, Bb, Bl, Bg), n, real, N)
    added = product(tl.trans(inputs), directions, DOT, PRECISION)  # (BP, BN)
    place = (b * chunks + c) * H + head
    target = states + place * (P * N) + p[:, None] * N + n[None, :]
    tl.store(target, added, mask=(p < P)[:, None] & (n < N)[None, :])
    if not GRADIENT:
        if tl.program_id(0) % blocks == 0:
            tl.store(keep + place, through)


@triton.jit(do_not_specialize=["chunks"])
def pass_states(
    states, keep, first, last, chunks,
    H: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """The recurrence over chunks, in place: what a chunk adds becomes what it is given; BACKWARD goes from the last chunk.

    Grid (blocks of SIZE = P * N, H, b). `first` (b, H, P, N) starts it, unless FIRST is false; `last` (b, H, P, N) is left.
    """
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = e < SIZE
    state = tl.zeros((BLOCK,), tl.float32)
    if FIRST:
        state = tl.load(first + (b * H + head) * SIZE + e, mask=inside, other=0.0).to(tl.float32)
    for number in range(chunks):
        c = chunks - 1 - number if BACKWARD else number
        place = (b * chunks + c) * H + head
        added = tl.load(states + place * SIZE + e, mask=inside, other=0.0)
        tl.store(states + place * SIZE + e, state, mask=inside)
        state = state * tl.load(keep + place) + added
    tl.store(last + (b * H + head) * SIZE + e, state, mask=inside)


@triton.autotune(configs=choices((8, 1), (8, 2), (4, 2)), key=["P", "N", "Q"])
@triton.jit(do_not_specialize=["l", "chunks"])
def outputs(
    x, dt, A, B, C, D, seq_idx, states, y, l, chunks,
    xb, xl, xh, Bb, Bl, Bg, Cb, Cl, Cg,
    H: tl.constexpr, P: tl.constexpr, R: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, DOCUMENTS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (b, l, H, P). Grid (H, chunks, b)."""
    head, c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, p = c * Q + tl.arange(0, Q), tl.arange(0, BP)
    real = t < l
    step, log_decay = steps(dt, A, b, t, head, l, H)
    total, end = tl.cumsum(log_decay, 0), tl.sum(log_decay, 0)
    from_start, to_end, through = reach(seq_idx, b, c, t, l, total, end, Q, DOCUMENTS)
    place = (b * chunks + c) * H + head
    matches, carried = tl.zeros((Q, Q), tl.float32), tl.zeros((Q, BP), tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        reads = tile(rows(C, b, t, head // R, Cb, Cl, Cg), n, real, N)
        directions = tile(rows(B, b, t, head // R, Bb, Bl, Bg), n, real, N)
        state = tile(states + place * (P * N) + p[:, None] * N, n, p < P, N)  # (BP, BN)
        matches += product(reads, tl.trans(directions), DOT, PRECISION)
        carried += product(reads, tl.trans(state), DOT, PRECISION)
    scores = matches * between(seq_idx, b, t, l, total, Q, DOCUMENTS) * step[None, :]
    inputs = tile(rows(x, b, t, head, xb, xl, xh), p, real, P)
    out = product(scores, inputs, DOT, PRECISION) + carried * from_start[:, None]
    out += inputs.to(tl.float32) * tl.load(D + head).to(tl.float32)
    target = y + ((b * l + t) * H + head)[:, None] * P + p[None, :]
    tl.store(target, out.to(y.dtype.element_ty), mask=real[:, None] & (p < P)[None, :])


@triton.autotune(configs=choices((8, 1), (8, 2)), key=["P", "N", "Q"])
@triton.jit(do_not_specialize=["l", "chunks"])
def input_gradients(
    x, dt, A, B, C, D, seq_idx, states, dy, dstates, dx, ddt, dA, dD, l, chunks,
    xb, xl, xh, Bb, Bl, Bg, Cb, Cl, Cg,
    H: tl.constexpr, P: tl.constexpr, R: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, DOCUMENTS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx (b, l, H, P), ddt (b, l, H), and each chunk's share of dA and dD (b, c, H). Grid (H, chunks, b)."""
    head, c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, p = c * Q + tl.arange(0, Q), tl.arange(0, BP)
    real = t < l
    step, log_decay = steps(dt, A, b, t, head, l, H)
    total, end = tl.cumsum(log_decay, 0), tl.sum(log_decay, 0)
    from_start, to_end, through = reach(seq_idx, b, c, t, l, total, end, Q, DOCUMENTS)
    place = (b * chunks + c) * H + head
    matches = tl.zeros((Q, Q), tl.float32)
    carried, returned = tl.zeros((Q, BP), tl.float32), tl.zeros((Q, BP), tl.float32)
    across = tl.zeros((BP,), tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        reads = tile(rows(C, b, t, head // R, Cb, Cl, Cg), n, real, N)
        directions = tile(rows(B, b, t, head // R, Bb, Bl, Bg), n, real, N)
        state = tile(states + place * (P * N) + p[:, None] * N, n, p < P, N)  # (BP, BN)
        dstate = tile(dstates + place * (P * N) + p[:, None] * N, n, p < P, N)
        matches += product(reads, tl.trans(directions), DOT, PRECISION)
        carried += product(reads, tl.trans(state), DOT, PRECISION)
        returned += product(directions, tl.trans(dstate), DOT, PRECISION)
        across += tl.sum(state * dstate, 1)
    inputs = tile(rows(x, b, t, head, xb, xl, xh), p, real, P)
    grads = tile(dy + ((b * l + t) * H + head)[:, None] * P, p, real, P)
    wide_inputs, wide_grads = inputs.to(tl.float32), grads.to(tl.float32)

    pairs = matches * between(seq_idx, b, t, l, total, Q, DOCUMENTS)  # (i, j)
    fed = product(tl.trans(pairs), grads, DOT, PRECISION) + returned * to_end[:, None]  # gradient of dt * x
    flow = pairs * product(grads, tl.trans(inputs), DOT, PRECISION) * step[None, :]
    token = tl.arange(0, Q)
    flow = tl.where(token[:, None] > token[None, :], flow, 0.0)
    later = from_start * tl.sum(wide_grads * carried, 1) + tl.sum(flow, 1) - tl.sum(flow, 0)
    earlier = step * to_end * tl.sum(wide_inputs * returned, 1)
    dlog = tl.cumsum(later, 0, reverse=True) + tl.cumsum(earlier, 0) - earlier + through * tl.sum(across, 0)

    out = step[:, None] * fed + wide_grads * tl.load(D + head).to(tl.float32)
    target = dx + ((b * l + t) * H + head)[:, None] * P + p[None, :]
    tl.store(target, out.to(dx.dtype.element_ty), mask=real[:, None] & (p < P)[None, :])
    dstep = tl.sum(wide_inputs * fed, 1) + dlog * tl.load(A + head).to(tl.float32)
    tl.store(ddt + (b * l + t) * H + head, dstep, mask=real)
    tl.store(dA + place, tl.sum(step * dlog, 0))
    tl.store(dD + place, tl.sum(tl.sum(wide_inputs * wide_grads, 1), 0))


@triton.autotune(configs=choices((8, 1), (8, 2)), key=["P", "N", "Q"])
@triton.jit(do_not_specialize=["l", "chunks"])
def projection_gradients(
    x, dt, A, B, C, seq_idx, states, dy, dstates, dB, dC, l, chunks,
    xb, xl, xh, Bb, Bl, Bg, Cb, Cl, Cg,
    H: tl.constexpr, P: tl.constexpr, R: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, DOCUMENTS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dB, dC (b, l, G, N): sums over the heads of a group, in one program, so that no sum depends on who comes first.

    Grid (G * blocks of N, chunks, b).
    """
    blocks = (N + BN - 1) // BN
    group, c, b = tl.program_id(0) // blocks, tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, p, n = c * Q + tl.arange(0, Q), tl.arange(0, BP), tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    real = t < l
    read_grads, fed_grads = tl.zeros((Q, BN), tl.float32), tl.zeros((Q, BN), tl.float32)
    weights = tl.zeros((Q, Q), tl.float32)  # (i, j), of all heads: what dC_i takes of B_j, and dB_j of C_i
    for member in range(R):
        head = group * R + member
        step, log_decay = steps(dt, A, b, t, head, l, H)
        total, end = tl.cumsum(log_decay, 0), tl.sum(log_decay, 0)
        from_start, to_end, through = reach(seq_idx, b, c, t, l, total, end, Q, DOCUMENTS)
        place = ((b * chunks + c) * H + head) * (P * N)
        inputs = tile(rows(x, b, t, head, xb, xl, xh), p, real, P)
        grads = tile(dy + ((b * l + t) * H + head)[:, None] * P, p, real, P)
        alike = product(grads, tl.trans(inputs), DOT, PRECISION)
        weights += alike * between(seq_idx, b, t, l, total, Q, DOCUMENTS) * step[None, :]
        state = tile(states + place + p[:, None] * N, n, p < P, N)
        read_grads += product(grads.to(tl.float32) * from_start[:, None], state, DOT, PRECISION)
        dstate = tile(dstates + place + p[:, None] * N, n, p < P, N)
        fed_grads += product(inputs.to(tl.float32) * (step * to_end)[:, None], dstate, DOT, PRECISION)
    reads = tile(rows(C, b, t, group, Cb, Cl, Cg), n, real, N)
    directions = tile(rows(B, b, t, group, Bb, Bl, Bg), n, real, N)
    read_grads += product(weights, directions, DOT, PRECISION)
    fed_grads += product(tl.trans(weights), reads, DOT, PRECISION)
    place = ((b * l + t) * (H // R) + group)[:, None] * N + n[None, :]
    inside = real[:, None] & (n < N)[None, :]
    tl.store(dC + place, read_grads.to(dC.dtype.element_ty), mask=inside)
    tl.store(dB + place, fed_grads.to(dB.dtype.element_ty), mask=inside)
