"""Conversations: what is read from LLaVA's JSON, and what a batch of them asks of the model."""

import json

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from tiny_training import conversations, tiny_model, tiny_processor

from vtp_kernels.chat import chat_inputs
from vtp_kernels.methods.lvpruning import Conversation, LlavaConversations
from vtp_kernels.methods.lvpruning.data import IGNORE, Collator
from vtp_kernels.models.families import parts_of
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.questions import PocketQuestions

RED = Image.new("RGB", (224, 224), (255, 0, 0))
SAID = [
    {"from": "human", "value": "<image>\nwhat color is the bar"},
    {"from": "gpt", "value": "red"},
    {"from": "human", "value": "how many shapes"},
    {"from": "gpt", "value": "2"},
]
TURNS = (("what color is the bar", "red"), ("how many shapes", "2"))


def write(folder, entries):
    (folder / "pictures").mkdir(exist_ok=True)
    for name, color in (("a.png", (255, 0, 0)), ("b.png", (0, 255, 0))):
        Image.new("RGB", (30, 20), color).save(folder / "pictures" / name)
    (folder / "it.json").write_text(json.dumps(entries))
    return folder / "it.json"


def test_llava_json(tmp_path):
    entries = [
        {"id": 1, "image": "a.png", "conversations": SAID},
        {"id": 2, "conversations": SAID},
        {"id": 3, "image": ["b.png", "a.png"], "conversations": SAID[:2]},
    ]
    dataset = LlavaConversations(write(tmp_path, entries), tmp_path / "pictures")
    assert len(dataset) == 2  # the one without a picture has nothing to prune
    assert dataset[0].turns == TURNS and dataset[1].turns == TURNS[:1]
    pixels = [[image.getpixel((0, 0)) for image in dataset[i].images] for i in range(2)]
    assert pixels == [[(255, 0, 0)], [(0, 255, 0), (255, 0, 0)]]


def test_pictures_beside_the_json(tmp_path):
    path = write(tmp_path, [{"image": "pictures/a.png", "conversations": SAID}])
    assert LlavaConversations(path)[0].images[0].size == (30, 20)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "expected a list of conversations"),
        ([], 'no entry has an "image"'),
        ([{"conversations": SAID}], 'no entry has an "image"'),
        ([{"image": "a.png"}], r'it\.json, entry 0: "conversations" must go "human", "gpt"'),
        ([{"image": "a.png", "conversations": SAID[:1]}], r"entry 0: .* got \['human'\]"),
        ([{"image": "a.png", "conversations": SAID[1:3]}], r"got \['gpt', 'human'\]"),
        ([{"image": "x.png", "conversations": SAID}], r"there is no picture .*x\.png"),
        ([{"image": 3, "conversations": SAID}], 'entry 0: "image" must be a path or .*, got 3'),
        ([{"image": "a.png", "conversations": "hi"}], 'entry 0: "conversations" must be a list of'),
        ([{"image": "a.png", "conversations": ["hi"]}], 'entry 0: "conversations" must be a list'),
        (
            [{"image": "a.png", "conversations": [{"from": "human"}, {"from": "gpt"}]}],
            'entry 0: "conversations" must be a list of',
        ),
    ],
)
def test_json_that_cannot_be_trained_on(tmp_path, entries, message):
    with pytest.raises(ValueError, match=message):
        LlavaConversations(write(tmp_path, entries), tmp_path / "pictures")


def test_data_that_is_cut(tmp_path):
    (tmp_path / "it.json").write_text('[{"image": "a.png"')
    with pytest.raises(ValueError, match=r"it\.json is no JSON that can be read"):
        LlavaConversations(tmp_path / "it.json")


def test_a_prompt_is_what_the_model_is_asked():
    processor = tiny_processor()
    batch = Collator(processor)([Conversation((RED,), TURNS[:1])])
    asked = chat_inputs(processor, [RED], [TURNS[0][0]])
    prompt = asked["input_ids"].shape[1]
    assert torch.equal(batch.inputs["input_ids"][:, :prompt], asked["input_ids"])
    assert torch.equal(batch.inputs["pixel_values"], asked["pixel_values"])
    assert batch.text[0].tolist() == [True] * prompt + [False] * 2
    assert batch.labels[0, :prompt].tolist() == [IGNORE] * prompt
    assert processor.decode(batch.labels[0, prompt:]) == "red </s>"


def test_answers_of_all_turns_are_learned_and_the_first_question_decides():
    processor = tiny_processor()
    batch = Collator(processor)([Conversation((RED,), TURNS), Conversation((RED,), TURNS[:1])])
    ids, labels = batch.inputs["input_ids"], batch.labels
    assert processor.decode(ids[0, batch.inputs["attention_mask"][0].bool()]).endswith(
        "what color is the bar red </s> how many shapes 2 </s>"
    )
    learned = [processor.decode(row[row != IGNORE]) for row in labels]
    assert learned == ["red </s> 2 </s>", "red </s>"]
    assert torch.equal(batch.text[0], batch.text[1])  # behind it, nothing of the first row decides
    assert batch.inputs["attention_mask"].sum(1).tolist() == [29, 24]
    assert labels[1, 24:].tolist() == [IGNORE] * 5


def test_padding_is_on_the_right_and_learns_nothing():
    batch = Collator(tiny_processor())(conversations(6))
    mask = batch.inputs["attention_mask"].bool()
    assert (mask[:, :-1] >= mask[:, 1:]).all() and not mask.all()
    assert (batch.labels[~mask] == IGNORE).all() and not batch.text[~mask].any()


def test_several_pictures():
    batch = Collator(tiny_processor())([Conversation((RED, RED), TURNS[:1])])
    assert (batch.inputs["input_ids"] == 4).sum() == 32 and len(batch.inputs["pixel_values"]) == 2


def test_a_model_s_visual_rows_are_found():
    batch = Collator(tiny_processor())(conversations(3))
    visual = parts_of(tiny_model()).visual_tokens(batch.inputs)
    assert visual.sum(1).tolist() == [16] * 3 and not (visual & (batch.labels != IGNORE)).any()


def test_a_processor_without_a_template():
    processor = tiny_processor()
    processor.chat_template = None
    with pytest.raises(ValueError, match="processor: it has no chat_template"):
        Collator(processor)


def test_a_tokenizer_without_an_end():
    processor = tiny_processor()
    processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="processor: its tokenizer has no eos_token"):
        Collator(processor)


def test_kinds_of_tokens_go_on_behind_the_prompt():
    """Some processors tell visual tokens from text."""
    processor = tiny_processor()

    class Telling:
        chat_template, tokenizer = processor.chat_template, processor.tokenizer
        apply_chat_template = processor.apply_chat_template

        def __call__(self, **arguments):
            encoded = processor(**arguments)
            encoded["mm_token_type_ids"] = (encoded["input_ids"] == 4).long()
            return encoded

    batch = Collator(Telling())(conversations(4))
    kinds = batch.inputs["mm_token_type_ids"]
    assert torch.equal(kinds.bool(), batch.inputs["input_ids"] == 4)


def test_what_belongs_to_tokens_in_a_way_unknown_is_refused():
    processor = tiny_processor()

    class Telling:
        chat_template, tokenizer = processor.chat_template, processor.tokenizer
        apply_chat_template = processor.apply_chat_template

        def __call__(self, **arguments):
            encoded = processor(**arguments)
            encoded["moods"] = torch.ones_like(encoded["input_ids"])
            return encoded

    with pytest.raises(NotImplementedError, match="how to go on with moods behind the prompt"):
        Collator(Telling())(conversations(1))


def test_a_template_that_does_not_go_on_where_it_stopped():
    processor = tiny_processor()
    processor.chat_template = "{{ messages | length }} <image> what color"
    with pytest.raises(ValueError, match="its chat template does not go on where it stopped"):
        Collator(processor)([Conversation((RED,), TURNS)])


def test_pocket_questions():
    dataset = PocketQuestions("train", 20)
    assert len(dataset) == 20
    case = scenes.case("train", 7, dataset.kinds)
    assert dataset[7].turns == ((case.question.text, case.question.answer),)
    assert dataset[7].turns == dataset[7].turns and dataset[0].images[0].size == (224, 224)
    asked = [scenes.case("train", i, dataset.kinds).question.kind for i in range(20)]
    assert set(asked) == set(scenes.KINDS)
    with pytest.raises(IndexError):
        dataset[20]
    with pytest.raises(ValueError, match="at least 1 question"):
        PocketQuestions("train", 0)
    with pytest.raises(ValueError, match="split"):
        PocketQuestions("nowhere", 3)
