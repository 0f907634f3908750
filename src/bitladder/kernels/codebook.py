"""Codebooks: eight or four neighbouring weights together are one entry of a table, times a step, times their signs.

For a group of weights x with importance w, an entry g and a step q, the squared error is

    sum w x x - 2 q A + q q B,      A = sum w |x| g,  B = sum w g g

so A and B of every entry are summed once, sixteen entries side by side (``lanes.py``), and any step is tried on all
entries for two more products each: the nearest entry is found, not one near a rounded point. The steps of a block of
256 are whole odd numbers, one for each sub-block, times a float16; the search is that of ``scale.py``: the best step of
each sub-block alone, then float16s that hold them all, then each sub-block's whole number with the float16 as stored.

Where signs of eight weights must be even in number and are not, the sign whose loss costs least is given up.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bitladder.kernels.lanes import helper, kernel, load, minimum, splat, store, where

BLOCK = 256


@helper
def sums_of(table: Any, form: Any, variant: Any, y: Any, w: Any, start: Any, work: Any, at: Any) -> None:
    """A and B of all entries for the weights from ``start`` on: two runs of ``work`` from ``at``."""
    first = variant * form.width * form.entries
    for k in range(0, form.entries, 16):
        a, b = splat(0.0), splat(0.0)
        for i in range(form.width):
            g = load(table, first + i * form.entries + k)
            weighted = splat(w[start + i]) * g
            a = a + splat(y[start + i]) * weighted
            b = b + weighted * g
        store(work, at + k, a)
        store(work, at + form.entries + k, b)


@helper
def first_least(best: Any, index: Any, tile: Any, at: Any) -> Any:
    """The entry of the least of sixteen costs, of equals the first; its cost is left in ``tile[at + 32]``. A lane holds
    the entry ``index`` and its own number."""
    store(tile, at, best)
    store(tile, at + 16, index)
    found, value = np.int64(tile[at + 16]), tile[at]
    for lane in range(1, 16):
        entry = np.int64(tile[at + 16 + lane]) + lane
        if tile[at + lane] < value or (tile[at + lane] == value and entry < found):
            found, value = entry, tile[at + lane]
    tile[at + 32] = value
    return found


@helper
def least_of(work: Any, at: Any, entries: Any, q: Any, tile: Any) -> Any:
    """The entry of least ``q q B - 2 q A``; its value is left in ``tile[32]``, of equals the first is taken."""
    square, twice = splat(q * q), splat(np.float32(2) * q)
    best, index = splat(np.float32(3e38)), splat(0.0)
    for k in range(0, entries, 16):
        cost = square * load(work, at + entries + k) - twice * load(work, at + k)
        index = where(cost < best, splat(np.float32(k)), index)
        best = minimum(cost, best)
    return first_least(best, index, tile, 0)


@helper
def part_cost(work: Any, at: Any, form: Any, q: Any, tile: Any, chosen: Any, first: Any) -> Any:
    """The cost of a sub-block at a step; its groups' entries go to ``chosen`` from ``first`` on."""
    cost = np.float32(0)
    for group in range(form.size // form.width):
        entry = least_of(work, at + 2 * form.entries * group, form.entries, q, tile)
        chosen[first + group] = entry
        cost += tile[32]
    return cost


@helper
def chosen_sums(work: Any, at: Any, form: Any, chosen: Any, first: Any, out: Any, to: Any) -> None:
    """A and B of a sub-block's chosen entries, to two places of ``out``."""
    a, b = np.float32(0), np.float32(0)
    for group in range(form.size // form.width):
        place = at + 2 * form.entries * group + chosen[first + group]
        a += work[place]
        b += work[place + form.entries]
    out[to], out[to + 1] = a, b


@helper
def float16(x: Any) -> Any:
    """The nearest float16 of a positive number, ties to even."""
    if x >= np.float32(65504.0):
        return np.float32(65504.0)
    unit = np.float32(2.0**-24)
    while x >= unit * np.float32(2048.0):
        unit = unit * np.float32(2.0)
    return np.rint(x / unit) * unit


@helper
def spend_signs(x: Any, start: Any, w: Any, form: Any, y: Any, signs: Any, at: Any) -> None:
    """The magnitudes of 256 weights to ``y``, their signs to 32 bytes; a sign given up makes its magnitude negative."""
    for byte in range(BLOCK // 8):
        bits, count, cheapest, least = 0, 0, 0, np.float32(3e38)
        for i in range(8):
            place = 8 * byte + i
            value = min(max(x[start + place], np.float32(-1e15)), np.float32(1e15))
            cost = w[place] * value * value
            if cost < least:
                cheapest, least = i, cost
            if form.signed:
                y[place] = value
                continue
            if value < 0:
                bits |= 1 << i
                count += 1
            y[place] = abs(value)
        if form.even and count % 2:
            bits ^= 1 << cheapest
            y[8 * byte + cheapest] = -y[8 * byte + cheapest]
        signs[at + byte] = bits


@helper
def best_step(work: Any, at: Any, form: Any, look: Any, peak: Any, tile: Any, chosen: Any, first: Any) -> Any:
    """The step at which a sub-block alone costs least, of the starts and what they lead to. The cost goes to
    ``tile[33]``, A and B of its entries to ``tile[34]`` and ``tile[35]``."""
    best, least = np.float32(0), np.float32(0)
    a, b = np.float32(0), np.float32(0)
    for start in range(look.starts + look.rounds):
        if start < look.starts:
            share = look.low + (look.high - look.low) * np.float32(start) / np.float32(max(look.starts - 1, 1))
            q = peak / np.float32(form.top) * share / np.float32(100)
        elif b > 0:  # where the best so far leads with its own entries
            q = a / b
        else:
            break
        cost = part_cost(work, at, form, q, tile, chosen, first)
        if cost < least:
            chosen_sums(work, at, form, chosen, first, tile, 36)
            best, least, a, b = q, cost, tile[36], tile[37]
    tile[33], tile[34], tile[35] = least, a, b
    return best


@helper
def nearest_odd(q: Any, unit: Any, form: Any) -> Any:
    """The whole number s from 0 up for which ``(2 s + 1) unit`` is nearest to q."""
    if unit <= 0:
        return 0
    s = np.int64(np.rint((q / unit - np.float32(1)) / np.float32(2)))
    return min(max(s, 0), form.scales - 1)


@helper
def fit_whole(steps: Any, part_sums: Any, form: Any, look: Any) -> Any:
    """Of ``look.trials`` float16s the one that costs least over all sub-blocks, entries as they are."""
    parts = BLOCK // form.size
    largest = np.float32(0)
    for part in range(parts):
        largest = max(largest, steps[part])
    best, least = np.float32(0), np.float32(3e38)
    for trial in range(look.trials):
        share = np.float32(0.7) + np.float32(0.7) * np.float32(trial) / np.float32(max(look.trials - 1, 1))
        tried = float16(largest / (np.float32(2 * form.scales - 1) * np.float32(form.unit) / np.float32(8)) * share)
        cost = np.float32(0)
        for part in range(parts):
            unit = tried * np.float32(form.unit) / np.float32(8)
            q = np.float32(2 * nearest_odd(steps[part], unit, form) + 1) * unit
            cost += q * q * part_sums[2 * part + 1] - np.float32(2) * q * part_sums[2 * part]
        if cost < least:
            best, least = tried, cost
    return best


@helper
def settle(
    work: Any, form: Any, look: Any, d: Any, steps: Any, part_sums: Any, tile: Any, trial: Any,
    entries: Any, whole: Any, variants: Any,
) -> Any:  # fmt: skip
    """Every sub-block's whole number and entries at a float16 as stored, and what the block costs so."""
    parts, groups = BLOCK // form.size, form.size // form.width
    unit, total = d * np.float32(form.unit) / np.float32(8), np.float32(0)
    for part in range(parts):
        least = np.float32(3e38)
        for variant in range(form.variants):
            at = 2 * form.entries * groups * (part * form.variants + variant)
            near = nearest_odd(steps[part * form.variants + variant], unit, form)
            for s in range(max(near - look.reach, 0), min(near + look.reach, form.scales - 1) + 1):
                cost = part_cost(work, at, form, np.float32(2 * s + 1) * unit, tile, trial, 0)
                if cost < least:
                    least = cost
                    whole[part], variants[part] = s, variant
                    for group in range(groups):
                        entries[groups * part + group] = trial[group]
        at = 2 * form.entries * groups * (part * form.variants + variants[part])
        chosen_sums(work, at, form, entries, groups * part, part_sums, 2 * part)
        total += least
    return total


@helper
def best_steps(table: Any, form: Any, look: Any, work: Any, small: Any, trial: Any) -> Any:
    """The best step of each sub-block alone, for each variant and over all of them, and A and B of its entries, all to
    their places in ``small``; the largest of them."""
    parts, groups = BLOCK // form.size, form.size // form.width
    y, w, steps, part_sums, tile = small[0:256], small[256:512], small[512:544], small[544:608], small[608:672]
    largest = np.float32(0)
    for part in range(parts):
        peak = np.float32(0)
        for i in range(form.size * part, form.size * (part + 1)):
            peak = max(peak, abs(y[i]))
        least = np.float32(3e38)
        for variant in range(form.variants):
            at = 2 * form.entries * groups * (part * form.variants + variant)
            for group in range(groups):
                place = form.size * part + form.width * group
                sums_of(table, form, variant, y, w, place, work, at + 2 * form.entries * group)
            q = best_step(work, at, form, look, peak, tile, trial, 0)
            steps[part * form.variants + variant] = q
            if tile[33] < least:
                least = tile[33]
                part_sums[2 * part], part_sums[2 * part + 1] = tile[34], tile[35]
                small[672 + part] = q
        largest = max(largest, small[672 + part])
    return largest


@kernel
def quantize_codebook(
    x: Any, columns: Any, importance: Any, table: Any, form: Any, look: Any, work: Any, small: Any, trial: Any,
    scale: Any, whole: Any, variants: Any, entries: Any, signs: Any,
) -> None:  # fmt: skip
    """Find float16s, whole numbers, entries and signs of all blocks.

    Args:
        x: f32[blocks * 256].
        columns: of a row; importance repeats after so many weights.
        importance: f32[columns], or empty.
        table: f32[variants * width * entries], entries side by side.
        form, look: a ``CodebookRow`` and a ``CodebookSearch``.
        work: f32[form.scratch].
        small: f32[720].
        trial: i64[64].
        scale: f32[blocks], out.
        whole: i64[blocks * parts], out.
        variants: i64[blocks * parts], out.
        entries: i64[blocks * 256 / width], out.
        signs: u8[blocks * 32], out.
    """
    parts, groups = BLOCK // form.size, form.size // form.width
    y, w, steps, part_sums, tile = small[0:256], small[256:512], small[512:544], small[544:608], small[608:672]
    for block in range(x.size // BLOCK):
        start = BLOCK * block
        for i in range(BLOCK):
            w[i] = importance[(start + i) % columns] if importance.size else np.float32(1)
        spend_signs(x, start, w, form, y, signs, 32 * block)
        own_whole, own_variants = (
            whole[parts * block : parts * (block + 1)],
            variants[parts * block : parts * (block + 1)],
        )
        own = entries[parts * groups * block : parts * groups * (block + 1)]
        largest = best_steps(table, form, look, work, small, trial)
        best = np.float32(0)
        if largest > 0:
            best = fit_whole(small[672:704], part_sums, form, look)
        total = settle(work, form, look, best, steps, part_sums, tile, trial, own, own_whole, own_variants)
        for _ in range(look.passes):
            over, under = np.float32(0), np.float32(0)
            for part in range(parts):
                unit = np.float32(2 * own_whole[part] + 1) * np.float32(form.unit) / np.float32(8)
                over += unit * part_sums[2 * part]
                under += unit * unit * part_sums[2 * part + 1]
            if under <= 0 or over <= 0:
                break
            tried = float16(over / under)
            again = settle(work, form, look, tried, steps, part_sums, tile, trial, own, own_whole, own_variants)
            if again < total:
                best, total = tried, again
            else:  # back to what was better
                settle(work, form, look, best, steps, part_sums, tile, trial, own, own_whole, own_variants)
                break
        scale[block] = best


@helper
def nearest_entry(
    table: Any, first: Any, form: Any, step: Any, exact: Any, target: Any, at: Any, negative: Any, coupling: Any,
    pivots: Any, tile: Any,
) -> Any:  # fmt: skip
    """The entry whose error costs least where each error of the group moves the targets after it. ``tile`` holds eight
    vectors of errors, then the least costs and their entries."""
    best, index = splat(np.float32(3e38)), splat(0.0)
    for k in range(0, form.entries, 16):
        cost = splat(0.0)
        for i in range(form.width):
            sign = np.float32(-1) if (negative >> i) & 1 else np.float32(1)
            value = splat(step * sign) * load(table, first + i * form.entries + k)
            store(tile, 16 * i, value - splat(exact[at + i]))
            moved = value - splat(target[at + i])
            for j in range(i):
                moved = moved + splat(coupling[BLOCK * (at + j) + at + i]) * load(tile, 16 * j)
            cost = cost + splat(pivots[at + i]) * (moved * moved)
        index = where(cost < best, splat(np.float32(k)), index)
        best = minimum(cost, best)
    return first_least(best, index, tile, 128)


@helper
def signs_of(target: Any, at: Any, weight: Any, even: Any) -> Any:
    """The signs of eight targets as bits; where their number must be even the cheapest is given up."""
    bits, count, cheapest, least = 0, 0, 0, np.float32(3e38)
    for i in range(8):
        value = target[at + i]
        cost = weight[at + i] * value * value
        if cost < least:
            cheapest, least = i, cost
        if value < 0:
            bits |= 1 << i
            count += 1
    if even and count % 2:
        bits ^= 1 << cheapest
    return bits


@kernel
def feed_codebook(
    weights: Any, coupling: Any, pivots: Any, table: Any, form: Any, scale: Any, whole: Any, variants: Any,
    tile: Any, room: Any, entries: Any, signs: Any,
) -> None:  # fmt: skip
    """Entries and signs of one block of each row, in storage order, with error feedback.

    Args:
        weights: f32[rows * 256].
        coupling: f32[256 * 256], above the diagonal.
        pivots: f32[256].
        table: f32[variants * width * entries].
        form: a ``CodebookRow``.
        scale: f32[rows].
        whole, variants: i64[rows * parts].
        tile: f32[176].
        room: f32[512].
        entries: i64[rows * 256 / width], out.
        signs: u8[rows * 32], out.
    """
    parts, groups = BLOCK // form.size, BLOCK // form.width
    weight, target = room[0:BLOCK], room[BLOCK : 2 * BLOCK]
    for i in range(BLOCK):  # what an error costs where the rest of its eight weights cannot make up for it
        weight[i] = pivots[i]
        for later in range(i + 1, 8 * (i // 8) + 8):
            weight[i] += pivots[later] * coupling[BLOCK * i + later] * coupling[BLOCK * i + later]
    for row in range(scale.size):
        exact = weights[BLOCK * row : BLOCK * (row + 1)]
        for i in range(BLOCK):
            target[i] = exact[i]
        for group in range(groups):
            at = form.width * group
            part = at // form.size
            if not form.signed and at % 8 == 0:
                signs[32 * row + at // 8] = signs_of(target, at, weight, form.even)
            negative = 0 if form.signed else np.int64(signs[32 * row + at // 8]) >> (at % 8)
            first = variants[parts * row + part] * form.width * form.entries
            step = scale[row] * np.float32(2 * whole[parts * row + part] + 1) * np.float32(form.unit) / np.float32(8)
            entry = nearest_entry(table, first, form, step, exact, target, at, negative, coupling, pivots, tile)
            entries[groups * row + group] = entry
            for i in range(form.width):
                value = step * table[first + i * form.entries + entry]
                wrong = (-value if (negative >> i) & 1 else value) - exact[at + i]
                for later in range(at + form.width, BLOCK):
                    target[later] -= coupling[BLOCK * (at + i) + later] * wrong


@helper
def change_of(square: Any, at: Any, width: Any, by: Any, gradient: Any) -> Any:
    """What the cost changes by when the columns from ``at`` on move by ``by``."""
    total = np.float32(0)
    for i in range(width):
        inner = np.float32(0)
        for j in range(width):
            inner += square[BLOCK * (at + i) + at + j] * by[j]
        total += by[i] * (np.float32(2) * gradient[at + i] + inner)
    return total


@helper
def move(square: Any, at: Any, width: Any, by: Any, gradient: Any, value: Any) -> None:
    """The values from ``at`` on move by ``by``, all gradients with them."""
    for i in range(width):
        if by[i] != 0:
            value[at + i] += by[i]
            for other in range(BLOCK):
                gradient[other] += by[i] * square[BLOCK * (at + i) + other]


@helper
def better_step(
    square: Any, at: Any, form: Any, unit: Any, whole: Any, gradient: Any, value: Any, entry: Any, by: Any
) -> Any:
    """The whole number of a sub-block with its entries as they are; the values move."""
    q = np.float32(2 * whole + 1) * unit
    slope, curve = np.float32(0), np.float32(0)
    for i in range(form.size):
        entry[i] = value[at + i] / q
    for i in range(form.size):
        inner = np.float32(0)
        for j in range(form.size):
            inner += square[BLOCK * (at + i) + at + j] * entry[j]
        slope += entry[i] * gradient[at + i]
        curve += entry[i] * inner
    if curve <= 0:
        return whole
    found = nearest_odd(q - slope / curve, unit, form)
    moved = np.float32(2 * found + 1) * unit - q
    if moved * (np.float32(2) * slope + moved * curve) >= 0:
        return whole
    for i in range(form.size):
        by[i] = moved * entry[i]
    move(square, at, form.size, by, gradient, value)
    return found


@helper
def signs_for(target: Any, at: Any, form: Any, weight: Any, byte: Any) -> Any:
    """A byte of signs with those of a group's targets in their places; where their number must be even the cheapest of
    the group is given up."""
    place = at % 8
    bits, count, cheapest, least = byte, 0, 0, np.float32(3e38)
    for i in range(8):
        if place <= i < place + form.width:
            value = target[at + i - place]
            cost = weight[at + i - place] * value * value
            if cost < least:
                cheapest, least = i, cost
            if value < 0:
                bits |= 1 << i
            else:
                bits &= ~(1 << i)
        count += (bits >> i) & 1
    if form.even and count % 2:
        bits ^= 1 << cheapest
    return bits


@kernel
def refine_codebook(
    gradients: Any, values: Any, square: Any, inverse: Any, coupling: Any, pivots: Any, table: Any, form: Any,
    scale: Any, whole: Any, variants: Any, tile: Any, room: Any, entries: Any, signs: Any,
) -> None:  # fmt: skip
    """Steps, entries and signs of one block of each row, each set in turn to what is best while all else stays
    (``refine.py``): a group's entries are compared by what their errors cost together.

    Args:
        gradients: f32[rows * 256], the Hessian times the errors; moves along.
        values: f32[rows * 256], what blocks stand for; moves along.
        square: f32[256 * 256], the Hessian of these columns.
        inverse: f32[256 * width], of each group's own square.
        coupling: f32[256 * 256], pivots: f32[256]: a factor of each group's own square, as ``feed_codebook`` takes it.
        table: f32[variants * width * entries].
        form: a ``CodebookRow``.
        scale: f32[rows].
        whole, variants: i64[rows * parts]; whole numbers change.
        tile: f32[176].
        room: f32[576].
        entries: i64[rows * 256 / width], signs: u8[rows * 32]; they change.
    """
    parts, groups = BLOCK // form.size, BLOCK // form.width
    weight, target, entry, by = room[0:BLOCK], room[BLOCK : 2 * BLOCK], room[512:544], room[544:576]
    for i in range(BLOCK):
        weight[i] = square[BLOCK * i + i]
    for row in range(scale.size):
        unit = scale[row] * np.float32(form.unit) / np.float32(8)
        if unit <= 0:
            continue
        gradient, value = gradients[BLOCK * row : BLOCK * (row + 1)], values[BLOCK * row : BLOCK * (row + 1)]
        for group in range(groups):
            at = form.width * group
            part = at // form.size
            if at % form.size == 0:
                whole[parts * row + part] = better_step(
                    square, at, form, unit, whole[parts * row + part], gradient, value, entry, by
                )
            step = np.float32(2 * whole[parts * row + part] + 1) * unit
            for i in range(form.width):
                away = np.float32(0)
                for j in range(form.width):
                    away += inverse[form.width * (at + i) + j] * gradient[at + j]
                target[at + i] = value[at + i] - away
            byte = np.int64(signs[32 * row + at // 8])
            bits = byte if form.signed else signs_for(target, at, form, weight, byte)
            negative = 0 if form.signed else bits >> (at % 8)
            first = variants[parts * row + part] * form.width * form.entries
            found = nearest_entry(table, first, form, step, target, target, at, negative, coupling, pivots, tile)
            for i in range(form.width):
                new = step * table[first + i * form.entries + found]
                by[i] = (-new if (negative >> i) & 1 else new) - value[at + i]
            if change_of(square, at, form.width, by, gradient) < 0:
                move(square, at, form.width, by, gradient, value)
                entries[groups * row + group] = found
                signs[32 * row + at // 8] = bits
