"""What holds for all ops: registration, torch.compile, autograd, choice of backend, info()."""

import inspect
import re
import subprocess
import sys

import pytest
import torch

import vtp_kernels as vtp
from backends import runs
from gpu.variants import VARIANTS, assert_same_bits
from schema import positional
from vtp_kernels import _native
from vtp_kernels._compiling import constant
from vtp_kernels.ops._dispatch import BACKENDS, why_not


def attention(draw):
    return {
        "query": draw.normal(2, 4, 3, 16),
        "key": draw.normal(2, 2, 20, 16),
        "candidates": draw.bools(2, 20, p=0.8),
        "valid": draw.bools(2, 20, p=0.9),
        "query_positions": draw.integers(0, 20, 2, 3),
        "query_valid": draw.bools(2, 3, p=0.9),
    }


def token_contribution(draw):
    return {
        "query": draw.normal(2, 4, 16),
        "key": draw.normal(2, 2, 20, 16),
        "value": draw.normal(2, 2, 20, 16),
        "candidates": draw.bools(2, 20, p=0.8),
        "valid": draw.bools(2, 20, p=0.9),
    }


def passive_attention(draw):
    return {
        "query": draw.normal(2, 4, 20, 16),
        "key": draw.normal(2, 2, 20, 16),
        "value": draw.normal(2, 2, 20, 16),
        "visual": draw.bools(2, 20),
        "valid": draw.bools(2, 20, p=0.9),
    }


def compact_kv(draw):
    indices, counts = draw.rows(2, 20, 7)
    layers = [draw.normal(2, 2, 20, 8) for _ in range(4)]
    return {"keys": layers[:2], "values": layers[2:], "indices": indices, "counts": counts}


def compact_rows(draw):
    indices, counts = draw.rows(2, 20, 7)
    tensors = [draw.normal(2, 20, 8), draw.integers(0, 9, 2, 20), draw.bools(2, 20)]
    return {"tensors": tensors, "indices": indices, "counts": counts}


def merging(draw):
    """Positions of rows, and the rows they are of."""
    targets = draw.uniform(2, 20).argsort(1)[:, :6]
    return {"assignment": draw.integers(-1, 6, 2, 20), "targets": targets}


def merge_rows(draw):
    features, weights = draw.normal(2, 20, 8), draw.uniform(2, 20)
    return {"features": features, **merging(draw), "weights": weights, "mode": "weighted"}


#: op -> how to make its arguments
INPUTS = {
    "attention_scores": attention,
    "attention_topk": lambda draw: {**attention(draw), "k": 5, "keep": draw.bools(2, 20, p=0.1)},
    "select_topk": lambda draw: {
        "scores": draw.normal(2, 20),
        "k": draw.integers(0, 9, 2),
        "candidates": draw.bools(2, 20),
        "keep": draw.bools(2, 20, p=0.1),
        "threshold": -0.5,
        "capacity": 9,
    },
    "select_diverse": lambda draw: {
        "features": draw.normal(2, 20, 8),
        "k": draw.integers(0, 9, 2),
        "rule": "dpp",
        "relevance": draw.uniform(2, 20),
        "candidates": draw.bools(2, 20),
        "capacity": 9,
    },
    "token_contribution": token_contribution,
    "passive_attention": passive_attention,
    "compact_kv": compact_kv,
    "compact_rows": compact_rows,
    "inflection": lambda draw: {"curve": draw.normal(2, 20), "max_keep": 9},
    "cls_inflection": lambda draw: {"features": draw.normal(2, 20, 8), "cls": draw.normal(2, 8)},
    "assign_rows": lambda draw: {
        "keys": draw.normal(2, 20, 8),
        "targets": merging(draw)["targets"],
        "candidates": draw.bools(2, 20, p=0.8),
    },
    "merge_rows": merge_rows,
}
OPS_AND_BACKENDS = [
    (op, backend) for op in INPUTS for backend in BACKENDS if why_not(op, backend, "cpu") is None
]


def flat(result):
    """The tensors of any op's result."""
    return [result] if isinstance(result, torch.Tensor) else [x for y in result for x in flat(y)]


def test_every_public_op_is_listed_here():
    assert set(INPUTS) | {"compact_kv_"} == set(_native.OPS)


@pytest.mark.parametrize("op, backend", OPS_AND_BACKENDS)
def test_compiles_without_graph_breaks(draw, op, backend):
    arguments = INPUTS[op](draw)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(arguments):
        return getattr(vtp, op)(**arguments, backend=backend)

    with torch.no_grad():
        want = flat(getattr(vtp, op)(**arguments, backend=backend))
        got = flat(compiled(arguments))
    assert len(got) == len(want)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("op", INPUTS)
def test_compiles_with_the_default_backend_and_dynamic_shapes(draw, op):
    torch._dynamo.reset()
    compiled = torch.compile(getattr(vtp, op), fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for _ in range(2):
            arguments = INPUTS[op](draw)
            got, want = flat(compiled(**arguments)), flat(getattr(vtp, op)(**arguments))
            assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in want]


@pytest.mark.parametrize("backend", [b for op, b in OPS_AND_BACKENDS if op == "compact_kv"])
def test_compiles_in_place(draw, backend):
    torch._dynamo.reset()
    compiled = torch.compile(vtp.compact_kv, fullgraph=True, backend="aot_eager")
    arguments = compact_kv(draw)
    want = [x.clone() for x in (*arguments["keys"], *arguments["values"])]
    options = {"in_place": True, "backend": backend}
    vtp.compact_kv(want[:2], want[2:], arguments["indices"], arguments["counts"], **options)
    compiled(**arguments, **options)
    for x, y in zip((*arguments["keys"], *arguments["values"]), want, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("op, backend", OPS_AND_BACKENDS)
def test_refuses_autograd(draw, op, backend):
    arguments = INPUTS[op](draw)
    first = next(iter(arguments))
    leaf = arguments[first][0] if isinstance(arguments[first], list) else arguments[first]
    leaf.requires_grad_()
    with pytest.raises(NotImplementedError, match=rf"{op} has no backward.*torch.no_grad\(\)"):
        getattr(vtp, op)(**arguments, backend=backend)
    with torch.no_grad():
        assert not any(x.requires_grad for x in flat(getattr(vtp, op)(**arguments)))
    with torch.inference_mode():
        getattr(vtp, op)(**arguments, backend=backend)


def native_arguments(op, draw):
    given = INPUTS[op.removesuffix("_")](draw)
    k = given.pop("k", None)
    return positional(op, given | ({"k_per_row": k, "k": 0} if torch.is_tensor(k) else {"k": k}))


@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
@pytest.mark.parametrize("op", _native.OPS)
def test_opcheck(draw, op):
    """Schema, fake kernel, mutation and aliasing, tracing with static and dynamic shapes."""
    arguments = native_arguments(op, draw)
    torch.library.opcheck(getattr(torch.ops.vtp_kernels, op).default, arguments)


#: op -> its masks
MASKS = {
    op: {"candidates", "keep", "query_valid", "valid", "visual"} & set(parameters)
    for op in INPUTS
    if (parameters := inspect.signature(getattr(vtp, op)).parameters)
}


@pytest.mark.parametrize(
    "op, device, backend, emulated",
    [
        pytest.param(op, *run.values, id=f"{run.id}-{op}", marks=run.marks)
        for op in MASKS
        if MASKS[op]
        for run in runs(op)
    ],
    indirect=["emulated"],
)
def test_every_byte_of_a_mask_but_0_is_true(draw, op, backend):
    """As in torch: `uint8.view(torch.bool)`, or a picture's mask of 0 and 255. Same bits as with
    0 and 1, on every path of the op."""
    tried = set()
    for variant in VARIANTS:
        if variant.op != op:
            continue
        arguments = variant.draw(draw, 70, batch=2)
        want = variant.run(arguments, backend)
        for name in MASKS[op] & set(arguments):
            mask = arguments[name]
            byte = draw.integers(2, 256, *mask.shape, dtype=torch.uint8)
            byte[..., ::3] = draw.integer(1, 3) * 254 % 253 + 1  # 2 or 255
            odd = (mask.to(torch.uint8) * byte).view(torch.bool)
            assert_same_bits(variant.run({**arguments, name: odd}, backend), want)
            tried.add(name)
    assert tried == MASKS[op]


MOST = 2147418112  # entries in a dimension
LONG = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**31, 1)  # one number, seen again and again
MASK = torch.ones(1, 4, dtype=torch.bool)
#: op, argument and what it has too many of -> every argument
TOO_LONG = {
    ("select_topk", "scores"): {"scores": LONG[0, :, :, 0], "k": 3},
    ("select_diverse", "features"): {"features": LONG[0], "k": 3},
    ("inflection", "curve"): {"curve": LONG[0, :, :, 0]},
    ("cls_inflection", "features"): {"features": LONG[0], "cls": LONG[0, 0, :1]},
    ("attention_scores", "query"): {
        "query": LONG,
        "key": torch.zeros(1, 1, 4, 1),
        "candidates": MASK,
    },
    ("attention_scores", "key"): {
        "query": torch.zeros(1, 1, 1, 1),
        "key": LONG,
        "candidates": MASK,
    },
    ("token_contribution", "key"): {
        "query": torch.zeros(1, 1, 1),
        "key": LONG,
        "value": LONG,
        "candidates": MASK,
    },
    ("passive_attention", "query"): {"query": LONG, "key": LONG, "value": LONG, "visual": MASK},
    ("compact_kv", "keys[0]"): {
        "keys": [LONG],
        "values": [LONG],
        "indices": torch.zeros(1, 1, dtype=torch.int64),
    },
    ("compact_rows", "tensors[0]"): {
        "tensors": [LONG[0]],
        "indices": torch.zeros(1, 1, dtype=torch.int64),
    },
    ("compact_rows", "tensors[0]", "elements in a row"): {
        "tensors": [torch.zeros(1, 1, 1, 1).expand(1, 1, 2**16, 2**15)],
        "indices": torch.zeros(1, 1, dtype=torch.int64),
    },
    ("assign_rows", "keys"): {"keys": LONG[0], "targets": torch.zeros(1, 1, dtype=torch.int64)},
    ("assign_rows", "targets"): {
        "keys": torch.zeros(1, 4, 1),
        "targets": torch.zeros(1, 1, dtype=torch.int64).expand(1, 2**31),
    },
    ("merge_rows", "features"): {
        "features": LONG[0],
        "assignment": torch.zeros(1, 1, dtype=torch.int64).expand(1, 2**31),
        "targets": torch.zeros(1, 1, dtype=torch.int64),
    },
    ("compact_rows", "indices"): {
        "tensors": [torch.zeros(1, 4)],
        "indices": torch.zeros(1, 1, dtype=torch.int64).expand(1, 2**31),
    },
}


@pytest.mark.parametrize("case", TOO_LONG)
def test_rows_too_many_to_count_are_refused(case):
    op, name, what = (*case, "entries in every dimension")[:3]
    message = rf"^{re.escape(name)} must have at most {MOST} {what}, got \[1, "
    with pytest.raises(ValueError, match=message):
        getattr(vtp, op)(**TOO_LONG[case])


@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
@pytest.mark.parametrize("case", TOO_LONG)
def test_native_code_refuses_them_itself(case):
    op, name, what = (*case, "entries in every dimension")[:3]
    given = positional(op, TOO_LONG[case] | {"k_per_row": None})
    message = rf"vtp_kernels: {name.removesuffix('[0]')} must have at most {MOST} {what}"
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.vtp_kernels, op)(*given)


@pytest.mark.parametrize("op", INPUTS)
def test_environment_chooses_the_backend(draw, monkeypatch, op):
    arguments = INPUTS[op](draw)
    call = getattr(vtp, op)
    want = flat(call(**arguments, backend="reference"))
    monkeypatch.setenv("VTP_BACKEND", "reference")
    for x, y in zip(flat(call(**arguments)), want, strict=True):
        assert torch.equal(x, y)
    monkeypatch.setenv("VTP_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'abacus'"):
        call(**arguments)
    call(**arguments, backend="reference")  # an explicit choice wins
    monkeypatch.setenv("VTP_BACKEND", "")
    call(**arguments)


def test_debug_switches_reading_checks(monkeypatch):
    from vtp_kernels.ops import _checks

    monkeypatch.setattr(_checks, "_debug", False)
    on_gpu = torch.empty(1, device="meta")  # any device that is not the CPU
    assert not _checks.may_read(on_gpu) and _checks.may_read(torch.empty(1))
    vtp.debug(True)
    assert _checks.may_read(on_gpu)
    vtp.debug(False)
    assert not _checks.may_read(on_gpu)


WITHOUT = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "vtp_kernels._C" and len(sys.argv) > 1:
            raise ImportError(sys.argv[1])
        if name.split(".")[0] in ("transformers", "triton") or name == "vtp_kernels._C":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import torch
import vtp_kernels as vtp

x = torch.randn(2, 2, 9, 8)
mask = torch.ones(2, 9, dtype=torch.bool)
rows = torch.tensor([[0, 3], [1, 8]])
with torch.no_grad():
    vtp.attention_scores(x, x, candidates=mask)
    vtp.select_topk(x[:, 0, 0], 3)
    vtp.select_diverse(x[:, 0], 3)
    vtp.attention_topk(x, x, 3, candidates=mask)
    vtp.token_contribution(x[:, :, 0], x, x, candidates=mask)
    vtp.compact_kv([x], [x], rows)
    vtp.compact_rows([mask], rows)
    vtp.inflection(x[:, 0, 0])
    vtp.cls_inflection(x[:, 0], x[:, 0, 0])
    vtp.passive_attention(x, x, x, visual=mask)
    vtp.merge_rows(x[:, 0], vtp.assign_rows(x[:, 0], rows), rows)
import vtp_kernels.flops, vtp_kernels.info, vtp_kernels.ops.inflection
assert all(map(callable, (vtp.flops, vtp.info, vtp.inflection)))  # not hidden by their modules
from vtp_kernels.cli import main
main(["flops", "--model", "llava-1.5-7b", "--method", "fastv", "visipruner", "lvpruning"])
assert not any(name.split(".")[0] in ("transformers", "triton") for name in sys.modules)
assert "torch._dynamo" not in sys.modules  # which takes longer to load than torch
print(vtp.info())
try:
    vtp.select_topk(x[:, 0, 0], 3, backend="native")
except NotImplementedError as error:
    print(error)
"""


def test_what_is_constant_is_so_to_dynamo():
    """Told without loading it."""
    ours, its = (mark(lambda: 0) for mark in (constant, torch.compiler.assume_constant_result))
    assert vars(ours) == vars(its) != {}


@pytest.mark.parametrize(
    "fails_with, reason",
    [
        ([], "the native library is not built (no module vtp_kernels._C)"),
        (
            ["undefined symbol: aoti_torch_new"],
            f"the native library does not load with torch {torch.__version__}: "
            "undefined symbol: aoti_torch_new",
        ),
    ],
)
def test_works_without_transformers_triton_and_the_native_library(fails_with, reason):
    command = [sys.executable, "-c", WITHOUT, *fails_with]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"native library: {reason}" in done.stdout
    assert "not triton: Triton compiles for GPUs" in done.stdout
    assert f"select_topk: backend 'native' cannot serve cpu tensors: {reason}" in done.stdout


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'prune_everything'"):
        vtp.prune_everything  # noqa: B018
    assert {"select_topk", "prune", "Schedule", "info"} <= set(dir(vtp))
