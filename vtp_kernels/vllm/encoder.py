"""Images as embeddings that keep as many tokens as each needs: for vLLM's `multi_modal_data`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtp_kernels._shown import shown
from vtp_kernels.contract.vision import PromptVision, Shown
from vtp_kernels.methods import InflectionPruning
from vtp_kernels.models.families import FAMILIES as PAGES
from vtp_kernels.models.pictures.watch import SEEN, VisionWatch

__all__ = ["Encoder", "encode"]

FAMILIES = ("llava", "llava_next")
DEFAULT = InflectionPruning(llm_layers=())


class Encoder:
    """The vision tower and the projector of a LLaVA-1.5 or LLaVA-NeXT.

    Parameters
    ----------
    model : a transformers model, with its language model or without
    processor : its processor, or the image processor of that
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.base = getattr(model, "model", model)
        family = self.base.config.model_type
        self.tower = PAGES[family].tower(self.base) if family in FAMILIES else None
        # With Pixtral there is text between the rows of a picture, whose places vLLM counts.
        if self.tower is None or self.tower.ragged:
            raise NotImplementedError(
                f"model: expected one of {FAMILIES} with a vision tower that is known, and that "
                f"sees pictures of one size, got {type(model).__name__}"
            )
        self.image_processor = getattr(processor, "image_processor", processor)

    @classmethod
    def load(cls, name: str | Path, device: str = "cpu", dtype: str = "auto") -> Encoder:
        """From a folder or the Hugging Face hub; of the language model only the embeddings come."""
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText

        config = AutoConfig.from_pretrained(name)
        if config.model_type not in FAMILIES:
            raise NotImplementedError(
                f"model: expected one of {FAMILIES}, got a {config.model_type!r}"
            )
        config.text_config.num_hidden_layers = 0
        model = AutoModelForImageTextToText.from_pretrained(name, config=config, dtype=dtype)
        return cls(model.to(device).eval(), AutoImageProcessor.from_pretrained(name))

    @torch.no_grad()
    def __call__(self, images: Sequence[Any], method: InflectionPruning = DEFAULT) -> list[Tensor]:
        """See `encode`."""
        _check(method)
        if len(images) == 0:
            return []
        parameter = next(self.base.multi_modal_projector.parameters())
        inputs = self.image_processor(list(images), return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(parameter.device, parameter.dtype)
        watch = VisionWatch(self.base, self.tower, method.source, backend=None)
        watch.attach()
        try:
            output = self.base.get_image_features(**inputs)
        finally:
            watch.detach()
        embeddings = output.pooler_output
        rows = [len(image) for image in embeddings]
        everywhere = torch.ones(1, sum(rows), dtype=torch.bool, device=parameter.device)
        shown = Shown(getattr(output, SEEN), everywhere, [sum(rows)])
        vision = PromptVision([shown], backend=None)
        selection, _ = vision.inflection(method.source, **method.knee)
        stays = vision.rows_showing(selection)[0].split(rows)
        return [image[kept].cpu() for image, kept in zip(embeddings, stays, strict=True)]


def encode(
    images: Sequence[Any],
    model: str | Path | Encoder,
    method: InflectionPruning = DEFAULT,
) -> list[Tensor]:
    """What vLLM takes in place of images, of each as many tokens as come up to its knee.

        images = vtp_kernels.vllm.encode([picture], "llava-hf/llava-1.5-7b-hf")
        llm = vllm.LLM("llava-hf/llava-1.5-7b-hf", enable_mm_embeds=True)
        llm.generate({"prompt": prompt, "multi_modal_data": {"image": images}})

    Where requests with different numbers of tokens meet in one batch, vLLM needs the plugin
    (`VLLM_PLUGINS=vtp_kernels`): its own classes want images of one length.

    Parameters
    ----------
    images : pictures as the model's image processor takes them
    model : str or Encoder
        Folder or hub name of a LLaVA-1.5 or LLaVA-NeXT, which is loaded once, on the CPU; or an
        Encoder, for another device.
    method : InflectionPruning
        Its stage 1; `llm_layers` must be empty, for vLLM's layers all have the same rows.

    Returns
    -------
    list of [rows, C], on the CPU, in the dtype of the model; of LLaVA-NeXT with the rows that end
    its lines.

    Raises
    ------
    TypeError, ValueError
        If the method is not one that leaves some of each image, before the layers, and only there.
    NotImplementedError
        If the model is of another family, or its vision tower not known.
    """
    _check(method)
    return (model if isinstance(model, Encoder) else _loaded(str(model)))(images, method)


@functools.lru_cache(maxsize=1)
def _loaded(name: str) -> Encoder:
    return Encoder.load(name)


def _check(method: InflectionPruning) -> None:
    if not isinstance(method, InflectionPruning):
        raise TypeError(f"method: expected an InflectionPruning, got {shown(method)}")
    if method.llm_layers:
        raise ValueError(
            "method.llm_layers: expected (), for all layers of a served model have the same rows, "
            f"got {method.llm_layers}"
        )
    if method.source is None:
        raise ValueError("method.source: expected 'similarity' or 'attention', got None")
    if method.min_keep < 1:
        raise ValueError(
            f"method.min_keep: expected at least 1, for vLLM takes no empty image, got "
            f"{method.min_keep}"
        )
