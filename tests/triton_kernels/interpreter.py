"""Makes Triton's interpreter right for bfloat16, and faster.

It keeps bfloat16 as uint16, truncates where a GPU rounds to nearest even, and multiplies the bits
in `tl.dot`. And it replaces the functions of `triton.language` anew in every call of a function,
and computes checks for overflow that it then does not report.
"""

import dataclasses
import inspect

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16).reshape(np.shape(x))


def to_float32(x: np.ndarray) -> np.ndarray:
    bits = np.asarray(x, dtype=np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32)


def is_patched(language) -> bool:
    return not tl.core.is_builtin(language.load)


def install() -> None:
    convert_float = interpreter._convert_float
    create_dot = interpreter.InterpreterBuilder.create_dot

    def convert(x, of, to, rounding):
        if (of, to) == (tl.float32, tl.bfloat16):
            return to_bfloat16(x)
        if (of, to) == (tl.bfloat16, tl.float32):
            return to_float32(x)
        return convert_float(x, of, to, rounding)

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(to_float32(handle.data), tl.float32)

    def dot(builder, a, b, *rest):
        return create_dot(builder, widened(a), widened(b), *rest)

    patch = interpreter._patch_lang

    def patch_once(function):
        modules = filter(inspect.ismodule, function.__globals__.values())
        if all(is_patched(module) for module in modules if module in (tl, tl.core)):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._patch_lang = patch_once
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
