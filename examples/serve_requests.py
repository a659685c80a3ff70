"""A server's loop: a method stays in the model until another one is wanted.

python examples/serve_requests.py
"""

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtp_kernels as vtp
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.model import TRAINED

model = AutoModelForImageTextToText.from_pretrained(TRAINED).eval()
processor = AutoProcessor.from_pretrained(TRAINED)


def serve(requests):
    """Answers in turn. A request may say which method it wants; None is the model as it is."""
    at_work = None
    try:
        for picture, question, method in requests:
            if method != at_work:
                vtp.remove(model)  # the model is bit for bit the one it was
                if method is not None:
                    vtp.apply(model, method)
                at_work = method
            yield ask(picture, question)
    finally:  # also where a request fails, or nobody asks for the rest
        vtp.remove(model)


def ask(picture, question):
    """The answer, and which share of the prefill's FLOPs was saved."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=[picture], text=[text], return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    new = generated[0, inputs["input_ids"].shape[1] :]
    handle = vtp.handle(model)  # None for the model as it is
    saved = handle.report().flops_reduction if handle else 0.0
    return processor.decode(new, skip_special_tokens=True).strip(), saved


cases = [scenes.case("test", index) for index in range(4)]
methods = [None, "fastv:2:0.5", "fastv:2:0.5", "random:0.5"]
requests = [
    (Image.fromarray(case.scene.image), case.question.text, method)
    for case, method in zip(cases, methods, strict=True)
]
for (_, question, method), (answer, saved) in zip(requests, serve(requests), strict=True):
    print(f"{question}? {answer} ({method or 'dense'}, {saved:.0%} of the prefill saved)")
