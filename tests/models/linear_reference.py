"""Pruning in models with linear attention, told again: one prompt, layer by layer, and whatever
leaves is taken out by hand. No mask is used but the causal one, and nothing of vtp_kernels.

For eager models: scores are read off the weights that the model's own attention computed.
"""

import torch
from transformers import DynamicCache


def merged(model, inputs):
    """What the decoder stack is given of prompts with pictures: embeddings [B, S, C], in which
    their features are, and positions [P, B, S]; P is 3 where they have room for rows and columns,
    else 1."""
    calls, text = [], model.model.language_model
    note = lambda module, args, kwargs: calls.append(kwargs)  # noqa: E731
    hook = text.register_forward_pre_hook(note, with_kwargs=True)
    model.generate(**inputs, max_new_tokens=1)
    hook.remove()
    positions = calls[0]["position_ids"]
    if hasattr(text.rotary_emb, "mrope_section"):
        positions = positions.expand(3, -1, -1) if positions.dim() == 2 else positions[-3:]
    else:
        positions = positions[None]
    return calls[0]["inputs_embeds"], positions


def as_given(positions):
    """Positions [P, S] of one prompt as the model is given them: [1, S], or [3, 1, S]."""
    return positions if len(positions) == 1 else positions[:, None]


class Gathered:
    """A conversation of one prompt with an eager model."""

    def __init__(self, model):
        self.model, self.text = model, model.model.language_model
        self._norm = getattr(self.text, "norm", None) or self.text.embedding_norm
        self.cache = DynamicCache(config=model.config.get_text_config())

    @torch.no_grad()
    def call(self, hidden, positions, stages=None, given=None, visual=None, content=()):
        """Logits [V] of the last of the rows hidden [S, C] at positions [P, S]; each call goes on
        where the last one ended. `stages` {layer: keep} by the last row's attention among the rows
        `visual` [S], or the sets `given` {layer: bool [S]}. `content` {layer: (bool [S], [S, C])}:
        rows that hold something else from there on. `kept` tells which stayed."""
        hidden, here, self.kept = hidden[None], torch.arange(len(hidden)), {}
        total, weights = 0 if visual is None else int(visual.sum()), None
        for index, layer in enumerate(self.text.layers):
            if given and index in given:
                stays = given[index][here]
            elif stages and index in stages:
                count = stages[index]
                count = count if isinstance(count, int) else int(count * total + 0.5)
                stays = self._best(weights, visual[here], count)
            else:
                stays = None
            if stays is not None:
                hidden, here = hidden[:, stays], here[stays]
                if index in content:
                    changed, rows = (x[here] for x in content[index])
                    hidden = torch.where(changed[:, None], rows, hidden)
                self.kept[index] = torch.zeros(positions.shape[1], dtype=torch.bool)
                self.kept[index][here] = True
            hidden, weights = self._layer(layer, hidden, positions[:, here])
        return self.model.lm_head(self._norm(hidden)[0, -1])

    @staticmethod
    def _best(weights, visual, count):
        scores = weights[0, :, -1, -len(visual) :].float().mean(0)
        order = sorted(visual.nonzero()[:, 0].tolist(), key=lambda j: (-float(scores[j]), j))
        stays = ~visual
        stays[order[:count]] = True
        return stays

    def _layer(self, layer, hidden, positions):
        seen, rows, attention = [], hidden.shape[1], getattr(layer, "self_attn", None)
        mask = None
        if attention is not None:
            past = self.cache.layers[attention.layer_idx].get_seq_length()
            mask = torch.full((rows, past + rows), torch.finfo(hidden.dtype).min).triu(past + 1)
            mask = mask[None, None]
            hook = attention.register_forward_hook(lambda module, args, out: seen.append(out[1]))
        hidden = layer(
            hidden,
            position_embeddings=self.text.rotary_emb(hidden, position_ids=as_given(positions)),
            attention_mask=mask,
            past_key_values=self.cache,
        )
        if attention is not None:
            hook.remove()
        return hidden, seen[0] if seen else None

    def tokens(self, ids, positions):
        """Logits [V] after each of some tokens, the first of which is at `positions` [P, 1]."""
        logits = []
        for step, token in enumerate(ids):
            hidden = self.text.embed_tokens(torch.tensor([token]))
            logits.append(self.call(hidden, positions + step))
        return logits
