"""Trains the pocket LLaVA from a seed: `python -m benchmarks.pocket_llava.train`.

Three stages; the first two are those of LLaVA.

Tower: the vision tower alone. Linear heads read shape, colour, row and column off every patch of
the feature layer; the *same* shape and colour heads read off the CLS token which of them are in the
picture. Sharing the heads is what gives CLS similarity its meaning: a patch that shows an object
points where CLS points.

All: everything, on short questions. Many questions share one picture in one sequence, each seeing
the picture and itself only (a block mask), so that no question can be answered from another's
answer. Muon for the language model's matrices, AdamW for the rest; pictures of 2 objects first,
then more.

Fewer: the language model and the projector go on with as many patches as the lot says, all that
objects touch among them, and on the way through the layers more of them leave, twice, some of the
objects' too. Without it the model counts objects by setting them against the background, and
miscounts as soon as background leaves; a model of billions of parameters is not that brittle.
`--only fewer` runs this stage alone, on the weights in `--out`.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from vtp_kernels.demo import load
from vtp_kernels.machine import multiplies_bfloat16

from . import scenes
from .model import TOKEN, TRAINED, new_model, pixels, processor
from .muon import Muon

BACKGROUND_WEIGHT = 0.03  # 97 % of the patches are background
COVERED = 0.3  # a patch belongs to an object that fills this share of it; less, but any: ignored
IGNORE = -100
PATCHES = scenes.GRID**2
PLACES = ("top", "bottom", "left", "right")
WORDS = [TOKEN[word] for word in (*scenes.SHAPES, *scenes.COLOR_NAMES, *PLACES)]
# relations take longest to learn and counting least
KIND_SHARES = {"color": 0.22, "shape": 0.22, "place": 0.2, "count": 0.08, "relation": 0.28}
# of the last stage: counting is what depends on how many patches there are
FEWER_SHARES = {"color": 0.15, "shape": 0.15, "place": 0.15, "count": 0.35, "relation": 0.2}
FEWEST_SHOWN = 32
FEWEST_LEFT = 12  # in a layer further down: two for each of six objects
# all patches; fewer shown; fewer from layer 1, 2 and 4 on
FEWER_CHECKS = ((256,), (64,), (32,), (256, 154, 102, 102, 26), (256, 128, 64, 64, 12))


class Heads(torch.nn.Module):
    """Linear readings of the feature layer; used in training only."""

    def __init__(self, width: int):
        super().__init__()
        self.shape = torch.nn.Linear(width, len(scenes.SHAPES) + 1)
        self.color = torch.nn.Linear(width, len(scenes.COLORS) + 1)
        self.row = torch.nn.Linear(width, scenes.GRID)
        self.column = torch.nn.Linear(width, scenes.GRID)
        self.pooled = torch.nn.Linear(width, len(scenes.SHAPES) + len(scenes.COLORS))

    def loss(self, hidden: torch.Tensor, pooled: torch.Tensor, target: dict) -> torch.Tensor:
        cls, patches = hidden[:, 0], hidden[:, 1:].flatten(0, 1)
        total = 0.0
        for name in ("shape", "color"):
            head = getattr(self, name)
            weight = torch.ones(head.out_features, device=hidden.device)
            weight[-1] = BACKGROUND_WEIGHT
            total += F.cross_entropy(
                head(patches).float(), target[name].flatten(), weight=weight, ignore_index=IGNORE
            )
            present = head(cls)[:, :-1].float()
            total += F.binary_cross_entropy_with_logits(present, target[f"{name}_present"])
        grid = torch.arange(scenes.GRID, device=hidden.device)
        grid = grid.expand(len(hidden), scenes.GRID, scenes.GRID)
        total += 0.1 * F.cross_entropy(self.row(patches).float(), grid.transpose(1, 2).flatten())
        total += 0.1 * F.cross_entropy(self.column(patches).float(), grid.flatten())
        present = torch.cat([target["shape_present"], target["color_present"]], 1)
        return total + F.binary_cross_entropy_with_logits(self.pooled(pooled).float(), present)


def alignment_loss(model, hidden: torch.Tensor, target: dict) -> torch.Tensor:
    """What LLaVA's first stage is for: a projected patch lies where the words for it lie.

    Its product with a word's embedding tells whether the word (shape, colour, place) is true of it.
    """
    visual = model.model.multi_modal_projector(hidden[:, 1:])
    words = model.get_input_embeddings().weight[WORDS]
    logits = (visual @ words.to(visual.dtype).T).float()
    known = (target["shape"] != IGNORE).flatten(1)
    loss = F.binary_cross_entropy_with_logits(logits, target["words"], reduction="none").sum(-1)
    weight = torch.where(target["words"].any(-1), 1.0, BACKGROUND_WEIGHT) * known
    return (loss * weight).sum() / weight.sum()


def patch_targets(batch: list[scenes.Scene]) -> dict[str, torch.Tensor]:
    """Per patch: its object's class (the last is background); per picture: what is present."""
    n_shapes, n_colors = len(scenes.SHAPES), len(scenes.COLORS)
    shape = np.full((len(batch), scenes.GRID, scenes.GRID), n_shapes)
    color = np.full_like(shape, n_colors)
    shape_present = np.zeros((len(batch), n_shapes), np.float32)
    color_present = np.zeros((len(batch), n_colors), np.float32)
    words = np.zeros((len(batch), scenes.GRID, scenes.GRID, len(WORDS)), np.float32)
    for b, scene in enumerate(batch):
        touched = scene.coverage.max(0) > 0
        shape[b][touched] = color[b][touched] = IGNORE
        for thing, cover in zip(scene.things, scene.coverage, strict=True):
            shape[b][cover > COVERED], color[b][cover > COVERED] = thing.shape, thing.color
            true = [thing.shape, n_shapes + thing.color]
            true += [
                n_shapes + n_colors + PLACES.index(word) for word in scenes.place(thing).split()
            ]
            for word in true:
                words[b, cover > COVERED, word] = 1
            shape_present[b, thing.shape] = color_present[b, thing.color] = 1
    arrays = {
        "words": words.reshape(len(batch), -1, len(WORDS)),
        "shape": shape,
        "color": color,
        "shape_present": shape_present,
        "color_present": color_present,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def drawn(scene: scenes.Scene, rng: np.random.Generator) -> np.ndarray:
    """The patches of a picture in the order in which the lot falls on them.

    Those that objects touch come first, roughly a patch of each, then a second of each, and so on.
    """
    turn = np.full(PATCHES, np.inf)
    for cover in scene.coverage:
        touched = rng.permutation(np.flatnonzero(cover.ravel() > 0.05))
        turn[touched] = np.minimum(turn[touched], np.arange(len(touched)) + 3 * rng.random())
    turn[turn == np.inf] = PATCHES
    return np.argsort(turn + rng.random(PATCHES))


def pack(
    batch: list[scenes.Scene],
    rng: np.random.Generator,
    questions: int,
    counts: Sequence[int] = (PATCHES,),
    shares: dict[str, float] = KIND_SHARES,
) -> dict[str, torch.Tensor]:
    """One row per picture: <s> image question answer </s> question answer </s> ...

    counts: patches that a layer of the language model has, from the first layer on; the last count
    is that of all further layers.

    ids, labels, kinds, positions [B, S]; mask bool [B, len(counts), S, S]; patches [B, counts[0]],
    those that the language model is shown. Positions restart behind the picture for every question,
    which makes each of them look exactly as it does when asked alone.
    """
    patches = counts[0]
    prefix, end = 1 + patches, 1 + PATCHES
    rows, shown, turns = [], [], []
    for scene in batch:
        ids, labels = [TOKEN["<s>"]] + [TOKEN["<image>"]] * patches, [IGNORE] * prefix
        owner, kinds = [0] * prefix, [-1] * prefix
        order = drawn(scene, rng)[:patches]
        shown.append(np.sort(order))
        turns.append(np.argsort(order))  # of the patches from the first on, when each is drawn
        positions = [0, *(1 + shown[-1])]
        asked_kinds = rng.choice(list(shares), questions, p=list(shares.values()))
        for number, kind in enumerate(asked_kinds, start=1):
            question = scenes.ask(scene, rng, str(kind))
            asked = [TOKEN[word] for word in question.text.split()]
            answer = [TOKEN[word] for word in question.answer.split()] + [TOKEN["</s>"]]
            ids += asked + answer
            labels += [IGNORE] * len(asked) + answer
            kinds += [scenes.KINDS.index(question.kind)] * (len(asked) + len(answer))
            owner += [number] * (len(asked) + len(answer))
            positions += range(end, end + len(asked) + len(answer))
        rows.append((ids, labels, kinds, owner, positions))
    length = max(len(row[0]) for row in rows)
    pad = (TOKEN["<pad>"], IGNORE, -1, -1, 0)
    ids, labels, kinds, owner, positions = (
        torch.tensor([list(row[i]) + [pad[i]] * (length - len(row[0])) for row in rows])
        for i in range(5)
    )
    same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
    mask = (same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
    mask = mask.repeat(1, len(counts), 1, 1)
    turn = torch.from_numpy(np.stack(turns))
    for layer, count in enumerate(counts):
        mask[:, layer, :, 1:prefix] &= (turn < count)[:, None]
    return {
        "ids": ids,
        "labels": labels,
        "kinds": kinds,
        "positions": positions,
        "mask": mask,
        "patches": torch.from_numpy(np.stack(shown)),
    }


def on_device(tensors: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def tower_features(model, images: torch.Tensor):
    """CLS and patches of the layer LLaVA reads, and the pooled CLS of the last layer."""
    out = model.model.vision_tower(images, output_hidden_states=True)
    return out.hidden_states[model.config.vision_feature_layer], out.pooler_output


@contextmanager
def masked(layers: torch.nn.ModuleList, masks: Sequence[torch.Tensor]):
    """Every layer with the attention mask of its own; the last one serves all further layers."""

    def replace(mask: torch.Tensor, layer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"attention_mask": mask}

    hooks = [
        layer.register_forward_pre_hook(
            partial(replace, masks[min(index, len(masks) - 1)]), with_kwargs=True
        )
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def forward(model, images: torch.Tensor, packed: dict[str, torch.Tensor]):
    """(logits [B, S, V], feature layer, pooled CLS)."""
    hidden, pooled = tower_features(model, images)
    shown = packed["patches"][:, :, None].expand(-1, -1, hidden.shape[2])
    visual = model.model.multi_modal_projector(hidden[:, 1:].gather(1, shown))
    embeds = model.get_input_embeddings()(packed["ids"]).to(visual.dtype)
    embeds = torch.cat([embeds[:, :1], visual, embeds[:, 1 + visual.shape[1] :]], 1)
    masks = packed["mask"].split(1, dim=1)
    with masked(model.model.language_model.layers, masks):
        out = model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=masks[0],
            position_ids=packed["positions"],
            use_cache=False,
        )
    return model.lm_head(out.last_hidden_state), hidden, pooled


@torch.no_grad()
def accuracy(
    model,
    device: str,
    counts: Sequence[int] = (PATCHES,),
    pictures: int = 64,
    questions: int = 10,
) -> dict[str, float]:
    """Share of questions with every answer token right, teacher-forced, on unseen pictures."""
    model.eval()
    right, asked = np.zeros(len(scenes.KINDS)), np.zeros(len(scenes.KINDS))
    for start in range(0, pictures, 32):
        some = range(start, min(start + 32, pictures))
        batch = [scenes.scene("calibration", index) for index in some]
        rng = scenes.generator("calibration", 1_000_000 + start)
        packed = on_device(pack(batch, rng, questions, counts), device)
        logits, _, _ = forward(model, pixels([s.image for s in batch]).to(device), packed)
        labels = packed["labels"][:, 1:]
        wrong = (logits[:, :-1].argmax(-1) != labels) & (labels != IGNORE)
        for b in range(len(batch)):
            ends = (labels[b] == TOKEN["</s>"]).nonzero().flatten().tolist()
            begin = 0
            for end in ends:
                kind = packed["kinds"][b, end].item()
                right[kind] += not bool(wrong[b, begin : end + 1].any())
                asked[kind] += 1
                begin = end + 1
    model.train()
    return {
        kind: round(float(r / max(a, 1)), 3)
        for kind, r, a in zip(scenes.KINDS, right, asked, strict=True)
    }


class Optimizer:
    """Muon for the matrices of a list of modules, AdamW for everything else; one rate for all.

    `modules` holds (module, scale): the scale multiplies the learning rate.
    """

    def __init__(self, modules: list[tuple[torch.nn.Module, float]]):
        matrices, others, self.scales = [], [], []
        for module, scale in modules:
            inner = [
                p for n, p in module.named_parameters() if ".layers." in f".{n}" and p.dim() == 2
            ]
            taken = {id(p) for p in inner}
            outer = [p for p in module.parameters() if id(p) not in taken]
            matrices += [{"params": inner, "scale": 2 * scale}] if inner else []
            others += [{"params": outer, "scale": scale}]
        self.parameters = [p for group in matrices + others for p in group["params"]]
        fast = multiplies_bfloat16(self.parameters[0].device)
        self.parts = [
            Muon(matrices, torch.bfloat16 if fast else torch.float32, weight_decay=0.05),
            torch.optim.AdamW(others, weight_decay=0.01, betas=(0.9, 0.98)),
        ]

    def step(self, lr: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr * group["scale"]
            part.step()
            part.zero_grad(set_to_none=True)


def autocast(device: str) -> torch.autocast:
    """bfloat16 where the machine multiplies it fast; losses differ in their last digits."""
    return torch.autocast(
        torch.device(device).type, torch.bfloat16, enabled=multiplies_bfloat16(device)
    )


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, cosine to 1 % of the peak."""
    return (
        peak
        * min(1.0, (step + 1) / 100)
        * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
    )


def train_tower(model, heads, args, log) -> None:
    projector, words = model.model.multi_modal_projector, model.get_input_embeddings()
    modules = (model.model.vision_tower, heads, projector, words)
    optimizer = Optimizer([(module, 1.0) for module in modules])
    for step in range(args.tower_steps):
        first = step * args.tower_batch
        batch = [scenes.scene("train", first + i) for i in range(args.tower_batch)]
        target = on_device(patch_targets(batch), args.device)
        with autocast(args.device):
            hidden, pooled = tower_features(model, pixels([s.image for s in batch]).to(args.device))
            heads_loss = heads.loss(hidden, pooled, target)
            aligned = alignment_loss(model, hidden, target)
        (heads_loss + 0.3 * aligned).backward()
        optimizer.step(learning_rate(step, args.tower_steps, args.lr))
        if step % 25 == 0:
            seen = heads.shape(hidden[:, 1:]).argmax(-1).flatten() == target["shape"].flatten()
            covered = (target["words"] > 0).any(-1).flatten()
            log(
                stage="tower",
                step=step,
                heads=round(heads_loss.item(), 3),
                aligned=round(aligned.item(), 3),
                shapes=round(seen[covered].float().mean().item(), 3),
            )


@dataclass(frozen=True)
class Phase:
    """A share of the steps, the patches the language model is shown, whether the tower learns."""

    share: float
    patches: int
    train_tower: bool


# Finding the right patch is what takes long: among 256 patches its gradient drowns, and the model
# goes on guessing among the words for what is in the picture. Among 64 it takes 150 steps.
PHASES = (Phase(0.25, 64, False), Phase(0.3, 128, True), Phase(0.45, PATCHES, True))


def train_all(model, heads, args, log) -> None:
    tower = model.model.vision_tower
    modules = (model.model.language_model, model.model.multi_modal_projector, heads)
    optimizer = Optimizer([*((module, 1.0) for module in modules), (tower, 0.3)])
    schedule = [phase for phase in PHASES for _ in range(round(phase.share * args.steps))]
    for step, phase in enumerate(schedule):
        tower.requires_grad_(phase.train_tower)
        most = min(scenes.MAX_OBJECTS, 4 + 8 * step // args.steps)
        first = 10_000_000 + step * args.batch
        batch = [scenes.scene("train", first + i, (2, most)) for i in range(args.batch)]
        rng = scenes.generator("train", 1_000_000_000 + step)
        packed = on_device(pack(batch, rng, args.questions, (phase.patches,)), args.device)
        target = on_device(patch_targets(batch), args.device)
        images = pixels([scene.image for scene in batch]).to(args.device)
        with autocast(args.device):
            logits, hidden, pooled = forward(model, images, packed)
            labels = packed["labels"][:, 1:].flatten()
            logits = logits[:, :-1].flatten(0, 1).float()
            loss = F.cross_entropy(logits, labels, ignore_index=IGNORE)
            seen = heads.loss(hidden, pooled, target) + 2 * alignment_loss(model, hidden, target)
        (loss + 0.1 * seen).backward()
        optimizer.step(learning_rate(step, len(schedule), args.lr))
        if step % 25 == 0:
            log(stage="all", step=step, loss=round(loss.item(), 4), seen=round(seen.item(), 3))
        if step % 100 == 99:
            log(stage="all", step=step, accuracy=accuracy(model, args.device))
            save(model, args.out)


def fewer_counts(rng: np.random.Generator, layers: int) -> tuple[int, ...]:
    """Patches in every layer: some are not shown at all, others leave before one layer or two.

    As many draws between 32 and 64 patches as between 128 and 256.
    """

    def fewer(most: int, fewest: int) -> int:
        return round(fewest * (most / fewest) ** rng.random())

    counts = [fewer(PATCHES, FEWEST_SHOWN)] * layers
    for layer in np.sort(rng.choice(np.arange(1, layers), 2, replace=False)):
        counts[layer:] = [fewer(counts[layer], FEWEST_LEFT)] * (layers - layer)
    return tuple(counts)


def train_fewer(model, args, log) -> None:
    model.model.vision_tower.requires_grad_(False)
    modules = (model.model.language_model, model.model.multi_modal_projector)
    optimizer = Optimizer([(module, 1.0) for module in modules])
    for step in range(args.fewer_steps):
        first = 20_000_000 + step * args.batch
        batch = [scenes.scene("train", first + i) for i in range(args.batch)]
        rng = scenes.generator("train", 2_000_000_000 + step)
        counts = fewer_counts(rng, model.config.text_config.num_hidden_layers)
        packed = on_device(pack(batch, rng, args.questions, counts, FEWER_SHARES), args.device)
        logits, _, _ = forward(model, pixels([s.image for s in batch]).to(args.device), packed)
        labels = packed["labels"][:, 1:].flatten()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORE)
        loss.backward()
        optimizer.step(learning_rate(step, args.fewer_steps, args.fewer_lr))
        if step % 25 == 0:
            log(stage="fewer", step=step, patches=counts, loss=round(loss.item(), 4))
        if step % 100 == 99 or step == args.fewer_steps - 1:
            for counts in FEWER_CHECKS:
                right = accuracy(model, args.device, counts)
                log(stage="fewer", step=step, patches=counts, accuracy=right)


def save(model, folder: Path) -> None:
    """float16 on disk, 13 MB; the evaluation reads it back into float32."""
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    processor().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=TRAINED)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tower-steps", type=int, default=400)
    parser.add_argument("--tower-batch", type=int, default=48)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--fewer-steps", type=int, default=500)
    parser.add_argument("--fewer-lr", type=float, default=5e-4)
    parser.add_argument("--only", choices=["fewer"], help="go on from the weights in --out")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    started = time.time()

    def log(**entry):
        print(json.dumps({"seconds": round(time.time() - started, 1), **entry}), flush=True)

    if args.only is None:
        model, heads = new_model(), Heads(128)
        model.to(args.device).train(), heads.to(args.device)
        train_tower(model, heads, args, log)
        train_all(model, heads, args, log)
        save(model, args.out)
    # from what was saved: the same with --only
    model = load(args.out, device=args.device)[0].float().train()
    train_fewer(model, args, log)
    save(model, args.out)


if __name__ == "__main__":
    main()
