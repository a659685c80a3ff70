"""Names the machine and the versions in every result file."""

import os
import platform
import subprocess
from pathlib import Path

import torch

import vtp_kernels


def describe() -> dict:
    """{"machine": ..., "versions": ..., "commit": ...}, ready for JSON."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else None,
    }
    versions = {
        "vtp_kernels": vtp_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }
    try:
        from transformers import __version__ as transformers_version

        versions["transformers"] = transformers_version
    except ImportError:
        versions["transformers"] = None
    commit = _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
    return {"machine": machine, "versions": versions, "commit": commit}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _output(*command: str) -> str | None:
    """What a command prints; None where it does not exist or fails (no git checkout, say)."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
