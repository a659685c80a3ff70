"""Whose results a file holds: it is gone on with where all of this is the same, and not else."""

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("benchmarks", "csrc", "tests", "vtp_kernels")
BUILT = ROOT / "build" / "gpu-check-library"
KINDS = (".py", ".cu", ".cuh", ".cpp", ".h")


def identity() -> dict[str, str | None]:
    """Digests of the sources and of the native library, and torch's version.

    Of the sources and not of the commit: a copy of them need not have one, and may have changes.
    """
    return {"sources": sources(), "library": library(), "torch": _torch()}


def found_before(path: Path, header: dict) -> dict | None:
    """What a result file holds, if its identity, device and machine are those of `header`."""
    if not path.exists():
        return None
    before = json.loads(path.read_text())
    if any(before.get(name) != header[name] for name in ("identity", "device", "machine")):
        print(f"benchmarks: {path} is of other sources or another machine: starting anew")
        return None
    return before


def sources() -> str:
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in KINDS and path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def library() -> str | None:
    """A digest of the native library; None where there is none. One that gpu-check has built is
    known by the sources: two builds of them need not have the same bytes."""
    digest = _library_digest()
    if digest is not None and BUILT.exists() and BUILT.read_text() == digest:
        return "built from these sources"
    return digest


def note_built() -> None:
    """That the library which is there was built from the sources which are there."""
    BUILT.parent.mkdir(exist_ok=True)
    BUILT.write_text(_library_digest() or "")


def _library_digest() -> str | None:
    files = sorted((ROOT / "vtp_kernels").glob("_C*.so"))
    return hashlib.sha256(files[0].read_bytes()).hexdigest()[:16] if files else None


def _torch() -> str:
    try:
        return f"{version('torch')} on Python {platform.python_version()}"
    except PackageNotFoundError:
        return "none"
