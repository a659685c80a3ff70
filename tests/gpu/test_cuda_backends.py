"""What serves CUDA tensors, and what happens where nothing can."""

import json
import os
import subprocess
import sys

import pytest
import torch
from variants import OPS, VARIANTS, assert_same_bits, each, flat

import vtp_kernels as vtp
from schema import positional
from vtp_kernels import _native, reference

REHEARSED = ("test_native_serves", "test_float64_rows", "test_ranges", "test_opcheck")
FLOAT_OPS = [op for op in OPS if not op.startswith("compact")]


def one_of(op):
    return next(variant for variant in VARIANTS if variant.op == op)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh process: a broken context or a setting of the driver stays there."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_this_device_has_an_image_of_every_kernel():
    info = vtp.info()
    assert info.build["cuda_archs"]
    assert {op: info.chosen(op, "cuda:0") for op in OPS} == dict.fromkeys(OPS, "native")
    assert torch.cuda.get_device_name() in str(info)


@pytest.mark.parametrize("op", OPS)
def test_native_serves_without_being_asked(draw, op):
    arguments = one_of(op).draw(draw, 100)
    assert_same_bits(one_of(op).run(arguments, backend=None), one_of(op).run(arguments))


@pytest.mark.parametrize("op", FLOAT_OPS)
def test_float64_goes_to_the_reference(draw, op):
    """No kernel computes in float64; who asks for one is told, who does not gets the reference."""
    arguments = each(
        lambda x: x.double() if x.is_floating_point() else x, one_of(op).draw(draw, 100)
    )
    with pytest.raises(NotImplementedError, match=f"{op}: backend 'native' cannot serve"):
        getattr(vtp, op)(**arguments, backend="native")
    got = flat(getattr(vtp, op)(**arguments))
    want = flat(getattr(reference, op)(**arguments))
    assert len(got) == len(want)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("op", ("compact_kv", "compact_rows"))
def test_float64_rows_are_moved_like_any_other(draw, op):
    arguments = each(
        lambda x: x.double() if x.is_floating_point() else x, one_of(op).draw(draw, 100)
    )
    one_of(op).check(arguments, one_of(op).run(arguments))


# --- errors -------------------------------------------------------------------------------------


BROKEN_DEVICE = """
import torch
import vtp_kernels as vtp

scores = torch.rand(2, 100, device="cuda")
vtp.select_topk(scores, 5, backend="native")
torch.cuda.synchronize()
scores[:, torch.tensor([10**6], device="cuda")]  # trips an assertion on the device
try:
    torch.cuda.synchronize()
except RuntimeError:
    print("broken")
try:
    vtp.select_topk(scores, 5, backend="native")
except RuntimeError as error:
    print("raised", type(error).__name__, error)
"""


def test_a_launch_that_fails_raises():
    """After a device-side assertion no launch succeeds any more; the op says so."""
    done = python(BROKEN_DEVICE)
    assert "broken" in done.stdout, done.stderr
    assert "raised" in done.stdout, done.stderr


def test_ranges_are_checked_on_request(draw):
    """Indices of CUDA tensors are read in debug mode alone."""
    arguments = one_of("compact_kv").draw(draw, 50)
    arguments["indices"][0, 0], arguments["counts"][0] = 50, 1
    vtp.debug(True)
    try:
        with pytest.raises(ValueError, match=r"indices must be within \[0, 50\), got 50"):
            vtp.compact_kv(**arguments, backend="native")
    finally:
        vtp.debug(False)


@pytest.mark.parametrize("name", ("candidates", "keep", "k"))
def test_arguments_on_another_device_are_refused(draw, name):
    arguments = next(v for v in VARIANTS if str(v) == "select_topk-k-per-row").draw(draw, 50)
    arguments[name] = arguments[name].cpu()
    with pytest.raises(ValueError, match=f"{name} must be on cuda:0, got cpu"):
        vtp.select_topk(**arguments)


# --- images -------------------------------------------------------------------------------------


PTX_ALONE = """
import json
import torch
import vtp_kernels as vtp

scores = torch.rand(3, 577)
there = scores.to("cuda")  # copies alone: torch's own kernels may have no PTX for this device
try:
    got = [x.cpu().tolist() for x in vtp.select_topk(there, 64, backend="native")]
except NotImplementedError as error:
    got = None
    print(error)
want = [x.tolist() for x in vtp.select_topk(scores, 64)]
print(json.dumps({"chosen": vtp.info().chosen("select_topk", "cuda:0"), "equal": got == want}))
"""


def ptx_architecture() -> tuple[int, int] | None:
    """The architecture whose PTX the library carries, e.g. (12, 0), or None."""
    with_ptx = [arch for arch in _native.build["cuda_archs"] if arch.endswith("+PTX")]
    if not with_ptx:
        return None
    major, minor = with_ptx[-1].removesuffix("+PTX").split(".")
    return int(major), int(minor.rstrip("af"))


def with_ptx_alone() -> tuple[dict, str]:
    """What the library does when the driver ignores machine code and compiles PTX, and says."""
    done = python(PTX_ALONE, CUDA_FORCE_PTX_JIT="1")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_ptx_of_the_last_architecture_is_compiled_by_the_driver():
    ptx, device = ptx_architecture(), torch.cuda.get_device_capability()
    if ptx is None or ptx > device:
        pytest.skip(f"the library's PTX is for {ptx}, this device is {device}")
    result, _ = with_ptx_alone()
    assert result == {"chosen": "native", "equal": True}


def test_a_device_without_an_image_is_refused():
    """PTX for newer devices only is as good as no image: the library must find that out by asking
    the driver, not by comparing numbers."""
    ptx, device = ptx_architecture(), torch.cuda.get_device_capability()
    if ptx is not None and ptx <= device:
        pytest.skip(f"the library's PTX, for {ptx}, does for this device, {device}")
    result, said = with_ptx_alone()
    assert result["chosen"] != "native" and not result["equal"]
    assert "select_topk: backend 'native' cannot serve cuda tensors" in said


# --- torch's own checks -------------------------------------------------------------------------


def schema_arguments(op: str, draw) -> tuple:
    return positional(op, one_of(op.removesuffix("_")).draw(draw, 40))


@pytest.mark.parametrize("op", _native.OPS)
def test_opcheck(draw, op):
    """Schema, fake kernel, mutation and aliasing, tracing with static and dynamic shapes."""
    torch.library.opcheck(getattr(torch.ops.vtp_kernels, op).default, schema_arguments(op, draw))


def test_a_compiled_step_is_one_graph(draw):
    """What a model does between two layers, through inductor and its CUDA graphs."""
    pytest.importorskip("triton")
    from torch._dynamo.utils import counters

    def step(query, key, value, hidden, candidates):
        selection, scores = vtp.attention_topk(2 * query, key, 64, candidates=candidates)
        keys, values = vtp.compact_kv([key], [value], selection.indices, selection.counts)
        (rows,) = vtp.compact_rows([hidden], selection.indices, selection.counts)
        return keys[0], values[0], rows + 1, selection.indices, scores

    def inputs():
        kv = [draw.normal(2, 4, 320, 64, dtype=torch.bfloat16) for _ in range(2)]
        query = draw.normal(2, 8, 1, 64, dtype=torch.bfloat16)
        return query, *kv, draw.normal(2, 320, 96), draw.bools(2, 320, p=0.8)

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(5):  # warms up, records, replays
            arguments = inputs()
            torch.compiler.cudagraph_mark_step_begin()
            got = [x.clone() for x in compiled(*arguments)]
            assert_same_bits(got, list(step(*arguments)))
    assert counters["inductor"]["cudagraph_skips"] == 0
    torch._dynamo.reset()
