"""InflectionPruning told again: one prompt, plain matrices and loops, nothing removed but masked.

Written from the method's description, with whole attention matrices. Nothing of vtp_kernels is
used.
"""

import math

import numpy as np
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from near_ties import apart, away, cut


def knee(scores, rule, min_keep, max_keep, clip_quantile, mass):
    """Indices up to the knee of a list of finite scores, sorted; chord, iqr and mass."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    y = [float(scores[i]) for i in order]
    if rule == "chord":
        y = [min(x, float(np.quantile(y, clip_quantile))) for x in y]
    last, found = None, len(y) >= 3 and y[0] > y[-1]
    if found and rule == "chord":
        chord = np.linspace(y[0], y[-1], len(y))
        below = [line - x for line, x in zip(chord, y, strict=True)]
        size = max(abs(y[0]), abs(y[-1]))
        rounding = np.finfo(np.float32).eps * size
        deepest = max(below[1:-1])  # the ends of the chord are on it
        away([deepest], rounding, size)
        last = None
        if deepest > rounding:
            apart(sorted(below)[-2:], size)
            last = below.index(deepest)
    elif found and rule == "iqr":
        q1, q3 = np.percentile(y, [25, 75])
        bound = q3 + 1.5 * (q3 - q1)
        last = sum(x > bound for x in away(y, bound)) - 1
        last = None if last < 0 else last
    elif found:
        positive = np.cumsum([max(x, 0.0) for x in y])
        away(positive, mass * positive[-1], size=positive[-1])
        last = int(np.argmax(positive >= mass * positive[-1])) if positive[-1] > 0 else None
    count = len(y) if last is None else last + 1
    count = min(max(count, min_keep), len(y) if max_keep is None else max_keep)
    cut([float(scores[i]) for i in order], count)
    return sorted(order[:count])


class PlainInflection:
    """Runs one prompt. `kept` {layer: list of columns}, `logits` of the last row, `curves` of the
    pictures, by picture."""

    def __init__(
        self,
        *,
        source="similarity",
        rule="chord",
        min_keep=1,
        max_keep=None,
        clip_quantile=0.995,
        mass=0.9,
        llm_layers=(),
        visual_keep=0.5,
        text_keep=0.75,
        score_without_rope=True,
        protect_template=True,
        template_tail=1,
    ):
        self.__dict__.update({k: v for k, v in locals().items() if k != "self"})
        self.rule_options = (rule, min_keep, max_keep, clip_quantile, mass)

    @torch.no_grad()
    def run(self, model, inputs):
        text, seen = model.model.language_model, {}
        hook = text.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
        )
        model(**inputs)
        hook.remove()
        hidden = seen["inputs_embeds"]
        ids = inputs["input_ids"][0]
        self.visual = ids == model.config.image_token_id
        self.visual[-1] = False  # the row whose logits are asked for has to be there
        rotary = text.rotary_emb(hidden, position_ids=torch.arange(len(ids))[None])
        self.open, self.kept = torch.ones_like(self.visual), {}
        if self.source is not None:
            self.first_stage(model, inputs, ids == model.config.image_token_id)
        for index, layer in enumerate(text.layers):
            normed = layer.input_layernorm(hidden)
            hidden = hidden + self.attend(layer.self_attn, normed, rotary)
            if index + 1 in self.llm_layers:
                self.second_stage(index + 1, layer.self_attn, normed, rotary)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.logits = model.lm_head(text.norm(hidden))[0, -1]
        return self

    # Rows that leave before layer K are masked from K on; their own hidden states do not matter.

    def first_stage(self, model, inputs, placeholders):
        tower = model.model.vision_tower
        tower = getattr(tower, "vision_model", tower)
        states = model.model.vision_tower(
            inputs["pixel_values"], output_hidden_states=True
        ).hidden_states
        index = model.config.vision_feature_layer % len(states)
        self.curves = []
        for picture in range(len(inputs["pixel_values"])):
            features = states[index][picture]
            if self.source == "similarity":
                curve = torch.cosine_similarity(features[1:], features[:1]).tolist()
            else:
                layer = tower.encoder.layers[index - 1]
                attention, x = layer.self_attn, layer.layer_norm1(states[index - 1][picture])
                size = attention.head_dim
                query = attention.q_proj(x[:1]).view(-1, size)
                key = attention.k_proj(x).view(len(x), -1, size)
                logits = torch.einsum("hd,shd->hs", query, key) * size**-0.5
                curve = logits.softmax(-1).mean(0)[1:].tolist()
            self.curves.append(curve)
        columns = placeholders.nonzero()[:, 0].tolist()
        stay = set((~placeholders).nonzero()[:, 0].tolist())
        for picture, curve in enumerate(self.curves):
            for patch in knee(curve, *self.rule_options):
                stay.add(columns[picture * len(curve) + patch])
        stay |= {len(placeholders) - 1}
        self.note(0, stay)

    def second_stage(self, layer, attention, hidden, rotary):
        def heads(projection):
            return projection(hidden).view(*hidden.shape[:2], -1, attention.head_dim)

        query, key = (heads(p).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
        if not self.score_without_rope:
            query, key = apply_rotary_pos_emb(query, key, *rotary)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits = (query @ key.transpose(2, 3))[0] * attention.scaling  # [H, S, S]
        rows = range(len(self.visual))
        here = [i for i in rows if self.open[i]]
        visual = [i for i in here if self.visual[i]]
        text = [i for i in here if not self.visual[i]]
        first = int(self.visual.nonzero()[0]) if self.visual.any() else len(self.visual)
        free = [i for i in text if i > text[0]][: len(text) - 1 - self.template_tail]
        free = [i for i in free if i > first or not self.protect_template]
        if not self.visual.any():
            free = []
        # behind the first visual token that is still there
        asking = [i for i in text if visual and i > visual[0]]
        relevance = torch.zeros(len(self.visual))
        for i in asking:
            earlier = [j for j in here if j <= i]
            weights = logits[:, i, earlier].softmax(-1).mean(0)
            for j, weight in zip(earlier, weights, strict=True):
                relevance[j] += weight / len(asking)
        stay = set(text) - set(free)
        stay |= self.choose(visual, relevance, self.visual_keep)
        if free:
            correlation = torch.zeros(len(self.visual))
            if visual:
                from_visual = logits[:, visual][:, :, free].softmax(-1).mean((0, 1))
                correlation[free] += from_visual / 2
            correlation[free] += logits[:, -1, free].softmax(-1).mean(0) / 2
            stay |= self.choose(free, correlation, self.text_keep)
        self.note(layer, stay)

    def choose(self, among, scores, keep):
        if not among:
            return set()
        if keep == "knee":
            rule, min_keep, _, clip_quantile, mass = self.rule_options
            found = knee(
                [float(scores[i]) for i in among], rule, min_keep, None, clip_quantile, mass
            )
            return {among[i] for i in found}
        count = keep if isinstance(keep, int) else math.floor(keep * len(among) + 0.5)
        ranked = sorted(among, key=lambda i: (-float(scores[i]), i))
        cut([float(scores[i]) for i in ranked], count)
        return set(ranked[:count])

    def note(self, layer, stay):
        self.open = torch.tensor([i in stay for i in range(len(self.visual))])
        self.kept[layer] = sorted(stay)

    def attend(self, attention, hidden, rotary):
        def heads(projection):
            return (
                projection(hidden).view(*hidden.shape[:2], -1, attention.head_dim).transpose(1, 2)
            )

        query, key, value = map(heads, (attention.q_proj, attention.k_proj, attention.v_proj))
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1)[0] for x in (key, value))
        logits = query[0] @ key.transpose(1, 2) * attention.scaling
        rows = hidden.shape[1]
        seen = torch.ones(rows, rows, dtype=torch.bool).tril() & self.open
        seen |= torch.eye(rows, dtype=torch.bool)  # rows that left see themselves, for a softmax
        weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
        return attention.o_proj((weights @ value).transpose(0, 1).reshape(1, rows, -1))
