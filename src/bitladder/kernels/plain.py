# mypy: disable-error-code="arg-type,index"
"""Every format's quantizer in plain numpy: slow, short, correct."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any

# codes lo..hi, sub-block size, offset stored with the code, largest integer scale
_SCALE = {
    "Q8_0": (-127, 127, 32, 128),
    "Q4_0": (-8, 7, 32, 8),
    "Q5_0": (-16, 15, 32, 16),
    "Q3_K": (-4, 3, 16, 4),
    "Q6_K": (-32, 31, 16, 32),
}
_AFFINE = {
    "Q4_1": (15, 32, 0),
    "Q5_1": (31, 32, 0),
    "Q2_K": (3, 16, 15),
    "Q4_K": (15, 32, 63),
    "Q5_K": (31, 32, 63),
}
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def quantize_rows(x: Array, qtype: str, importance: Array | None, effort: str) -> Array:
    rows, cols = x.shape
    if qtype == "F32":
        return x.view(np.uint8)
    if qtype == "F16":
        return x.astype(np.float16).view(np.uint8)
    if qtype == "BF16":
        bits = x.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.uint8)
    if rows == 0 or cols == 0:
        return np.empty((rows, 0), np.uint8) if cols == 0 else np.empty((0, 0), np.uint8)
    size = 32 if qtype in ("Q8_0", "Q4_0", "Q5_0", "Q4_1", "Q5_1", "IQ4_NL") else 256
    b = x.reshape(-1, size)
    w = np.ones_like(b) if importance is None else np.broadcast_to(importance, x.shape).reshape(-1, size)
    if importance is not None or size == 256:
        w = (w * np.sqrt((b * b).mean(1, keepdims=True) + b * b) + np.float32(1e-30)).astype(np.float32)
    if qtype in _SCALE:
        out = _scale(b, w, qtype)
    elif qtype in _AFFINE:
        out = _affine(b, w, qtype)
    else:
        out = _iq4(b, w, qtype)
    return out.reshape(rows, -1)


def _f16(v: Array) -> Array:
    return np.clip(v, -65504, 65504).astype(np.float16)


def _inv(v: Array) -> Array:
    with np.errstate(divide="ignore", over="ignore"):
        r = 1 / v
    return np.where(np.isfinite(r), r, 0).astype(np.float32)


def _search(x: Array, w: Array, lo: int, hi: int) -> Array:
    at = np.abs(x).argmax(-1)[..., None]
    top = np.take_along_axis(x, at, -1)
    best, best_gain = None, None
    for k in range(-9, 10):
        scale0 = top / (lo + 0.1 * k) if abs(lo) > hi else np.abs(top) / hi
        code = np.clip(np.rint(x * _inv(scale0)), lo, hi)
        num = (w * x * code).sum(-1, keepdims=True)
        den = (w * code * code).sum(-1, keepdims=True)
        gain, d = num * num * _inv(den), num * _inv(den)
        if best is None:
            best, best_gain = d, gain
        else:
            best = np.where(gain > best_gain, d, best)
            best_gain = np.maximum(gain, best_gain)
        if abs(lo) == hi:
            break
    return best


def _scale(b: Array, w: Array, qtype: str) -> Array:
    n = len(b)
    lo, hi, sub, offset = _SCALE[qtype]
    if sub == b.shape[1]:
        d = np.abs(b).max(-1, keepdims=True) / 127 if qtype == "Q8_0" else _search(b, w, lo, hi)
        d = _f16(d)
        code = np.clip(np.rint(b * _inv(d.astype(np.float32))), lo, hi).astype(np.int32)
        if qtype == "Q8_0":
            return np.concatenate([d.view(np.uint8), code.astype(np.int8).view(np.uint8)], 1)
        u = (code + offset).astype(np.uint8)
        qs = (u[:, :16] & 15) | ((u[:, 16:] & 15) << 4)
        if qtype == "Q4_0":
            return np.concatenate([d.view(np.uint8), qs], 1)
        return np.concatenate([d.view(np.uint8), _bits32(u >> 4), qs], 1)
    xs, ws = b.reshape(n, -1, sub), w.reshape(n, -1, sub)
    scales = _search(xs, ws, lo, hi)[..., 0]
    smax = 32 if qtype == "Q3_K" else 128
    at = np.abs(scales).argmax(-1)[:, None]
    d = _f16(np.take_along_axis(scales, at, -1) / -smax)
    s = np.clip(np.rint(scales * _inv(d.astype(np.float32))), -smax, smax - 1).astype(np.int32)
    dl = d.astype(np.float32)[..., None] * s[..., None]
    code = np.clip(np.rint(xs * _inv(dl)), lo, hi).astype(np.int32).reshape(n, 256)
    u = (code + offset).astype(np.uint8)
    if qtype == "Q6_K":
        u = u.reshape(n, 2, 4, 32)
        lo4, h = u & 15, u >> 4
        ql = np.concatenate([lo4[:, :, 0] | lo4[:, :, 2] << 4, lo4[:, :, 1] | lo4[:, :, 3] << 4], -1).reshape(
            n, 128
        )
        qh = (h[:, :, 0] | h[:, :, 1] << 2 | h[:, :, 2] << 4 | h[:, :, 3] << 6).reshape(n, 64)
        return np.concatenate([ql, qh, s.astype(np.int8).view(np.uint8), d.view(np.uint8)], 1)
    u8 = u.reshape(n, 8, 32)
    hmask = sum((u8[:, j] >> 2) << j for j in range(8)).astype(np.uint8)
    u4 = u.reshape(n, 2, 4, 32) & 3
    qs = (u4[:, :, 0] | u4[:, :, 1] << 2 | u4[:, :, 2] << 4 | u4[:, :, 3] << 6).reshape(n, 64)
    su = (s + 32).astype(np.uint8)
    low = (su[:, :8] & 15) | (su[:, 8:] & 15) << 4
    hi2 = (su >> 4).reshape(n, 4, 4)
    high = hi2[:, 0] | hi2[:, 1] << 2 | hi2[:, 2] << 4 | hi2[:, 3] << 6
    return np.concatenate([hmask, qs, low, high, d.view(np.uint8)], 1)


def _bits32(bits: Array) -> Array:
    return np.packbits(bits.astype(np.uint8), axis=-1, bitorder="little")


def _search_affine(x: Array, w: Array, nmax: int, free: bool) -> tuple[Array, Array]:
    lo = x.min(-1, keepdims=True)
    if not free:
        lo = np.minimum(lo, 0)
    span = x.max(-1, keepdims=True) - lo
    sw, sx = w.sum(-1, keepdims=True), (w * x).sum(-1, keepdims=True)
    best = (span / nmax, lo, np.full_like(lo, np.inf))
    for k in range(-10, 11):
        code = np.clip(np.rint((x - lo) * ((nmax + 0.1 * k) * _inv(span))), 0, nmax)
        sl, sll, sxl = (
            (w * code).sum(-1, keepdims=True),
            (w * code * code).sum(-1, keepdims=True),
            (w * x * code).sum(-1, keepdims=True),
        )
        det = _inv(sw * sll - sl * sl)
        d, m = (sw * sxl - sx * sl) * det, (sll * sx - sl * sxl) * det
        if not free:
            d, m = np.where(m > 0, sxl * _inv(sll), d), np.minimum(m, 0)
        err = (w * (d * code + m - x) ** 2).sum(-1, keepdims=True)
        better = (err < best[2]) & (det > 0)
        best = tuple(np.where(better, a, c) for a, c in zip((d, m, err), best, strict=True))
    return best[0], best[1]


def _affine(b: Array, w: Array, qtype: str) -> Array:
    n = len(b)
    nmax, sub, smax = _AFFINE[qtype]
    if not smax:
        d, m = _search_affine(b, w, nmax, True)
        d, m = _f16(d), _f16(m)
        u = np.clip(np.rint((b - m.astype(np.float32)) * _inv(d.astype(np.float32))), 0, nmax).astype(
            np.uint8
        )
        qs = (u[:, :16] & 15) | ((u[:, 16:] & 15) << 4)
        high = [_bits32(u >> 4)] if qtype == "Q5_1" else []
        return np.concatenate([d.view(np.uint8), m.view(np.uint8), *high, qs], 1)
    xs, ws = b.reshape(n, -1, sub), w.reshape(n, -1, sub)
    sc, mn = (v[..., 0] for v in _search_affine(xs, ws, nmax, False))
    d, dmin = _f16(sc.max(-1, keepdims=True) / smax), _f16((-mn).max(-1, keepdims=True) / smax)
    s = np.clip(np.rint(sc * _inv(d.astype(np.float32))), 0, smax).astype(np.uint8)
    m = np.clip(np.rint(-mn * _inv(dmin.astype(np.float32))), 0, smax).astype(np.uint8)
    dl, ml = (d.astype(np.float32) * s)[..., None], (dmin.astype(np.float32) * m)[..., None]
    u = np.clip(np.rint((xs + ml) * _inv(dl)), 0, nmax).astype(np.uint8).reshape(n, 256)
    if qtype == "Q2_K":
        u4 = u.reshape(n, 2, 4, 32)
        qs = (u4[:, :, 0] | u4[:, :, 1] << 2 | u4[:, :, 2] << 4 | u4[:, :, 3] << 6).reshape(n, 64)
        return np.concatenate([s | m << 4, qs, d.view(np.uint8), dmin.view(np.uint8)], 1)
    packed = np.concatenate(
        [
            s[:, :4] | (s[:, 4:] >> 4) << 6,
            m[:, :4] | (m[:, 4:] >> 4) << 6,
            (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4,
        ],
        1,
    )
    u2 = (u & 15).reshape(n, 4, 2, 32)
    qs = (u2[:, :, 0] | u2[:, :, 1] << 4).reshape(n, 128)
    u8 = u.reshape(n, 8, 32)
    high = [sum((u8[:, j] >> 4) << j for j in range(8)).astype(np.uint8)] if qtype == "Q5_K" else []
    return np.concatenate([d.view(np.uint8), dmin.view(np.uint8), packed, *high, qs], 1)


def _nearest(v: Array) -> Array:
    return np.searchsorted((_IQ4[1:] + _IQ4[:-1]) / 2, v)


def _iq4(b: Array, w: Array, qtype: str) -> Array:
    n = len(b)
    xs, ws = b.reshape(n, -1, 32), w.reshape(n, -1, 32)
    at = np.abs(xs).argmax(-1)[..., None]
    top = np.take_along_axis(xs, at, -1)
    best, gain = None, None
    for k in range(-7, 8):
        value = _IQ4[_nearest(xs * _inv(top / (_IQ4[0] + k)))]
        num, den = (ws * xs * value).sum(-1, keepdims=True), (ws * value * value).sum(-1, keepdims=True)
        d, g = num * _inv(den), num * num * _inv(den)
        best, gain = (d, g) if best is None else (np.where(g > gain, d, best), np.maximum(g, gain))
    if qtype == "IQ4_NL":
        d = _f16(best[..., 0])
        u = _nearest(b * _inv(d.astype(np.float32))).astype(np.uint8)
        return np.concatenate([d.view(np.uint8), (u[:, :16]) | (u[:, 16:] << 4)], 1)
    scales = best[..., 0]
    at = np.abs(scales).argmax(-1)[:, None]
    d = _f16(np.take_along_axis(scales, at, -1) / -32)
    s = np.clip(np.rint(scales * _inv(d.astype(np.float32))), -32, 31).astype(np.int32)
    u = _nearest(xs * _inv((d.astype(np.float32) * s)[..., None])).astype(np.uint8)
    su = (s + 32).astype(np.uint8)
    high = sum((su[:, j] >> 4).astype(np.uint16) << (2 * j) for j in range(8)).astype(np.uint16)[:, None]
    low = (su[:, 0::2] & 15) | (su[:, 1::2] & 15) << 4
    qs = (u[:, :, :16] | u[:, :, 16:] << 4).reshape(n, 128)
    return np.concatenate([d.view(np.uint8), high.view(np.uint8), low, qs], 1)
