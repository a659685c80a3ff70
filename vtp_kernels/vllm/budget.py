"""How many visual tokens an image may take in vLLM, and what chooses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from vtp_kernels._shown import shown

__all__ = ["KEY", "SCORES", "Budget", "without_budget"]

#: Where the settings stand in vLLM's `mm_processor_kwargs`. Of the ways that settings travel, this
#: one reaches the processor and the workers, may differ from request to request, and is part of the
#: keys of vLLM's caches. Inside of `images_kwargs` transformers refuses what it does not know: with
#: the plugin switched off, the settings are an error and not forgotten.
SCOPE, KEY = "images_kwargs", "vtp"
SCORES = ("attention", "similarity")


@dataclass(frozen=True)
class Budget:
    """A fixed number of visual tokens for every image.

    Parameters
    ----------
    keep : int
        Rows of the prompt that an image takes, at least 1. LLaVA-NeXT sees an image as a whole and
        in crops: they share the number evenly, and what a crop with little in it cannot use goes to
        the others. The rows that end its lines (`image_newline`) leave first. An image that has no
        more rows than that keeps them all.
    score : "attention" | "similarity"
        The attention that CLS pays to the tokens in the feature layer of the vision tower, mean
        over heads; or their cosine similarity to CLS there.
    """

    keep: int
    score: str = "attention"

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, int):
            raise TypeError(f"{KEY}.keep: expected an int, got {shown(self.keep)}")
        if self.keep < 1:
            raise ValueError(f"{KEY}.keep: expected at least 1, got {self.keep}")
        if self.score not in SCORES:
            raise ValueError(f"{KEY}.score: expected one of {SCORES}, got {shown(self.score)}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, mm_processor_kwargs: Mapping[str, Any] | None) -> Budget | None:
        """The settings in vLLM's `mm_processor_kwargs`; None where there are none.

        Raises ValueError or TypeError for settings in the wrong place and keys that are not known.
        """
        kwargs = mm_processor_kwargs or {}
        if KEY in kwargs:
            raise ValueError(
                f"{KEY}: expected within {SCOPE!r} of mm_processor_kwargs, as in "
                f'{{"{SCOPE}": {{"{KEY}": {{"keep": 144}}}}}}'
            )
        scope = kwargs.get(SCOPE)
        value = scope.get(KEY) if isinstance(scope, Mapping) else None
        if value is None:
            return None
        known = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping):
            raise TypeError(f"{KEY}: expected a mapping with {known}, got {shown(value)}")
        if unknown := sorted(map(str, value.keys() - set(known))):
            raise ValueError(f"{KEY}: there is no {', '.join(unknown)}; expected {known}")
        if "keep" not in value:
            raise ValueError(f"{KEY}.keep: expected how many tokens an image keeps, got nothing")
        return cls(**value)

    def check_model(self, config: Any, most: int) -> None:
        """Whether a model can be pruned so.

        Parameters
        ----------
        config : the configuration of a LLaVA-1.5 or LLaVA-NeXT
        most : int
            Rows that its images take at most, unpruned.

        Raises
        ------
        NotImplementedError
            If its vision tower has no CLS token, or if its features come from several layers or
            with the CLS token among them.
        ValueError
            If `keep` is more than its images have.
        """
        tower = config.vision_config.model_type
        if tower != "clip_vision_model":
            raise NotImplementedError(
                f"{KEY}: the vision tower is a {tower!r}, which has no CLS token to choose by; "
                "expected a 'clip_vision_model'"
            )
        strategy = config.vision_feature_select_strategy
        if strategy != "default":
            raise NotImplementedError(
                f"{KEY}: expected vision_feature_select_strategy 'default', got {strategy!r}"
            )
        layer = config.vision_feature_layer
        if not isinstance(layer, int):
            raise NotImplementedError(
                f"{KEY}: expected one vision_feature_layer to choose by, got {layer!r}"
            )
        if self.score == "attention" and layer in (0, -1 - config.vision_config.num_hidden_layers):
            raise ValueError(
                f"{KEY}.score: the features are taken before the first layer, and no attention "
                "made them; use 'similarity'"
            )
        if self.keep > most:
            raise ValueError(f"{KEY}.keep: images have at most {most} tokens, got {self.keep}")


def without_budget(mm_processor_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """`mm_processor_kwargs` as transformers knows them."""
    kwargs = dict(mm_processor_kwargs or {})
    scope = kwargs.get(SCOPE)
    if isinstance(scope, Mapping) and KEY in scope:
        scope = {name: value for name, value in scope.items() if name != KEY}
        kwargs[SCOPE] = scope
        if not scope:
            del kwargs[SCOPE]
    return kwargs
