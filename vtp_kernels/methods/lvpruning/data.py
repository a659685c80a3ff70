"""Conversations about pictures, and how a batch of them becomes what a model trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vtp_kernels._shown import shown
from vtp_kernels.contract.storage import read_json

__all__ = ["IGNORE", "Batch", "Collator", "Conversation", "Dataset", "LlavaConversations"]

IGNORE = -100
"""The label of tokens that are no answer."""
PLACEHOLDER = "<image>"
TOKEN_KINDS = ("token_type_ids", "mm_token_type_ids")  # 0 for text


@dataclass(frozen=True)
class Conversation:
    """Pictures (PIL), shown with the first question, and (question, answer) in turn."""

    images: tuple[Any, ...]
    turns: tuple[tuple[str, str], ...]


class Dataset(Protocol):
    """What can be trained on: a list of conversations, or anything that behaves as one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Conversation: ...


class LlavaConversations:
    """The JSON that LLaVA is trained on: a list of

        {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                             {"from": "gpt", "value": "A cat."}, ...]}

    "image" may be a list. Entries without one are left out: they have nothing to prune.

    Parameters
    ----------
    path : the JSON file
    images : folder that image paths start from; by default that of the file

    Raises
    ------
    ValueError
        Naming the entry, if it is not of this form or its picture is not there.
    """

    def __init__(self, path: str | Path, images: str | Path | None = None) -> None:
        self.path = Path(path)
        self.folder = self.path.parent if images is None else Path(images)
        entries = read_json(self.path)
        if not isinstance(entries, list):
            raise ValueError(f"{path}: expected a list of conversations, got {shown(entries)}")
        self.entries = [
            _paths_and_turns(entry, f"{path}, entry {index}")
            for index, entry in enumerate(entries)
            if isinstance(entry, dict) and entry.get("image")
        ]
        if not self.entries:
            raise ValueError(f'{path}: no entry has an "image", there is nothing to train on')
        for paths, _ in self.entries:
            for name in paths:
                if not (self.folder / name).is_file():
                    raise ValueError(f"{path}: there is no picture {self.folder / name}")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Conversation:
        from vtp_kernels.pictures import load_image

        paths, turns = self.entries[index]
        return Conversation(tuple(load_image(self.folder / name) for name in paths), turns)


def _paths_and_turns(
    entry: dict[str, Any], where: str
) -> tuple[list[str], tuple[tuple[str, str], ...]]:
    paths = [entry["image"]] if isinstance(entry["image"], str) else entry["image"]
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f'{where}: "image" must be a path or a list of paths, got {shown(paths)}')
    return paths, _turns(entry, where)


def _turns(entry: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    said = entry.get("conversations") or []
    if not isinstance(said, list) or not all(map(_is_turn, said)):
        raise ValueError(
            f'{where}: "conversations" must be a list of {{"from": ..., "value": ...}}'
        )
    speakers = [turn["from"] for turn in said]
    if not said or speakers != ["human", "gpt"] * (len(said) // 2):
        raise ValueError(
            f'{where}: "conversations" must go "human", "gpt" in turn, and end with "gpt"; got '
            f"{speakers}"
        )
    # Where the picture stands among the words is for the model's own template to say.
    texts = [turn["value"].replace(PLACEHOLDER, "").strip() for turn in said]
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(x), str) for x in ("from", "value"))


@dataclass(frozen=True)
class Batch:
    """B prompts with their answers, padded on the right to S tokens.

    Attributes
    ----------
    inputs : the model's arguments, input_ids and attention_mask [B, S] among them
    labels : int64 [B, S]
        The token itself where it is part of an answer, IGNORE elsewhere.
    text : bool [B, S]
        The text that decides: all that comes before the first answer, visual tokens included.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    text: Tensor


class Collator:
    """Conversations -> Batch, by the model's own processor and chat template.

    A prompt is tokenized as it is when the model is asked: up to where the answer begins. So what
    decides cannot know the answer. Every answer ends with the tokenizer's end of sequence.
    """

    def __init__(self, processor: Any) -> None:
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                "processor: it has no chat_template, so there is no telling how questions and "
                "answers are put to this model; set processor.chat_template"
            )
        if processor.tokenizer.eos_token is None:
            raise ValueError(
                "processor: its tokenizer has no eos_token, so answers would have no end"
            )
        self.processor = processor

    def __call__(self, conversations: Sequence[Conversation]) -> Batch:
        tokenizer = self.processor.tokenizer
        pieces = [self._pieces(conversation) for conversation in conversations]
        images = [list(conversation.images) for conversation in conversations]
        encoded = self.processor(
            images=images,
            text=[first for (first, _), *_ in pieces],
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        mask = encoded["attention_mask"].bool()
        rows = []
        for ids, real, turns in zip(encoded["input_ids"], mask, pieces, strict=True):
            prompt = ids[real].tolist()
            ids, labels = list(prompt), [IGNORE] * len(prompt)
            for number, (question, answer) in enumerate(turns):
                if number:
                    asked = tokenizer(question, add_special_tokens=False)["input_ids"]
                    ids, labels = ids + asked, labels + [IGNORE] * len(asked)
                said = tokenizer(answer, add_special_tokens=False)["input_ids"]
                ids, labels = ids + said, labels + said
            rows.append(_Row(ids, labels, len(prompt)))
        return _batch(encoded, mask, rows, tokenizer)

    def _pieces(self, conversation: Conversation) -> list[tuple[str, str]]:
        """What is asked and answered, turn by turn, with all that the template puts around."""
        messages: list[dict[str, Any]] = []
        pieces, before = [], ""
        images = [{"type": "image"}] * len(conversation.images)
        for question, answer in conversation.turns:
            content = [*images, {"type": "text", "text": question}]
            messages.append({"role": "user", "content": content})
            asked = self.processor.apply_chat_template(messages, add_generation_prompt=True)
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            answered = self.processor.apply_chat_template(messages)
            if not (asked.startswith(before) and answered.startswith(asked)):
                raise ValueError(
                    "processor: its chat template does not go on where it stopped, so that answers "
                    f"cannot be told from questions: {before!r}, {asked!r}, {answered!r}"
                )
            said = answered[len(asked) :].strip()
            end = self.processor.tokenizer.eos_token
            pieces.append((asked[len(before) :], said if said.endswith(end) else said + end))
            before, images = answered, []
        return pieces


class _Row(NamedTuple):
    ids: list[int]
    labels: list[int]
    prompt: int  # the first so many are the prompt


def _batch(encoded: Any, mask: Tensor, rows: list[_Row], tokenizer: Any) -> Batch:
    """Rows with padding behind them, and pictures as the processor made them with the prompts."""
    width = max(len(row.ids) for row in rows)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in values])

    inputs = dict(encoded)
    for name, tensor in encoded.items():
        if name in TOKEN_KINDS:
            inputs[name] = padded(
                [kinds[real].tolist() for kinds, real in zip(tensor, mask, strict=True)], 0
            )
        elif name not in ("input_ids", "attention_mask") and tensor.shape == mask.shape:
            raise NotImplementedError(
                f"processor: training does not know how to go on with {name} behind the prompt"
            )
    filler = tokenizer.pad_token_id
    if filler is None:
        filler = tokenizer.eos_token_id
    inputs["input_ids"] = padded([row.ids for row in rows], filler)
    inputs["attention_mask"] = padded([[1] * len(row.ids) for row in rows], 0)
    return Batch(
        inputs=inputs,
        labels=padded([row.labels for row in rows], IGNORE),
        text=padded([[1] * row.prompt for row in rows], 0).bool(),
    )
