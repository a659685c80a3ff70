"""Families whose visual tokens ask a picture for what they show: they have no place in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtp_kernels.contract.vision import Ask, Seen

from .tower import LastLayer, Tower, seen_whole

__all__ = ["AskingTower", "PerceiverTower"]


class AskingTower(Tower):
    """Aria: each token asks all patches, once. It has what they have that it reads, by how much of
    it each is. The features are what it reads."""

    models = ("idefics3_vision",)
    vectors = False

    def read(
        self, modality: str, given: Mapping[str, Any], output: Any, looked: Mapping[Ask, Tensor]
    ) -> Seen:
        features = output.pooler_output
        values = {}
        for ask, scores in looked.items():
            reads = self._reads(given, self._states(given, output), features.shape[1])
            values[ask] = (reads.float() @ scores[:, :, None])[:, :, 0]
        return seen_whole(features, values)

    @torch.no_grad()
    def _reads(self, given: Mapping[str, Any], states: Tensor, tokens: int) -> Tensor:
        """[I, N, M]: how much of what a token reads each patch is, mean over heads. As the model
        computes it, which does not hand it on."""
        projector = self.base.multi_modal_projector
        asking = projector.cross_attn
        query = asking.q_proj(asking.layer_norm(projector.query[:tokens]))
        query = query.expand(len(states), -1, -1)
        key = asking.k_proj(asking.layer_norm_kv(states))
        masked = self.base._create_patch_attention_mask(given.get("pixel_mask"))
        if masked is not None:
            masked = ~masked.flatten(1).repeat_interleave(asking.num_heads, 0)[:, None]
            masked = masked.expand(-1, tokens, -1)
        return asking.multihead_attn(query, key, key, attn_mask=masked)[1]


class PerceiverTower(LastLayer, Tower):
    """Idefics 2. Its tokens ask all patches, and each other, several times: there is no telling
    which patches they are. The features are what comes of it."""

    models = ("idefics2_vision",)
    place = "vision_model"
    scores = ("similarity",)
    vectors = False
    unscored = (
        "its visual tokens ask all patches, and each other, in several layers, so that which "
        "patches they show, and whose attention they have, cannot be told"
    )

    def read(
        self, modality: str, given: Mapping[str, Any], output: Any, looked: Mapping[Ask, Tensor]
    ) -> Seen:
        rows = output.pooler_output  # by prompt, since transformers 5.23
        rows = rows.flatten(0, -2) if isinstance(rows, Tensor) else torch.cat(rows)
        features = rows.unflatten(0, (len(output.last_hidden_state), -1))
        return seen_whole(features, {})
