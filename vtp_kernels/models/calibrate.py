"""A method that decides as it goes, turned into a fixed schedule."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from vtp_kernels.methods import Method, Schedule
from vtp_kernels.methods.scorers import SCORERS

from .families import parts_of
from .handle import prune

__all__ = ["calibrate"]


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    method: Method,
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
    batches : the model's inputs, as its processor gives them
        Prompts without images are left out.
    method : VisiPruner(...), or any other
    score : as of Schedule
        How the schedule ranks tokens; by default as VisiPruner does.

    Raises
    ------
    ValueError
        If no prompt has an image; if the method lets text leave, which no schedule does
        (InflectionPruning), or anything before layer 0, where there is nothing yet for `score` to
        look at; or as `apply` and Schedule.
    """
    Schedule({}, score=score)  # these two refuse what cannot be before a prompt runs
    prune(model, method, backend=backend).remove()
    name = type(method).__name__
    if SCORERS[score].needs_attention and 0 in method.decision_layers(len(parts_of(model).layers)):
        raise ValueError(
            f"method: {name} lets tokens leave before layer 0, and a schedule that ranks them by "
            f"{score!r} cannot: there is no attention yet to look at. Use score='random', or a "
            "method that begins later"
        )
    shares: list[list[float]] = []
    for batch in batches:
        with torch.inference_mode(), prune(model, method, backend=backend) as run:
            model(**batch, logits_to_keep=1)
            try:
                report = run.report()
            except RuntimeError:  # no call with images
                continue
        lost_text = [event["layer"] for event in report.events if "text_after" in event]
        if lost_text:
            raise ValueError(
                f"method: {name} lets text leave before layer {lost_text[0]}, and a schedule is "
                "for visual tokens alone: it would not do what the method does"
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
