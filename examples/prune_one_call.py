"""Prune one call, see what it saved, and draw what was kept.

    python examples/prune_one_call.py
    python examples/prune_one_call.py --model llava-hf/llava-1.5-7b-hf --image photo.jpg \
        --question "What is in the picture?"
"""

import argparse

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtp_kernels as vtp
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.model import TRAINED

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=TRAINED, help="default: the small LLaVA of the package")
parser.add_argument("--image", help="default: a picture of its world")
parser.add_argument("--question", default="how many shapes")
args = parser.parse_args()

model = AutoModelForImageTextToText.from_pretrained(args.model).eval()
processor = AutoProcessor.from_pretrained(args.model)
if args.image:
    image = Image.open(args.image).convert("RGB")
else:
    image = Image.fromarray(scenes.scene("demo", 1).image)

content = [{"type": "image"}, {"type": "text", "text": args.question}]
text = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True
)
inputs = processor(images=[image], text=[text], return_tensors="pt")


def answer():
    generated = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    new = generated[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True).strip()


print("dense: ", answer())
with vtp.prune(model, vtp.FastV(layer=2, keep=0.5)) as run:
    print("pruned:", answer())
    report = run.report()
print(report)

grids = vtp.picture_grids(model, inputs, images=[image], processor=processor)
vtp.plot.tokens(image, report, "vtp_kept.png", grids=grids)
vtp.plot.layers(report, "vtp_layers.png")
