"""A method of one's own: keep the visual tokens whose hidden states differ most from their mean.

    python examples/own_method.py

docs/own_method.md says line by line what a method may ask and answer.
"""

from dataclasses import dataclass

from PIL import Image

import vtp_kernels as vtp
from vtp_kernels.chat import chat_inputs, greedy_answers
from vtp_kernels.demo import load
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.model import TRAINED


@dataclass(frozen=True)
class Unusual(vtp.Method, key="unusual"):
    """Before `layer`, keep that share of the visual tokens: those farthest from their mean."""

    layer: int = 1
    keep: float = 0.25

    def __post_init__(self):
        if not 0 <= self.keep <= 1:
            raise ValueError(f"Unusual.keep: expected a share from 0 to 1, got {self.keep}")

    def decision_layers(self, depth):
        return (self.layer,)

    def decide(self, layer, rows):
        states, visual = rows.hidden.float(), rows.visual[..., None]
        mean = (states * visual).sum(1, keepdim=True) / visual.sum(1, keepdim=True).clamp(min=1)
        counts = [round(self.keep * count) for count in rows.visual_at_start]
        return rows.keep_visual(counts, (states - mean).norm(dim=-1))


model, processor = load(TRAINED)
cases = [scenes.case("test", index) for index in range(40)]
pictures = [Image.fromarray(case.scene.image) for case in cases]
inputs = chat_inputs(processor, pictures, [case.question.text for case in cases])

for name, method in (("unusual", Unusual()), ("chance", vtp.RandomPruning(1, Unusual().keep))):
    with vtp.prune(model, method) as run:
        answers = greedy_answers(model, processor, inputs, max_new_tokens=4)
        saved = run.report().flops_reduction
    right = sum(a == case.question.answer for a, case in zip(answers, cases, strict=True))
    print(f"{name}: {right} of {len(cases)} right, {saved:.0%} of the prefill saved")
