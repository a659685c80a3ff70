"""info(): what is installed, and which backend each op would use, and why."""

from dataclasses import asdict, dataclass

import torch

from vtp_kernels import _native
from vtp_kernels.machine import cpu_name, versions
from vtp_kernels.ops._dispatch import BACKENDS, why_not

_OPS = tuple(op for op in _native.OPS if not op.endswith("_"))  # in-place variants follow their op


@dataclass(frozen=True)
class Info:
    """What `info()` found. `str()` gives a page to read, `to_dict()` plain data for JSON.

    Attributes:
        versions: of vtp_kernels, Python and packages; None: not installed.
        devices: device types in use here, "cpu" first, each with a description.
        native: None if the native library is loaded, else why not.
        build: what the native library says of itself: version, compiler, cpu_isa, cuda_archs, and
            cuda, the compiler of the CUDA kernels (None: built without).
        backends: {device type: {op: {backend: None if it can serve, else why not}}}.
    """

    versions: dict[str, str | None]
    devices: dict[str, str]
    native: str | None
    build: dict[str, str | list[str] | None]
    backends: dict[str, dict[str, dict[str, str | None]]]

    def to_dict(self) -> dict:
        return asdict(self)

    def chosen(self, op: str, device_type: str) -> str:
        """The backend `backend=None` takes, VTP_BACKEND aside."""
        reasons = self.backends[device_type][op]
        return next(backend for backend in BACKENDS if reasons[backend] is None)

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
        for device, ops in self.backends.items():
            lines += ["", f"on {device}:"]
            lines += [f"  {op:<20}{self.chosen(op, device)}" for op in ops]
            lines += [f"  {line}" for line in _reasons(ops)]
        return "\n".join(lines)


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

    Starts no kernel; on a machine with a GPU it does initialise CUDA.
    """
    devices = {"cpu": cpu_name()}
    if torch.cuda.is_available():
        names = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
        devices["cuda"] = ", ".join(f"{gpu.name} (sm_{gpu.major}{gpu.minor})" for gpu in names)
    return Info(
        versions=versions(),
        devices=devices,
        native=_native.missing,
        build=_native.build,
        backends={
            device: {
                op: {backend: why_not(op, backend, device) for backend in BACKENDS} for op in _OPS
            }
            for device in devices
        },
    )
