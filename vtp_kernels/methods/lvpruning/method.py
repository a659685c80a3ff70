"""LVPruning (arXiv 2501.13652): trained deciders rank visual rows by themselves and the prompt."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from vtp_kernels._shown import shown
from vtp_kernels.contract.counts import less
from vtp_kernels.contract.method import Method

from ..budget import SHARES, as_tuple
from .deciders import Deciders, Shape
from .files import WEIGHTS, check_weights, load_deciders, read_fit
from .recipe import LAYERS, RATIOS, check_stages

if TYPE_CHECKING:
    from vtp_kernels.contract.rows import Kept, PromptRows

__all__ = ["LVPruning", "kept_tokens"]

# Deciders in use, by file, device and dtype: methods that differ in their ratios share them.
_in_use: WeakValueDictionary[tuple[Any, ...], Deciders] = WeakValueDictionary()


def kept_tokens(ratio: float, visual_tokens: int) -> int:
    """ratio * visual_tokens, rounded down as the paper does: 0.3 of 576 keeps 172."""
    return math.floor(ratio * visual_tokens + 1e-9)  # 0.29 * 100 is 28.999... in floating point


@dataclass(frozen=True)
class LVPruning(Method, key="lvpruning"):
    """Before each of `layers`, a trained decider keeps a share of the prompt's visual tokens.

    A decider looks at the rows that enter the layer: each visual row attends to the prompt's text
    (two blocks of cross-attention) and gets two logits, to be kept and to be dropped. The rows
    whose difference is largest stay, as many as the ratio says. Deciders are made by
    `vtp_kernels.methods.lvpruning.train`, or `python -m vtp_kernels lvpruning train`. They run in
    the dtype of the rows they look at, and rank in float32.

    Parameters
    ----------
    modules_path : str | Path | None
        Folder with trained deciders. What they are for is read when the method is applied, and
        whether the weights are all there; the weights themselves when they are first needed. None:
        deciders of the paper's size that are not trained yet, for counting FLOPs; pruning needs a
        folder.
    layers : tuple of int
        Ascending; those the deciders were trained for, or some of them.
    ratios : tuple of float
        One per layer, never growing: shares of the tokens the prompt came with. They may differ
        from those in training; the paper uses (r, r - 0.2, r - 0.4).

    Raises
    ------
    ValueError
        When applied to a model that the deciders are not for: of another family, depth or width;
        or where their files are missing, cut short or not what they should be.
    """

    modules_path: str | None = None
    layers: tuple[int, ...] = LAYERS
    ratios: tuple[float, ...] = RATIOS

    def __post_init__(self) -> None:
        if self.modules_path is not None:
            if not isinstance(self.modules_path, str | Path):
                raise TypeError(
                    f"LVPruning.modules_path: expected a folder, got {shown(self.modules_path)}"
                )
            object.__setattr__(self, "modules_path", str(self.modules_path))
        object.__setattr__(self, "layers", as_tuple(self.layers, "LVPruning.layers"))
        object.__setattr__(self, "ratios", as_tuple(self.ratios, "LVPruning.ratios", SHARES))
        check_stages(self.layers, self.ratios, "LVPruning")
        object.__setattr__(self, "_loaded", {})

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": {}}  # a copy reads the file again

    # ---- what the engine asks -----------------------------------------------------------------

    def decision_layers(self, depth: int) -> tuple[int, ...]:
        return self.layers

    def check_config(self, family: str, config: Any) -> None:
        if self.modules_path is None:
            raise ValueError(
                "LVPruning.modules_path: pruning needs trained deciders; train them with: python "
                "-m vtp_kernels lvpruning train"
            )
        fit = read_fit(self.modules_path)
        fit.check(family, config, f"LVPruning.modules_path {self.modules_path}")
        if strange := sorted(set(self.layers) - set(fit.shape.layers)):
            raise ValueError(
                f"LVPruning.layers: {self.modules_path} has no deciders for layers {strange}, it "
                f"has them for {list(fit.shape.layers)}"
            )
        check_weights(self.modules_path, fit.shape)
        vars(self)["_shape"] = fit.shape  # what report() needs, should the files go away

    def decision_flops(self, layer: int, config: Any, text: int, visual: int, kept: int) -> int:
        if kept in (0, visual):  # nobody had to be asked
            return 0
        if self.modules_path is None:
            shape = Shape(config.hidden_size, config.hidden_size, self.layers)
        else:
            shape = self._shape
        if shape.hidden_size != config.hidden_size:
            raise ValueError(
                f"LVPruning.modules_path {self.modules_path}: these deciders are for another "
                f"model: hidden size {shape.hidden_size}, the model's is {config.hidden_size}"
            )
        return shape.flops(text, visual)

    @functools.cached_property
    def _shape(self) -> Shape:
        return read_fit(self.modules_path).shape

    def decide(self, layer: int, rows: PromptRows) -> Kept | None:
        counts = [
            min(self.budget(layer, total), now)
            for total, now in zip(rows.visual_at_start, rows.visual_now, strict=True)
        ]
        if counts == rows.visual_now:
            return None
        scores = self._scores(layer, rows) if any(counts) else None
        return rows.keep_visual(counts, scores)

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        self._deciders(device, dtype)

    def visual_left(self, layer: int, pictures: Sequence[int]) -> int:
        total = sum(pictures)
        return min([total, *(self.budget(at, total) for at in self.layers if at <= layer)])

    # ---- how it decides -----------------------------------------------------------------------

    def budget(self, layer: int, visual_tokens: int) -> int:
        """Tokens that stay from `layer` on, of a prompt that came with so many."""
        return kept_tokens(self.ratios[self.layers.index(layer)], visual_tokens)

    def _scores(self, layer: int, rows: PromptRows) -> Tensor:
        """Keep logit less drop logit, float32 [B, S]; 0 off visual rows."""
        # Drafts of assisted decoding come behind the prompt: what it keeps is not theirs to say.
        places = torch.arange(rows.text.shape[1], device=rows.text.device)
        text = rows.text & (places <= rows.prompt_end)
        drafts = rows.text.shape[1] - 1 - rows.prompt_end
        asked, _, text_valid = rows.gather(text, less(rows.text_now, drafts))
        visual, visual_at, _ = rows.gather(rows.visual, rows.visual_now)
        decider = self._deciders(rows.hidden.device, rows.hidden.dtype)[layer]
        logits = decider(visual, asked, text_valid).float()
        return rows.spread(logits[..., 0] - logits[..., 1], visual_at)

    def _deciders(self, device: torch.device, dtype: torch.dtype) -> Deciders:
        at = device, dtype
        if at not in self._loaded:
            file = Path(self.modules_path, WEIGHTS).resolve()
            written = file.stat().st_mtime_ns if file.exists() else None
            key = (file, written, *at)
            deciders = _in_use.get(key)
            if deciders is None:
                deciders = _in_use[key] = load_deciders(self.modules_path).to(*at)
            self._loaded[at] = deciders
        return self._loaded[at]

    @classmethod
    def from_spec(cls, arguments: str) -> LVPruning:
        """`FOLDER[:RATIO,...]`; layers are those of the folder. Without a folder, the paper's."""
        folder, _, ratios = arguments.partition(":")
        layers = read_fit(folder).shape.layers if folder else LAYERS
        shares = tuple(map(float, ratios.split(","))) if ratios else RATIOS
        return cls(folder or None, layers, shares)
