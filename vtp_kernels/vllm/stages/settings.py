"""What is asked for in vLLM's `additional_config`, and whether it can be had."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vtp_kernels._shown import shown
from vtp_kernels.contract.passive import PassiveVisual
from vtp_kernels.methods import Method, method_from_spec
from vtp_kernels.vllm.budget import KEY

__all__ = ["REQUESTS", "SCHEDULER", "WHERE", "Settings", "check_engine"]

WHERE = f"additional_config.{KEY}"
SCHEDULER = "vtp_kernels.vllm.StagedScheduler"
REQUESTS = "vtp_kernels.vllm:StagedRequests"
GRAPHS = ("NONE", "FULL_DECODE_ONLY")
#: In which a block of one layer may be as long as several of others.
PACKED = ("BLNHC", "BLHNC")
#: How many images a prompt is taken to have where a method is asked whether it can tell its counts.
SOME = (576, 576)


@dataclass(frozen=True)
class Settings:
    """A method, the layers before which it lets rows leave, of how many, those in which visual
    tokens are passive, and whether KV cache groups are to have unlike numbers of layers."""

    method: Method
    layers: tuple[int, ...]
    depth: int
    passive: Mapping[int, PassiveVisual] = field(default_factory=dict)
    packed: bool = False

    @classmethod
    def of(cls, vllm_config: Any) -> Settings | None:
        """What an engine was started with; None if it asks for nothing.

        Raises ValueError or TypeError for settings that are wrong, NotImplementedError for a method
        that vLLM cannot have.
        """
        given = _given(vllm_config.additional_config)
        method = _method(given.get("method"))
        if method is None:
            return None
        text = vllm_config.model_config.hf_config.get_text_config()
        depth = text.num_hidden_layers
        method.check_model(depth)
        method.check_config(vllm_config.model_config.hf_config.model_type, text)
        _check_method(method, depth)
        layers = tuple(sorted(set(method.decision_layers(depth))))
        found = cls(method, layers, depth, dict(method.passive_layers(depth)), given["packed"])
        if found.packed and found.times < 2:
            raise ValueError(
                f"{WHERE}.packed: expected a method with a stage of at least twice as many layers "
                f"as come before the first; it decides before layers {layers} of {depth}"
            )
        return found

    @property
    def times(self) -> int:
        """How many layers the widest stage has for one before the first stage."""
        bounds = [*self.layers, self.depth]
        widest = max(b - a for a, b in itertools.pairwise(bounds))
        return widest // self.layers[0] if self.layers[0] else 0

    def stage_of(self, layer: int) -> int | None:
        """The last stage that has begun at a layer; None above the first."""
        begun = [stage for stage, at in enumerate(self.layers) if at <= layer]
        return begun[-1] if begun else None

    @cached_property
    def counted(self) -> bool:
        """Whether it is known beforehand how many rows stay; else only how many at most."""
        return all(self.method.visual_left(layer, SOME) is not None for layer in self.layers)

    def changes(self, pictures: Sequence[int]) -> bool:
        """Whether such a prompt is read in another way than vLLM's own."""
        visual = sum(pictures)
        if self.passive or not self.counted:
            return bool(visual)
        return any(most < visual for most in self.most(pictures))

    def most(self, pictures: Sequence[int]) -> list[int]:
        """Visual tokens in each stage, of a prompt whose pictures came with so many; at most, if
        they are not counted."""
        return [self.method.visual_most(layer, pictures) for layer in self.layers]


def _given(additional_config: Any) -> dict[str, Any]:
    """What was given, with `packed` in any case."""
    if not isinstance(additional_config, Mapping) or additional_config.get(KEY) is None:
        return {"packed": False}
    value = additional_config[KEY]
    if not isinstance(value, Mapping):
        raise TypeError(f'{WHERE}: expected {{"method": "fastv:2:0.5"}}, got {shown(value)}')
    if unknown := sorted(map(str, value.keys() - {"method", "packed"})):
        raise ValueError(
            f"{WHERE}: there is no {', '.join(unknown)}; expected 'method' and 'packed'"
        )
    if "method" not in value:
        raise ValueError(f"{WHERE}.method: expected a method, got nothing")
    if not isinstance(value.get("packed", False), bool):
        raise TypeError(f"{WHERE}.packed: expected true or false, got {shown(value['packed'])}")
    return {"packed": False, **value}


def _method(given: Any) -> Method | None:
    try:
        if isinstance(given, Mapping):
            return Method.from_dict(dict(given))
        if given is None or isinstance(given, str):
            return None if given is None else method_from_spec(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{WHERE}.method: {error}") from error
    raise TypeError(
        f"{WHERE}.method: expected a string such as 'fastv:2:0.5', the path of a JSON file, or "
        f"what to_dict() gives, got {shown(given)}"
    )


def _check_method(method: Method, depth: int) -> None:
    """Raise NotImplementedError for one that asks for what vLLM cannot give it."""
    layers = method.decision_layers(depth)
    for cannot, why in (
        (not layers, "it lets no rows leave between layers"),
        (
            any(how.leaves_one for how in method.passive_layers(depth).values()),
            "it keeps visual tokens out of layers' caches (shallow_attention='skip')",
        ),
        (method.forgetful_layers(depth), "it takes keys from the cache (forgetful_layers)"),
        (method.vision_source(), "it asks what the vision tower saw (vision_source)"),
        (
            any(method.visual_most(layer, SOME) is None for layer in layers),
            "it does not tell beforehand how many tokens it leaves at most (visual_most), and vLLM "
            "gives a prompt its memory before anything runs",
        ),
    ):
        if cannot:
            raise NotImplementedError(
                f"{WHERE}.method: vLLM cannot have {type(method).__name__} with these settings: "
                f"{why}"
            )


def check_engine(config: Any, version: str, layout: str | None) -> None:
    """Raise ValueError or NotImplementedError, naming the option, unless vLLM's configuration is
    one with which rows may leave between layers. `version` is vLLM's, and `layout` what
    VLLM_KV_CACHE_LAYOUT asks for."""
    if not version.startswith("0.32."):
        raise NotImplementedError(
            f"{WHERE}: pruning between layers is made for vLLM 0.32, this is {version}"
        )
    if not config.use_v2_model_runner:
        raise NotImplementedError(
            f"{WHERE}: pruning between layers needs vLLM's model runner V2; set "
            "VLLM_USE_V2_MODEL_RUNNER=1"
        )
    for option, found, expected, why in _options(config):
        if found != expected:
            raise ValueError(
                f"{option}: expected {expected!r} with {WHERE}, for {why}; got {shown(found)}"
            )
    graphs = config.compilation_config.cudagraph_mode
    if graphs is not None and graphs.name not in GRAPHS:
        raise ValueError(
            f"compilation_config.cudagraph_mode: expected one of {GRAPHS} with {WHERE}, for a "
            f"graph has as many rows in all layers; got {graphs.name!r}"
        )
    if _given(config.additional_config)["packed"]:
        _check_packed(config, layout)


def _check_packed(config: Any, layout: str | None) -> None:
    if config.device_config.device_type == "cpu":
        raise NotImplementedError(
            f"{WHERE}.packed: vLLM's attention on a CPU has no layout with blocks outermost"
        )
    if layout not in PACKED:
        raise ValueError(
            f"VLLM_KV_CACHE_LAYOUT: expected one of {PACKED} with {WHERE}.packed, for unlike "
            f"numbers of layers share a block; got {shown(layout)}"
        )


def _name(given: Any) -> Any:
    """A class that was given itself by the name that it has on a command line."""
    homes = {
        "vtp_kernels.vllm.stages.scheduler.StagedScheduler": SCHEDULER,
        "vtp_kernels.vllm.stages.requests.StagedRequests": REQUESTS,
    }
    if isinstance(given, type):
        given = f"{given.__module__}.{given.__qualname__}"
    return homes.get(given, given)


def _options(config: Any) -> list[tuple[str, Any, Any, str]]:
    """(option, what it is, what it has to be, why)."""
    scheduler, parallel, cache = (
        config.scheduler_config,
        config.parallel_config,
        config.cache_config,
    )
    name = _name(scheduler.scheduler_cls)
    processors = list(map(_name, config.model_config.logits_processors or ()))
    rows = "it counts on all layers having the same rows"
    blocks = "it finds keys by their place in the prompt"
    return [
        ("scheduler_cls", name, SCHEDULER, "it tells the KV cache how many rows stay"),
        (
            "logits_processors",
            REQUESTS if REQUESTS in processors else processors,
            REQUESTS,
            "it tells clients what they cannot ask for",
        ),
        (
            "enable_chunked_prefill",
            scheduler.enable_chunked_prefill,
            False,
            "a prompt with images has to be read in one step, or its choice would not see all of "
            "it (--no-enable-chunked-prefill)",
        ),
        (
            "long_prefill_token_threshold",
            scheduler.long_prefill_token_threshold,
            0,
            "it cuts prompts up",
        ),
        (
            "disable_hybrid_kv_cache_manager",
            bool(scheduler.disable_hybrid_kv_cache_manager),
            False,
            "layers need block tables of their own",
        ),
        ("speculative_config", config.speculative_config, None, rows),
        ("enable_lora", config.lora_config is not None, False, rows),
        ("pipeline_parallel_size", parallel.pipeline_parallel_size, 1, rows),
        ("data_parallel_size", parallel.data_parallel_size, 1, "that has not been tried"),
        ("decode_context_parallel_size", parallel.decode_context_parallel_size, 1, blocks),
        ("prefill_context_parallel_size", parallel.prefill_context_parallel_size, 1, rows),
        ("enable_dbo", bool(parallel.use_ubatching), False, rows),
        ("kv_transfer_config", config.kv_transfer_config, None, blocks),
        ("ec_transfer_config", config.ec_transfer_config, None, "that has not been tried"),
        ("kv_offloading_size", cache.kv_offloading_size, None, blocks),
        ("kv_sharing_fast_prefill", cache.kv_sharing_fast_prefill, False, rows),
        (
            "enable_prompt_embeds",
            config.model_config.enable_prompt_embeds,
            False,
            "such a prompt does not tell its images from its text",
        ),
        ("runner", config.model_config.runner_type, "generate", "pooling reads rows that leave"),
    ]
