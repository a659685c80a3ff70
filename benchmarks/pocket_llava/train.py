"""Trains the pocket LLaVA from a seed: `python -m benchmarks.pocket_llava.train`.

Two stages, as LLaVA has them.

Tower: the vision tower alone. Linear heads read shape, colour, row and column off every patch of
the feature layer; the *same* shape and colour heads read off the CLS token which of them are in the
picture. Sharing the heads is what gives CLS similarity its meaning: a patch that shows an object
points where CLS points.

All: everything, on short questions. Many questions share one picture in one sequence, each seeing
the picture and itself only (a block mask), so that no question can be answered from another's
answer. Muon for the language model's matrices, AdamW for the rest; pictures of 2 objects first,
then more.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from . import scenes
from .model import TOKEN, TRAINED, new_model, pixels, processor

BACKGROUND_WEIGHT = 0.1  # 97 % of the patches are background
COVERED = 0.3  # a patch belongs to an object that fills this share of it; less, but any: ignored
IGNORE = -100
# relations take longest to learn and counting least
KIND_SHARES = {"color": 0.22, "shape": 0.22, "place": 0.2, "count": 0.08, "relation": 0.28}


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


def patch_targets(batch: list[scenes.Scene]) -> dict[str, torch.Tensor]:
    """Per patch: its object's class (the last is background); per picture: what is present."""
    n_shapes, n_colors = len(scenes.SHAPES), len(scenes.COLORS)
    shape = np.full((len(batch), scenes.GRID, scenes.GRID), n_shapes)
    color = np.full_like(shape, n_colors)
    shape_present = np.zeros((len(batch), n_shapes), np.float32)
    color_present = np.zeros((len(batch), n_colors), np.float32)
    for b, scene in enumerate(batch):
        touched = scene.coverage.max(0) > 0
        shape[b][touched] = color[b][touched] = IGNORE
        for thing, cover in zip(scene.things, scene.coverage, strict=True):
            shape[b][cover > COVERED], color[b][cover > COVERED] = thing.shape, thing.color
            shape_present[b, thing.shape] = color_present[b, thing.color] = 1
    arrays = {
        "shape": shape,
        "color": color,
        "shape_present": shape_present,
        "color_present": color_present,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def pack(
    batch: list[scenes.Scene], rng: np.random.Generator, questions: int
) -> dict[str, torch.Tensor]:
    """One row per picture: <s> image question answer </s> question answer </s> ...

    ids, labels, kinds, positions [B, S]; mask bool [B, 1, S, S]. Positions restart behind the
    picture for every question, which makes each of them look exactly as it does when asked alone.
    """
    prefix = 1 + scenes.GRID**2
    rows = []
    for scene in batch:
        ids, labels = [TOKEN["<s>"]] + [TOKEN["<image>"]] * (prefix - 1), [IGNORE] * prefix
        owner, kinds, positions = [0] * prefix, [-1] * prefix, list(range(prefix))
        asked_kinds = rng.choice(list(KIND_SHARES), questions, p=list(KIND_SHARES.values()))
        for number, kind in enumerate(asked_kinds, start=1):
            question = scenes.ask(scene, rng, str(kind))
            asked = [TOKEN[word] for word in question.text.split()]
            answer = [TOKEN[word] for word in question.answer.split()] + [TOKEN["</s>"]]
            ids += asked + answer
            labels += [IGNORE] * len(asked) + answer
            kinds += [scenes.KINDS.index(question.kind)] * (len(asked) + len(answer))
            owner += [number] * (len(asked) + len(answer))
            positions += range(prefix, prefix + len(asked) + len(answer))
        rows.append((ids, labels, kinds, owner, positions))
    length = max(len(row[0]) for row in rows)
    pad = (TOKEN["<pad>"], IGNORE, -1, -1, 0)
    ids, labels, kinds, owner, positions = (
        torch.tensor([list(row[i]) + [pad[i]] * (length - len(row[0])) for row in rows])
        for i in range(5)
    )
    same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
    mask = same & torch.ones(length, length, dtype=torch.bool).tril()
    return {
        "ids": ids,
        "labels": labels,
        "kinds": kinds,
        "positions": positions,
        "mask": mask[:, None],
    }


def tower_features(model, images: torch.Tensor):
    """CLS and patches of the layer LLaVA reads, and the pooled CLS of the last layer."""
    out = model.model.vision_tower(images, output_hidden_states=True)
    return out.hidden_states[model.config.vision_feature_layer], out.pooler_output


def forward(model, images: torch.Tensor, packed: dict[str, torch.Tensor]):
    """(logits [B, S, V], feature layer, pooled CLS)."""
    hidden, pooled = tower_features(model, images)
    visual = model.model.multi_modal_projector(hidden[:, 1:])
    embeds = model.get_input_embeddings()(packed["ids"]).to(visual.dtype)
    embeds = torch.cat([embeds[:, :1], visual, embeds[:, 1 + visual.shape[1] :]], 1)
    out = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=packed["mask"],
        position_ids=packed["positions"],
        use_cache=False,
    )
    return model.lm_head(out.last_hidden_state), hidden, pooled


@torch.no_grad()
def accuracy(model, device: str, pictures: int = 64, questions: int = 10) -> dict[str, float]:
    """Share of questions with every answer token right, teacher-forced, on unseen pictures."""
    model.eval()
    right, asked = np.zeros(len(scenes.KINDS)), np.zeros(len(scenes.KINDS))
    for start in range(0, pictures, 32):
        batch = [scenes.scene("calibration", start + i) for i in range(32)]
        packed = pack(batch, scenes.generator("calibration", 1_000_000 + start), questions)
        packed = {name: value.to(device) for name, value in packed.items()}
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
    """Muon for the language model's matrices, AdamW for everything else; one learning-rate knob."""

    def __init__(self, model, heads):
        tower = list(model.model.vision_tower.parameters()) + list(heads.parameters())
        layers = model.model.language_model.layers
        matrices = [p for p in layers.parameters() if p.dim() == 2]
        taken = {id(p) for p in tower + matrices}
        rest = [p for p in model.parameters() if id(p) not in taken]
        self.parts = [
            torch.optim.Muon(matrices, lr=0.0, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(
                [{"params": tower}, {"params": rest}], lr=0.0, weight_decay=0.01, betas=(0.9, 0.98)
            ),
        ]
        self.groups = [group for part in self.parts for group in part.param_groups]
        self.scale = (2.0, 0.3, 1.0)  # matrices, tower, rest

    def step(self, lr: float) -> None:
        for group, scale in zip(self.groups, self.scale, strict=True):
            group["lr"] = lr * scale
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, cosine to 1 % of the peak."""
    return (
        peak
        * min(1.0, (step + 1) / 100)
        * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
    )


def train_tower(model, heads, args, log) -> None:
    tower = model.model.vision_tower
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, betas=(0.9, 0.98))
    for step in range(args.tower_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.tower_steps, 1e-3)
        first = step * args.tower_batch
        batch = [scenes.scene("train", first + i) for i in range(args.tower_batch)]
        target = {name: value.to(args.device) for name, value in patch_targets(batch).items()}
        with torch.autocast(args.device, dtype=torch.bfloat16):
            loss = heads.loss(
                *tower_features(model, pixels([s.image for s in batch]).to(args.device)), target
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0:
            log(stage="tower", step=step, loss=round(loss.item(), 3))


def train_all(model, heads, args, log) -> None:
    optimizer = Optimizer(model, heads)
    parameters = [*model.parameters(), *heads.parameters()]
    for step in range(args.steps):
        most = min(scenes.MAX_OBJECTS, 2 + step // 100)
        first = 10_000_000 + step * args.batch
        batch = [scenes.scene("train", first + i, (2, most)) for i in range(args.batch)]
        packed = pack(batch, scenes.generator("train", 1_000_000_000 + step), args.questions)
        packed = {name: value.to(args.device) for name, value in packed.items()}
        target = {name: value.to(args.device) for name, value in patch_targets(batch).items()}
        with torch.autocast(args.device, dtype=torch.bfloat16):
            logits, hidden, pooled = forward(
                model, pixels([s.image for s in batch]).to(args.device), packed
            )
            labels = packed["labels"][:, 1:].flatten()
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels, ignore_index=IGNORE
            )
            heads_loss = heads.loss(hidden, pooled, target)
        (loss + 0.1 * heads_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(learning_rate(step, args.steps, args.lr))
        if step % 25 == 0:
            log(
                stage="all",
                step=step,
                loss=round(loss.item(), 4),
                heads=round(heads_loss.item(), 3),
            )
        if step % 100 == 99:
            log(stage="all", step=step, accuracy=accuracy(model, args.device))
            save(model, args.out)


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
    parser.add_argument("--tower-steps", type=int, default=600)
    parser.add_argument("--tower-batch", type=int, default=48)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model, heads = new_model(), Heads(128)
    model.to(args.device).train(), heads.to(args.device)
    started = time.time()

    def log(**entry):
        print(json.dumps({"seconds": round(time.time() - started, 1), **entry}), flush=True)

    train_tower(model, heads, args, log)
    train_all(model, heads, args, log)
    save(model, args.out)


if __name__ == "__main__":
    main()
