"""What the model families do in vLLM's workers: encode images, and keep the best of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.models.utils import WeightsMapper

from .budget import KEY, Budget
from .choice import attention_received, best_rows, similarity_to_whole, unlike_rows
from .stages.model import Staged

__all__ = [
    "OutsideGraphs",
    "PrunedImages",
    "Sight",
    "mean_over_ranks",
    "see_with_cls",
    "stays",
    "watching",
]

_TOWER_PARTS = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")


class PrunedImages(Staged):
    """In front of a model class of vLLM that reads images. Those that come without a budget take
    its own course."""

    #: transformers 5 writes the weights of CLIP and SigLIP without the `vision_model` that vLLM
    #: looks for.
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


class OutsideGraphs:
    """In front of a model class of vLLM that encodes by graphs where it can."""

    def get_encoder_cudagraph_config(self) -> Any:
        """Images are not encoded by graphs, which would go past `embed_multimodal`."""
        config = super().get_encoder_cudagraph_config()
        config.modalities = [name for name in config.modalities if name != "image"]
        return config


class Sight:
    """What a vision tower made of V views.

    hidden : [V, M, C], what it put out. query, key : [V, M, H * D], what its last attention was
    called with, which made the features: vLLM builds a tower up to the layer of these.
    """

    hidden: Tensor
    query: Tensor
    key: Tensor

    def __init__(self, attention: Any) -> None:
        self._attention = attention

    def scores(self, score: str, cls: bool) -> Tensor | None:
        """float32 [V, M], or [V, M - 1] without CLS in front: what each token is scored by; None
        where it is not the tower that is asked."""
        if score == "similarity":
            return similarity_to_whole(self.hidden, cls)
        return self.attention(cls) if score == "attention" else None

    def attention(self, cls: bool) -> Tensor:
        attention = self._attention
        ranks = getattr(attention, "tp_size", 1)
        here = attention.num_heads_per_partition if ranks > 1 else attention.num_heads
        query, key = (
            states.unflatten(-1, (here, attention.head_dim)).transpose(1, 2)
            for states in (self.query, self.key)
        )
        return mean_over_ranks(attention_received(query, key, attention.scale, cls), ranks)


def mean_over_ranks(scores: Tensor, ranks: int) -> Tensor:
    """Of the heads that each of them has as many of, or ranks would keep different tokens."""
    if ranks == 1:
        return scores
    return tensor_model_parallel_all_reduce(scores.contiguous()) / ranks


@contextmanager
def watching(tower: Any, attention: Any) -> Iterator[Sight]:
    """While a model encodes images: what its tower puts out, and its last attention reads."""
    sight = Sight(attention)

    def called(module: Any, args: Any) -> None:
        sight.query, sight.key = args[:2]

    def put_out(module: Any, args: Any, output: Tensor) -> None:
        sight.hidden = output

    hooks = (
        attention.attn.register_forward_pre_hook(called),
        tower.register_forward_hook(put_out),
    )
    try:
        yield sight
    finally:
        for hook in hooks:
            hook.remove()


def see_with_cls(tower: Any, pixels: Tensor, score: str) -> tuple[Tensor, Tensor | None]:
    """Of pixels [V, 3, h, w], by a CLIP tower: what it puts out, CLS in row 0, [V, 1 + N, C], and
    the scores of all other rows, float32 [V, N]; None where it is not the tower that is asked."""
    with watching(tower, tower.vision_model.encoder.layers[-1].self_attn) as sight:
        tower(pixels, feature_select_strategy="full")
    return sight.hidden, sight.scores(score, cls=True)


def stays(rows: Tensor, scores: Tensor | None, budget: Budget) -> Tensor:
    """Of an image's rows [R, C] those that stay, by their scores float32 [R], or by themselves."""
    keep = budget.rows(len(rows))
    return rows[unlike_rows(rows, keep) if scores is None else best_rows(scores, keep)]
