"""A method that decides as it goes, turned into a fixed schedule."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtp_kernels._shown import shown
from vtp_kernels.contract.method import Method
from vtp_kernels.contract.spec import method_of
from vtp_kernels.models.families import parts_of
from vtp_kernels.models.handle import NothingToReport, prune

from .merging import MERGED
from .schedule import Schedule
from .scorers import SCORERS

__all__ = ["calibrate"]


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    method: Method | str,
    *,
    score: str = "contribution",
    backend: str | None = None,
) -> Schedule:
    """What `method` does to sample prompts, as a schedule that decides nothing while it runs.

    A layer keeps the share of visual tokens that it had in half of the prompts: the median. Such a
    schedule waits for nothing on the host and has static shapes for prompts of one shape.

    Parameters
    ----------
    model : a transformers model of a supported family, see `supported_models()`
    batches : list of the model's inputs, as its processor gives them
        Prompts without images are left out.
    method : VisiPruner(...), or any other, or a string such as "visipruner" that stands for one
    score : as of Schedule
        How the schedule ranks tokens; by default as VisiPruner does.

    Raises
    ------
    TypeError
        If `batches` is one batch, or holds something that is none.
    ValueError
        If no prompt has an image; if the method lets text leave (InflectionPruning) or merges rows
        (SparseVLM), which no schedule does; if it lets anything leave before layer 0, where there
        is nothing yet for `score` to look at; or as `apply` and Schedule.
    """
    method = method_of(method)
    batches = _checked(batches)
    Schedule({}, score=score)  # these two refuse what cannot be before a prompt runs
    prune(model, method, backend=backend).remove()
    name = type(method).__name__
    if SCORERS[score].needs_attention and 0 in method.decision_layers(len(parts_of(model).layers)):
        raise ValueError(
            f"method: {name} decides before layer 0, and a schedule that ranks them by "
            f"{score!r} cannot: there is no attention yet to look at. Use score='random', or a "
            "method that begins later"
        )
    shares: list[list[float]] = []
    for batch in batches:
        with torch.inference_mode(), prune(model, method, backend=backend) as run:
            model(**batch, logits_to_keep=1)
            try:
                report = run.report()
            except NothingToReport:
                continue
        lost_text = [event["layer"] for event in report.events if "text_after" in event]
        if lost_text:
            raise ValueError(
                f"method: {name} lets text leave before layer {lost_text[0]}, and a schedule is "
                "for visual tokens alone: it would not do what the method does"
            )
        if any(event["event"] == MERGED for event in report.events):
            raise ValueError(
                f"method: {name} merges rows that leave into others, which no schedule does"
            )
        visual = report.kept.visual.sum(1).tolist()
        for b, count in enumerate(visual):
            if count:
                shares.append([layer[b] / count for layer in report.visual_tokens_per_layer])
    if not shares:
        raise ValueError("batches: no prompt has an image, there is nothing to calibrate on")
    keep, before = {}, 1.0
    for layer, column in enumerate(zip(*shares, strict=True)):
        median = statistics.median(column)
        if median < before:
            keep[layer] = before = median
    return Schedule(keep, score=score)


def _checked(batches: Any) -> Iterable[Mapping[str, Any]]:
    """The same, once it is known to be several batches. What makes its batches as it goes is
    checked as it goes."""
    if isinstance(batches, Mapping):
        raise TypeError(
            f"batches: expected a list of batches, got one batch ({shown(batches)}): pass [batch]"
        )
    if not isinstance(batches, Iterable) or isinstance(batches, str | Tensor):
        raise TypeError(f"batches: expected a list of batches, got {shown(batches)}")
    one_by_one = _mappings(batches)
    return list(one_by_one) if isinstance(batches, Sequence) else one_by_one


def _mappings(batches: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"batches[{index}]: expected a mapping of the model's inputs, as its processor "
                f"gives them, got {shown(batch)}"
            )
        yield batch
