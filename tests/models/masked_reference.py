"""Pruning told again, independently: nothing is removed, pruned keys are masked layer by layer.

For eager models only. Scores are read off the attention weights the model itself computed; masks
are the model's own 4D masks with columns closed; sets are chosen by sorting in Python. Nothing of
vtp_kernels is used.
"""

import torch


class MaskedReference:
    """`stages` {layer: keep} as in Schedule, or `given` {layer: bool [B, S]}: sets to take over.
    `groups` int64 [B, S]: of each visual token, where budgets are of groups and not of prompts.
    `content` {layer: f}: rows [B, S, C] at its entry are to be f(rows)."""

    def __init__(
        self,
        model,
        stages,
        *,
        score="last_token",
        given=None,
        contiguous=False,
        groups=None,
        content=(),
    ):
        assert model.get_decoder().config._attn_implementation == "eager"
        self.model, self.stages, self.score = model, stages, score
        self.given, self.contiguous, self.groups = given, contiguous, groups
        self.content = dict(content)
        self.keep = {}  # layer -> bool [B, every row seen so far]: columns open from there on
        self.kept = {}  # the same for the last call with images, that call's rows alone
        self.scores = None
        self.hooks = []

    def __enter__(self):
        language_model = self.model.get_decoder()
        self.rotary = language_model.rotary_emb
        add = self.hooks.append
        add(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        for index, layer in enumerate(language_model.layers):
            before = self._before_layer(index)
            add(layer.register_forward_pre_hook(before, with_kwargs=True))
            if index + 1 in self.stages and not self.given:
                after = self._after_attention
                add(layer.self_attn.register_forward_hook(after, with_kwargs=True))
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def kind_of(self, layer):
        """What the rotary embedding wants to know of a layer, where it has several."""
        several = hasattr(self.rotary, "layer_types")
        return (self.rotary.config.layer_types[layer],) if several else ()

    def _begin(self, module, args, kwargs):
        ids = kwargs["input_ids"]
        features = kwargs.get("mm_encoder_outputs") or {}
        self.visual = torch.zeros_like(ids, dtype=torch.bool)
        for pixels, kind in (("pixel_values", "image"), ("pixel_values_videos", "video")):
            if kwargs.get(pixels) is not None or features.get(kind) is not None:
                config = self.model.config
                token = getattr(config, f"{kind}_token_id", None)
                token = getattr(config, f"{kind}_token_index") if token is None else token
                if config.model_type in (
                    "glm4v",
                    "glm4v_moe",
                    "glm46v",
                    "glm_ocr",
                ):  # frames are as pictures
                    token = config.image_token_id
                self.visual |= ids == token
        self.with_images = bool(self.visual.any())
        self.rows = ids.shape[1]
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        past = 0 if cache is None else cache.get_seq_length()
        if mask is None:  # generate() drops masks that are all ones
            mask = torch.ones(ids.shape[0], past + self.rows)
        self.all_real = mask.bool()
        self.real = self.all_real[:, -self.rows :]
        if past == 0:
            self.keep = {}
        if self.with_images:
            self.total = self.visual.sum(1)
            self.open = self.real.clone()

    def _after_attention(self, module, args, kwargs, output):
        if not self.with_images:
            return
        weights = output[1][..., -self.rows :].float()  # [B, H, rows, rows]
        if self.score == "contribution":  # length of all heads' (weight x value), side by side
            hidden = kwargs["hidden_states"]
            value = module.v_proj(hidden).view(*hidden.shape[:2], -1, module.head_dim)
            value = value.repeat_interleave(weights.shape[1] // value.shape[2], dim=2)
            added = weights[:, :, -1].transpose(1, 2)[..., None] * value  # [B, rows, H, D]
            self.scores = added.flatten(2).norm(dim=-1)
            return
        if self.score == "last_token":
            self.scores = weights[:, :, -1].mean(1)
            return
        self.scores = torch.zeros(weights.shape[0], self.rows)
        for b in range(weights.shape[0]):
            behind = self.visual[b].cumsum(0) > 0
            text = self.real[b] & ~self.visual[b] & behind
            if text.any():
                self.scores[b] = weights[b][:, text].mean((0, 1))

    def _choose(self, layer):
        if self.given:
            return self.given[layer] & self.real
        keep = self.stages[layer]
        for b in range(self.visual.shape[0]):
            groups = torch.zeros_like(self.visual[b]) if self.groups is None else self.groups[b]
            for group in groups[self.visual[b]].unique():
                within = self.visual[b] & (groups == group)
                left = (within & self.open[b]).nonzero()[:, 0].tolist()
                count = keep if isinstance(keep, int) else int(keep * int(within.sum()) + 0.5)
                best = sorted(left, key=lambda j: (-float(self.scores[b, j]), j))[:count]
                self.open[b, [j for j in left if j not in best]] = False
        return self.open.clone()

    @staticmethod
    def _changed(args, kwargs, change):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    def _before_layer(self, index):
        def before(module, args, kwargs):
            if index in self.stages:
                now = self._choose(index) if self.with_images else self.real
                if self.with_images:
                    self.kept[index] = now
                past = self.keep.get(index)
                if past is None:  # whatever came before the first call with images is all open
                    past = self.all_real[:, : self.all_real.shape[1] - self.rows]
                self.keep[index] = torch.cat((past, now), dim=1)
            if index in self.content and self.with_images:
                args, kwargs = self._changed(args, kwargs, self.content[index])
            stage = max((layer for layer in self.keep if layer <= index), default=None)
            if stage is None:
                return None
            keep, mask = self.keep[stage], kwargs["attention_mask"]
            kwargs = dict(kwargs)
            # Padding is closed already; closed here are rows that are real but were pruned.
            closed = torch.zeros(*keep.shape, dtype=mask.dtype)
            closed = closed.masked_fill(~keep, torch.finfo(mask.dtype).min)[:, None, None]
            closed = closed[..., -mask.shape[-1] :]  # a sliding window's mask has the last alone
            kwargs["attention_mask"] = torch.clamp(mask + closed, min=torch.finfo(mask.dtype).min)
            if self.contiguous:
                real = self.all_real[:, : keep.shape[1]]
                gone = (real & ~keep).cumsum(1)[:, -self.rows :]
                positions = kwargs["position_ids"] - gone
                hidden = args[0] if args else kwargs["hidden_states"]
                kwargs["position_ids"] = positions
                kwargs["position_embeddings"] = self.rotary(hidden, positions, *self.kind_of(index))
            return args, kwargs

        return before
