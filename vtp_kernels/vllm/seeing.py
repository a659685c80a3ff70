"""What both model families do in vLLM's workers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.models.utils import WeightsMapper

from .budget import KEY, Budget
from .choice import attention_of_cls, similarity_to_cls

__all__ = ["PrunedImages"]

_TOWER_PARTS = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")


class PrunedImages:
    """In front of a model class of vLLM that has `vision_tower`, a CLIP with CLS, and
    `multi_modal_projector`. Images that come without a budget take its own course."""

    #: transformers 5 writes the tower's weights without the `vision_model` that vLLM looks for.
    tower_names = WeightsMapper(
        orig_to_new_prefix={
            f"vision_tower.{part}.": f"vision_tower.vision_model.{part}." for part in _TOWER_PARTS
        }
    )

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        lora = vllm_config.lora_config
        if lora is not None and lora.enable_tower_connector_lora:
            raise NotImplementedError(
                "enable_tower_connector_lora: expected False with the plugin, for the rows of an "
                "adapter in the vision tower are counted by those that the image takes"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def embed_multimodal(self, **kwargs: object) -> Any:
        budget = kwargs.pop(KEY, None)
        if budget is not None:
            images = self._parse_and_validate_image_input(**kwargs)
            return self._embed_best(images, Budget.of_numbers(budget.tolist()))
        if kwargs.get("pixel_values") is None and kwargs.get("image_embeds") is not None:
            # vLLM's own class wants all images of a batch to have as many rows.
            return list(kwargs["image_embeds"])
        return super().embed_multimodal(**kwargs)

    def _embed_best(self, images: Any, budget: Budget) -> Any:
        """The embeddings of each image, of as many rows as its budget says."""
        raise NotImplementedError

    def _see(self, pixels: Tensor, score: str) -> tuple[Tensor, Tensor | None]:
        """Of pixels [V, 3, h, w]: what the tower puts out, CLS in row 0, [V, 1 + N, C], and the
        scores of all other rows, float32 [V, N]; None where it is not the tower that is asked."""
        if score == "divprune":
            return self.vision_tower(pixels, feature_select_strategy="full"), None
        if score == "similarity":
            hidden = self.vision_tower(pixels, feature_select_strategy="full")
            return hidden, similarity_to_cls(hidden)
        # vLLM builds the tower up to the feature layer, so the last attention is the one that made
        # the features. What it is called with are the queries and keys of this rank's heads.
        attention = self.vision_tower.vision_model.encoder.layers[-1].self_attn
        called_with: list[Any] = []
        hook = attention.attn.register_forward_pre_hook(
            lambda module, args: called_with.append(args)
        )
        try:
            hidden = self.vision_tower(pixels, feature_select_strategy="full")
        finally:
            hook.remove()
        (query, key, *_), *_ = called_with
        shape = (*query.shape[:2], attention.num_heads_per_partition, attention.head_dim)
        query, key = (states.view(shape).transpose(1, 2) for states in (query, key))
        scores = attention_of_cls(query, key, attention.scale)
        if attention.tp_size > 1:  # or ranks would keep different tokens
            scores = tensor_model_parallel_all_reduce(scores.contiguous()) / attention.tp_size
        return hidden, scores
