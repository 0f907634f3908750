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
    kernel,
    load,
    load_transposed,
    magnitude,
    maximum,
    minimum,
    nearest,
    reciprocal,
    splat,
    store,
    store_transposed,
    to_f16,
    where,
)
from bitladder.kernels.pack import pack_scale

# rows of the state: one value per lane for each of up to 16 sub-blocks
SLL, SXL, D, WHOLE, PLAIN, ROWS = range(6)

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
def nearest_code(x: Any, low: Any, high: Any, table: Any) -> Any:
    """The nearest value a code can stand for, before scaling."""
    if table:
        return table_value(x)
    return nearest(minimum(maximum(x, low), high))


@helper
def sums(x: Any, w: Any, at: Any, size: Any, inverse: Any, low: Any, high: Any, table: Any) -> Any:
    """Sll and Sxl of the codes nearest to x * inverse."""
    sll, sxl = splat(0.0), splat(0.0)
    for i in range(at, at + 16 * size, 16):
        value = load(x, i)
        code = nearest_code(value * inverse, low, high, table)
        weighted = load(w, i) * code
        sll = sll + weighted * code
        sxl = sxl + weighted * value
    return sll, sxl


@helper
def search_part(
    x: Any, w: Any, state: Any, j: Any, n: Any, size: Any, low: Any, high: Any, table: Any, starts: Any, rounds: Any
) -> Any:
    """Fill the sub-block's sums and scale; ``j`` is its place in a row of the state, ``n`` the length of a row."""
    at = j * size
    lowest, highest = splat(0.0), splat(0.0)
    for i in range(at, at + 16 * size, 16):
        value = load(x, i)
        lowest, highest = minimum(lowest, value), maximum(highest, value)
    largest = where(highest >= splat(0.0) - lowest, highest, lowest)
    over_largest = reciprocal(largest)
    d, gain = largest / low, splat(-1.0)
    store(state, PLAIN * n + j, d)
    sll, sxl = splat(0.0), splat(0.0)
    guesses = starts.shape[0] + rounds if starts.shape[0] > 1 else 0
    for k in range(guesses):
        inverse = splat(starts[k, 0]) * over_largest if k < starts.shape[0] else reciprocal(d)
        ll, xl = sums(x, w, at, size, inverse, low, high, table)
        d1 = xl * reciprocal(ll)
        gain1 = d1 * xl
        better = gain1 > gain
        gain = where(better, gain1, gain)
        d, sll, sxl = where(better, d1, d), where(better, ll, sll), where(better, xl, sxl)
    store(state, SLL * n + j, sll)
    store(state, SXL * n + j, sxl)
    store(state, D * n + j, d)


@helper
def largest_scale(state: Any, row: Any, n: Any) -> Any:
    """The sub-blocks' scale of largest magnitude, with its sign."""
    d = load(state, row * n)
    for j in range(16, n, 16):
        other = load(state, row * n + j)
        d = where(magnitude(other) > magnitude(d), other, d)
    return d


@helper
def choose_whole(state: Any, row: Any, n: Any, d: Any, whole_low: Any, whole_high: Any) -> Any:
    """Whole-number scales nearest to the best ones, which are in ``row`` (the error is a parabola around each)."""
    inverse = reciprocal(d)
    for j in range(0, n, 16):
        s = minimum(maximum(load(state, row * n + j) * inverse, splat(whole_low)), splat(whole_high))
        store(state, WHOLE * n + j, nearest(s))


@helper
def choose_d(state: Any, n: Any, d: Any, whole_low: Any, whole_high: Any, trials: Any) -> Any:
    """The float16 d, out of ``trials`` near the given one, whose multiples fit the sub-blocks' scales best."""
    two = splat(2.0)
    best_d, best = to_f16(d), splat(3e38)
    for k in range(trials):
        trial = to_f16(d * splat(0.97 + 0.4 * k / trials if k > 0 else 1.0))
        inverse = reciprocal(trial)
        error = splat(0.0)
        for j in range(0, n, 16):
            s = minimum(maximum(load(state, D * n + j) * inverse, splat(whole_low)), splat(whole_high))
            step = nearest(s) * trial
            error = error + step * (step * load(state, SLL * n + j) - two * load(state, SXL * n + j))
        better = error < best
        best, best_d = where(better, error, best), where(better, trial, best_d)
    return best_d


@helper
def solve_block(state: Any, n: Any, d: Any) -> Any:
    """Best float16 d of the block for the present codes and whole numbers."""
    a, b = splat(0.0), splat(0.0)
    for j in range(0, n, 16):
        s = load(state, WHOLE * n + j)
        a = a + s * s * load(state, SLL * n + j)
        b = b + s * load(state, SXL * n + j)
    best = b * reciprocal(a)
    return to_f16(where(magnitude(best) > splat(0.0), best, d))


@helper
def new_codes(
    x: Any,
    w: Any,
    state: Any,
    n: Any,
    size: Any,
    d: Any,
    low: Any,
    high: Any,
    table: Any,
    whole_low: Any,
    whole_high: Any,
    reach: Any,
) -> Any:
    """Codes for the stored scales, or for whole-number scales up to ``reach`` away when those leave less error."""
    two = splat(2.0)
    for j in range(0, n, 16):
        s0 = load(state, WHOLE * n + j)
        best_s, best, sll, sxl = s0, splat(3e38), splat(0.0), splat(0.0)
        for a in range(-reach, reach + 1):
            s = s0 + splat(a)
            if reach > 0:
                s = minimum(maximum(s, splat(whole_low)), splat(whole_high))
            step = s * d
            ll, xl = sums(x, w, j * size, size, reciprocal(step), low, high, table)
            error = step * (step * ll - two * xl)
            better = error < best
            best, best_s = where(better, error, best), where(better, s, best_s)
            sll, sxl = where(better, ll, sll), where(better, xl, sxl)
        store(state, SLL * n + j, sll)
        store(state, SXL * n + j, sxl)
        store(state, WHOLE * n + j, best_s)
        store(state, D * n + j, sxl * reciprocal(sll))


@helper
def true_error(x: Any, w: Any, state: Any, n: Any, size: Any, d: Any, low: Any, high: Any, table: Any) -> Any:
    """The block's weighted squared error, summed from the differences themselves."""
    error = splat(0.0)
    for j in range(0, n, 16):
        step = load(state, WHOLE * n + j) * d
        inverse = reciprocal(step)
        for i in range(j * size, (j + 16) * size, 16):
            value = load(x, i)
            code = nearest_code(value * inverse, low, high, table)
            rest = value - step * code
            error = error + load(w, i) * rest * rest
    return error


@helper
def keep_plain(
    x: Any,
    w: Any,
    state: Any,
    n: Any,
    size: Any,
    d: Any,
    low: Any,
    high: Any,
    table: Any,
    whole_low: Any,
    whole_high: Any,
) -> Any:
    """Where the plain encoding (scales from the largest weights alone) has less error, take it."""
    error = true_error(x, w, state, n, size, d, low, high, table)
    plain_d = largest_scale(state, PLAIN, n)
    if whole_high > 0:
        plain_d = plain_d / splat(whole_low)
    plain_d = to_f16(plain_d)
    for j in range(0, n, 16):
        store(state, D * n + j, load(state, WHOLE * n + j))
    if whole_high > 0:
        choose_whole(state, PLAIN, n, plain_d, whole_low, whole_high)
    plain = true_error(x, w, state, n, size, plain_d, low, high, table) < error
    for j in range(0, n, 16):
        s = where(plain, load(state, WHOLE * n + j), load(state, D * n + j))
        store(state, WHOLE * n + j, s)
    return where(plain, plain_d, d)


@helper
def search_block(
    x: Any,
    w: Any,
    state: Any,
    n: Any,
    size: Any,
    low: Any,
    high: Any,
    table: Any,
    whole_low: Any,
    whole_high: Any,
    starts: Any,
    rounds: Any,
    trials: Any,
    passes: Any,
    reach: Any,
    guard: Any,
) -> Any:
    """Leave the whole-number scales in the state and return d."""
    if whole_high == 0:
        reach = 0
    for j in range(0, n, 16):
        search_part(x, w, state, j, n, size, low, high, table, starts, rounds)
    d = largest_scale(state, D, n)
    if whole_high > 0:
        d = choose_d(state, n, d / splat(whole_low), whole_low, whole_high, trials)
    else:
        store(state, WHOLE * n, splat(1.0))
        d = to_f16(d)
    for k in range(passes + 1):
        if k > 0:
            new_codes(x, w, state, n, size, d, low, high, table, whole_low, whole_high, reach)
        if whole_high > 0:
            choose_whole(state, D, n, d, whole_low, whole_high)
        if passes > 0:
            d = solve_block(state, n, d)
    if whole_high > 0:
        choose_whole(state, D, n, d, whole_low, whole_high)
    if guard:
        d = keep_plain(x, w, state, n, size, d, low, high, table, whole_low, whole_high)
    return d


@helper
def write_codes(x: Any, state: Any, n: Any, size: Any, d: Any, low: Any, high: Any, table: Any, codes: Any) -> Any:
    """The codes nearest to x / d for the stored scales, counted from 0 up."""
    for j in range(0, n, 16):
        inverse = reciprocal(load(state, WHOLE * n + j) * d)
        for i in range(j * size, (j + 16) * size, 16):
            scaled = load(x, i) * inverse
            if table:
                store(codes, i, table_index(scaled))
            else:
                store(codes, i, nearest(minimum(maximum(scaled, low), high)) - low)


@kernel
def quantize_scale(
    x: Any,
    columns: Any,
    importance: Any,
    layout: Any,
    parts: Any,
    size: Any,
    code_low: Any,
    code_high: Any,
    table: Any,
    whole_low: Any,
    whole_high: Any,
    type_size: Any,
    starts: Any,
    rounds: Any,
    trials: Any,
    passes: Any,
    reach: Any,
    guard: Any,
    scratch: Any,
    tile: Any,
    places: Any,
    out: Any,
) -> Any:
    """Blocks of f32 x, one after another, to their bytes in ``out``.

    ``importance`` is f32[columns], or empty for equal weights; ``columns`` the length of a row of x. To work in:
    ``scratch`` f32[``Row.scratch``], ``tile`` u8[16 type_size], ``places`` i64[48].
    """
    length, n = parts * size, parts * 16
    blocks = x.size // length
    values, codes, weights = scratch, scratch[16 * length :], scratch[32 * length :]
    state = scratch[48 * length :]
    source, column, target = places, places[16:], places[32:]
    for i in range(0, 16 * length, 16):
        store(weights, i, splat(1.0))
    for first in range(0, blocks, 16):
        for lane in range(16):
            block = min(first + lane, blocks - 1)
            source[lane], target[lane] = block * length, block * type_size
            column[lane] = block * length % columns
        for i in range(0, length, 16):
            load_transposed(x, source, i, values, 16 * i)
            if importance.size:
                load_transposed(importance, column, i, weights, 16 * i)
        low, high = splat(code_low), splat(code_high)
        d = search_block(
            values,
            weights,
            state,
            n,
            size,
            low,
            high,
            table,
            whole_low,
            whole_high,
            starts,
            rounds,
            trials,
            passes,
            reach,
            guard,
        )
        write_codes(values, state, n, size, d, low, high, table, codes)
        pack_scale(layout, codes, state[WHOLE * n :], d, tile)
        for i in range(0, type_size, 16):
            at = min(i, type_size - 16)
            store_transposed(tile, 16 * at, out, target, at)
