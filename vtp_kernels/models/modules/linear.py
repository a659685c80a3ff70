"""Layers with linear attention: a state takes in row after row, in the place of keys. In some
models it is no more than the last rows, for a short convolution.

Such a layer has a causal convolution over its last rows, a state of one size, and no weights by
which a row attends to another. A row that has left is not taken in: its neighbours stand side by
side in the convolution, and the state decays by one step less. No mask can say that of a row that
is there, for it would still be a hole and a step. So what is right here is what the layer makes of
the rows that come to it, in their order; layers before have taken in all that came to them.

Padding is such a row. In front of a prompt it comes to an empty state and changes nothing; behind
something that was taken in before, it would.
"""

from __future__ import annotations

from torch import nn

from .unwrapping import own

__all__ = ["KINDS", "linear_layers", "words_for"]

KINDS = ("linear_attention", "conv")
"""As `layer_types` of a text config has them."""
LOOKED_AT = (
    "Lfm2ShortConv",
    "Qwen3NextGatedDeltaNet",
    "Qwen3_5GatedDeltaNet",
    "Qwen3_5MoeGatedDeltaNet",
)
"""Classes of what such a layer has in the place of attention. Of each it was seen that padding in
front of a prompt changes nothing, and that it goes on from a cache by itself."""


def linear_layers(text: nn.Module) -> frozenset[int]:
    """Which decoder layers have it.

    Raises NotImplementedError where all do, for positions and masks go by the keys of those that do
    not, and where what they have was not looked at.
    """
    kinds = getattr(text.config, "layer_types", None) or ()
    found = frozenset(i for i, kind in enumerate(kinds) if kind in KINDS)
    refused = f"a {text.config.model_type!r} text model is not supported: "
    if found and len(found) == len(text.layers):
        raise NotImplementedError(f"{refused}it has no layer of full attention")
    for layer in sorted(found):
        children = own(text.layers[layer])._modules.values()
        if not any(cls.__name__ in LOOKED_AT for x in children for cls in type(x).__mro__):
            raise NotImplementedError(
                f"{refused}layer {layer} is a {kinds[layer]!r}, and has nothing of class "
                f"{' or '.join(LOOKED_AT)}"
            )
    return found


def words_for(layers: list[int]) -> str:
    """As "3, 7, 11 ..." """
    return ", ".join(map(str, layers[:3])) + (" ..." if len(layers) > 3 else "")
