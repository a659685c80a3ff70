"""VisiPruner told again: one prompt, plain matrices, weights zeroed after the softmax.

Written from the paper and the arithmetic of its public code (arXiv 2510.17205), with explicit
contributions c_j and full attention matrices. Nothing of vtp_kernels is used.
"""

import math

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from near_ties import apart, away


class PlainVisiPruner:
    """Runs one prompt and notes what happens: `fusion` and `exit`, the layers, or None; `kept`, a
    list of columns; `logits` of the last row; by layer, `cosine` and `norm` of what is there."""

    def __init__(
        self,
        *,
        shallow_layers,
        fusion_threshold=-2.0,
        token_threshold=0.0,
        min_keep=0,
        exit_threshold=2.0,
        exit_votes=2,
        stages=("shallow", "middle", "deep"),
        consecutive_votes=False,
        shallow_attention="exact",
        shallow_first_layer="merge_first",
        shallow_visual_rows="causal",
    ):
        self.__dict__.update({k: v for k, v in locals().items() if k != "self"})

    def run(self, model, inputs):
        text = model.model.language_model
        seen = {}
        hook = text.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
        )
        model(**inputs)
        hook.remove()
        hidden = seen["inputs_embeds"]
        self.visual = (inputs["input_ids"] == model.config.image_token_id)[0]
        rows = torch.arange(hidden.shape[1])
        rotary = text.rotary_emb(hidden, position_ids=rows[None])
        self.open = torch.ones_like(self.visual)  # columns that have not left
        self.fusion = self.exit = self.kept = None
        self.votes, self.cosine, self.norm = 0, {}, {}
        for index, layer in enumerate(text.layers):
            left = self.open.clone()
            hidden = hidden + self.attend(
                index, layer.self_attn, layer.input_layernorm(hidden), rotary, left
            )
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.logits = model.lm_head(text.norm(hidden))[0, -1]
        return self

    def attend(self, index, attention, hidden, rotary, left):
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
        seen = torch.ones(rows, rows, dtype=torch.bool).tril() & left
        weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
        if "shallow" in self.stages and index < self.shallow_layers:
            weights = self.make_passive(index, weights, logits, seen)
        if index > self.shallow_layers or self.shallow_layers == 0:
            self.judge(index, weights[:, -1], value)
        output = (weights @ value).transpose(0, 1).reshape(1, rows, -1)
        return attention.o_proj(output)

    def make_passive(self, index, weights, logits, seen):
        visual, text = self.visual, ~self.visual
        if not visual.any():
            return weights
        first = int(visual.nonzero()[0])
        if self.shallow_attention == "skip":
            only = seen & (text | (torch.arange(len(text)) == first))
            weights = logits.masked_fill(~only, -math.inf).softmax(-1).nan_to_num()
            weights[:, visual] = 0
            return weights
        weights = weights.clone()
        from_text, to_visual = text[:, None] & visual, visual[:, None] & visual
        if index == 0:
            if self.shallow_first_layer == "merge_first":
                mass = (weights * from_text).sum(-1)
                weights[:, from_text] = 0
                weights[:, to_visual] = 0
                weights[:, text, first] = mass[:, text]
                return weights
            ordinal = visual.cumsum(0) - 1
            first_half = visual & (ordinal < int(visual.sum()) // 2)
            weights[:, text[:, None] & first_half] = 0
            weights[:, to_visual] = 0
            return weights
        weights[:, from_text] = 0
        if self.shallow_visual_rows == "none":
            weights[:, to_visual] = 0
        return weights

    def judge(self, index, weights, value):
        alive = (self.visual & self.open).nonzero()[:, 0].tolist()
        if not alive:
            return
        contributions = (weights[:, :, None] * value).transpose(0, 1).flatten(1)  # [rows, H D]
        output = contributions.sum(0)
        cosine = [
            torch.cosine_similarity(output - contributions[j], output, dim=0).item() for j in alive
        ]
        norm = [contributions[j].norm().item() for j in alive]
        self.cosine[index], self.norm[index] = cosine, norm
        fused = self.fusion is not None or "middle" not in self.stages
        if not fused:
            away([min(cosine)], self.fusion_threshold)
            if min(cosine) < self.fusion_threshold:
                self.fusion = index
                away(apart(norm), self.token_threshold)
                best = sorted(norm, reverse=True)[: self.min_keep]
                self.kept = [
                    j
                    for j, n in zip(alive, norm, strict=True)
                    if n > self.token_threshold or n in best
                ]
                self.open = ~self.visual
                self.open[self.kept] = True
        elif "deep" in self.stages:
            away([min(cosine)], self.exit_threshold)
            if min(cosine) >= self.exit_threshold:
                self.votes += 1
            elif self.consecutive_votes:
                self.votes = 0
            if self.votes == self.exit_votes:
                self.exit = index
                self.open = ~self.visual
