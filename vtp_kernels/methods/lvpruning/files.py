"""Trained deciders on disk: a folder with weights as safetensors and what they fit as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .deciders import Deciders, Shape

__all__ = ["Fit", "load_deciders", "read_fit", "save_deciders"]

WEIGHTS = "deciders.safetensors"
DESCRIPTION = "deciders.json"
FORMAT = 1


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
    """What the deciders in a folder are for. Raises ValueError if it holds none."""
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise ValueError(
            f"modules_path: {folder} holds no trained deciders, there is no {path.name} in it; "
            "train them with: python -m vtp_kernels lvpruning train"
        )
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("format") != FORMAT:
        raise ValueError(
            f"modules_path: {path} has format {found.get('format')!r}, this version of "
            f"vtp_kernels reads {FORMAT}"
        )
    try:
        shape = Shape(found["hidden_size"], found["width"], tuple(found["layers"]))
        return Fit(found["family"], found["text_model"], found["depth"], shape)
    except KeyError as error:
        raise ValueError(f"modules_path: {path} does not say {error}") from error


def load_deciders(folder: str | Path) -> Deciders:
    """The deciders in a folder, on the CPU, as they were stored.

    Raises ValueError naming the tensors that are missing, unknown or of another shape.
    """
    from safetensors.torch import load_file

    deciders = Deciders(read_fit(folder).shape)
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise ValueError(f"modules_path: there is no {path.name} in {folder}")
    stored, expected = load_file(path), deciders.state_dict()
    wrong = [f"{name} is missing" for name in sorted(expected.keys() - stored.keys())]
    wrong += [f"{name} is unknown" for name in sorted(stored.keys() - expected.keys())]
    wrong += [
        f"{name} is {list(stored[name].shape)}, expected {list(expected[name].shape)}"
        for name in sorted(stored.keys() & expected.keys())
        if stored[name].shape != expected[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"modules_path: {path} does not hold what {DESCRIPTION} beside it describes: "
            f"{'; '.join(wrong[:5])}{more}"
        )
    deciders.load_state_dict(stored, assign=True)
    return deciders.requires_grad_(False).eval()
