"""How deciders are trained: every setting, with the paper's value as its default where it names
one."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from vtp_kernels._shown import shown

from ..budget import SHARES, as_tuple, check_layer

__all__ = ["GRADIENTS", "LAYERS", "PRECISIONS", "RATIOS", "Recipe", "check_stages"]

LAYERS = (1, 8, 16)
RATIOS = (0.5, 0.3, 0.1)
PRECISIONS = ("bf16", "fp32")
GRADIENTS = ("secant", "tangent")


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run; it can be gone on with only under the same ones.

    Attributes
    ----------
    layers, ratios : the decoder layers (0-based) before which rows leave, and the share of the
        prompt's visual tokens that is to be left there
    width : int or None
        Of the deciders, a multiple of 8. None: that of the model, as in the paper.
    epochs : int
    batch : int
        Conversations per step, all processes and micro-batches together.
    micro_batch : int
        Conversations that one process runs at once; gradients add up until the batch is full.
    learning_rate, warmup : peak of AdamW's rate; the share of all steps it takes to get there. It
        then falls to 0 along a cosine.
    weight_decay, clip : AdamW's; largest norm of the gradient
    ratio_weight : float
        Weight of the ratio loss beside the language model's. The paper does not say; 2 is what
        DynamicViT (arXiv 2106.02034) found for the same loss.
    temperature : float
        Of the Gumbel softmax. The paper does not say; 1 leaves the logits as they are.
    final_noise : float
        The Gumbel noise is multiplied by a factor that goes from 1 at the first step to this at the
        last. 1 is the paper's. At 0 decisions end up by rank alone, as they are when pruning: where
        it matters how many tokens of a kind are left, and not only which, drawing each by chance
        teaches something else.
    gradient : "secant" | "tangent"
        What a dropped token's decision gets to know: what attention would change if the token came
        back, or the derivative at the point where it is gone. See `policy_attention`.
    precision : "bf16" | "fp32"
        bf16 is autocast: deciders, their gradients and AdamW's state stay float32. A CPU
        without instructions for it is faster in fp32; training warns there.
    seed : int
        First weights, order of the data, noise.
    save_every : int
        Steps between checkpoints.
    """

    layers: tuple[int, ...] = LAYERS
    ratios: tuple[float, ...] = RATIOS
    width: int | None = None
    epochs: int = 1
    batch: int = 64
    micro_batch: int = 8
    learning_rate: float = 2e-6
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    ratio_weight: float = 2.0
    temperature: float = 1.0
    final_noise: float = 1.0
    gradient: str = "secant"
    precision: str = "bf16"
    seed: int = 0
    save_every: int = 500

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", as_tuple(self.layers, "Recipe.layers"))
        object.__setattr__(self, "ratios", as_tuple(self.ratios, "Recipe.ratios", SHARES))
        check_stages(self.layers, self.ratios, "Recipe")
        for name in ("epochs", "batch", "micro_batch", "save_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"Recipe.{name}: expected an int of at least 1, got {shown(value)}"
                )
        for name in ("learning_rate", "clip", "temperature"):
            self._check_number(name, above_zero=True)
        for name in ("warmup", "weight_decay", "ratio_weight", "final_noise"):
            self._check_number(name, above_zero=False)
        for name, choices in (("precision", PRECISIONS), ("gradient", GRADIENTS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"Recipe.{name}: got {shown(getattr(self, name))}, expected one of {choices}"
                )

    def _check_number(self, name: str, above_zero: bool) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0 or (above_zero and value == 0):
            least = "above" if above_zero else "of at least"
            raise ValueError(f"Recipe.{name}: expected a number {least} 0, got {shown(value)}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step number `step` of `steps`."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        done = (step - warm) / max(1, steps - warm)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def noise(self, step: int, steps: int) -> float:
        """What the Gumbel noise of that step is multiplied by."""
        return 1 + (self.final_noise - 1) * step / max(1, steps - 1)

    def to_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def check_stages(layers: tuple[int, ...], ratios: tuple[float, ...], owner: str) -> None:
    """Raise if these are no layers in ascending order with a share for each, never a larger one
    than before."""
    if not layers or len(layers) != len(ratios):
        raise ValueError(
            f"{owner}.ratios: expected one for each of the layers {shown(layers)}, got "
            f"{shown(ratios)}"
        )
    for i, (layer, ratio) in enumerate(zip(layers, ratios, strict=True)):
        check_layer(layer, f"{owner}.layers[{i}]")
        if isinstance(ratio, bool) or not isinstance(ratio, int | float):
            raise TypeError(f"{owner}.ratios[{i}]: expected a share, got {shown(ratio)}")
        if not 0 <= ratio <= 1:
            raise ValueError(f"{owner}.ratios[{i}]: expected a share from 0 to 1, got {ratio}")
        if i and layer <= layers[i - 1]:
            raise ValueError(f"{owner}.layers: they must ascend, got {layers}")
        if i and ratio > ratios[i - 1]:
            raise ValueError(
                f"{owner}.ratios: tokens that left do not come back, so ratios must not grow; got "
                f"{ratios}"
            )
