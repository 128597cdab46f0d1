"""The Triton kernels of the chunked scan; triton_scan.py has the mathematics and the launches.

Sums, decays and the running state are fp32; operands of products are DOT, the inputs' dtype, and so are the states that
chunks are given, which serve as operands alone. No sum depends on which program comes first.

    b batch, l length, H heads, P head_dim, G groups, R heads per group, N state, c chunk, Q tokens in a chunk
    BP, BN, BR blocks that hold P, N or a part of it, and R; BQ a part of a chunk
    i a token that reads, j one that is read, both rows of a chunk
    step, total (b, c, H, Q) fp32: dt, and the sum of dt * A from the chunk's start through the token
    matches (b, c, G, Q, Q) fp32: C_i . B_j, the same for all heads of a group
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
    """(rows, block), with zeros where a token or a column does not exist."""
    return tl.load(pointers + columns[None, :], mask=real[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def documents(seq_idx, b, c, t, l, Q: tl.constexpr):
    """Documents of the tokens t, of the state that the chunk is given, and of its last token."""
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
def between(seq_idx, b, ti, tj, l, total_i, total_j, DOCUMENTS: tl.constexpr):
    """(i, j) what survives of token j until token i >= j, 0 elsewhere; the exponent is masked, as for i < j it is > 0."""
    seen = ti[:, None] >= tj[None, :]
    if DOCUMENTS:
        row = seq_idx + b * l
        document_i, document_j = tl.load(row + tl.minimum(ti, l - 1)), tl.load(row + tl.minimum(tj, l - 1))
        seen = seen & (document_i[:, None] == document_j[None, :])
    return tl.exp(tl.where(seen, total_i[:, None] - total_j[None, :], float("-inf")))


@triton.jit(do_not_specialize=["l", "chunks"])
def prepare(
    dt, A, B, C, step, total, matches, l, chunks,
    Bb, Bl, Bg, Cb, Cl, Cg,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes step, total and, in blocks of BQ by BQ up to the diagonal, matches. Grid (G * Q / BQ, chunks, b)."""
    G: tl.constexpr = H // R
    parts: tl.constexpr = Q // BQ
    group, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if part == 0:
        q, member = tl.arange(0, Q), tl.arange(0, BR)
        t, head, own = c * Q + q, group * R + member, member < R
        given = tl.load(dt + (b * l + t)[:, None] * H + head[None, :], mask=(t < l)[:, None] & own[None, :], other=0.0)
        given = given.to(tl.float32)  # (Q, BR); 0, no step at all, behind the end
        decay = tl.load(A + head, mask=own, other=0.0).to(tl.float32)
        place = ((b * chunks + c) * H + head)[None, :] * Q + q[:, None]
        tl.store(step + place, given, mask=own[None, :])
        tl.store(total + place, tl.cumsum(given * decay[None, :], 0), mask=own[None, :])
    i = part * BQ + tl.arange(0, BQ)
    ti = c * Q + i
    target = matches + ((b * chunks + c) * G + group) * (Q * Q) + i[:, None] * Q
    for first in range(0, (part + 1) * BQ, BQ):
        j = first + tl.arange(0, BQ)
        tj = c * Q + j
        found = tl.zeros((BQ, BQ), tl.float32)
        for start in range(0, N, BN):
            n = start + tl.arange(0, BN)
            reads = tile(rows(C, b, ti, group, Cb, Cl, Cg), n, ti < l, N)
            directions = tile(rows(B, b, tj, group, Bb, Bl, Bg), n, tj < l, N)
            found += product(reads, tl.trans(directions), DOT, PRECISION)
        tl.store(target + j[None, :], found)


@triton.autotune(configs=choices((4, 3), (8, 3)), key=["P", "N", "Q"])
@triton.jit(do_not_specialize=["l", "chunks"])
def pass_states(
    x, B, step, total, seq_idx, states, first, last, l, chunks,
    xb, xl, xh, Bb, Bl, Bg,
    H: tl.constexpr, P: tl.constexpr, R: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, FIRST: tl.constexpr, BACKWARD: tl.constexpr, DOCUMENTS: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The recurrence over chunks; BACKWARD, with dy for x and C for B, of the state's gradient from the last chunk.

    Grid (blocks of N, H, b). Writes `states` (b, c, H, P, N), what each chunk is given. `first` (b, H, P, N) starts it,
    unless FIRST is false; `last` (b, H, P, N) is left.
    """
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    q, p, n = tl.arange(0, Q), tl.arange(0, BP), tl.program_id(0) * BN + tl.arange(0, BN)
    element, inside = p[:, None] * N + n[None, :], (p < P)[:, None] & (n < N)[None, :]
    state = tl.zeros((BP, BN), tl.float32)
    if FIRST:
        state = tl.load(first + (b * H + head) * (P * N) + element, mask=inside, other=0.0).to(tl.float32)
    for number in range(chunks):
        c = chunks - 1 - number if BACKWARD else number
        place = (b * chunks + c) * H + head
        t = c * Q + q
        log, end = tl.load(total + place * Q + q), tl.load(total + place * Q + Q - 1)
        from_start, to_end, through = reach(seq_idx, b, c, t, l, log, end, Q, DOCUMENTS)
        weights = from_start if BACKWARD else tl.load(step + place * Q + q) * to_end
        inputs = tile(rows(x, b, t, head, xb, xl, xh), p, t < l, P).to(tl.float32) * weights[:, None]
        directions = tile(rows(B, b, t, head // R, Bb, Bl, Bg), n, t < l, N)
        tl.store(states + place * (P * N) + element, state.to(states.dtype.element_ty), mask=inside)
        state = state * through + product(tl.trans(inputs), directions, DOT, PRECISION)
    tl.store(last + (b * H + head) * (P * N) + element, state, mask=inside)


@triton.autotune(configs=choices((4, 2), (4, 3)), key=["P", "N", "Q"])
@triton.jit(do_not_specialize=["l", "chunks"])
def outputs(
    x, C, D, step, total, matches, seq_idx, states, y, l, chunks,
    xb, xl, xh, Cb, Cl, Cg,
    H: tl.constexpr, P: tl.constexpr, R: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, DOCUMENTS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (b, l, H, P), BQ tokens in a program, from those of the chunk up to them. Grid (H * Q / BQ, chunks, b)."""
    parts: tl.constexpr = Q // BQ
    head, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, p = part * BQ + tl.arange(0, BQ), tl.arange(0, BP)
    ti = c * Q + i
    place = (b * chunks + c) * H + head
    total_i, end = tl.load(total + place * Q + i), tl.load(total + place * Q + Q - 1)
    from_start, to_end, through = reach(seq_idx, b, c, ti, l, total_i, end, Q, DOCUMENTS)
    out = tl.zeros((BQ, BP), tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        reads = tile(rows(C, b, ti, head // R, Cb, Cl, Cg), n, ti < l, N)
        state = tile(states + place * (P * N) + p[:, None] * N, n, p < P, N)  # (BP, BN)
        out += product(reads, tl.trans(state), DOT, PRECISION)
    out *= from_start[:, None]
    of_group = matches + ((b * chunks + c) * (H // R) + head // R) * (Q * Q) + i[:, None] * Q
    for first in range(0, (part + 1) * BQ, BQ):
        j = first + tl.arange(0, BQ)
        tj = c * Q + j
        found = tl.load(of_group + j[None, :])
        inputs = tile(rows(x, b, tj, head, xb, xl, xh), p, tj < l, P)
        step_j, total_j = tl.load(step + place * Q + j), tl.load(total + place * Q + j)
        scores = found * between(seq_idx, b, ti, tj, l, total_i, total_j, DOCUMENTS) * step_j[None, :]
        out += product(scores, inputs, DOT, PRECISION)
    own = tile(rows(x, b, ti, head, xb, xl, xh), p, ti < l, P)
    out += own.to(tl.float32) * tl.load(D + head).to(tl.float32)
    target = y + ((b * l + ti) * H + head)[:, None] * P + p[None, :]
    tl.store(target, out.to(y.dtype.element_ty), mask=(ti < l)[:, None] & (p < P)[None, :])


@triton.autotune(configs=choices((8, 1), (8, 2)), key=["P", "N", "Q"])
@triton.jit(do_not_specialize=["l", "chunks"])
def input_gradients(
    x, A, B, C, D, steps, total, matches, seq_idx, states, dy, dstates, dx, ddt, dA, dD, l, chunks,
    xb, xl, xh, Bb, Bl, Bg, Cb, Cl, Cg,
    H: tl.constexpr, P: tl.constexpr, R: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, DOCUMENTS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx (b, l, H, P), ddt (b, l, H), and each chunk's share of dA and dD (b, c, H). Grid (H, chunks, b)."""
    head, c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q, p = tl.arange(0, Q), tl.arange(0, BP)
    t = c * Q + q
    real = t < l
    place = (b * chunks + c) * H + head
    step, log = tl.load(steps + place * Q + q), tl.load(total + place * Q + q)
    end = tl.load(total + place * Q + Q - 1)
    from_start, to_end, through = reach(seq_idx, b, c, t, l, log, end, Q, DOCUMENTS)
    carried, returned = tl.zeros((Q, BP), tl.float32), tl.zeros((Q, BP), tl.float32)
    across = tl.zeros((BP,), tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        reads = tile(rows(C, b, t, head // R, Cb, Cl, Cg), n, real, N)
        directions = tile(rows(B, b, t, head // R, Bb, Bl, Bg), n, real, N)
        state = tile(states + place * (P * N) + p[:, None] * N, n, p < P, N)  # (BP, BN)
        dstate = tile(dstates + place * (P * N) + p[:, None] * N, n, p < P, N)
        carried += product(reads, tl.trans(state), DOT, PRECISION)
        returned += product(directions, tl.trans(dstate), DOT, PRECISION)
        across += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    inputs = tile(rows(x, b, t, head, xb, xl, xh), p, real, P)
    grads = tile(dy + ((b * l + t) * H + head)[:, None] * P, p, real, P)
    wide_inputs, wide_grads = inputs.to(tl.float32), grads.to(tl.float32)

    found = tl.load(matches + ((b * chunks + c) * (H // R) + head // R) * (Q * Q) + q[:, None] * Q + q[None, :])
    pairs = found * between(seq_idx, b, t, t, l, log, log, DOCUMENTS)  # (i, j)
    fed = product(tl.trans(pairs), grads, DOT, PRECISION) + returned * to_end[:, None]  # gradient of dt * x
    flow = pairs * product(grads, tl.trans(inputs), DOT, PRECISION) * step[None, :]
    flow = tl.where(q[:, None] > q[None, :], flow, 0.0)
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
    x, B, C, steps, total, seq_idx, states, dy, dstates, dB, dC, l, chunks,
    xb, xl, xh, Bb, Bl, Bg, Cb, Cl, Cg,
    H: tl.constexpr, P: tl.constexpr, R: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, DOCUMENTS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dB, dC (b, l, G, N): sums over the heads of a group, in one program, which makes the order of every sum fixed.

    Grid (G * blocks of N, chunks, b).
    """
    blocks = (N + BN - 1) // BN
    group, c, b = tl.program_id(0) // blocks, tl.program_id(1), tl.program_id(2).to(tl.int64)
    q, p, n = tl.arange(0, Q), tl.arange(0, BP), tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    t = c * Q + q
    real = t < l
    read_grads, fed_grads = tl.zeros((Q, BN), tl.float32), tl.zeros((Q, BN), tl.float32)
    weights = tl.zeros((Q, Q), tl.float32)  # (i, j), of all heads: what dC_i takes of B_j, and dB_j of C_i
    for member in range(R):
        head = group * R + member
        place = (b * chunks + c) * H + head
        step, log = tl.load(steps + place * Q + q), tl.load(total + place * Q + q)
        end = tl.load(total + place * Q + Q - 1)
        from_start, to_end, through = reach(seq_idx, b, c, t, l, log, end, Q, DOCUMENTS)
        inputs = tile(rows(x, b, t, head, xb, xl, xh), p, real, P)
        grads = tile(dy + ((b * l + t) * H + head)[:, None] * P, p, real, P)
        alike = product(grads, tl.trans(inputs), DOT, PRECISION)
        weights += alike * between(seq_idx, b, t, t, l, log, log, DOCUMENTS) * step[None, :]
        state = tile(states + place * (P * N) + p[:, None] * N, n, p < P, N)
        read_grads += product(grads.to(tl.float32) * from_start[:, None], state, DOT, PRECISION)
        dstate = tile(dstates + place * (P * N) + p[:, None] * N, n, p < P, N)
        fed_grads += product(inputs.to(tl.float32) * (step * to_end)[:, None], dstate, DOT, PRECISION)
    reads = tile(rows(C, b, t, group, Cb, Cl, Cg), n, real, N)
    directions = tile(rows(B, b, t, group, Bb, Bl, Bg), n, real, N)
    read_grads += product(weights, directions, DOT, PRECISION)
    fed_grads += product(tl.trans(weights), reads, DOT, PRECISION)
    place = ((b * l + t) * (H // R) + group)[:, None] * N + n[None, :]
    inside = real[:, None] & (n < N)[None, :]
    tl.store(dC + place, read_grads.to(dC.dtype.element_ty), mask=inside)
    tl.store(dB + place, fed_grads.to(dB.dtype.element_ty), mask=inside)
