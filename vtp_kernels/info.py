"""info(): what is installed, and which backend each op would use, and why."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch

from vtp_kernels import _native
from vtp_kernels.machine import cpu_name, versions
from vtp_kernels.ops._dispatch import BACKENDS, default_backends, why_not

_OPS = tuple(op for op in _native.OPS if not op.endswith("_"))  # in-place variants follow their op


@dataclass(frozen=True)
class Info:
    """What `info()` found. `str()` gives a page to read, `to_dict()` plain data for JSON.

    Attributes:
        versions: of vtp_kernels, Python and packages; None: not installed.
        devices: "cpu" and GPUs as "cuda:0", each with a description.
        native: None if the native library is loaded, else why not.
        build: what the native library says of itself: version, libtorch (the oldest torch that its
            binary loads with), compiler, cpu_isa, cuda_archs, and cuda, the compiler of the CUDA
            kernels (None: built without).
        images: {"cuda:0": "sm_90"}: what of the library each GPU's driver would run: machine code
            for that architecture, PTX that it compiles, or "none" and why.
        backends: {device: {op: {backend: None if it can serve, else why not}}}.
    """

    versions: dict[str, str | None]
    devices: dict[str, str]
    native: str | None
    build: dict[str, str | list[str] | None]
    images: dict[str, str]
    backends: dict[str, dict[str, dict[str, str | None]]]

    def to_dict(self) -> dict:
        return asdict(self)

    def chosen(self, op: str, device: str) -> str:
        """The backend `backend=None` takes, VTP_BACKEND aside."""
        reasons = self.backends[device][op]
        return next(b for b in default_backends(torch.device(device)) if reasons[b] is None)

    def _build(self) -> str:
        parts = {**self.build, "cuda_archs": " ".join(self.build["cuda_archs"])}
        return "loaded, " + ", ".join(f"{name} {value or 'none'}" for name, value in parts.items())

    def __str__(self) -> str:
        versions = (
            f"{name} {version or 'not installed'}" for name, version in self.versions.items()
        )
        lines = [" · ".join(versions)]
        lines += [f"{device}: {description}" for device, description in self.devices.items()]
        lines.append("native library: " + (self.native or self._build()))
        lines += [f"image for {device}: {image}" for device, image in self.images.items()]
        tables: dict[str, list[str]] = {}
        for device in self.backends:
            tables.setdefault(self._table(device), []).append(device)
        for table, devices in tables.items():
            lines += ["", f"on {', '.join(devices)}:", table]
        return "\n".join(lines)

    def _table(self, device: str) -> str:
        """Op by backend: the one that runs, those that can, and why others cannot."""
        ops = self.backends[device]
        lines = [_row("", BACKENDS)]
        for op, reasons in ops.items():
            chosen = self.chosen(op, device)
            words = ("no" if reasons[b] else "runs" if b == chosen else "can" for b in BACKENDS)
            lines.append(_row(op, words))
        return "\n".join([*lines, *(f"  {line}" for line in _reasons(ops))])


def _row(head: str, cells: Iterable[str]) -> str:
    return f"  {head:<20}" + "".join(f"{cell:<11}" for cell in cells).rstrip()


def _reasons(ops: dict[str, dict[str, str | None]]) -> list[str]:
    """One line per backend and reason; the ops are named where it is not all of them."""
    refused: dict[tuple[str, str], list[str]] = {}
    for op, reasons in ops.items():
        for backend, reason in reasons.items():
            if reason is not None:
                refused.setdefault((backend, reason), []).append(op)
    return [
        f"not {backend}: {reason}" + ("" if len(names) == len(ops) else f" ({', '.join(names)})")
        for (backend, reason), names in refused.items()
    ]


def info() -> Info:
    """Versions, devices, and which backend each op would use and why.

    On a machine with GPUs this initialises CUDA, and runs a Triton kernel on each, to know whether
    Triton works there.
    """
    devices = {"cpu": cpu_name()}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            devices[f"cuda:{i}"] = f"{gpu.name} (sm_{gpu.major}{gpu.minor})"
    return Info(
        versions=versions(),
        devices=devices,
        native=_native.missing,
        build=_native.build,
        images={
            device: str(_native.image(torch.device(device).index))
            for device in devices
            if device != "cpu"
        },
        backends={
            device: {
                op: {backend: why_not(op, backend, device) for backend in BACKENDS} for op in _OPS
            }
            for device in devices
        },
    )
