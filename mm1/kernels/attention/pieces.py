"""Load, multiply and store the rows of a head in pieces whose widths are powers of two, as Triton's products require.

80 columns are 64 and 16; padding them to 128 would be 60 % more work. Scores are summed over pieces, and each piece of
a result has its own accumulator. Kernels take P, the pieces (first column, columns), as a constant. A tensor of rows is
a tuple with one element for each piece.
"""

# pyright: reportArgumentType=false
# It takes len(P) for the length of a constexpr, not of the tuple in it.

from mm1.kernels.language import tl, triton
from mm1.kernels.tiles import dot


def pieces(width: int) -> tuple[tuple[int, int], ...]:
    """Return (first column, columns) of each power of two in the width, largest first."""
    parts, first = [], 0
    for bit in reversed(range(width.bit_length())):
        if width >> bit & 1:
            parts.append((first, 1 << bit))
            first += 1 << bit
    return tuple(parts)


@triton.jit
def _load_piece(ptr, rows, stride, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + FIRST + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def load(ptr, rows, stride, P: tl.constexpr):
    """Load rows of a matrix, in its dtype."""
    x = ()
    for i in tl.static_range(len(P)):
        x = x + (_load_piece(ptr, rows, stride, P[i][0], P[i][1]),)
    return x


@triton.jit
def _zero(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def zeros(ROWS: tl.constexpr, P: tl.constexpr):
    """Return zeros fp32 [ROWS, width]."""
    x = ()
    for i in tl.static_range(len(P)):
        x = x + (_zero(ROWS, P[i][1]),)
    return x


@triton.jit
def scores(a, b, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, P: tl.constexpr):
    """Return a · bᵀ in fp32 [BLOCK_M, BLOCK_N]."""
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(len(P)):
        s = dot(a[i], b[i].T, s)
    return s


@triton.jit
def add_product(weights, x, acc, P: tl.constexpr):
    """Return acc + weights · x, weights rounded to the dtype of x."""
    y = ()
    for i in tl.static_range(len(P)):
        y = y + (dot(weights.to(x[i].dtype), x[i], acc[i]),)
    return y


@triton.jit
def scaled(x, factor, P: tl.constexpr):
    """Return the rows of x times their factors."""
    y = ()
    for i in tl.static_range(len(P)):
        y = y + (x[i] * factor[:, None],)
    return y


@triton.jit
def row_products(a, b, BLOCK_M: tl.constexpr, P: tl.constexpr):
    """Return ⟨a, b⟩ of each row in fp32 [BLOCK_M]."""
    s = tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.static_range(len(P)):
        s += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return s


@triton.jit
def _store_piece(ptr, rows, inside, stride, x, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
    places = rows.to(tl.int64)[:, None] * stride + FIRST + tl.arange(0, COLUMNS)[None, :]
    tl.store(ptr + places, x.to(ptr.dtype.element_ty), inside[:, None])


@triton.jit
def store(ptr, rows, inside, stride, x, P: tl.constexpr):
    """Store x, rounded to the matrix's dtype, in the rows that are inside."""
    for i in tl.static_range(len(P)):
        _store_piece(ptr, rows, inside, stride, x[i], P[i][0], P[i][1])
