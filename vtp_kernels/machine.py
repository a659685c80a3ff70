"""What machine this is and which versions are installed: for info() and for every result file."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

_PACKAGES = ("triton", "transformers", "numpy")


def describe() -> dict:
    """{"machine": ..., "versions": ..., "commit": ...}, ready for JSON."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    machine = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "driver": _output(*driver) if gpu else None,
    }
    return {"machine": machine, "versions": versions(), "commit": _commit()}


def versions() -> dict[str, str | None]:
    """vtp_kernels, Python, torch with its CUDA, and other packages; None: not installed."""
    from vtp_kernels import __version__

    found = {
        "vtp_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def multiplies_bfloat16(device: torch.device | str) -> bool:
    """Whether products of bfloat16 are no slower there than those of float32.

    A CPU without instructions for them has to convert. One with AVX2 alone takes 5 to 30 times as
    long as for float32, one with AVX-512 3 times, although torch calls bfloat16 supported there.
    """
    if torch.device(device).type != "cpu":
        return True
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return not is_x86 or torch.cpu._is_avx512_bf16_supported()


def _commit() -> str | None:
    """The commit of the source tree this package runs from; None for an installed one."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    return _output("git", "-C", str(root), "rev-parse", "HEAD")


def _output(*command: str) -> str | None:
    """What a command prints; None where there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
