"""Scale only: stores x as d * code, with the weighted squared error as small as the search finds it.

For fixed codes l the best scale and the error it leaves follow from two sums:

    Sll = sum w l l, Sxl = sum w x l;   d = Sxl / Sll,   error(d) = sum w x x - 2 d Sxl + d d Sll

The search is that of ``affine.py`` without a minimum: guesses for each sub-block (which code should its largest weight
get?), the best one improved by alternating between codes and scale, then whole-number scales and the float16 d of the
block chosen together. The sixteen values of IQ4 are codes like any others, only unevenly spaced.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bitladder.kernels.lanes import (
    helper,
    load,
    magnitude,
    maximum,
    minimum,
    nearest,
    reciprocal,
    splat,
    store,
    to_f16,
    where,
)
from bitladder.kernels.pack import pack_scale
from bitladder.kernels.sixteen import kernel_of, scale_f16

# rows of the state: one value per lane for each of up to 16 sub-blocks
SLL, SXL, D, WHOLE, PLAIN, KEPT, ROWS = range(7)

# the values of IQ4_NL and IQ4_XS (kvalues_iq4nl in ggml-common.h), as midpoints and the steps taken there
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_MIDDLES = (IQ4_VALUES[1:] + IQ4_VALUES[:-1]) / np.float32(2)
_STEPS = IQ4_VALUES[1:] - IQ4_VALUES[:-1]
_LOWEST = float(IQ4_VALUES[0])


@helper
def table_value(x: Any) -> Any:
    """The value of IQ4 nearest to x."""
    zero = splat(0.0)
    value = splat(_LOWEST)
    for k in range(15):
        value = value + where(x > splat(_MIDDLES[k]), splat(_STEPS[k]), zero)
    return value


@helper
def table_index(x: Any) -> Any:
    """The number, from 0 up, of the value of IQ4 nearest to x."""
    zero, one = splat(0.0), splat(1.0)
    index = zero
    for k in range(15):
        index = index + where(x > splat(_MIDDLES[k]), one, zero)
    return index


@helper
def nearest_code(blocks: Any, x: Any) -> Any:
    """The nearest value a code can stand for, before scaling."""
    if blocks.row.table:
        return table_value(x)
    return nearest(minimum(maximum(x, blocks.low), blocks.high))


@helper
def stored_scale(blocks: Any, d: Any) -> Any:
    """The float16 of a block's scale. IQ4_NL has no code for zero, so there the smallest scale would add more than it
    keeps."""
    if blocks.row.table & (blocks.row.scale_high == 0):
        return to_f16(d)
    return scale_f16(d)


@helper
def sums(blocks: Any, j: Any, inverse: Any) -> Any:
    """Sll and Sxl of the codes nearest to x * inverse in sub-block ``j`` (its place in a row of the state)."""
    sll, sxl = splat(0.0), splat(0.0)
    for i in range(j * blocks.row.size, (j + 16) * blocks.row.size, 16):
        value = load(blocks.x, i)
        code = nearest_code(blocks, value * inverse)
        weighted = load(blocks.w, i) * code
        sll = sll + weighted * code
        sxl = sxl + weighted * value
    return sll, sxl


@helper
def search_part(blocks: Any, j: Any, search: Any) -> Any:
    """Fill the sub-block's sums and scale."""
    state, n, starts = blocks.state, blocks.n, search.starts
    lowest, highest = splat(0.0), splat(0.0)
    for i in range(j * blocks.row.size, (j + 16) * blocks.row.size, 16):
        value = load(blocks.x, i)
        lowest, highest = minimum(lowest, value), maximum(highest, value)
    largest = where(highest >= splat(0.0) - lowest, highest, lowest)
    over_largest = reciprocal(largest)
    d, gain = largest / blocks.low, splat(-1.0)
    store(state, PLAIN * n + j, d)
    sll, sxl = splat(0.0), splat(0.0)
    guesses = starts.shape[0] + search.rounds if starts.shape[0] > 1 else 0
    for k in range(guesses):
        inverse = splat(starts[k, 0]) * over_largest if k < starts.shape[0] else reciprocal(d)
        ll, xl = sums(blocks, j, inverse)
        d1 = xl * reciprocal(ll)
        gain1 = d1 * xl
        better = gain1 > gain
        gain = where(better, gain1, gain)
        d, sll, sxl = where(better, d1, d), where(better, ll, sll), where(better, xl, sxl)
    store(state, SLL * n + j, sll)
    store(state, SXL * n + j, sxl)
    store(state, D * n + j, d)


@helper
def largest_scale(blocks: Any, at: Any) -> Any:
    """The sub-blocks' scale of largest magnitude, with its sign; scales are row ``at`` of the state."""
    d = load(blocks.state, at * blocks.n)
    for j in range(16, blocks.n, 16):
        other = load(blocks.state, at * blocks.n + j)
        d = where(magnitude(other) > magnitude(d), other, d)
    return d


@helper
def whole_scale(blocks: Any, d: Any) -> Any:
    """The whole number nearest to a scale that was divided, within what can be stored."""
    return nearest(minimum(maximum(d, splat(blocks.row.scale_low)), splat(blocks.row.scale_high)))


@helper
def choose_whole(blocks: Any, at: Any, d: Any) -> Any:
    """Whole-number scales, where there are any, nearest to the best ones in row ``at`` of the state (the error is a
    parabola around each)."""
    if blocks.row.scale_high > 0:
        state, n, inverse = blocks.state, blocks.n, reciprocal(d)
        for j in range(0, n, 16):
            store(state, WHOLE * n + j, whole_scale(blocks, load(state, at * n + j) * inverse))


@helper
def choose_d(blocks: Any, d: Any, trials: Any) -> Any:
    """The float16 d, out of ``trials`` near the given one, whose multiples fit the sub-blocks' scales best."""
    state, n, two = blocks.state, blocks.n, splat(2.0)
    best_d, best = stored_scale(blocks, d), splat(3e38)
    for k in range(trials):
        trial = stored_scale(blocks, d * splat(0.97 + 0.4 * k / trials if k > 0 else 1.0))
        inverse = reciprocal(trial)
        error = splat(0.0)
        for j in range(0, n, 16):
            step = whole_scale(blocks, load(state, D * n + j) * inverse) * trial
            error = error + step * (step * load(state, SLL * n + j) - two * load(state, SXL * n + j))
        better = error < best
        best, best_d = where(better, error, best), where(better, trial, best_d)
    return best_d


@helper
def solve_block(blocks: Any, d: Any) -> Any:
    """Best float16 d of the block for the present codes and whole numbers."""
    state, n = blocks.state, blocks.n
    a, b = splat(0.0), splat(0.0)
    for j in range(0, n, 16):
        s = load(state, WHOLE * n + j)
        a = a + s * s * load(state, SLL * n + j)
        b = b + s * load(state, SXL * n + j)
    best = b * reciprocal(a)
    return stored_scale(blocks, where(magnitude(best) > splat(0.0), best, d))


@helper
def new_codes(blocks: Any, d: Any, reach: Any) -> Any:
    """Codes for the stored scales, or for whole-number scales up to ``reach`` away when those leave less error."""
    state, n, two = blocks.state, blocks.n, splat(2.0)
    least, most = splat(blocks.row.scale_low), splat(blocks.row.scale_high)
    for j in range(0, n, 16):
        s0 = load(state, WHOLE * n + j)
        best_s, best, sll, sxl = s0, splat(3e38), splat(0.0), splat(0.0)
        for a in range(-reach, reach + 1):
            s = s0 + splat(a)
            if reach > 0:
                s = minimum(maximum(s, least), most)
            step = s * d
            ll, xl = sums(blocks, j, reciprocal(step))
            error = step * (step * ll - two * xl)
            better = error < best
            best, best_s = where(better, error, best), where(better, s, best_s)
            sll, sxl = where(better, ll, sll), where(better, xl, sxl)
        store(state, SLL * n + j, sll)
        store(state, SXL * n + j, sxl)
        store(state, WHOLE * n + j, best_s)
        store(state, D * n + j, sxl * reciprocal(sll))


@helper
def true_error(blocks: Any, d: Any) -> Any:
    """The block's weighted squared error, summed from the differences themselves."""
    n, size, error = blocks.n, blocks.row.size, splat(0.0)
    for j in range(0, n, 16):
        step = load(blocks.state, WHOLE * n + j) * d
        inverse = reciprocal(step)
        for i in range(j * size, (j + 16) * size, 16):
            value = load(blocks.x, i)
            rest = value - step * nearest_code(blocks, value * inverse)
            error = error + load(blocks.w, i) * rest * rest
    return error


@helper
def keep_plain(blocks: Any, d: Any) -> Any:
    """Where the plain encoding (scales from the largest weights alone) has less error, take it."""
    state, n = blocks.state, blocks.n
    error = true_error(blocks, d)
    plain_d = largest_scale(blocks, PLAIN)
    if blocks.row.scale_high > 0:
        plain_d = plain_d / splat(blocks.row.scale_low)
    plain_d = stored_scale(blocks, plain_d)
    for j in range(0, n, 16):
        store(state, D * n + j, load(state, WHOLE * n + j))
    choose_whole(blocks, PLAIN, plain_d)
    plain = true_error(blocks, plain_d) < error
    for j in range(0, n, 16):
        store(state, WHOLE * n + j, where(plain, load(state, WHOLE * n + j), load(state, D * n + j)))
    return where(plain, plain_d, d)


@helper
def search_block(blocks: Any, search: Any) -> Any:
    """Leave the whole-number scales in the state and return d."""
    n, row = blocks.n, blocks.row
    reach = search.reach if row.scale_high > 0 else 0
    for j in range(0, n, 16):
        search_part(blocks, j, search)
    d = largest_scale(blocks, D)
    if row.scale_high > 0:
        d = choose_d(blocks, d / splat(row.scale_low), search.trials)
    else:
        store(blocks.state, WHOLE * n, splat(1.0))
        d = stored_scale(blocks, d)
    for k in range(search.passes + 1):
        if k > 0:
            new_codes(blocks, d, reach)
        choose_whole(blocks, D, d)
        if search.passes > 0:
            d = solve_block(blocks, d)
    choose_whole(blocks, D, d)
    if search.guard:
        d = keep_plain(blocks, d)
    return d


@helper
def search_ladder(blocks: Any, ladder: Any) -> Any:
    """Leave the whole-number scales of the search with the least error in the state and return its d; of equals the
    first's."""
    searches = (ladder.first, ladder.second, ladder.third)
    best_d, best = splat(0.0), splat(3e38)
    state, n = blocks.state, blocks.n
    for k in range(ladder.rungs):
        d = search_block(blocks, searches[k])
        better = splat(0.0) < splat(1.0)
        if ladder.rungs > 1:
            error = true_error(blocks, d)
            better = error < best
            best = where(better, error, best)
            for j in range(0, n, 16):
                kept = where(better, load(state, WHOLE * n + j), load(state, KEPT * n + j))
                store(state, KEPT * n + j, kept)
        best_d = where(better, d, best_d)
    if ladder.rungs > 1:
        for j in range(0, n, 16):
            store(state, WHOLE * n + j, load(state, KEPT * n + j))
    return best_d


@helper
def write_codes(blocks: Any, d: Any, codes: Any) -> Any:
    """The codes nearest to x / d for the stored scales, counted from 0 up."""
    n, size = blocks.n, blocks.row.size
    for j in range(0, n, 16):
        inverse = reciprocal(load(blocks.state, WHOLE * n + j) * d)
        for i in range(j * size, (j + 16) * size, 16):
            scaled = load(blocks.x, i) * inverse
            if blocks.row.table:
                store(codes, i, table_index(scaled))
            else:
                store(codes, i, nearest_code(blocks, scaled) - blocks.low)


@helper
def encode(blocks: Any, ladder: Any, codes: Any, tile: Any) -> Any:
    """Search sixteen blocks and leave their bytes in ``tile``."""
    d = search_ladder(blocks, ladder)
    write_codes(blocks, d, codes)
    pack_scale(blocks.row.packing, codes, blocks.state[WHOLE * blocks.n :], d, tile)


quantize_scale = kernel_of(encode)
