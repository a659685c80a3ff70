"""Builds: what VTP_BUILD says, names that tell, wheels that stand alone, errors of one line."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = "0.1.0"


def build(
    mode: str, *command: str, source: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        cwd=source,
        env={**os.environ, "VTP_BUILD": mode, **environment},
        capture_output=True,
        text=True,
    )


def wheel(mode: str, folder: Path, source: Path = ROOT) -> Path:
    # Away from the tree: neither build/ nor the egg-info of an editable install is touched. Debug
    # compiles fast.
    temporary = ("egg_info", "--egg-base", folder, "build", "--debug", "--build-base")
    wanted = (folder / "build", "bdist_wheel", "--dist-dir", folder / "dist")
    command = ("setup.py", "-q", *temporary, *wanted)
    run = build(mode, *map(str, command), source=source, SOURCE_DATE_EPOCH="1700000000")
    assert run.returncode == 0, run.stderr[-4000:]
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    command = ("setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder)
    run = build("cpu", *map(str, command))
    assert run.returncode == 0, run.stderr[-4000:]
    (path,) = folder.glob("*.tar.gz")
    assert path.name == f"vtp_kernels-{VERSION}.tar.gz"
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"vtp_kernels-{VERSION}"


def run_from(path: Path, folder: Path, code: str) -> str:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "site")
    command = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
    environment = {**os.environ, "PYTHONPATH": str(folder / "site")}
    run = subprocess.run(
        [*command, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout.strip()


# An editable install of this tree answers for the modules a wheel lacks: out of the way with it.
SELECT = """
import sys
sys.meta_path = [f for f in sys.meta_path if not f.__module__.startswith("__editable__")]
import torch, vtp_kernels
from vtp_kernels import _native
assert vtp_kernels.__file__.startswith({site!r}), vtp_kernels.__file__
chosen = vtp_kernels.select_topk(torch.tensor([[1.0, 3.0, 2.0]]), 2)
assert chosen.indices.tolist() == [[1, 2]]
print(_native.missing)
"""


def test_wheel_of_the_source_distribution_stands_alone(source, tmp_path):
    path = wheel("cpu", tmp_path, source)
    assert path.name.startswith(f"vtp_kernels-{VERSION}+cpu-cp310-abi3-linux_")
    names = zipfile.ZipFile(path).namelist()
    assert "vtp_kernels/_C.abi3.so" in names
    package = (ROOT / "vtp_kernels", ROOT / "benchmarks" / "pocket_llava")
    modules = [file for folder in package for file in folder.rglob("*.py")]
    assert {file.name for file in modules} <= {name.rsplit("/", 1)[-1] for name in names}
    assert [name for name in names if name.startswith("vtp_kernels/pocket_llava/trained/")]
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "csrc/"))]
    assert run_from(path, tmp_path, SELECT.format(site=str(tmp_path))) == "None"


def test_pure_python_wheel(tmp_path):
    path = wheel("none", tmp_path)
    assert path.name == f"vtp_kernels-{VERSION}-py3-none-any.whl"
    assert not [name for name in zipfile.ZipFile(path).namelist() if name.endswith(".so")]
    assert "not built" in run_from(path, tmp_path, SELECT.format(site=str(tmp_path)))


def error_of(run: subprocess.CompletedProcess) -> str:
    assert run.returncode != 0
    return run.stderr.strip().splitlines()[-1]


def test_unknown_mode():
    message = error_of(build("gpu", "setup.py", "--version"))
    assert message == "vtp_kernels: VTP_BUILD='gpu', expected one of auto, cuda, here, cpu, none"


def build_kernels(mode: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    folders = ("--build-lib", str(folder), "--build-temp", str(folder))
    return build(mode, "setup.py", "-q", "build_ext", *folders, **environment)


def toolkit(folder: Path, release: str) -> str:
    """A CUDA toolkit that knows two architectures and compiles nothing."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f"--version) echo 'Cuda compilation tools, release {release}, V{release}.1' ;;\n"
        "--list-gpu-code) echo sm_80; echo sm_90; echo sm_90a; echo sm_120 ;;\n"
        "*) exit 1 ;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    "mode, archs, version",
    [
        ("cpu", "9.0", VERSION + "+cpu"),
        ("none", "9.0", VERSION),
        ("cuda", "9.0", VERSION + "+cu130.sm90"),
        ("auto", "8.0;9.0a;12.0+PTX", VERSION + "+cu130.sm80.sm90a.sm120ptx"),
        ("cuda", "9.0+PTX,8.0 9.0", VERSION + "+cu130.sm90ptx.sm80"),
    ],
)
def test_a_version_says_what_is_inside(mode, archs, version, tmp_path):
    environment = {"CUDA_HOME": toolkit(tmp_path, "13.0"), "VTP_CUDA_ARCHS": archs}
    command = ("setup.py", "-q", "dist_info", "--output-dir", str(tmp_path))
    run = build(mode, *command, **environment)
    assert run.returncode == 0, run.stderr[-4000:]
    assert [path.name for path in tmp_path.glob("*.dist-info")] == [
        f"vtp_kernels-{version}.dist-info"
    ]


TORCH = """
__version__ = "2.11.0"
class cuda:
    is_available = staticmethod(lambda: {gpus} != [])
    device_count = staticmethod(lambda: len({gpus}))
    get_device_capability = staticmethod(lambda index: {gpus}[index])
"""


@pytest.mark.parametrize(
    "gpus, archs, inside",
    [
        ([], "", "cpu"),
        ([], "9.0", "cpu"),
        ([(9, 0), (8, 0), (9, 0)], "", "cu130.sm80.sm90"),
        ([(9, 0)], "8.0", "cu130.sm80"),
        ([(9, 0), (13, 7)], "", "cu130.sm80.sm90.sm120ptx"),  # one that nvcc does not know
    ],
)
def test_what_this_machine_can_run(gpus, archs, inside, tmp_path):
    fake = tmp_path / "torch.py"
    fake.write_text(TORCH.format(gpus=gpus))
    environment = {"CUDA_HOME": toolkit(tmp_path, "13.0"), "PYTHONPATH": str(tmp_path)}
    command = ("setup.py", "-q", "dist_info", "--output-dir", str(tmp_path))
    run = build("here", *command, **environment, VTP_CUDA_ARCHS=archs, TORCH_CUDA_ARCH_LIST="")
    assert run.returncode == 0, run.stderr[-4000:]
    (path,) = tmp_path.glob("*.dist-info")
    assert path.name == f"vtp_kernels-{VERSION}+{inside}.dist-info"


@pytest.mark.parametrize("jobs", ["0", "many", "-1"])
def test_jobs_that_are_no_number(jobs, tmp_path):
    message = error_of(build_kernels("cpu", tmp_path, MAX_JOBS=jobs))
    assert message.startswith(f"vtp_kernels: MAX_JOBS={jobs!r}, expected how many")


def test_cuda_without_a_toolkit(tmp_path):
    message = error_of(build_kernels("cuda", tmp_path, CUDA_HOME=str(tmp_path)))
    assert message == f"vtp_kernels: CUDA_HOME={tmp_path}, but there is no bin/nvcc in it"


def test_too_old_a_toolkit(tmp_path):
    message = error_of(build_kernels("cuda", tmp_path, CUDA_HOME=toolkit(tmp_path, "11.8")))
    assert "is 11.8, nvcc >= 12.1 is needed; VTP_BUILD=cpu builds without it" in message


@pytest.mark.parametrize("variable", ["VTP_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"])
def test_unknown_architecture(variable, tmp_path):
    home = toolkit(tmp_path, "13.0")
    environment = {"CUDA_HOME": home, "VTP_CUDA_ARCHS": "", variable: "9.0;5.2+PTX"}
    message = error_of(build_kernels("auto", tmp_path, **environment))
    expected = f"{variable} names '5.2+PTX'; {home}/bin/nvcc has 8.0 9.0 9.0a 12.0, each also with"
    assert expected in message


@pytest.mark.parametrize(
    "version, message",
    [(None, "is not installed here"), ("2.9.1", "torch 2.9.1 is too old, torch >= 2.10 is needed")],
)
def test_missing_or_old_torch(version, message, tmp_path):
    stand_in = tmp_path / "torch.py"
    stand_in.write_text("raise ImportError" if version is None else f"__version__ = {version!r}")
    assert message in error_of(build_kernels("cpu", tmp_path, PYTHONPATH=str(tmp_path)))
