"""What makes lmms-eval's model for vLLM a pruned one."""

from __future__ import annotations

import json
import os
from typing import Any

from vtp_kernels._shown import shown
from vtp_kernels.methods import method_from_spec
from vtp_kernels.vllm import Budget
from vtp_kernels.vllm.stages.settings import REQUESTS, SCHEDULER

__all__ = ["Served"]

PLUGINS = "VLLM_PLUGINS"
BETWEEN = {
    "scheduler_cls": SCHEDULER,
    "logits_processors": [REQUESTS],
    "enable_chunked_prefill": False,
}
GRAPHS = {"cudagraph_mode": "FULL_DECODE_ONLY"}


class Served:
    """Put in front of a model class of lmms-eval that makes a vLLM engine of its settings.

    Takes, besides that class's arguments, what is to leave before the language model, between its
    layers, or both:

    keep, score, at_most : a `vtp_kernels.vllm.Budget`
    vtp : a method as a JSON file or a short form, for between the layers; or "none". With neither
        of the two, "none" has to be said.
    """

    def __init__(
        self,
        *args: Any,
        vtp: str | None = None,
        keep: int | float | None = None,
        score: str | None = None,
        at_most: int | None = None,
        **kwargs: Any,
    ) -> None:
        if vtp is None and keep is None:
            raise TypeError("vtp: expected a method, or keep=TOKENS, or vtp=none; got none of them")
        given = {"score": score, "at_most": at_most}
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items() if keep is None else ():
            raise TypeError(f"{name}: expected with keep=TOKENS, got {shown(value)} alone")
        settings = dict(kwargs)
        if keep is not None:
            budget = Budget(keep, **given).to_dict()
            _set(settings, "mm_processor_kwargs", {"images_kwargs": {"vtp": budget}})
        if vtp is not None and (method := method_from_spec(vtp)) is not None:
            _set(settings, "additional_config", {"vtp": {"method": method.to_dict()}})
            settings["compilation_config"] = GRAPHS | _mapping(settings, "compilation_config")
            settings = BETWEEN | settings
        _ask_for_plugin()
        super().__init__(*args, **settings)


def _set(settings: dict[str, Any], option: str, value: dict[str, Any]) -> None:
    """Put `value` beside what an option of vLLM holds already."""
    given = _mapping(settings, option)
    if twice := sorted(given.keys() & value.keys()):
        raise ValueError(f"{option}: {twice[0]} is what vtp and keep say, and was given as well")
    settings[option] = given | value


def _mapping(settings: dict[str, Any], option: str) -> dict[str, Any]:
    """What an option holds, which lmms-eval also takes as JSON."""
    given = settings.get(option) or {}
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise TypeError(f"{option}: expected a mapping, or JSON of one, got {shown(given)}")
    return found


def _ask_for_plugin() -> None:
    """vLLM and its workers read this when they start."""
    named = [name for name in os.environ.get(PLUGINS, "").split(",") if name]
    if "vtp_kernels" not in named:
        os.environ[PLUGINS] = ",".join([*named, "vtp_kernels"])
