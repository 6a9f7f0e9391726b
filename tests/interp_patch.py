"""Makes Triton's CPU interpreter right for bfloat16. Import it before the first launch (tests/conftest.py does).

Triton 3.6 to 3.9 keep bf16 values as uint16 bit patterns, and their interpreter multiplies, adds and compares those
bits as integers; its fp32 -> bf16 conversion truncates where a GPU rounds to nearest even. No error is raised.
Here bf16 goes through fp32 and back, as on a GPU. Reductions over bf16, which the compiler promotes, are refused.
"""

import dataclasses
import functools
import inspect

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def bits_to_float(bits):
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def float_to_bits(values):
    """Round to nearest even; every NaN becomes the quiet NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    u = values.view(np.uint32)
    rounded = ((u + (0x7FFF + ((u >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def is_bf16(handle) -> bool:
    return getattr(handle.dtype, "scalar", handle.dtype) == tl.bfloat16


def _patch_convert():
    stock = interpreter._convert_float

    def convert(values, source, target, rounding):
        if source == tl.bfloat16 and target == tl.float32:
            return bits_to_float(values)
        if source == tl.float32 and target == tl.bfloat16:
            return float_to_bits(values)
        return stock(values, source, target, rounding)

    interpreter._convert_float = convert


def _patch_builder():
    builder = interpreter.InterpreterBuilder
    stock_dot, stock_binary, stock_unary = builder.create_dot, builder.binary_op, builder.unary_op

    def as_float(handle):
        return interpreter.TensorHandle(bits_to_float(handle.data), tl.float32) if is_bf16(handle) else handle

    def create_dot(self, a, b, *rest):
        return stock_dot(self, as_float(a), as_float(b), *rest)

    def binary_op(self, a, b, op):
        if not (is_bf16(a) and a.data.dtype == np.uint16):
            return stock_binary(self, a, b, op)
        out = op(bits_to_float(a.data), bits_to_float(b.data))
        return interpreter.TensorHandle(out if out.dtype == np.bool_ else float_to_bits(out), tl.bfloat16)

    def unary_op(self, a, op):
        if not is_bf16(a):
            return stock_unary(self, a, op)
        return interpreter.TensorHandle(float_to_bits(op(bits_to_float(a.data))), tl.bfloat16)

    builder.create_dot, builder.binary_op, builder.unary_op = create_dot, binary_op, unary_op


def _refuse_bf16(ops):
    stock = ops.apply_impl

    def apply_impl(self, arguments):
        handles = arguments if isinstance(arguments, tuple) else (arguments,)
        if any(h.dtype.scalar == tl.bfloat16 for h in handles):
            raise NotImplementedError("reduction over bfloat16 in the interpreter: cast to float32 first")
        return stock(self, arguments)

    ops.apply_impl = apply_impl


def _patch_index():
    """NumPy 2.4 refuses int() of a one-element array, which Triton 3.6 calls for `range(tensor)`."""
    stock = interpreter._patch_lang_tensor

    def to_int(self):
        return int(np.asarray(self.handle.data).reshape(-1)[0])

    def patch(tensor, *scope):
        result = stock(tensor, *scope)
        if scope:
            scope[0].set_attr(tensor, "__index__", to_int)
        else:
            tensor.__index__ = to_int
        return result

    interpreter._patch_lang_tensor = patch


def _patch_once():
    """Every call of a device function patches triton.language anew, which its launch has done and which takes most of
    a program's time.
    """
    stock, patched = interpreter._patch_lang, set()  # of the launch under way

    @functools.cache
    def modules(fn):
        return {id(v) for v in fn.__globals__.values() if inspect.ismodule(v) and v in (tl, tl.core)}

    def patch_lang(fn):
        if patched and modules(fn) <= patched:
            return None  # a device function's: nobody asks for it
        launch, scope = not patched, stock(fn)
        patched.update(modules(fn))
        if launch:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = patch_lang


def _compute_no_overflow():
    """Whether an integer overflows is computed, in 64 bits, for an assertion that is only made when debugging."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


_patch_convert()
_patch_builder()
_refuse_bf16(interpreter.ReduceOps)
_refuse_bf16(interpreter.ScanOps)
_patch_index()
_patch_once()
_compute_no_overflow()
