"""FastV the way papers' code does it, to be timed beside this package: prefill, one prompt.

The layer that scores runs eager attention and keeps its whole matrix; the rows that stay are chosen
with a sort on the host's account; and the host looks at a tensor in every layer, as code does that
asks "is it time to prune?" there. All of it is what such code needs to do, done without waste.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["published_fastv"]


@contextlib.contextmanager
def published_fastv(model: nn.Module, layer: int, keep: float) -> Iterator[None]:
    """Prune `model` (Llama-like language model) before `layer`, for calls with one prompt."""
    text, visual = model.model.language_model, {}
    scorer = text.layers[layer - 1].self_attn
    config = scorer.config
    scorer.config = copy.copy(config)
    scorer.config._attn_implementation = "eager"
    state: dict[str, Any] = {}

    def begin(module, args, kwargs):
        visual["rows"] = (kwargs["input_ids"] == model.config.image_token_id)[0].nonzero()[:, 0]
        state.clear()

    def mask(module, args, kwargs):
        kwargs["attention_mask"] = _causal_mask(kwargs["hidden_states"])
        return args, kwargs

    def score(module, args, output):
        state["scores"] = output[1].mean(1)[0, -1]

    def enter(index):
        def hook(module, args, kwargs):
            hidden = args[0]
            bool(hidden[0, 0, 0].isnan())  # the host waits for the device
            if index == layer:
                kept = _kept(state["scores"], visual["rows"], keep, hidden.shape[1])
                hidden = hidden[:, kept]
                embeddings = kwargs["position_embeddings"]
                state["embeddings"] = tuple(x[:, kept] for x in embeddings)
            if index >= layer:
                kwargs["position_embeddings"] = state["embeddings"]
                kwargs["attention_mask"] = kwargs["position_ids"] = None
            return (hidden, *args[1:]), kwargs

        return hook

    hooks = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        scorer.register_forward_pre_hook(mask, with_kwargs=True),
        scorer.register_forward_hook(score),
    ]
    for index, block in enumerate(text.layers):
        hooks.append(block.register_forward_pre_hook(enter(index), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        scorer.config = config


def _causal_mask(hidden: Tensor) -> Tensor:
    rows = hidden.shape[1]
    least = torch.finfo(hidden.dtype).min
    return torch.full((1, 1, rows, rows), least, dtype=hidden.dtype, device=hidden.device).triu(1)


def _kept(scores: Tensor, visual: Tensor, keep: float, rows: int) -> Tensor:
    """Rows that stay, ascending."""
    best = visual[scores[visual].topk(round(keep * len(visual))).indices]
    stays = torch.ones(rows, dtype=torch.bool, device=scores.device)
    stays[visual] = False
    stays[best] = True
    return stays.nonzero()[:, 0]
