"""exp2 for the weights of attention, part of it on the units that multiply and add.

A multiprocessor makes 16 exponentials per clock beside 128 multiplications and additions, and at small widths the
exponentials bound attention (kernels.py). So one of every SHARE columns can go through a polynomial, 9 instructions in
place of one, while the others wait for the special function unit (as in FlashAttention-4, Zadouri et al., arXiv
2603.05451). Columns are told apart by bits of their number that lie in the registers of one thread and not in lanes, so
that nothing is moved: on sm_90 and sm_100 the machine code has no further shuffle and no further access to shared
memory; on sm_80 it has some. Not timed yet, so off (SHARE = 0) unless asked for.
"""

import triton
import triton.language as tl

# 2^f for f in [-1/2, 1/2], the constant 1 exact: the relative error is at most 2.9e-6, equal at its extrema (minimax).
_C4 = tl.constexpr(9.58285282e-03)
_C3 = tl.constexpr(5.59064245e-02)
_C2 = tl.constexpr(2.40240986e-01)
_C1 = tl.constexpr(6.93124193e-01)
# Added to a float of magnitude below 2^22, it rounds it to an integer, which then stands in the lowest bits.
_ROUND = tl.constexpr(1.5 * 2**23)


@triton.jit
def polynomial_exp2(x):
    """2^x for float32 x up to 127, by a polynomial: relative error 3e-6 from -126 on; below, where results are not
    normal numbers, absolute error 2^-126; 0 for -127 and less, -inf included; NaN for NaN."""
    x = tl.maximum(x, -127.0, propagate_nan=tl.PropagateNan.ALL)
    rounded = x + _ROUND
    f = x - (rounded - _ROUND)
    p = (((_C4 * f + _C3) * f + _C2) * f + _C1) * f + 1.0
    # The integer part goes into the exponent.
    return (p.to(tl.int32, bitcast=True) + (rounded.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def exp2(x, SHARE: tl.constexpr):
    """2^x of a (rows, columns) tile of float32, one of every SHARE columns by the polynomial: 0 (none), 2 or 4."""
    tl.static_assert(SHARE == 0 or SHARE == 2 or SHARE == 4)
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    if SHARE == 0:
        return tl.exp2(x)
    # Bit 0 of a column's number lies in a thread's registers, bits 1 and 2 are lanes, bit 3 is again registers.
    even, odd = tl.split(tl.reshape(x, [ROWS, COLUMNS // 2, 2]))
    if SHARE == 2:
        odd = polynomial_exp2(odd)
    else:
        low, high = tl.split(tl.permute(tl.reshape(odd, [ROWS, COLUMNS // 16, 2, 4]), [0, 1, 3, 2]))
        odd = tl.permute(tl.join(tl.exp2(low), polynomial_exp2(high)), [0, 1, 3, 2])
        odd = tl.reshape(odd, [ROWS, COLUMNS // 2])
    return tl.reshape(tl.join(tl.exp2(even), odd), [ROWS, COLUMNS])
