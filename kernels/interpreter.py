"""Triton's interpreter made exact for the length of a launch.

Depending on its version, the interpreter rounds an fma twice, truncates float32 to bfloat16, and misreads subnormal bfloat16
and float16: here the three come from ``fastdiff.reference``. A scalar condition becomes a number where it is broadcast: here
it stays a condition. A reduction or a scan by a function of one's own goes element by element, which takes minutes: here whole tensors
are combined. A loaded number that bounds a loop is an array of one, which NumPy 2.5 does not take for a number: here it is squeezed.
Only launches of this package are affected: the interpreter is put back after each.
"""

import dataclasses
from contextlib import contextmanager

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

from .. import reference

__all__ = ["exact"]

_NAMES = {tl.float32: "float32", tl.float16: "float16", tl.bfloat16: "bfloat16"}


def _fma(self, x, y, z):
    assert z.dtype.scalar == tl.float32, z.dtype
    return TensorHandle(np.asarray(reference.fma(x.data, y.data, z.data)), z.dtype.scalar)


def _convert(src, dst_type):
    """Between float32 and the 16-bit types, or None where that is not asked for."""
    source, target = _NAMES.get(src.dtype.scalar), _NAMES.get(dst_type.scalar)
    if source is None or target is None or "float32" not in (source, target):
        return None
    shape = src.data.shape
    data = reference.widen(src.data, source) if target == "float32" else reference.narrow(src.data, target)
    return TensorHandle(np.asarray(data).reshape(shape), dst_type.scalar)


def _patched_cast(original):
    def cast_impl(self, src, dst_type):
        converted = _convert(src, dst_type)
        return original(self, src, dst_type) if converted is None else converted

    return cast_impl


def _patched_fp_to_fp(original):
    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        converted = _convert(src, dst_type)
        return original(self, src, dst_type, rounding_mode) if converted is None else converted

    return create_fp_to_fp


def _patched_splat(original):
    def create_splat(self, ret_ty, arg):
        # The result of a comparison still carries the type of what was compared.
        if arg.data.dtype == np.bool_:
            return TensorHandle(np.full(ret_ty.shape, arg.data), tl.int1)
        return original(self, ret_ty, arg)

    return create_splat


def _generic_reduce(self, input):
    (tensor,), axis = input, self.axis
    assert axis is not None and not self.keep_dims, (axis, self.keep_dims)
    parts = [self.to_tensor(np.take(tensor.handle.data, i, axis), tensor.dtype) for i in range(tensor.handle.data.shape[axis])]
    total = parts[0]
    for part in parts[1:]:
        total = self.combine_fn.fn(total, part)
    return [total]


def _generic_scan(self, input):
    """Each element takes what stands 1, 2, 4, ... before it: the function is associative."""
    (tensor,) = input
    data, apart = tensor.handle.data, 1
    assert data.ndim == 1, data.shape
    while apart < len(data):
        both = self.combine_fn.fn(self.to_tensor(np.roll(data, apart), tensor.dtype), self.to_tensor(data, tensor.dtype))
        data, apart = np.where(np.arange(len(data)) < apart, data, both.handle.data), 2 * apart
    return [self.to_tensor(data, tensor.dtype)]


def _patched_tensor(original):
    def patch_lang_tensor(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    return patch_lang_tensor


def _call(self, *args, **kwargs):
    """A device function called from a kernel. The language is patched already: doing it again takes milliseconds."""
    return self.rewrite()(*args, **kwargs)


@contextmanager
def exact():
    """While this is open, the interpreter computes what the hardware computes."""
    saved = {name: getattr(InterpreterBuilder, name) for name in ("create_fma", "cast_impl", "create_fp_to_fp", "create_splat")}
    call, reduce, builder = InterpretedFunction.__call__, ReduceOps.generic_reduce, interpreter.interpreter_builder
    scan = ScanOps.generic_scan
    tensor = interpreter._patch_lang_tensor
    options = builder.options
    builder.options = dataclasses.replace(options, sanitize_overflow=False)  # checks that take half the time
    InterpreterBuilder.create_fma = _fma
    InterpreterBuilder.cast_impl = _patched_cast(saved["cast_impl"])
    InterpreterBuilder.create_fp_to_fp = _patched_fp_to_fp(saved["create_fp_to_fp"])
    InterpreterBuilder.create_splat = _patched_splat(saved["create_splat"])
    InterpretedFunction.__call__ = _call
    ReduceOps.generic_reduce, ScanOps.generic_scan = _generic_reduce, _generic_scan
    interpreter._patch_lang_tensor = _patched_tensor(tensor)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        InterpretedFunction.__call__, ReduceOps.generic_reduce, builder.options = call, reduce, options
        ScanOps.generic_scan, interpreter._patch_lang_tensor = scan, tensor
        for name, member in saved.items():
            setattr(InterpreterBuilder, name, member)
