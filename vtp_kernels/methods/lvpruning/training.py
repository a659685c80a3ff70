"""Training of deciders beside a frozen model (LVPruning, arXiv 2501.13652, section 3.3)."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vtp_kernels.machine import multiplies_bfloat16
from vtp_kernels.models.checks.text_check import check_text_model
from vtp_kernels.models.families import ModelParts, parts_of
from vtp_kernels.models.masked_run import MaskedRun, check_masks
from vtp_kernels.models.modules.placement import device_of

from .checkpoint import load_checkpoint, save_checkpoint
from .data import IGNORE, Batch, Collator, Dataset
from .deciders import Deciders
from .decisions import Choosing, Sides, gumbel_noise
from .files import Fit, save_deciders
from .processes import Processes
from .recipe import Recipe

__all__ = ["METRICS", "train"]

METRICS = "metrics.jsonl"


def train(
    model: nn.Module,
    dataset: Dataset,
    *,
    processor: Any,
    out: str | Path,
    recipe: Recipe | None = None,
    stop_after: int | None = None,
) -> Path:
    """Train deciders for a model, whose own weights stay as they are.

    Rows that a decider drops are masked, not removed: later rows no longer see them, up to the
    end. The loss is the language model's on the answers, and how far the share of rows that stay
    is from the ratios. Where `out` holds a checkpoint of the same recipe the run goes on from
    there, and ends with the same bits as one that never stopped.

    Under torchrun the processes share every batch; the result is that of one process, up to the
    order of float32 sums.

    Parameters
    ----------
    model : of a supported family, on its device, in the dtype it is to run in
    dataset : conversations about pictures, as `LlavaConversations`
    processor : the model's
    out : folder for deciders.safetensors and deciders.json (what `LVPruning` takes),
        metrics.jsonl (one line a step) and the checkpoint
    recipe : default `Recipe()`, that of the paper
    stop_after : int
        Steps after which to stop with a checkpoint, before the end of the run.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    ValueError
        If the recipe does not fit the model or the data, or `out` holds another run.
    NotImplementedError
        If the model is not supported, or masking is not removing in its layers.
    """
    recipe = recipe or Recipe()
    parts = parts_of(model)
    check_masks(parts)
    check_text_model(parts.text, parts.page.row_arguments)
    device = device_of(parts.text)
    _check(parts, dataset, recipe)
    if recipe.precision == "bf16" and not multiplies_bfloat16(device):
        warnings.warn(
            'Recipe.precision: this CPU has no instructions for "bf16" and takes several times as '
            'long as for "fp32"',
            stacklevel=2,
        )
    with Processes(device) as processes, _frozen(model):
        run = _Run(parts, dataset, Collator(processor), Path(out), recipe, processes, device)
        run.go(stop_after)
    return Path(out)


def _check(parts: ModelParts, dataset: Dataset, recipe: Recipe) -> None:
    depth = len(parts.layers)
    if recipe.layers[-1] >= depth:
        raise ValueError(
            f"Recipe.layers: there is no layer {recipe.layers[-1]}, the model has {depth} decoder "
            f"layers (0 to {depth - 1})"
        )
    if len(dataset) < recipe.batch:
        raise ValueError(
            f"dataset: {len(dataset)} conversations do not fill one batch of {recipe.batch}"
        )


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without dropout, and no gradients for the model's own parameters; as before afterwards."""
    training = model.training
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in learned:
            parameter.requires_grad_(True)


class Sums(NamedTuple):
    """What a micro-batch adds to the loss and the metrics of a step; all but `language` and
    `ratio` carry no gradient."""

    language: Tensor  # of all answer tokens
    ratio: Tensor  # of all prompts
    kept: Tensor  # [layers], summed over prompts


class _Run:
    """A training run, in one of its processes."""

    def __init__(
        self,
        parts: ModelParts,
        dataset: Dataset,
        collate: Collator,
        out: Path,
        recipe: Recipe,
        processes: Processes,
        device: torch.device,
    ) -> None:
        self.parts, self.dataset, self.collate, self.out = parts, dataset, collate, out
        self.recipe, self.processes, self.device = recipe, processes, device
        self.fit = Fit.of(parts.family, parts.text.config, recipe.layers, recipe.width)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.deciders = Deciders(self.fit.shape)
        self.deciders.to(device)
        self.optimizer = torch.optim.AdamW(
            self.deciders.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.steps = recipe.epochs * (len(dataset) // recipe.batch)
        # What must agree for a run to go on; how it is cut into micro-batches need not.
        self.settings = recipe.to_dict() | {"conversations": len(dataset)}
        for name in ("micro_batch", "save_every"):
            del self.settings[name]

    def go(self, stop_after: int | None) -> None:
        from tqdm import tqdm

        begun = load_checkpoint(self.out, self.deciders, self.optimizer, self.settings)
        if self.processes.first:
            self.out.mkdir(parents=True, exist_ok=True)
            _forget_metrics(self.out / METRICS, begun)
        self.processes.wait()
        end = self.steps if stop_after is None else min(self.steps, stop_after)
        progress = tqdm(
            range(begun, end),
            initial=begun,
            total=self.steps,
            desc="deciders",
            disable=None if self.processes.first else True,
        )
        started = time.monotonic()
        for step in progress:
            metrics = self._step(step)
            metrics["seconds"] = round(time.monotonic() - started, 2)
            progress.set_postfix(lm=f"{metrics['lm_loss']:.3f}", ratio=f"{metrics['kept'][-1]:.3f}")
            if self.processes.first:
                with (self.out / METRICS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(metrics) + "\n")
            if (step + 1) % self.recipe.save_every == 0 or step + 1 == end:
                self._save(step + 1)

    def _save(self, step: int) -> None:
        if self.processes.first:
            save_checkpoint(self.out, self.deciders, self.optimizer, step, self.settings)
            training = self.settings | {"steps": step, "of": self.steps}
            save_deciders(self.out, self.deciders, self.fit, training)
        self.processes.wait()

    # ---- one step -----------------------------------------------------------------------------

    def _step(self, step: int) -> dict[str, Any]:
        recipe, processes = self.recipe, self.processes
        mine = self._samples(step)
        batches = [
            self.collate([self.dataset[index] for _, index in part])
            for part in _chunks(mine, recipe.micro_batch)
        ]
        answers = torch.tensor(
            [sum(int((batch.labels[:, 1:] != IGNORE).sum()) for batch in batches)],
            dtype=torch.float64,
            device=self.device,
        )
        processes.add([answers])
        totals = torch.zeros(2 + len(recipe.layers), dtype=torch.float64, device=self.device)
        for part, batch in zip(_chunks(mine, recipe.micro_batch), batches, strict=True):
            sums = self._forward(step, [position for position, _ in part], batch)
            loss = sums.language / answers.item()
            loss = loss + recipe.ratio_weight * sums.ratio / recipe.batch
            loss.backward()
            totals += torch.cat((sums.language[None], sums.ratio[None], sums.kept)).detach()
        parameters = list(self.deciders.parameters())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        processes.add([parameter.grad for parameter in parameters])
        processes.add([totals])
        norm = nn.utils.clip_grad_norm_(parameters, recipe.clip)
        rate = recipe.rate(step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        language, ratio, *kept = totals.tolist()
        return {
            "step": step,
            "lm_loss": language / answers.item(),
            "ratio_loss": ratio / recipe.batch,
            "kept": [share / recipe.batch for share in kept],
            "gradient_norm": float(norm),
            "learning_rate": rate,
        }

    def _samples(self, step: int) -> list[tuple[int, int]]:
        """This process's part of a batch: (position in the batch, index in the dataset)."""
        size, per_epoch = self.recipe.batch, len(self.dataset) // self.recipe.batch
        epoch, within = divmod(step, per_epoch)
        shuffle = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.dataset), generator=shuffle)
        batch = order[within * size : (within + 1) * size].tolist()
        return list(enumerate(batch))[self.processes.rank :: self.processes.world]

    def _forward(self, step: int, positions: list[int], batch: Batch) -> Sums:
        recipe = self.recipe
        inputs = {
            name: tensor.to(
                self.device, self.parts.text.dtype if tensor.is_floating_point() else None
            )
            for name, tensor in batch.inputs.items()
        }
        visual = self.parts.visual_tokens(inputs)
        text = batch.text.to(self.device) & ~visual
        sides = Sides.of(visual, text)
        choosing = Choosing(
            self.deciders, sides, self._noise(step, positions, sides), recipe.temperature
        )
        labels = batch.labels.to(self.device)
        # Logits from the first answer of the batch on: the last ones, as padding is behind.
        wanted = int((labels != IGNORE).any(0).nonzero()[0])
        labels = labels[:, wanted:]
        valid = inputs["attention_mask"].bool()
        secant = recipe.gradient == "secant"
        with (
            MaskedRun(self.parts, recipe.layers, choosing.decide, secant=secant) as run,
            torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"),
        ):
            run.valid = None if bool(valid.all()) else valid
            keep = labels.shape[1] + 1
            logits = self.parts.top(**inputs, use_cache=False, logits_to_keep=keep).logits[:, :-1]
        language = cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        ratio = choosing.ratio_losses(recipe.ratios).sum()
        kept = torch.stack([share.sum() for share in choosing.shares()])
        return Sums(language, ratio, kept.detach())

    def _noise(self, step: int, positions: list[int], sides: Sides) -> dict[int, Tensor]:
        """For each layer [B, N, 2], of which a prompt draws its own visual rows alone."""
        layers = self.recipe.layers
        noise = torch.zeros(len(layers), *sides.visual_at.shape, 2)
        for b, (position, count) in enumerate(
            zip(positions, sides.visual_valid.sum(1).tolist(), strict=True)
        ):
            drawn = gumbel_noise(self.recipe.seed, step, position, (len(layers), count, 2))
            noise[:, b, :count] = drawn
        noise *= self.recipe.noise(step, self.steps)
        return dict(zip(layers, noise.to(self.device), strict=True))


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _forget_metrics(path: Path, begun: int) -> None:
    """Drop lines of steps that a checkpoint does not have: they are taken once more."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(x for x in lines if json.loads(x)["step"] < begun), encoding="utf-8")
