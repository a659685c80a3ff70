"""GOT-OCR 2.0: the vision model of Segment Anything, and convolutions behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from vtp_kernels.contract.vision import Ask, Seen

from ..modules.placement import own_parameters
from .layers import Layers, Place, scale_of
from .tower import LastLayer, Tower, seen_whole

__all__ = ["ConvolvedTower", "SamLayers"]


class SamLayers(Layers):
    """Pictures of one size. To a logit is added what the query makes of the rows, and of the
    columns, that lie between it and the key.

    That is a product as well: of what it makes of every row and column there is, with a key that
    has 1 at its own.
    """

    models = ("got_ocr2_vision",)
    places = (Place("layers", "attn", ("qkv",)),)

    def _find(self) -> list[nn.Module]:
        found = super()._find()
        # Of all pictures whole, in the last layer: windows are filled up, which is not known here.
        return found if found and not self.model.layers[-1].window_size else []

    def _prefix(self) -> int:
        return 0

    def heads(
        self, attention: nn.Module, arguments: Mapping[str, Any], from_cls: bool
    ) -> tuple[Tensor, Tensor]:
        rows = arguments["hidden_states"]
        pictures, tall, wide, _ = rows.shape
        shape = (pictures, tall * wide, 3, attention.num_attention_heads, -1)
        query, key, _ = attention.qkv(rows).view(shape).permute(2, 0, 3, 1, 4)
        if not attention.use_rel_pos:
            return query, key
        plane, scale = query.unflatten(2, (tall, wide)), scale_of(attention)
        with own_parameters(attention):
            down = attention.get_rel_pos(tall, tall, attention.rel_pos_h)
            across = attention.get_rel_pos(wide, wide, attention.rel_pos_w)
        down = torch.einsum("ihyxc,ykc->ihyxk", plane, down).flatten(2, 3)
        across = torch.einsum("ihyxc,xkc->ihyxk", plane, across).flatten(2, 3)
        place = torch.cat(
            (
                torch.eye(tall, dtype=key.dtype, device=key.device).repeat_interleave(wide, 0),
                torch.eye(wide, dtype=key.dtype, device=key.device).repeat(tall, 1),
            ),
            dim=1,
        )
        place = place.expand(*key.shape[:2], -1, -1)
        return torch.cat((query, down / scale, across / scale), -1), torch.cat((key, place), -1)


class ConvolvedTower(LastLayer, Tower):
    """A visual token is made of patches by two convolutions, whose squares overlap: it has the mean
    of the attention that the patches get which it is made of. The features are what was made."""

    models = SamLayers.models
    vectors = all_layers = False  # most see windows

    def read(
        self, modality: str, given: Mapping[str, Any], output: Any, looked: Mapping[Ask, Tensor]
    ) -> Seen:
        features = output.pooler_output
        values = {}
        for ask, scores in looked.items():
            plane = scores.view(-1, 1, *output.last_hidden_state.shape[-2:])
            plane = avg_pool2d(plane, *self._squares(), count_include_pad=False)
            values[ask] = plane.flatten(1)
        return seen_whole(features, values)

    def _squares(self) -> tuple[int, int, int]:
        """The side of the squares, how far they lie apart, and how far the first begins beyond the
        edge; all in patches."""
        projector, side, step, beyond = self.base.multi_modal_projector, 1, 1, 0
        for convolution in (projector.conv_upsampler1, projector.conv_upsampler2):
            side += (convolution.kernel_size[0] - 1) * step
            beyond += convolution.padding[0] * step
            step *= convolution.stride[0]
        return side, step, beyond
