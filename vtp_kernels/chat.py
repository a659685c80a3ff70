"""From questions about pictures to answers, with any Hugging Face processor."""

from itertools import takewhile

import torch


def chat_inputs(
    processor,
    images: list,
    prompts: list[str],
    videos: list | None = None,
    frames_a_second: float | None = None,
):
    """Model inputs, one question a row, padded on the left as generation needs it.

    `images` has one picture a row, or a list of those that come before the question; `videos` a
    list of videos a row, which come behind these, each a list of frames. `frames_a_second` is for
    models that are told when a frame was; None: what the processor takes it for. The processor's
    own chat template is used, or LLaVA-1.5's "USER: <image> ... ASSISTANT:".
    """
    rows = [list(row) if isinstance(row, (list, tuple)) else [row] for row in images]
    clips = [[] for _ in rows] if videos is None else videos
    asked = list(zip(rows, clips, prompts, strict=True))
    if getattr(processor, "chat_template", None):
        texts = [
            processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image"}] * len(row)
                        + [{"type": "video"}] * len(clip)
                        + [{"type": "text", "text": prompt}],
                    }
                ],
                add_generation_prompt=True,
            )
            for row, clip, prompt in asked
        ]
    else:
        texts = [
            f"USER: {_lines(processor, 'image', row)}{_lines(processor, 'video', clip)}{prompt} "
            "ASSISTANT:"
            for row, clip, prompt in asked
        ]
    processor.tokenizer.padding_side = "left"
    given = {}
    if any(rows):
        single = all(len(row) == 1 for row in rows)
        given["images"] = [row[0] for row in rows] if single else rows
    if any(clips):
        # The frames are those that the model is to see.
        shown = [video for clip in clips for video in clip]
        given |= {"videos": shown, "do_sample_frames": False}
        given["video_metadata"] = [
            {
                "total_num_frames": len(frames),
                "fps": frames_a_second,
                "frames_indices": list(range(len(frames))),
            }
            for frames in shown
        ]
    return processor(**given, text=texts, return_tensors="pt", padding=True)


def _lines(processor, kind: str, shown: list) -> str:
    return f"{getattr(processor, f'{kind}_token')}\n" * len(shown) if shown else ""


@torch.no_grad()
def greedy_answers(model, processor, inputs, max_new_tokens: int) -> list[str]:
    """The model's greedy answers, one a row."""
    generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = generated[:, inputs["input_ids"].shape[1] :]
    return [answer.strip() for answer in processor.batch_decode(new, skip_special_tokens=True)]


def token_texts(processor, input_ids: torch.Tensor) -> list[list[str]]:
    """What each token of prompts int64 [B, S] adds to their text. Some tokenizers put words
    together as they decode, so that a token alone does not say whether a space is before it."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return [_texts(tokenizer, row) for row in input_ids.tolist()]


def _texts(tokenizer, ids: list[int]) -> list[str]:
    special = set(tokenizer.all_special_ids)
    texts: list[str] = []
    run: list[int] = []  # tokens since the last special one
    said = ""
    for token in ids:
        if token in special:
            texts.append(tokenizer.decode([token], skip_special_tokens=False))
            run, said = [], ""
            continue
        run.append(token)
        now = tokenizer.decode(run, skip_special_tokens=False)
        # Not all of it: an unfinished character changes.
        same = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(said, now, strict=False))
        )
        texts.append(now[same:])
        said = now
    return texts
