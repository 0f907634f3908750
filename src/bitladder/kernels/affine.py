"""Scale and minimum: stores x as d * code - m, with the weighted squared error as small as the search finds it.

For fixed codes l the best d and c = -m solve a 2 x 2 system, and the error they leave follows from five sums:

    S = sum w, Sx = sum w x, Sl = sum w l, Sll = sum w l l, Sxl = sum w x l
    error(d, c) = sum w x x - 2 d Sxl - 2 c Sx + d d Sll + 2 d c Sl + c c S

so one pass over the weights judges a guess, and no second pass computes its error. The search:

1. each sub-block: guesses from a grid (``Search.starts``), the best improved by alternating between codes and (d, c);
2. the block: float16 d and dmin such that the largest fits; whole-number scales and minima chosen by the error above
   (a parabola: three tries each); d and dmin solved again for all sub-blocks together; repeated with new codes.

The idea of trying scales near max/levels and solving for the scale comes from ggml's quantizers; closed-form errors,
the two-way grid and the joint choice are what they skip.
"""

from __future__ import annotations

from typing import Any

from bitladder.kernels.lanes import (
    helper,
    load,
    maximum,
    minimum,
    nearest,
    reciprocal,
    splat,
    store,
    to_f16,
    where,
)
from bitladder.kernels.pack import pack_affine
from bitladder.kernels.sixteen import kernel_of, scale_f16

# rows of the state: one value per lane for each of up to 16 sub-blocks
S, SX, SL, SLL, SXL, D, C, WHOLE_D, WHOLE_M, PLAIN_D, PLAIN_M, KEPT_D, KEPT_M, ROWS = range(14)


@helper
def minimum_f16(blocks: Any, m: Any) -> Any:
    """What is stored of a minimum: a scale of whole numbers, or the float16 nearest to the minimum itself."""
    if blocks.row.scale_high > 0:
        return scale_f16(m)
    return to_f16(m)


@helper
def sums(blocks: Any, j: Any, inverse: Any, shift: Any) -> Any:
    """Sl, Sll, Sxl of the codes nearest to x * inverse + shift in sub-block ``j`` (its place in a row of the state)."""
    zero = splat(0.0)
    sl, sll, sxl = zero, zero, zero
    for i in range(j * blocks.row.size, (j + 16) * blocks.row.size, 16):
        value = load(blocks.x, i)
        code = nearest(minimum(maximum(value * inverse + shift, zero), blocks.high))
        weighted = load(blocks.w, i) * code
        sl = sl + weighted
        sll = sll + weighted * code
        sxl = sxl + weighted * value
    return sl, sll, sxl


@helper
def solve(s: Any, sx: Any, sl: Any, sll: Any, sxl: Any, free: Any) -> Any:
    """Best d and c for fixed codes, and the error they save; c at most 0 unless ``free``."""
    zero = splat(0.0)
    det = s * sll - sl * sl
    sound = det > splat(1e-6) * s * sll
    r = reciprocal(det)
    d, c = (s * sxl - sx * sl) * r, (sll * sx - sl * sxl) * r
    if not free:
        sound = sound & (c < zero)
    # one of the two alone, when codes are all alike or c may not be what it would
    only_d, only_c = sxl * reciprocal(sll), sx * reciprocal(s)
    if not free:
        only_c = minimum(only_c, zero)
    d_alone = only_d * sxl > only_c * sx
    d = where(sound, d, where(d_alone, only_d, zero))
    c = where(sound, c, where(d_alone, zero, only_c))
    gain = d * sxl + c * sx
    return d, c, where(d >= zero, gain, splat(-1.0))


@helper
def search_part(blocks: Any, j: Any, search: Any) -> Any:
    """Fill the sub-block's sums, d and c."""
    zero, top = splat(0.0), blocks.high
    x, state, n, starts = blocks.x, blocks.state, blocks.n, search.starts
    free = blocks.row.scale_high == 0
    at = j * blocks.row.size
    low, high = load(x, at), load(x, at)
    s, sx = zero, zero
    for i in range(at, at + 16 * blocks.row.size, 16):
        value, weight = load(x, i), load(blocks.w, i)
        low, high = minimum(low, value), maximum(high, value)
        s = s + weight
        sx = sx + weight * value
    if not free:
        low, high = minimum(low, zero), maximum(high, zero)
    span = high - low
    over_span = reciprocal(span)
    d, c, gain = span / top, low, splat(-1.0)
    sl, sll, sxl = zero, zero, zero
    guesses = starts.shape[0] + search.rounds if starts.shape[0] > 1 else 0
    for k in range(guesses):
        if k < starts.shape[0]:
            inverse = (top + splat(starts[k, 0])) * over_span
            shift = splat(starts[k, 1]) - low * inverse
        else:
            inverse = reciprocal(d)
            shift = zero - c * inverse
        l1, l2, l3 = sums(blocks, j, inverse, shift)
        d1, c1, gain1 = solve(s, sx, l1, l2, l3, free)
        better = gain1 > gain
        gain = where(better, gain1, gain)
        d, c = where(better, d1, d), where(better, c1, c)
        sl, sll, sxl = where(better, l1, sl), where(better, l2, sll), where(better, l3, sxl)
    store(state, S * n + j, s)
    store(state, SX * n + j, sx)
    store_sums(blocks, j, sl, sll, sxl)
    store(state, D * n + j, d)
    store(state, C * n + j, c)
    store(state, PLAIN_D * n + j, span / top)
    store(state, PLAIN_M * n + j, zero - low)


@helper
def store_sums(blocks: Any, j: Any, sl: Any, sll: Any, sxl: Any) -> Any:
    """Keep the sums of a sub-block's codes."""
    store(blocks.state, SL * blocks.n + j, sl)
    store(blocks.state, SLL * blocks.n + j, sll)
    store(blocks.state, SXL * blocks.n + j, sxl)


@helper
def error_of(blocks: Any, j: Any, d: Any, c: Any, sl: Any, sll: Any, sxl: Any) -> Any:
    """The weighted squared error less sum w x x."""
    two = splat(2.0)
    s, sx = load(blocks.state, S * blocks.n + j), load(blocks.state, SX * blocks.n + j)
    return d * (d * sll + two * (c * sl - sxl)) + c * (c * s - two * sx)


@helper
def choose_whole(blocks: Any, j: Any, d: Any, dmin: Any) -> Any:
    """The whole-number scale and minimum with the least error for the sub-block's present codes; that error."""
    state, n = blocks.state, blocks.n
    zero, top = splat(0.0), splat(blocks.row.scale_high)
    sl, sll, sxl = load(state, SL * n + j), load(state, SLL * n + j), load(state, SXL * n + j)
    sx, over_s = load(state, SX * n + j), reciprocal(load(state, S * n + j))
    over_dmin = reciprocal(dmin)
    middle = nearest(minimum(load(state, D * n + j) * reciprocal(d), top))
    best_s, best_m, best = middle, zero, splat(3e38)
    for k in range(3):
        s = minimum(maximum(middle + splat(k - 1.0), zero), top)
        m = nearest(minimum(maximum((s * d * sl - sx) * over_s * over_dmin, zero), top))
        error = error_of(blocks, j, s * d, zero - m * dmin, sl, sll, sxl)
        better = error < best
        best = where(better, error, best)
        best_s, best_m = where(better, s, best_s), where(better, m, best_m)
    store(state, WHOLE_D * n + j, best_s)
    store(state, WHOLE_M * n + j, best_m)
    return best


@helper
def choose_all(blocks: Any, d: Any, dmin: Any) -> Any:
    """``choose_whole`` for every sub-block, where there are whole numbers to choose."""
    if blocks.row.scale_high > 0:
        for j in range(0, blocks.n, 16):
            choose_whole(blocks, j, d, dmin)


@helper
def choose_d(blocks: Any, d: Any, dmin: Any, trials: Any) -> Any:
    """The float16 d and dmin, out of some near the given ones, whose multiples fit the sub-blocks best."""
    best_d, best_m, best = scale_f16(d), scale_f16(dmin), splat(3e38)
    for k in range(2 * trials):
        if k < trials:
            trial_d, trial_m = scale_f16(d * splat(0.97 + 0.3 * k / trials if k > 0 else 1.0)), best_m
        else:
            trial_d, trial_m = best_d, scale_f16(dmin * splat(0.97 + 0.3 * (k - trials) / trials))
        error = splat(0.0)
        for j in range(0, blocks.n, 16):
            error = error + choose_whole(blocks, j, trial_d, trial_m)
        better = error < best
        best = where(better, error, best)
        best_d, best_m = where(better, trial_d, best_d), where(better, trial_m, best_m)
    return best_d, best_m


@helper
def solve_block(blocks: Any, d: Any, dmin: Any) -> Any:
    """Best float16 d and dmin of the block for the present codes and whole numbers."""
    state, n, zero = blocks.state, blocks.n, splat(0.0)
    a11, a12, a22, b1, b2 = zero, zero, zero, zero, zero
    for j in range(0, n, 16):
        s, m = load(state, WHOLE_D * n + j), load(state, WHOLE_M * n + j)
        a11 = a11 + s * s * load(state, SLL * n + j)
        a12 = a12 - s * m * load(state, SL * n + j)
        a22 = a22 + m * m * load(state, S * n + j)
        b1 = b1 + s * load(state, SXL * n + j)
        b2 = b2 - m * load(state, SX * n + j)
    det = a11 * a22 - a12 * a12
    sound = det > splat(1e-6) * a11 * a22
    r = reciprocal(det)
    alone_d, alone_m = where(a22 > zero, d, b1 * reciprocal(a11)), where(a11 > zero, dmin, b2 * reciprocal(a22))
    new_d = where(sound, (a22 * b1 - a12 * b2) * r, alone_d)
    new_d = scale_f16(where(new_d > zero, new_d, d))
    # dmin for the d that is stored: a weight of overwhelming importance stays exact but for one rounding
    new_m = where(sound, (b2 - a12 * new_d) * reciprocal(a22), alone_m)
    if blocks.row.scale_high > 0:
        new_m = where(new_m > zero, new_m, zero)
    return new_d, minimum_f16(blocks, new_m)


@helper
def new_codes(blocks: Any, j: Any, d: Any, dmin: Any, reach: Any) -> Any:
    """Codes for the stored scales, or for whole-number scales up to ``reach`` away when those leave less error."""
    state, n = blocks.state, blocks.n
    zero, limit = splat(0.0), splat(blocks.row.scale_high)
    s0, m0 = load(state, WHOLE_D * n + j), load(state, WHOLE_M * n + j)
    best_s, best_m, best = s0, m0, splat(3e38)
    sl, sll, sxl = zero, zero, zero
    for a in range(-reach, reach + 1):
        for b in range(-reach, reach + 1):
            s, m = s0 + splat(a), m0 + splat(b)
            if reach > 0:
                s, m = minimum(maximum(s, zero), limit), minimum(maximum(m, zero), limit)
            step, c = s * d, zero - m * dmin
            inverse = reciprocal(step)
            l1, l2, l3 = sums(blocks, j, inverse, zero - c * inverse)
            error = error_of(blocks, j, step, c, l1, l2, l3)
            better = error < best
            best = where(better, error, best)
            best_s, best_m = where(better, s, best_s), where(better, m, best_m)
            sl, sll, sxl = where(better, l1, sl), where(better, l2, sll), where(better, l3, sxl)
    store_sums(blocks, j, sl, sll, sxl)
    store(state, WHOLE_D * n + j, best_s)
    store(state, WHOLE_M * n + j, best_m)
    store(state, D * n + j, best_s * d)


@helper
def true_error(blocks: Any, d: Any, dmin: Any) -> Any:
    """The block's weighted squared error, summed from the differences themselves."""
    state, n, size, zero = blocks.state, blocks.n, blocks.row.size, splat(0.0)
    error = zero
    for j in range(0, n, 16):
        step, c = load(state, WHOLE_D * n + j) * d, zero - load(state, WHOLE_M * n + j) * dmin
        inverse = reciprocal(step)
        for i in range(j * size, (j + 16) * size, 16):
            value = load(blocks.x, i) - c
            code = nearest(minimum(maximum(value * inverse, zero), blocks.high))
            rest = value - step * code
            error = error + load(blocks.w, i) * rest * rest
    return error


@helper
def keep_plain(blocks: Any, d: Any, dmin: Any) -> Any:
    """Where the plain encoding (scales from the range alone) has less error, take it."""
    state, n, whole = blocks.state, blocks.n, blocks.row.scale_high
    limit, one = splat(whole), splat(1.0)
    error = true_error(blocks, d, dmin)
    plain_d, plain_m = load(state, PLAIN_D * n), load(state, PLAIN_M * n)
    for j in range(16, n, 16):
        plain_d = maximum(plain_d, load(state, PLAIN_D * n + j))
        plain_m = maximum(plain_m, load(state, PLAIN_M * n + j))
    if whole > 0:
        plain_d, plain_m = plain_d / limit, plain_m / limit
    plain_d, plain_m = scale_f16(plain_d), minimum_f16(blocks, plain_m)
    for j in range(0, n, 16):
        s, m = load(state, WHOLE_D * n + j), load(state, WHOLE_M * n + j)
        plain_s, plain_n = one, one
        if whole > 0:
            plain_s = nearest(minimum(load(state, PLAIN_D * n + j) * reciprocal(plain_d), limit))
            plain_n = nearest(minimum(load(state, PLAIN_M * n + j) * reciprocal(plain_m), limit))
        store(state, WHOLE_D * n + j, plain_s)
        store(state, WHOLE_M * n + j, plain_n)
        store(state, PLAIN_D * n + j, s)
        store(state, PLAIN_M * n + j, m)
    plain = true_error(blocks, plain_d, plain_m) < error
    for j in range(0, n, 16):
        s, m = load(state, WHOLE_D * n + j), load(state, WHOLE_M * n + j)
        store(state, WHOLE_D * n + j, where(plain, s, load(state, PLAIN_D * n + j)))
        store(state, WHOLE_M * n + j, where(plain, m, load(state, PLAIN_M * n + j)))
    return where(plain, plain_d, d), where(plain, plain_m, dmin)


@helper
def search_block(blocks: Any, search: Any) -> Any:
    """Leave the whole-number scales in the state and return d and dmin."""
    state, n, whole = blocks.state, blocks.n, blocks.row.scale_high
    reach = search.reach if whole > 0 else 0
    for j in range(0, n, 16):
        search_part(blocks, j, search)
    d, dmin = load(state, D * n), splat(0.0) - load(state, C * n)
    for j in range(16, n, 16):
        d, dmin = maximum(d, load(state, D * n + j)), maximum(dmin, splat(0.0) - load(state, C * n + j))
    if whole > 0:
        d, dmin = choose_d(blocks, d / splat(whole), dmin / splat(whole), search.trials)
    else:
        store(state, WHOLE_D * n, splat(1.0))
        store(state, WHOLE_M * n, splat(1.0))
        d, dmin = scale_f16(d), to_f16(dmin)
    for k in range(search.passes + 1):
        if k > 0:
            for j in range(0, n, 16):
                new_codes(blocks, j, d, dmin, reach)
        choose_all(blocks, d, dmin)
        if search.passes > 0:
            d, dmin = solve_block(blocks, d, dmin)
    choose_all(blocks, d, dmin)
    if search.guard:
        d, dmin = keep_plain(blocks, d, dmin)
    return d, dmin


@helper
def search_ladder(blocks: Any, ladder: Any) -> Any:
    """Leave the whole-number scales of the search with the least error in the state and return its d and dmin; of
    equals the first's."""
    searches = (ladder.first, ladder.second, ladder.third)
    best_d, best_m, best = splat(0.0), splat(0.0), splat(3e38)
    state, n = blocks.state, blocks.n
    for k in range(ladder.rungs):
        d, dmin = search_block(blocks, searches[k])
        better = splat(0.0) < splat(1.0)
        if ladder.rungs > 1:
            error = true_error(blocks, d, dmin)
            better = error < best
            best = where(better, error, best)
            for j in range(0, n, 16):
                kept_d = where(better, load(state, WHOLE_D * n + j), load(state, KEPT_D * n + j))
                kept_m = where(better, load(state, WHOLE_M * n + j), load(state, KEPT_M * n + j))
                store(state, KEPT_D * n + j, kept_d)
                store(state, KEPT_M * n + j, kept_m)
        best_d, best_m = where(better, d, best_d), where(better, dmin, best_m)
    if ladder.rungs > 1:
        for j in range(0, n, 16):
            store(state, WHOLE_D * n + j, load(state, KEPT_D * n + j))
            store(state, WHOLE_M * n + j, load(state, KEPT_M * n + j))
    return best_d, best_m


@helper
def write_codes(blocks: Any, d: Any, dmin: Any, codes: Any) -> Any:
    """The codes nearest to (x + m) / d for the stored scales."""
    state, n, size, zero = blocks.state, blocks.n, blocks.row.size, splat(0.0)
    for j in range(0, n, 16):
        inverse = reciprocal(load(state, WHOLE_D * n + j) * d)
        m = load(state, WHOLE_M * n + j) * dmin
        for i in range(j * size, (j + 16) * size, 16):
            store(codes, i, nearest(minimum(maximum((load(blocks.x, i) + m) * inverse, zero), blocks.high)))


@helper
def encode(blocks: Any, ladder: Any, codes: Any, tile: Any) -> Any:
    """Search sixteen blocks and leave their bytes in ``tile``."""
    d, dmin = search_ladder(blocks, ladder)
    write_codes(blocks, d, dmin, codes)
    state, n = blocks.state, blocks.n
    pack_affine(blocks.row.packing, codes, state[WHOLE_D * n :], state[WHOLE_M * n :], d, dmin, tile)


quantize_affine = kernel_of(encode)
