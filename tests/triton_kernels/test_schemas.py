"""The Triton launchers take what the native ops take."""

import importlib
import re

import pytest
import torch

from vtp_kernels import _native, _triton
from vtp_kernels.ops._fakes import fakes

importlib.import_module("vtp_kernels.triton")


def signature(namespace: str, op: str) -> str:
    """An op's schema without what may differ: SymInt, and names of results."""
    schema = str(getattr(getattr(torch.ops, namespace), op).default._schema)
    arguments, results = schema.removeprefix(f"{namespace}::").split(" -> ")
    results = re.sub(r"Tensor \w+", "Tensor", results)
    return re.sub(r"\((a\d?|b)!\)", "(!)", arguments).replace("SymInt", "int") + " -> " + results


def test_every_op_has_a_shape_function():
    assert set(fakes) == set(_native.OPS)


@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
@pytest.mark.parametrize("op", [op for op in _native.OPS if op not in _triton.WITHOUT])
def test_schemas_are_those_of_the_native_ops(op):
    assert signature("vtp_kernels_triton", op) == signature("vtp_kernels", op)
