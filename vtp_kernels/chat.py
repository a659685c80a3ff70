"""From questions about pictures to answers, with any Hugging Face processor."""

import torch


def chat_inputs(processor, images: list, prompts: list[str]):
    """Model inputs, one question a row, padded on the left as generation needs it.

    `images` has one picture a row, or a list of those that come before the question. The
    processor's own chat template is used, or LLaVA-1.5's "USER: <image> ... ASSISTANT:".
    """
    rows = [list(row) if isinstance(row, (list, tuple)) else [row] for row in images]
    asked = list(zip(rows, prompts, strict=True))
    if getattr(processor, "chat_template", None):
        texts = [
            processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image"}] * len(row)
                        + [{"type": "text", "text": prompt}],
                    }
                ],
                add_generation_prompt=True,
            )
            for row, prompt in asked
        ]
    else:
        line = f"{processor.image_token}\n"
        texts = [f"USER: {line * len(row)}{prompt} ASSISTANT:" for row, prompt in asked]
    processor.tokenizer.padding_side = "left"
    single = all(len(row) == 1 for row in rows)
    return processor(
        images=[row[0] for row in rows] if single else rows,
        text=texts,
        return_tensors="pt",
        padding=True,
    )


@torch.no_grad()
def greedy_answers(model, processor, inputs, max_new_tokens: int) -> list[str]:
    """The model's greedy answers, one a row."""
    generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = generated[:, inputs["input_ids"].shape[1] :]
    return [answer.strip() for answer in processor.batch_decode(new, skip_special_tokens=True)]
