"""The state-space scan of a sequence on a CPU, forward and backward, in loops that Numba compiles.

A row's chunk of up to 32 tokens of one document, and what a head needs of it, fits into a core's caches: no tensor of the
sequence's length is made but the results. All large products are `multiply`, in vectors of the processor's length.
In the letters of ssd.py, with t_i the sum of dt A from the chunk's first token to token i, T that to its last, and X = dt x:

    Y_i = exp(t_i) C_i S + sum over j <= i of (C_i . B_j) exp(t_i - t_j) X_j + D x_i
    S'  = exp(T) S + sum of exp(T - t_j) B_j (outer) X_j             the state after the chunk, here (n, p)

Tensors are addresses, as in numba_loops.py.

    b batch, l length, h heads, p head_dim, g groups, r heads per group, n state, m tokens of a chunk
"""

import numpy as np

from .numba_compile import compiled, compiled_for_c
from .numba_loops import exponential, pointer

try:  # inside `try`, for readers that check the imports of pushed model code
    from llvmlite.binding import get_host_cpu_features
    from numba import carray, types
    from numba.core.cgutils import alloca_once_value, for_range, ir
    from numba.extending import intrinsic
except ImportError as missing:
    raise ImportError("the compiled loops of a CPU need numba; pip install numba") from missing

FORWARD, BACKWARD = range(2)
NUM_INTS = 32  # of an operation, at most
CHUNK = 32  # tokens
KEPT_CHUNKS = 16  # every so many chunks a state is kept for the backward pass
LANES = 16 if get_host_cpu_features().get("avx512f") else 8  # fp32 values in a vector
ROWS = 4  # of a tile: with two vectors 8 sums, enough to hide the latency of an addition


# Products


def _tile_of(vectors):
    """An intrinsic c (4, vectors) = by * c + a (4, k) times b (k, vectors): addresses, strides in bytes."""

    @intrinsic
    def tile(_context, a, a_row, a_column, b, b_row, c, c_row, k, by):
        def generate(_context, builder, _signature, arguments):
            a, a_row, a_column, b, b_row, c, c_row, k, by = arguments
            vector, word = ir.VectorType(ir.FloatType(), LANES), ir.IntType(64)

            def at(address, kind, row, stride, offset=0):
                place = builder.add(builder.add(address, builder.mul(row, stride)), word(offset))
                return builder.inttoptr(place, kind.as_pointer())

            def spread(value):
                first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
                mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
                return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), mask)

            def vectors_of(address, row, stride):
                return [at(address, vector, row, stride, 4 * LANES * v) for v in range(vectors)]

            outputs = [vectors_of(c, word(row), c_row) for row in range(ROWS)]
            sums = [[alloca_once_value(builder, builder.fmul(builder.load(out, align=4), spread(by))) for out in row]
                    for row in outputs]  # fmt: skip
            with for_range(builder, k) as loop:
                read = [builder.load(place, align=4) for place in vectors_of(b, loop.index, b_row)]
                start = builder.add(a, builder.mul(loop.index, a_column))
                for row in range(ROWS):
                    value = spread(builder.load(at(start, ir.FloatType(), word(row), a_row), align=4))
                    for total, values in zip(sums[row], read):
                        added = builder.fmul(value, values, flags=["contract"])
                        builder.store(builder.fadd(builder.load(total), added, flags=["contract"]), total)
            for out, total in ((o, t) for row in zip(outputs, sums) for o, t in zip(*row)):
                builder.store(builder.load(total), out, align=4)

        return types.void(*[types.int64] * 8, types.float32), generate

    return tile


_tile, _wide_tile = _tile_of(1), _tile_of(2)


@compiled
def multiply(left, a_row, a_column, right, out, m, k, by):  # pragma: no cover, machine code
    """c (m, n) = by * c + a (m, k) times b (k, n): m a multiple of ROWS, n of LANES, a's strides in elements, rows of b and c
    as long as the arrays say."""
    a, b, c, n, b_row, c_row = (
        left.ctypes.data,
        right.ctypes.data,
        out.ctypes.data,
        out.shape[1],
        right.shape[1],
        out.shape[1],
    )
    by = np.float32(by)
    for j in range(0, n - LANES, 2 * LANES):
        for i in range(0, m, ROWS):
            _wide_tile(
                a + 4 * i * a_row,
                4 * a_row,
                4 * a_column,
                b + 4 * j,
                4 * b_row,
                c + 4 * (i * c_row + j),
                4 * c_row,
                k,
                by,
            )
    if n // LANES % 2:
        j = n - LANES
        for i in range(0, m, ROWS):
            _tile(
                a + 4 * i * a_row,
                4 * a_row,
                4 * a_column,
                b + 4 * j,
                4 * b_row,
                c + 4 * (i * c_row + j),
                4 * c_row,
                k,
                by,
            )


@compiled
def _matrix(rows, columns):  # pragma: no cover, machine code
    return np.zeros((rows, columns), np.float32)


@compiled
def _floats(address, offset, size):  # pragma: no cover, machine code
    """`size` values from the `offset`th at an address on."""
    return carray(pointer(address + 4 * offset), size, np.float32)


@compiled
def _up(size, step):  # pragma: no cover, machine code
    return (size + step - 1) // step * step


# Chunks


@compiled
def _end_of_chunk(documents, start, l):  # pragma: no cover, machine code
    """One token past a chunk; `documents` (l) or nothing."""
    end = min(start + CHUNK, l)
    for t in range(start + 1, min(end, len(documents))):
        if documents[t] != documents[t - 1]:
            return t
    return end


@compiled
def _read_group(source, stride, m, n, rows, columns):  # pragma: no cover, machine code
    """m tokens of n values, `stride` apart, as rows (CHUNK, N) and as columns (N, CHUNK), with zeros around."""
    rows[:], columns[:] = np.float32(0), np.float32(0)
    for i in range(m):
        values = _floats(source, i * stride, n)
        for c in range(n):
            rows[i, c] = values[c]
            columns[c, i] = values[c]


@compiled
def _decays(dt, h, A, m, total, from_start, to_end):  # pragma: no cover, machine code
    """t_i, exp(t_i) and exp(T - t_i) of one head; of places behind the chunk t_i is T. -> exp(T)"""
    at = np.float32(0)
    for i in range(CHUNK):
        if i < m:
            at += dt[i * h] * A
        total[i] = at
    for i in range(CHUNK):
        from_start[i] = exponential(total[i])
        to_end[i] = exponential(at - total[i])
    return from_start[CHUNK - 1]


@compiled
def _weigh(products, total, m, scores):  # pragma: no cover, machine code
    """(C_i . B_j) exp(t_i - t_j) for j <= i, else 0: (CHUNK, CHUNK)."""
    for i in range(CHUNK):
        for j in range(CHUNK):
            kept = products[i, j] * exponential(min(total[i] - total[j], np.float32(0)))
            scores[i, j] = kept if j <= i else np.float32(0)


@compiled
def scan_part(ints, part, parts):  # pragma: no cover, machine code
    """One part of the heads of `scan_of`."""
    x_at, x_row, x_token, dt_at, A_at, D_at, B_at, C_at = (
        ints[0],
        ints[1],
        ints[2],
        ints[3],
        ints[4],
        ints[5],
        ints[6],
        ints[7],
    )
    B_row, B_token, documents_at, given_at, y_at, last_at, kept_at = (
        ints[8], ints[9], ints[10], ints[11], ints[12], ints[13], ints[14]
    )  # fmt: skip
    kept_size, b, l, h, p, g, n = ints[15], ints[16], ints[17], ints[18], ints[19], ints[20], ints[21]
    r, N, P = h // g, _up(n, LANES), _up(p, LANES)
    A, D = _floats(A_at, 0, h), _floats(D_at, 0, h)
    Bs, BT, Cs, CT = _matrix(CHUNK, N), _matrix(N, CHUNK), _matrix(CHUNK, N), _matrix(N, CHUNK)
    products, scores = _matrix(CHUNK, CHUNK), _matrix(CHUNK, CHUNK)
    X, Xe, Y = _matrix(CHUNK, P), _matrix(CHUNK, P), _matrix(CHUNK, P)
    times = _matrix(3, CHUNK)
    total, from_start, to_end = times[0], times[1], times[2]
    states = np.zeros((r, N, P), np.float32)
    first, last = b * h * part // parts, b * h * (part + 1) // parts
    for job in range(first // r, (last + r - 1) // r):
        row, group = job // g, job % g
        low, high = max(first, job * r) - job * r, min(last, job * r + r) - job * r
        documents = carray(pointer(documents_at + 8 * row * l), l if documents_at else 0, np.int64)
        states[:] = np.float32(0)
        if given_at:
            for i in range(low, high):
                given = _floats(given_at, (job * r + i) * p * n, p * n).reshape(p, n)
                for c in range(n):
                    for e in range(p):
                        states[i, c, e] = given[e, c]
        start, number = 0, 0
        while start < l:
            end = _end_of_chunk(documents, start, l)
            m = end - start
            M = _up(m, ROWS)
            if documents_at and start and documents[start] != documents[start - 1]:
                states[:] = np.float32(0)
            _read_group(B_at + 4 * (row * B_row + start * B_token + group * n), B_token, m, n, Bs, BT)
            _read_group(C_at + 4 * (row * B_row + start * B_token + group * n), B_token, m, n, Cs, CT)
            products[:] = np.float32(0)
            multiply(Cs, N, 1, BT, products, M, n, 1.0)
            for i in range(low, high):
                head = group * r + i
                state = states[i]
                if kept_at and number % KEPT_CHUNKS == 0:
                    place = ((row * kept_size + number // KEPT_CHUNKS) * h + head) * N * P
                    _floats(kept_at, place, N * P).reshape(N, P)[:] = state
                dt = _floats(dt_at, (row * l + start) * h + head, (m - 1) * h + 1)
                keep = _decays(dt, h, A[head], m, total, from_start, to_end)
                Y[:], X[m:], Xe[m:] = np.float32(0), np.float32(0), np.float32(0)
                multiply(Cs, N, 1, state, Y, M, n, 1.0)
                skip = D[head]
                for j in range(m):
                    values = _floats(x_at, row * x_row + (start + j) * x_token + head * p, p)
                    step, to, since = dt[j * h], to_end[j], from_start[j]
                    for e in range(p):
                        value = values[e] * step
                        X[j, e] = value
                        Xe[j, e] = value * to
                        Y[j, e] = Y[j, e] * since + values[e] * skip
                _weigh(products, total, m, scores)
                for j in range(0, M, ROWS):
                    multiply(scores[j:], CHUNK, 1, X, Y[j:], ROWS, j + ROWS, 1.0)
                multiply(BT, CHUNK, 1, Xe, state, N, m, keep)
                for j in range(m):
                    out = _floats(y_at, ((row * l + start + j) * h + head) * p, p)
                    for e in range(p):
                        out[e] = Y[j, e]
            start, number = end, number + 1
        for i in range(low, high):
            out = _floats(last_at, (job * r + i) * p * n, p * n).reshape(p, n)
            for e in range(p):
                for c in range(n):
                    out[e, c] = states[i, c, e]


# Gradients: G is that of Y, H that of the state after a chunk


@compiled
def _columns(source, m, by, out):  # pragma: no cover, machine code
    """The transposed of m rows (m, p), column i times by_i: (P, CHUNK), zeros behind."""
    for i in range(m):
        for e in range(source.shape[1]):
            out[e, i] = source[i, e] * by[i]
    for e in range(len(out)):
        for i in range(m, CHUNK):
            out[e, i] = np.float32(0)


@compiled
def _add_with_dots(given, columns, to, dots):  # pragma: no cover, machine code
    """given (N, CHUNK) is added to `to`; dots_i = its column i times that of `columns`."""
    dots[:] = np.float32(0)
    for c in range(len(given)):
        for i in range(CHUNK):
            value = given[c, i]
            to[c, i] += value
            dots[i] += value * columns[c, i]


@compiled
def _weigh_gradients(products, gradients, total, m, of_products, scores):  # pragma: no cover, machine code
    """As `_weigh`, given the gradients of the scores; adds those of C_i . B_j. In place of `gradients`: those of t_i - t_j."""
    _weigh(products, total, m, scores)
    for i in range(CHUNK):
        for j in range(CHUNK):
            decay = exponential(min(total[i] - total[j], np.float32(0)))
            of_products[i, j] += gradients[i, j] * decay if j <= i else np.float32(0)
            gradients[i, j] = gradients[i, j] * scores[i, j] if j < i else np.float32(0)


@compiled
def _of_log_decays(pairs, carried, given, kept, m, columns, out):  # pragma: no cover, machine code
    """Gradients of a_i = dt_i A, which every t from t_i on contains: the sum of `pairs` (t_k - t_j) over j < i <= k, of
    `carried` (t_k) over k >= i, of `given` (T - t_j) over j < i, and `kept` (T). Sums of differences would cancel."""
    for i in range(m):
        out[i] = kept
        kept += given[i]
    columns[:] = np.float32(0)
    later = np.float32(0)
    for i in range(m - 1, -1, -1):
        later += carried[i]
        for j in range(CHUNK):
            columns[j] += pairs[i, j]
        across = np.float32(0)
        for j in range(i):
            across += columns[j]
        out[i] += later + across


@compiled
def scan_back_part(ints, part, parts):  # pragma: no cover, machine code
    """One part of the rows' groups of `scan_back_of`."""
    x_at, x_row, x_token, dt_at, A_at, D_at, B_at, C_at = (
        ints[0],
        ints[1],
        ints[2],
        ints[3],
        ints[4],
        ints[5],
        ints[6],
        ints[7],
    )
    B_row, B_token, documents_at, G_at, H_at, kept_at = ints[8], ints[9], ints[10], ints[12], ints[13], ints[14]
    kept_size, b, l, h, p, g, n = ints[15], ints[16], ints[17], ints[18], ints[19], ints[20], ints[21]
    x_to, dt_to, A_to, D_to, B_to, C_to, given_to = ints[22], ints[23], ints[24], ints[25], ints[26], ints[27], ints[28]
    r, N, P = h // g, _up(n, LANES), _up(p, LANES)
    A, D = _floats(A_at, 0, h), _floats(D_at, 0, h)
    Bs, BT, Cs, CT = _matrix(CHUNK, N), _matrix(N, CHUNK), _matrix(CHUNK, N), _matrix(N, CHUNK)
    of_B, of_BT, of_C, of_CT = _matrix(CHUNK, N), _matrix(N, CHUNK), _matrix(CHUNK, N), _matrix(N, CHUNK)
    products, scores = _matrix(CHUNK, CHUNK), _matrix(CHUNK, CHUNK)
    of_products, of_scores = _matrix(CHUNK, CHUNK), _matrix(CHUNK, CHUNK)
    x, Xe, G, Gs, of_X = _matrix(CHUNK, P), _matrix(CHUNK, P), _matrix(CHUNK, P), _matrix(CHUNK, P), _matrix(CHUNK, P)
    XT, GT, wide = _matrix(P, CHUNK), _matrix(P, CHUNK), _matrix(N, CHUNK)
    times = _matrix(3, CHUNK)
    total, from_start, to_end = times[0], times[1], times[2]
    by_token = _matrix(6, CHUNK)
    steps, ends, carried, given_to_state = by_token[0], by_token[1], by_token[2], by_token[3]
    columns, of_decay = by_token[4], by_token[5]
    states, H = np.empty((KEPT_CHUNKS, r, N, P), np.float32), np.empty((r, N, P), np.float32)
    starts = np.empty(l + 1, np.int64)
    for job in range(b * g * part // parts, b * g * (part + 1) // parts):
        row, group = job // g, job % g
        documents = carray(pointer(documents_at + 8 * row * l), l if documents_at else 0, np.int64)
        count, starts[0] = 0, 0
        while starts[count] < l:
            starts[count + 1] = _end_of_chunk(documents, starts[count], l)
            count += 1
        H[:] = np.float32(0)
        if H_at:
            for i in range(r):
                given = _floats(H_at, (job * r + i) * p * n, p * n).reshape(p, n)
                for c in range(n):
                    for e in range(p):
                        H[i, c, e] = given[e, c]
        of_A, of_D = np.zeros(r, np.float32), np.zeros(r, np.float32)
        for segment in range((count - 1) // KEPT_CHUNKS, -1, -1):
            low, high = segment * KEPT_CHUNKS, min(count, (segment + 1) * KEPT_CHUNKS)
            for i in range(r):
                place = ((row * kept_size + segment) * h + group * r + i) * N * P
                states[0, i] = _floats(kept_at, place, N * P).reshape(N, P)
            for number in range(low, high - 1):  # the state that each chunk is given
                start, m = starts[number], starts[number + 1] - starts[number]
                _read_group(B_at + 4 * (row * B_row + start * B_token + group * n), B_token, m, n, Bs, BT)
                for i in range(r):
                    head, now, after = group * r + i, states[number - low, i], states[number + 1 - low, i]
                    dt = _floats(dt_at, (row * l + start) * h + head, (m - 1) * h + 1)
                    keep = _decays(dt, h, A[head], m, total, from_start, to_end)
                    for j in range(m):
                        values = _floats(x_at, row * x_row + (start + j) * x_token + head * p, p)
                        by = dt[j * h] * to_end[j]
                        for e in range(p):
                            Xe[j, e] = values[e] * by
                    fresh = documents_at and documents[starts[number + 1]] != documents[starts[number + 1] - 1]
                    if fresh:
                        after[:] = np.float32(0)
                    else:
                        after[:] = now
                        multiply(BT, CHUNK, 1, Xe, after, N, m, keep)
            for number in range(high - 1, low - 1, -1):
                start, m = starts[number], starts[number + 1] - starts[number]
                M = _up(m, ROWS)
                _read_group(B_at + 4 * (row * B_row + start * B_token + group * n), B_token, m, n, Bs, BT)
                _read_group(C_at + 4 * (row * B_row + start * B_token + group * n), B_token, m, n, Cs, CT)
                products[:], of_products[:] = np.float32(0), np.float32(0)
                of_B[:], of_BT[:], of_C[:], of_CT[:] = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
                multiply(Cs, N, 1, BT, products, M, n, 1.0)
                is_fresh = documents_at and start and documents[start] != documents[start - 1]
                for i in range(r):
                    head, state, after = group * r + i, states[number - low, i], H[i]
                    dt = _floats(dt_at, (row * l + start) * h + head, (m - 1) * h + 1)
                    keep = _decays(dt, h, A[head], m, total, from_start, to_end)
                    G[m:], Gs[m:], of_X[:] = np.float32(0), np.float32(0), np.float32(0)
                    steps[m:] = np.float32(0)
                    skip = np.float32(0)
                    for j in range(m):
                        values = _floats(x_at, row * x_row + (start + j) * x_token + head * p, p)
                        given = _floats(G_at, ((row * l + start + j) * h + head) * p, p)
                        since, steps[j] = from_start[j], dt[j * h]
                        ends[j] = steps[j] * to_end[j]
                        for e in range(p):
                            x[j, e] = values[e]
                            G[j, e] = given[e]
                            Gs[j, e] = given[e] * since
                            skip += given[e] * values[e]
                    of_D[i] += skip
                    _columns(x[:, :p], m, steps, XT)
                    of_scores[:] = np.float32(0)
                    multiply(G, P, 1, XT, of_scores, M, p, 1.0)
                    _weigh_gradients(products, of_scores, total, m, of_products, scores)
                    # 1. what the state gave to Y
                    _columns(G[:, :p], m, from_start, GT)
                    wide[:] = np.float32(0)
                    multiply(state, P, 1, GT, wide, N, p, 1.0)
                    _add_with_dots(wide, CT, of_CT, carried)
                    # 2. what the chunk gave to the state after it
                    _columns(x[:, :p], m, ends, XT)
                    wide[:] = np.float32(0)
                    multiply(after, P, 1, XT, wide, N, p, 1.0)
                    _add_with_dots(wide, BT, of_BT, given_to_state)
                    kept = np.float32(0)
                    for c in range(N):
                        for e in range(P):
                            kept += after[c, e] * state[c, e]
                    _of_log_decays(of_scores, carried, given_to_state, kept * keep, m, columns, of_decay)
                    # 3. X, from both
                    multiply(Bs, N, 1, after, of_X, M, n, 1.0)
                    for j in range(m):
                        for e in range(p):
                            of_X[j, e] *= to_end[j]
                    for j in range(0, M, ROWS):
                        multiply(scores[j:, j:], 1, CHUNK, G[j:], of_X[j:], ROWS, M - j, 1.0)
                    # 4. the state that the chunk was given, of a new document no other's
                    multiply(CT, CHUNK, 1, Gs, after, N, m, keep)
                    if is_fresh:
                        after[:] = np.float32(0)
                    for j in range(m):
                        of_step = of_decay[j] * A[head]
                        of_A[i] += of_decay[j] * steps[j]
                        to = _floats(x_to, ((row * l + start + j) * h + head) * p, p)
                        for e in range(p):
                            of_step += of_X[j, e] * x[j, e]
                            to[e] = of_X[j, e] * steps[j] + G[j, e] * D[head]
                        _floats(dt_to, (row * l + start + j) * h + head, 1)[0] = of_step
                multiply(of_products, CHUNK, 1, Bs, of_C, M, m, 1.0)
                multiply(of_products, 1, CHUNK, Cs, of_B, M, m, 1.0)
                for j in range(m):
                    place = ((row * l + start + j) * g + group) * n
                    to_B, to_C = _floats(B_to, place, n), _floats(C_to, place, n)
                    for c in range(n):
                        to_B[c] = of_B[j, c] + of_BT[c, j]
                        to_C[c] = of_C[j, c] + of_CT[c, j]
        for i in range(r):
            _floats(A_to, job * r + i, 1)[0] = of_A[i]
            _floats(D_to, job * r + i, 1)[0] = of_D[i]
            if given_to:
                out = _floats(given_to, (job * r + i) * p * n, p * n).reshape(p, n)
                for e in range(p):
                    for c in range(n):
                        out[e, c] = H[i, c, e]


# At the end: it is compiled here and now


@compiled_for_c("void(int64, int64, int64, int64, int64)")
def part_at(which, ints, reals, part, parts):  # pragma: no cover, machine code
    """One part of an operation."""
    numbers = carray(pointer(ints), NUM_INTS, np.int64)
    if which == FORWARD:
        scan_part(numbers, part, parts)
    else:
        scan_back_part(numbers, part, parts)
