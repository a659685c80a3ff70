"""From questions about pictures to answers, with any Hugging Face processor."""

import torch
from PIL import Image


def chat_inputs(processor, images: list[Image.Image], prompts: list[str]):
    """Model inputs, one picture and one question a row, padded on the left as generation needs it.

    The processor's own chat template is used, or LLaVA-1.5's "USER: <image> ... ASSISTANT:".
    """
    if getattr(processor, "chat_template", None):
        texts = [
            processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image"}, {"type": "text", "text": prompt}],
                    }
                ],
                add_generation_prompt=True,
            )
            for prompt in prompts
        ]
    else:
        texts = [f"USER: {processor.image_token}\n{prompt} ASSISTANT:" for prompt in prompts]
    processor.tokenizer.padding_side = "left"
    return processor(images=images, text=texts, return_tensors="pt", padding=True)


@torch.no_grad()
def greedy_answers(model, processor, inputs, max_new_tokens: int) -> list[str]:
    """The model's greedy answers, one a row."""
    generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = generated[:, inputs["input_ids"].shape[1] :]
    return [answer.strip() for answer in processor.batch_decode(new, skip_special_tokens=True)]
