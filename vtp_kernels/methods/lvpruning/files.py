"""Trained deciders on disk: a folder with weights as safetensors and what they fit as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtp_kernels._shown import shown
from vtp_kernels.contract.checks import check_depth
from vtp_kernels.contract.storage import read_json

from ..budget import check_layer
from .deciders import Deciders, Shape

__all__ = ["Fit", "check_weights", "load_deciders", "read_fit", "save_deciders"]

WEIGHTS = "deciders.safetensors"
DESCRIPTION = "deciders.json"
FORMAT = 1
FIELDS = {
    "family": str,
    "text_model": str,
    "depth": int,
    "hidden_size": int,
    "width": int,
    "layers": list,
}
KINDS = {str: "a string", int: "an int", list: "a list of layers"}
DTYPES = ("F64", "F32", "BF16", "F16")  # as safetensors writes them


@dataclass(frozen=True)
class Fit:
    """The model that deciders were trained for, and their own shape.

    `family` is one of `supported_models()`, `text_model` the model type of its language model,
    `depth` the number of its decoder layers.
    """

    family: str
    text_model: str
    depth: int
    shape: Shape

    @classmethod
    def of(cls, family: str, config: Any, layers: tuple[int, ...], width: int | None) -> Fit:
        """For a language model of that configuration; `width` None: as wide as its rows."""
        shape = Shape(config.hidden_size, width or config.hidden_size, tuple(layers))
        return cls(family, config.model_type, config.num_hidden_layers, shape)

    def check(self, family: str, config: Any, where: str) -> None:
        """Raise ValueError, naming every difference, if that is not the model this is for."""
        theirs = {
            "family": family,
            "text model": config.model_type,
            "decoder layers": config.num_hidden_layers,
            "hidden size": config.hidden_size,
        }
        ours = (self.family, self.text_model, self.depth, self.shape.hidden_size)
        differ = [
            f"{name} {our!r}, the model's is {their!r}"
            for our, (name, their) in zip(ours, theirs.items(), strict=True)
            if our != their
        ]
        if differ:
            raise ValueError(f"{where}: these deciders are for another model: {'; '.join(differ)}")


def save_deciders(
    folder: str | Path,
    deciders: Deciders,
    fit: Fit,
    training: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Write deciders; `training` is noted beside them, `dtype` is that of the stored weights."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        for name, tensor in deciders.state_dict().items()
    }
    save_file(weights, folder / WEIGHTS)
    description = {
        "format": FORMAT,
        "family": fit.family,
        "text_model": fit.text_model,
        "depth": fit.depth,
        "hidden_size": fit.shape.hidden_size,
        "width": fit.shape.width,
        "layers": list(fit.shape.layers),
        "training": training,
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def read_fit(folder: str | Path) -> Fit:
    """What the deciders in a folder are for. Raises ValueError if it holds none, or their
    description is none."""
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise ValueError(
            f"modules_path: {folder} holds no trained deciders, there is no {path.name} in it; "
            "train them with: python -m vtp_kernels lvpruning train"
        )
    try:
        return _fit_of(read_json(path))
    except (TypeError, ValueError) as error:
        raise ValueError(f"modules_path: {path}: {error}") from error


def _fit_of(found: Any) -> Fit:
    """A Fit from what DESCRIPTION holds. Raises TypeError or ValueError if it does not say one."""
    if not isinstance(found, dict):
        raise TypeError(f"expected an object, got {shown(found)}")
    if found.get("format") != FORMAT:
        raise ValueError(
            f"this has format {shown(found.get('format'))}, this version of vtp_kernels reads "
            f"{FORMAT}"
        )
    if missing := [name for name in FIELDS if name not in found]:
        raise ValueError(f"this does not say {', '.join(map(repr, missing))}")
    for name, kind in FIELDS.items():
        if type(found[name]) is not kind:
            raise TypeError(f"{name}: expected {KINDS[kind]}, got {shown(found[name])}")
    for name in ("depth", "hidden_size"):
        if found[name] < 1:
            raise ValueError(f"{name}: expected at least 1, got {found[name]}")
    layers = tuple(check_layer(layer, "layers") for layer in found["layers"])
    if not layers or layers != tuple(sorted(set(layers))):
        raise ValueError(f"layers: expected ascending layers, got {shown(layers)}")
    check_depth(layers[-1], found["depth"], "layers")
    shape = Shape(found["hidden_size"], found["width"], layers)
    return Fit(found["family"], found["text_model"], found["depth"], shape)


def check_weights(folder: str | Path, shape: Shape) -> None:
    """Raise ValueError unless the weights in a folder are those of deciders of that shape. Reads
    what the file says of them, and that it is as long as they are."""
    with _weights(folder, shape):
        pass


def load_deciders(folder: str | Path) -> Deciders:
    """The deciders in a folder, on the CPU, as they were stored.

    Raises ValueError naming the tensors that are missing, unknown, or of another shape or dtype.
    """
    shape = read_fit(folder).shape
    with _weights(folder, shape) as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    deciders = _empty(shape)
    deciders.load_state_dict(stored, assign=True)
    return deciders.requires_grad_(False).eval()


@contextmanager
def _weights(folder: str | Path, shape: Shape) -> Iterator[Any]:
    """The open file of weights, once it is known to hold those of deciders of that shape."""
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise ValueError(f"modules_path: there is no {path.name} in {folder}")
    try:
        with safe_open(path, "pt") as file:
            _compare(path, file, _empty(shape).state_dict())
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"modules_path: {path} is cut short or no safetensors file: {error}"
        ) from error


def _compare(path: Path, file: Any, expected: dict[str, Tensor]) -> None:
    """Raise ValueError naming what a file of weights lacks, or has too much, or otherwise."""
    stored = {name: file.get_slice(name) for name in file.keys()}
    wrong = [f"{name} is missing" for name in sorted(expected.keys() - stored.keys())]
    wrong += [f"{name} is unknown" for name in sorted(stored.keys() - expected.keys())]
    for name in sorted(stored.keys() & expected.keys()):
        shape, dtype = stored[name].get_shape(), stored[name].get_dtype()
        if shape != list(expected[name].shape):
            wrong.append(f"{name} is {shape}, expected {list(expected[name].shape)}")
        elif dtype not in DTYPES:
            wrong.append(f"{name} is {dtype}, expected one of {', '.join(DTYPES)}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"modules_path: {path} does not hold what {DESCRIPTION} beside it describes: "
            f"{'; '.join(wrong[:5])}{more}"
        )


def _empty(shape: Shape) -> Deciders:
    """Deciders without memory: those of a large model take long to fill."""
    with torch.device("meta"):
        return Deciders(shape)
