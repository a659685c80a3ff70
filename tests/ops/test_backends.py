"""Which backend runs, device by device and op by op, and what is said of it."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch

import vtp_kernels as vtp
from vtp_kernels import _native, _triton
from vtp_kernels.info import Info
from vtp_kernels.ops._dispatch import BACKENDS, choose, why_not

OPS = [op for op in _native.OPS if not op.endswith("_")]
NO_IMAGE = "no kernel image is available"


@pytest.fixture
def gpus(monkeypatch):
    """Three GPUs that are not there: the library and Triton run on the first, on the second Triton
    alone, on the third neither. The library has no `inflection`."""
    kernels = frozenset((op, "cuda") for op in _native.OPS if op != "inflection")
    monkeypatch.setattr(_native, "missing", None)
    monkeypatch.setattr(_native, "kernels", kernels)
    monkeypatch.setattr(_native, "build", {"cuda_archs": ["8.0", "9.0"]})
    no_image = _native.Image(0, 0, NO_IMAGE)
    images = {0: _native.Image(90, 90, None), 1: no_image, 2: no_image}
    monkeypatch.setattr(_native, "_images", images)
    reasons = {"cuda:0": None, "cuda:1": None, "cuda:2": "it rains"}
    monkeypatch.setattr(_triton, "_reasons", reasons)
    monkeypatch.delenv("VTP_BACKEND", raising=False)


def on(device, dtype=torch.float16):
    """As much of a tensor as is needed to choose."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


@pytest.mark.parametrize(
    "op, device, dtype, chosen",
    [
        ("select_topk", "cuda:0", torch.float16, "native"),
        ("inflection", "cuda:0", torch.float16, "triton"),
        ("select_topk", "cuda:1", torch.bfloat16, "triton"),
        ("select_topk", "cuda:2", torch.float32, "reference"),
        ("select_topk", "cuda:0", torch.float64, "reference"),
        ("compact_kv_", "cuda:1", torch.int64, "triton"),
        ("inflection", "cpu", torch.float32, "reference"),
    ],
)
def test_the_first_that_can_serve_runs(gpus, op, device, dtype, chosen):
    assert choose(op, on(device, dtype), None) == chosen


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_environment_and_the_argument_choose(gpus, monkeypatch, backend):
    assert choose("select_topk", on("cuda:0"), backend) == backend
    monkeypatch.setenv("VTP_BACKEND", backend)
    assert choose("select_topk", on("cuda:0"), None) == backend
    assert choose("select_topk", on("cuda:0"), "reference") == "reference"


@pytest.mark.parametrize(
    "op, backend, device, dtype, reason",
    [
        ("select_topk", "native", "cuda:1", torch.float16, NO_IMAGE),
        ("select_topk", "native", "cuda:1", torch.float16, r"architectures \(8.0 9.0\).* cuda:1"),
        ("inflection", "native", "cuda:0", torch.float16, "no CUDA code for it"),
        ("select_topk", "native", "cuda:0", torch.float64, "float64"),
        ("select_topk", "triton", "cuda:0", torch.float64, "float64"),
        ("select_topk", "triton", "cuda:2", torch.float16, "it rains"),
    ],
)
def test_who_cannot_serve_says_why(gpus, monkeypatch, op, backend, device, dtype, reason):
    refusal = rf"{op}: backend '{backend}' cannot serve cuda tensors: .*{reason}"
    with pytest.raises(NotImplementedError, match=refusal):
        choose(op, on(device, dtype), backend)
    monkeypatch.setenv("VTP_BACKEND", backend)
    with pytest.raises(NotImplementedError, match=refusal):
        choose(op, on(device, dtype), None)


def test_without_a_native_library_the_cpu_has_the_reference(draw, monkeypatch):
    scores = draw.normal(2, 5)
    monkeypatch.setattr(_native, "kernels", frozenset())
    monkeypatch.setattr(_native, "missing", "it rains")
    monkeypatch.setattr(_triton, "_reasons", {"cpu": None})  # interpreted, which none asked for
    monkeypatch.delenv("VTP_BACKEND", raising=False)
    with pytest.raises(NotImplementedError, match="'native' cannot serve cpu tensors: it rains"):
        vtp.select_topk(scores, 2, backend="native")
    assert choose("select_topk", scores, None) == "reference"
    vtp.select_topk(scores, 2)


@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
def test_the_driver_is_asked_for_an_image(monkeypatch):
    monkeypatch.setattr(_native, "_images", {})
    index = torch.cuda.device_count()  # one that is not there
    reason = _native.why_no_image(index)
    assert reason and _native._images == {index: _native.Image(0, 0, reason)}


@pytest.mark.parametrize(
    "image, said",
    [
        ((90, 90, None), "sm_90"),
        ((130, 120, None), "PTX of sm_120, compiled by the driver for sm_130"),
        ((0, 0, NO_IMAGE), f"none: {NO_IMAGE}"),
    ],
)
def test_an_image_says_where_it_comes_from(image, said):
    assert str(_native.Image(*image)) == said


def test_without_a_library_there_is_no_image(monkeypatch):
    monkeypatch.setattr(_native, "missing", "it rains")
    assert str(_native.image(0)) == "none: it rains"


# --- Triton is asked to run a kernel ------------------------------------------------------------


@pytest.fixture
def nothing_known(monkeypatch):
    monkeypatch.setattr(_triton, "_reasons", {})


def test_a_cpu_runs_triton_only_if_interpreted(nothing_known, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in _triton.why_not("cpu")


@pytest.mark.parametrize("error", (None, RuntimeError("no C compiler")))
def test_triton_serves_where_its_probe_runs(nothing_known, monkeypatch, error):
    asked = []

    def probe(device):
        asked.append(device)
        if error:
            raise error

    kernels = SimpleNamespace(probe=probe)
    monkeypatch.setattr(importlib, "import_module", lambda name: kernels)
    reasons = {_triton.why_not("cuda:1") for _ in range(3)}
    said = "Triton cannot run on cuda:1: RuntimeError: no C compiler"
    assert reasons == {said if error else None}
    assert asked == [torch.device("cuda:1")]  # once


def test_a_missing_triton_is_a_reason(nothing_known, monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert _triton.why_not("cuda:0") == "Triton does not load: No module named 'triton'"


# --- info() -------------------------------------------------------------------------------------


def test_info_is_a_table_of_ops_and_backends_with_reasons():
    info = vtp.info()
    page, data = str(info), json.loads(json.dumps(info.to_dict()))
    assert data["versions"]["vtp_kernels"] == vtp.__version__
    assert data["versions"]["torch"] == torch.__version__
    assert set(data["backends"]["cpu"]) == set(OPS)
    rows = {line.split()[0]: line.split()[1:] for line in page.splitlines() if line.startswith(" ")}
    for op, reasons in data["backends"]["cpu"].items():
        assert tuple(reasons) == BACKENDS
        assert rows[op][BACKENDS.index(info.chosen(op, "cpu"))] == "runs"
        assert [word == "no" for word in rows[op]] == [bool(why) for why in reasons.values()]
        for reason in filter(None, reasons.values()):
            assert reason in page
    assert (_native.missing or "native library: loaded") in page
    if _native.missing is None:
        assert data["build"]["version"] == vtp.__version__  # else the library is of another tree
        assert f"libtorch {data['build']['libtorch']}, " in page
    assert set(data["images"]) == set(data["devices"]) - {"cpu"}


def test_info_tells_the_image_of_each_gpu(gpus, monkeypatch):
    properties = SimpleNamespace(name="Imaginary", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    info = vtp.info()
    assert info.images == {"cuda:0": "sm_90", "cuda:1": f"none: {NO_IMAGE}"}
    page = str(info)
    assert "cuda:0: Imaginary (sm_90)\n" in page
    assert f"image for cuda:0: sm_90\nimage for cuda:1: none: {NO_IMAGE}\n" in page


def test_info_shows_gpus_that_are_alike_together(gpus):
    backends = {
        f"cuda:{i}": {op: {b: why_not(op, b, f"cuda:{i}") for b in BACKENDS} for op in OPS}
        for i in (0, 1, 2)
    }
    backends["cuda:3"] = backends["cuda:0"]
    page = str(Info({"vtp_kernels": "1"}, {}, "not built", {}, {}, backends))
    alike, triton_alone, neither = page.split("\non ")[1:]
    assert alike.startswith("cuda:0, cuda:3:\n")
    assert "  select_topk         runs       can        can\n" in alike
    assert "  inflection          no         runs       can\n" in alike
    assert "not native: the native library has no CUDA code for it (inflection)" in alike
    assert "  select_topk         no         runs       can\n" in triton_alone
    assert "  select_topk         no         no         runs\n" in neither
    assert "not triton: it rains" in neither
