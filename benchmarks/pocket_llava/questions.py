"""Questions of the pocket world as conversations, to train deciders on."""

from PIL import Image

from vtp_kernels.methods.lvpruning import Conversation

from . import scenes

# Which tokens show an object is soon learned; which of them to keep so that objects can still be
# counted takes longest: how many seem to be there depends on what is left beside them.
KINDS = (
    "count",
    "color",
    "count",
    "relation",
    "count",
    "shape",
    "count",
    "place",
    "count",
    "relation",
)


class PocketQuestions:
    """`count` questions of a split, one per picture, `kinds` in turn; drawn when asked for."""

    def __init__(self, split: str, count: int, kinds: tuple[str, ...] = KINDS) -> None:
        if count < 1:
            raise ValueError(f"count: expected at least 1 question, got {count}")
        scenes.generator(split, 0)  # whether there is such a split
        self.split, self.count, self.kinds = split, count, kinds

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < self.count:
            raise IndexError(index)
        case = scenes.case(self.split, index, self.kinds)
        image = Image.fromarray(case.scene.image)
        return Conversation((image,), ((case.question.text, case.question.answer),))
