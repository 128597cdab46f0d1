"""The state-space scan of a sequence on a CPU, in loops that Numba compiles.

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

NUM_INTS = 20  # of an operation
CHUNK = 32  # tokens
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
    a, b, c, n = left.ctypes.data, right.ctypes.data, out.ctypes.data, out.shape[1]
    row, column, b_row, c_row, by = 4 * a_row, 4 * a_column, 4 * right.shape[1], 4 * n, np.float32(by)  # in bytes
    for j in range(0, n - LANES, 2 * LANES):
        for i in range(0, m, ROWS):
            _wide_tile(a + i * row, row, column, b + 4 * j, b_row, c + i * c_row + 4 * j, c_row, k, by)
    if n // LANES % 2:
        j = n - LANES
        for i in range(0, m, ROWS):
            _tile(a + i * row, row, column, b + 4 * j, b_row, c + i * c_row + 4 * j, c_row, k, by)


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
    """One part of the heads of a scan, whose sizes and addresses are as in numba_scan.py."""
    x_at, x_row, x_token, dt_at, A_at, D_at = ints[0], ints[1], ints[2], ints[3], ints[4], ints[5]
    B_at, C_at, B_row, B_token = ints[6], ints[7], ints[8], ints[9]
    documents_at, given_at, y_at, last_at = ints[10], ints[11], ints[12], ints[13]
    b, l, h, p, g, n = ints[14], ints[15], ints[16], ints[17], ints[18], ints[19]
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
        start = 0
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
            start = end
        for i in range(low, high):
            out = _floats(last_at, (job * r + i) * p * n, p * n).reshape(p, n)
            for e in range(p):
                for c in range(n):
                    out[e, c] = states[i, c, e]


# At the end: it is compiled here and now


@compiled_for_c("void(int64, int64, int64, int64, int64)")
def part_at(kind, ints, reals, part, parts):  # pragma: no cover, machine code
    """One part of the only kind of operation here."""
    scan_part(carray(pointer(ints), NUM_INTS, np.int64), part, parts)
