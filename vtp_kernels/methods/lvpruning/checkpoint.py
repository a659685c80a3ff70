"""A training run on disk, so that it can go on as if it had never stopped.

Noise and the order of the data follow from the seed and the step (decisions.py, training.py), so
weights, AdamW's moments and the number of steps done are all there is to keep.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .deciders import Deciders

__all__ = ["load_checkpoint", "save_checkpoint"]

TENSORS = "checkpoint.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_checkpoint(
    folder: Path,
    deciders: Deciders,
    optimizer: torch.optim.AdamW,
    step: int,
    settings: dict[str, Any],
) -> None:
    """After `step` steps. A run that is killed while it writes leaves the checkpoint before."""
    from safetensors.torch import save_file

    tensors = {f"weights.{k}": v.detach().cpu() for k, v in deciders.named_parameters()}
    for name, parameter in deciders.named_parameters():
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].detach().cpu()
    folder.mkdir(parents=True, exist_ok=True)
    # The step is in the tensors' own metadata: one file, so that it cannot belong to another.
    metadata = {"run": json.dumps({"step": step, "settings": settings})}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "new", metadata)
    os.replace(folder / "new", folder / TENSORS)


def load_checkpoint(
    folder: Path,
    deciders: Deciders,
    optimizer: torch.optim.AdamW,
    settings: dict[str, Any],
) -> int:
    """Put a checkpoint's state back; the number of steps done, 0 where there is no checkpoint.

    Raises ValueError naming the settings that are not those of the run, or the file if it is no
    checkpoint of these deciders.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / TENSORS
    if not path.is_file():
        return 0
    try:
        with safe_open(path, "pt") as file:
            step, before = _run_of(file)
            _check_settings(folder, before, settings)
            found = _tensors_of(file, deciders)
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is cut short or no checkpoint of this run ({error}); delete it to begin anew"
        ) from error
    for name, parameter in deciders.named_parameters():
        parameter.data.copy_(found[f"weights.{name}"])
        state = {moment: found[f"{moment}.{name}"] for moment in MOMENTS}
        optimizer.state[parameter] = {
            m: t if m == "step" else t.to(parameter.device) for m, t in state.items()
        }
    return step


def _run_of(file: Any) -> tuple[int, dict[str, Any]]:
    """Steps done, and the settings they were done with."""
    run = json.loads(file.metadata()["run"])
    return run["step"], run["settings"]


def _check_settings(folder: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    differ = [
        f"{name} was {before.get(name)!r} and is {settings.get(name)!r}"
        for name in sorted(before.keys() | settings.keys())
        if before.get(name) != settings.get(name)
    ]
    if differ:
        raise ValueError(
            f"{folder}: a run with other settings was begun here: {'; '.join(differ)}; go on "
            "with those, or train into another folder"
        )


def _tensors_of(file: Any, deciders: Deciders) -> dict[str, Tensor]:
    """All tensors of a checkpoint; TypeError for one of another shape."""
    found = {}
    for name, parameter in deciders.named_parameters():
        for part in ("weights", *MOMENTS):
            tensor = file.get_tensor(f"{part}.{name}")
            shape = torch.Size() if part == "step" else parameter.shape
            if tensor.shape != shape:
                raise TypeError(f"{part}.{name} is {list(tensor.shape)}, expected {list(shape)}")
            found[f"{part}.{name}"] = tensor
    return found
