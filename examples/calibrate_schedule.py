"""Turn a method that decides as it goes into a fixed schedule, and save it.

    python examples/calibrate_schedule.py [schedule.json]

VisiPruner looks at each prompt, and the host waits for what it finds. What it does to prompts like
yours, as a schedule, waits for nothing. On the command line: --method schedule.json
"""

import sys

from PIL import Image

import vtp_kernels as vtp
from vtp_kernels.chat import chat_inputs, greedy_answers
from vtp_kernels.demo import load, pocket_methods
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.model import TRAINED

path = sys.argv[1] if len(sys.argv) > 1 else "schedule.json"
model, processor = load(TRAINED)


def prompts(split, count):
    """The inputs of a batch of questions, and their answers."""
    cases = [scenes.case(split, index) for index in range(count)]
    pictures = [Image.fromarray(case.scene.image) for case in cases]
    questions = [case.question.text for case in cases]
    return chat_inputs(processor, pictures, questions), [case.question.answer for case in cases]


method = pocket_methods()["VisiPruner"]
samples, _ = prompts("calibration", 20)
vtp.calibrate(model, [samples], method).save(path)

schedule = vtp.Method.load(path)
inputs, expected = prompts("test", 20)
for name, tried in (("VisiPruner", method), ("as a schedule", schedule)):
    with vtp.prune(model, tried) as run:
        answers = greedy_answers(model, processor, inputs, max_new_tokens=4)
        saved = run.report().flops_reduction
    right = sum(map(str.__eq__, answers, expected))
    print(f"{name}: {right} of {len(expected)} right, {saved:.0%} of the prefill saved")
print(f"{path}: {schedule.to_dict()}")
