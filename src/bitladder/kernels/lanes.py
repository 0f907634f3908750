"""Sixteen blocks side by side: a numba type for a vector of 16 float32, one lane per block.

A compiler vectorises a loop over the weights of one block only by reordering its sums, and then bytes differ from
CPU to CPU. With a block per lane every sum runs in file order inside its lane, so vectors of any width give the same
bytes: LLVM maps 16 lanes to one AVX-512 register, two AVX registers or four SSE registers. Nothing here is
``fastmath``, and a multiply and an add are never fused, so an FMA unit changes nothing either.

Types: ``Lanes`` is <16 x float>, ``Mask`` is <16 x i1>. In numba functions: ``+ - * /`` and comparisons between two
``Lanes``, ``&`` between two ``Mask``, and the functions below. Arrays are one-dimensional and contiguous; indices
count elements and are not checked.
"""
# mypy: disable-error-code="no-untyped-call,import-untyped,misc"
# ruff: noqa: ARG001 the first argument of an intrinsic is the typing context

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic as _intrinsic
from numba.extending import lower_builtin, models, register_model

LANES = 16

# what these decorators make is called from compiled code with fewer arguments than Python sees
intrinsic: Any = _intrinsic

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_VF = ir.VectorType(_F32, LANES)
_VI = ir.VectorType(_I32, LANES)
_VB = ir.VectorType(ir.IntType(1), LANES)


class LanesType(types.Type):
    """<16 x float>."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


class MaskType(types.Type):
    """<16 x i1>."""

    def __init__(self) -> None:
        super().__init__(name="Mask")


lanes_type = LanesType()
mask_type = MaskType()


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _VF)


@register_model(MaskType)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _VB)


# --- operators -------------------------------------------------------------------------------------------


def _define(op: Callable[..., Any], operand: Any, result: Any, emit: Callable[[Any, Any, Any], Any]) -> None:
    """Teach numba ``op(operand, operand) -> result``."""

    class Template(ConcreteTemplate):
        cases = [signature(result, operand, operand)]  # noqa: RUF012 numba reads a class attribute

    infer_global(op)(Template)

    @lower_builtin(op, operand, operand)
    def lower(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return emit(builder, args[0], args[1])


_define(operator.add, lanes_type, lanes_type, lambda b, x, y: b.fadd(x, y))
_define(operator.sub, lanes_type, lanes_type, lambda b, x, y: b.fsub(x, y))
_define(operator.mul, lanes_type, lanes_type, lambda b, x, y: b.fmul(x, y))
_define(operator.truediv, lanes_type, lanes_type, lambda b, x, y: b.fdiv(x, y))
_define(operator.lt, lanes_type, mask_type, lambda b, x, y: b.fcmp_ordered("<", x, y))
_define(operator.gt, lanes_type, mask_type, lambda b, x, y: b.fcmp_ordered(">", x, y))
_define(operator.le, lanes_type, mask_type, lambda b, x, y: b.fcmp_ordered("<=", x, y))
_define(operator.ge, lanes_type, mask_type, lambda b, x, y: b.fcmp_ordered(">=", x, y))
_define(operator.and_, mask_type, mask_type, lambda b, x, y: b.and_(x, y))


# --- small helpers that write LLVM -----------------------------------------------------------------------


def _splat_const(value: float) -> Any:
    return ir.Constant(_VF, [float(np.float32(value))] * LANES)


def _splat_int(value: int) -> Any:
    return ir.Constant(_VI, [value] * LANES)


def _splat(builder: Any, scalar: Any) -> Any:
    first = builder.insert_element(ir.Constant(_VF, ir.Undefined), scalar, _I32(0))
    return builder.shuffle_vector(first, ir.Constant(_VF, ir.Undefined), ir.Constant(_VI, [0] * LANES))


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, element: Any) -> Any:
    """Address of ``array[index]`` as a pointer to a vector of 16 ``element``."""
    data = context.make_array(array_type)(context, builder, array).data
    at = builder.gep(data, [index])
    return builder.bitcast(at, ir.VectorType(element, LANES).as_pointer())


def _select_less(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", x, y), x, y)


def _select_greater(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _fabs(builder: Any, x: Any) -> Any:
    bits = builder.and_(builder.bitcast(x, _VI), _splat_int(0x7FFFFFFF))
    return builder.bitcast(bits, _VF)


def _starts(context: Any, builder: Any, array_type: Any, array: Any) -> list[Any]:
    """The sixteen entries of an int64 array."""
    data = context.make_array(array_type)(context, builder, array).data
    return [builder.load(builder.gep(data, [ir.IntType(64)(lane)])) for lane in range(LANES)]


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Sixteen vectors turned into their columns by a butterfly: each round swaps rows that differ in one bit."""
    for bit in (1, 2, 4, 8):
        low = ir.Constant(_VI, [i if not i & bit else i - bit + LANES for i in range(LANES)])
        high = ir.Constant(_VI, [i + bit if not i & bit else i + LANES for i in range(LANES)])
        turned = list(rows)
        for i in range(LANES):
            if not i & bit:
                turned[i] = builder.shuffle_vector(rows[i], rows[i + bit], low)
                turned[i + bit] = builder.shuffle_vector(rows[i], rows[i + bit], high)
        rows = turned
    return rows


def _of_rows(builder: Any, rows: list[Any], choose: Callable[[Any, Any, Any], Any], bit: int = 1) -> Any:
    """What ``choose`` leaves of each row, a lane each: rows are joined in pairs, depth first to save registers."""
    if len(rows) == 1:
        return rows[0]
    low = ir.Constant(_VI, [i if not i & bit else i - bit + LANES for i in range(LANES)])
    high = ir.Constant(_VI, [i + bit if not i & bit else i + LANES for i in range(LANES)])
    even, odd = (_of_rows(builder, rows[half::2], choose, 2 * bit) for half in (0, 1))
    return choose(builder, builder.shuffle_vector(even, odd, low), builder.shuffle_vector(even, odd, high))


# --- functions for numba code ----------------------------------------------------------------------------


@intrinsic
def load(typingctx: Any, array: Any, index: Any) -> Any:
    """``Lanes`` from ``array[index : index + 16]`` of float32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_pointer(context, builder, sig.args[0], args[0], args[1], _F32), align=4)

    return lanes_type(array, types.intp), codegen


@intrinsic
def store(typingctx: Any, array: Any, index: Any, x: Any) -> Any:
    """``array[index : index + 16] = x`` in float32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], _pointer(context, builder, sig.args[0], args[0], args[1], _F32), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes_type), codegen


@intrinsic
def store_u8(typingctx: Any, array: Any, index: Any, x: Any) -> Any:
    """``array[index : index + 16] = x`` in uint8; x holds whole numbers, negative ones wrap."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        whole = builder.fptosi(args[2], _VI)
        narrow = builder.trunc(whole, ir.VectorType(ir.IntType(8), LANES))
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1], ir.IntType(8))
        builder.store(narrow, pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes_type), codegen


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """The same number, rounded to float32, in every lane."""

    def codegen(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return _splat(builder, args[0])

    return lanes_type(types.float32), codegen


def _function(emit: Callable[..., Any], result: Any, *operands: Any) -> Any:
    """An intrinsic from ``operands`` to ``result`` that ``emit(builder, *values)`` writes."""

    def codegen(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return emit(builder, *args)

    return result(*operands), codegen


@intrinsic
def where(typingctx: Any, mask: Any, x: Any, y: Any) -> Any:
    """x where the mask is set, else y."""
    return _function(lambda b, m, u, v: b.select(m, u, v), lanes_type, mask_type, lanes_type, lanes_type)


@intrinsic
def minimum(typingctx: Any, x: Any, y: Any) -> Any:
    """The smaller of two."""
    return _function(_select_less, lanes_type, lanes_type, lanes_type)


@intrinsic
def maximum(typingctx: Any, x: Any, y: Any) -> Any:
    """The larger of two."""
    return _function(_select_greater, lanes_type, lanes_type, lanes_type)


@intrinsic
def magnitude(typingctx: Any, x: Any) -> Any:
    """|x|."""
    return _function(_fabs, lanes_type, lanes_type)


@intrinsic
def nearest(typingctx: Any, x: Any) -> Any:
    """The nearest whole number, ties to even, for |x| < 2^22.

    Adding 1.5 * 2^23 leaves no bits for a fraction, so the addition itself rounds.
    """

    def emit(builder: Any, value: Any) -> Any:
        magic = _splat_const(12582912.0)
        return builder.fsub(builder.fadd(value, magic), magic)

    return _function(emit, lanes_type, lanes_type)


@intrinsic
def to_f16(typingctx: Any, x: Any) -> Any:
    """The nearest float16, ties to even, as float32; beyond the largest float16, that."""

    def emit(builder: Any, value: Any) -> Any:
        bits = builder.bitcast(value, _VI)
        odd = builder.and_(builder.lshr(bits, _splat_int(13)), _splat_int(1))
        rounded = builder.add(builder.add(bits, _splat_int(0xFFF)), odd)
        normal = builder.bitcast(builder.and_(rounded, _splat_int(0xFFFFE000 - (1 << 32))), _VF)
        # under 2^-14 float16 counts in steps of 2^-24; adding 0.75 leaves exactly those
        step = _splat_const(0.75)
        small = builder.fsub(builder.fadd(value, step), step)
        tiny = builder.fcmp_ordered("<", _fabs(builder, value), _splat_const(2.0**-14))
        result = builder.select(tiny, small, normal)
        result = _select_less(builder, result, _splat_const(65504.0))
        return _select_greater(builder, result, _splat_const(-65504.0))

    return _function(emit, lanes_type, lanes_type)


@intrinsic
def store_f16(typingctx: Any, array: Any, index: Any, x: Any) -> Any:
    """The two bytes of each float16 as 16 low bytes, then 16 high bytes; x comes from ``to_f16``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[2], _VI)
        sign = builder.and_(builder.lshr(bits, _splat_int(16)), _splat_int(0x8000))
        size = _fabs(builder, args[2])
        normal = builder.sub(builder.lshr(builder.bitcast(size, _VI), _splat_int(13)), _splat_int(112 << 10))
        small = builder.fptosi(
            builder.fmul(_select_less(builder, size, _splat_const(2.0**-14)), _splat_const(2.0**24)), _VI
        )
        tiny = builder.fcmp_ordered("<", size, _splat_const(2.0**-14))
        half = builder.or_(sign, builder.select(tiny, small, normal))
        byte = ir.VectorType(ir.IntType(8), LANES)
        at = _pointer(context, builder, sig.args[0], args[0], args[1], ir.IntType(8))
        builder.store(builder.trunc(half, byte), at, align=1)
        high = builder.trunc(builder.lshr(half, _splat_int(8)), byte)
        builder.store(high, builder.gep(at, [_I32(1)]), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes_type), codegen


@intrinsic
def load_transposed(typingctx: Any, source: Any, starts: Any, offset: Any, tile: Any, index: Any) -> Any:
    """Sixteen weights of sixteen blocks: ``tile[index + 16 * i + lane] = source[starts[lane] + offset + i]``.

    Weights are held within +-1e15 on the way, beyond what any format stores, so that their squares stay finite.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows = []
        for start in _starts(context, builder, sig.args[1], args[1]):
            at = _pointer(context, builder, sig.args[0], args[0], builder.add(start, args[2]), _F32)
            row = _select_less(builder, builder.load(at, align=4), _splat_const(1e15))
            rows.append(_select_greater(builder, row, _splat_const(-1e15)))
        for i, row in enumerate(_transposed(builder, rows)):
            at = builder.add(args[4], ir.IntType(64)(LANES * i))
            builder.store(row, _pointer(context, builder, sig.args[3], args[3], at, _F32), align=4)
        return context.get_dummy_value()

    return types.void(source, starts, types.intp, tile, types.intp), codegen


def _extreme_of_rows(choose: Callable[[Any, Any, Any], Any], source: Any, starts: Any) -> Any:
    """An intrinsic that reduces the 32 weights from each of sixteen starts on to one lane each."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows = []
        for start in _starts(context, builder, sig.args[1], args[1]):
            ends = [builder.add(start, ir.IntType(64)(i)) for i in (0, LANES)]
            pointers = [_pointer(context, builder, sig.args[0], args[0], at, _F32) for at in ends]
            rows.append(choose(builder, *(builder.load(pointer, align=4) for pointer in pointers)))
        return _of_rows(builder, rows, choose)

    return lanes_type(source, starts), codegen


@intrinsic
def lowest_of_rows(typingctx: Any, source: Any, starts: Any) -> Any:
    """In each lane the smallest of ``source[starts[lane] : starts[lane] + 32]``."""
    return _extreme_of_rows(_select_less, source, starts)


@intrinsic
def highest_of_rows(typingctx: Any, source: Any, starts: Any) -> Any:
    """In each lane the largest of ``source[starts[lane] : starts[lane] + 32]``."""
    return _extreme_of_rows(_select_greater, source, starts)


@intrinsic
def store_bits(typingctx: Any, array: Any, index: Any, mask: Any) -> Any:
    """A mask as two bytes of ``array``, lane 0 in the lowest bit."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[2], ir.IntType(LANES))
        for i in range(2):
            byte = builder.trunc(builder.lshr(bits, ir.IntType(LANES)(8 * i)), ir.IntType(8))
            at = builder.add(args[1], ir.IntType(64)(i))
            data = context.make_array(sig.args[0])(context, builder, args[0]).data
            builder.store(byte, builder.gep(data, [at]))
        return context.get_dummy_value()

    return types.void(array, types.intp, mask_type), codegen


@intrinsic
def store_transposed(typingctx: Any, tile: Any, index: Any, target: Any, starts: Any, offset: Any) -> Any:
    """Sixteen bytes of sixteen blocks: ``target[starts[lane] + offset + i] = tile[index + 16 * i + lane]``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        byte = ir.IntType(8)
        rows = []
        for i in range(LANES):
            at = builder.add(args[1], ir.IntType(64)(LANES * i))
            rows.append(builder.load(_pointer(context, builder, sig.args[0], args[0], at, byte), align=1))
        starts_of = _starts(context, builder, sig.args[3], args[3])
        for start, row in zip(starts_of, _transposed(builder, rows), strict=True):
            at = _pointer(context, builder, sig.args[2], args[2], builder.add(start, args[4]), byte)
            builder.store(row, at, align=1)
        return context.get_dummy_value()

    return types.void(tile, types.intp, target, starts, types.intp), codegen


_njit: Any = nb.njit

helper: Any = _njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Compiles a function that only kernels call."""

kernel: Any = helper
"""Compiles a function that ``compiled.py`` calls. It allocates and raises nothing: its caller brings all arrays."""


@helper
def reciprocal(x: Any) -> Any:
    """1 / x, and 0 where x is too near zero for a finite answer."""
    usable = magnitude(x) > splat(1e-37)
    return where(usable, splat(1.0) / where(usable, x, splat(1.0)), splat(0.0))
