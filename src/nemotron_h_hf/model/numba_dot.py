"""The sum of products of bfloat16 numbers in the processor's own instruction for it (AVX-512), which LLVM makes of no loop.

It reads 32 weights at once as they are stored; a loop widens 16 of them with two more instructions each time, and for one
row that takes longer than the memory (docs/results/cpu_tokens). Needs Numba.
"""

from collections.abc import Callable, Sequence

try:  # inside `try`, for readers that check the imports of pushed model code
    from llvmlite import binding, ir
    from numba import config, types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError as missing:
    raise ImportError("the compiled steps of a CPU need numba; pip install numba") from missing

WIDTH, UNROLLED = 32, 4  # numbers of an instruction; instructions with sums of their own, as one takes several cycles
STEP = WIDTH * UNROLLED


def _has_dot() -> bool:
    """Whether Numba compiles for this processor as it is, and it has the instruction."""
    try:
        return config.CPU_NAME is None and config.CPU_FEATURES is None and "avx512bf16" in _features()
    except RuntimeError:  # LLVM cannot tell on this platform
        return False


def _features() -> list[str]:
    return [name for name, has in binding.get_host_cpu_features().items() if has]


HAS_DOT = _has_dot()
if HAS_DOT:
    binding.initialize_native_asmparser()

_TOTALS, _PAIRS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(32), 16)


def dot_of(rows: int, pieces: int) -> Callable:
    """For compiled code: `dot(x, behind, weights, steps, out)` puts the sums of x * weights over STEP * steps numbers, fp32,
    at `out` and after it, one for each row of x; nothing if not `HAS_DOT`.

    All but `steps` are addresses, or bytes between addresses: x is the sum of `pieces` rows of bfloat16 numbers, each `behind`
    the one before, and the next row of x follows.
    """
    unrolled = max(1, UNROLLED // rows)

    @intrinsic
    def dot(_context, x, behind, weights, steps, out):
        def generate(_context, builder, _signature, arguments):
            x, behind, weights, steps, out = arguments
            if HAS_DOT:
                starts = [builder.add(x, builder.mul(behind, _integer(i))) for i in range(rows * pieces)]
                totals = _sums(builder, starts, weights, steps, unrolled)
                for i in range(rows):
                    of_row = [total for start in totals[i * pieces : (i + 1) * pieces] for total in start]
                    at = builder.inttoptr(builder.add(out, _integer(4 * i)), ir.FloatType().as_pointer())
                    builder.store(_whole(builder, of_row), at)
            return _context.get_dummy_value()

        return types.none(*[types.int64] * 5), generate

    return dot


dot_1, dot_2, dot_4 = dot_of(1, 2), dot_of(2, 2), dot_of(4, 1)


def _sums(
    builder: ir.IRBuilder, starts: Sequence[ir.Value], weights: ir.Value, steps: ir.Value, unrolled: int
) -> list[list[ir.Value]]:
    """For each start the places of some vectors, all of which are its sum."""
    zero = ir.Constant(_TOTALS, [0.0] * 16)
    totals = [[cgutils.alloca_once_value(builder, zero) for _ in range(unrolled)] for _ in starts]
    count = builder.mul(steps, _integer(UNROLLED // unrolled))
    with cgutils.for_range(builder, count) as loop:
        for i in range(unrolled):
            at = builder.mul(builder.add(builder.mul(loop.index, _integer(unrolled)), _integer(i)), _integer(2 * WIDTH))
            given = _load(builder, weights, at)
            for start, own in zip(starts, totals):
                added = _add_products(builder, builder.load(own[i]), _load(builder, start, at), given)
                builder.store(added, own[i])
    return totals


def _whole(builder: ir.IRBuilder, totals: Sequence[ir.Value]) -> ir.Value:
    """All numbers of some vectors added up."""
    vector = builder.load(totals[0])
    for total in totals[1:]:
        vector = builder.fadd(vector, builder.load(total))
    result = ir.Constant(ir.FloatType(), 0.0)
    for i in range(16):
        result = builder.fadd(result, builder.extract_element(vector, ir.Constant(ir.IntType(32), i)))
    return result


def _integer(value: int) -> ir.Constant:
    return ir.Constant(ir.IntType(64), value)


def _load(builder: ir.IRBuilder, address: ir.Value, offset: ir.Value) -> ir.Value:
    loaded = builder.load(builder.inttoptr(builder.add(address, offset), _PAIRS.as_pointer()))
    loaded.align = 2
    return loaded


def _add_products(builder: ir.IRBuilder, totals: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """16 totals, each with the products of two pairs of numbers more."""
    kind = ir.FunctionType(_TOTALS, [_PAIRS, _PAIRS, _TOTALS])
    return builder.call(ir.InlineAsm(kind, "vdpbf16ps $2, $1, $0", "=v,v,v,0"), [x, y, totals])
