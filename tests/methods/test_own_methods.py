"""Methods of one's own that err: what they answer is refused, and the error says what is wrong."""

import inspect
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from tiny_llava import DEPTH, IMAGE, batch, prompt, three, tiny_llava

import vtp_kernels as vtp
from reads import Reads
from vtp_kernels.contract import facts
from vtp_kernels.contract import method as base
from vtp_kernels.contract.passive import PassiveVisual
from vtp_kernels.contract.rows import Kept
from vtp_kernels.models.passage import decision
from vtp_kernels.ops import _checks

WHERE = r"Answer\.decide before layer 2"


@dataclass(frozen=True)
class Answer(vtp.Method):
    """Decides before layer 2 whatever `answer(rows)` is."""

    answer: Any

    def decision_layers(self, depth):
        return (2,)

    def decide(self, layer, rows):
        return self.answer(rows)


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def prefill(model, method, inputs=None, logits_to_keep=1):
    with torch.no_grad(), vtp.prune(model, method) as run:
        logits = model(**inputs or three(), logits_to_keep=logits_to_keep).logits
    return logits, run.report()


def every_second(rows):
    """A mask of visual tokens, and how many they are."""
    kept = rows.visual & (rows.visual_ordinal % 2 == 0)
    return kept, [n // 2 for n in rows.visual_now]


def by_hand(rows, **changed):
    """All text and every second visual token, as a Kept that no helper made."""
    kept, visual = every_second(rows)
    stays = kept | rows.text
    width = int(stays.sum(1).max())
    indices = torch.full((len(stays), width), -1)
    for b, row in enumerate(stays):
        at = row.nonzero()[:, 0]
        indices[b, : len(at)] = at
    given = {"indices": indices, "counts": stays.sum(1).int(), "text": rows.text_now}
    given |= {"visual": visual}
    given |= {k: f(rows, indices) for k, f in changed.items()}
    selection = vtp.Selection(given["indices"], given["counts"])
    return Kept(selection, given["text"], given["visual"], given.get("hidden"))


def merged(rows, targets, content=None, **changed):
    """`by_hand`, with zeros in some rows."""
    targets = torch.tensor(targets)
    if content is None:
        content = torch.zeros(*targets.shape, rows.hidden.shape[2])
    return rows.with_content(by_hand(rows, **changed), targets, content)


def test_the_same_by_mask_by_rank_and_by_hand(model):
    expected = torch.zeros(4, three()["input_ids"].shape[1], dtype=torch.bool)
    for row, ids in enumerate(three()["input_ids"]):
        expected[row, (ids == IMAGE).nonzero()[::2, 0]] = True
    answers = (
        lambda rows: rows.keep_where(*every_second(rows)),
        lambda rows: rows.keep_rows(rows.text | every_second(rows)[0]),
        lambda rows: rows.keep_rows(
            rows.text | every_second(rows)[0], counts=(rows.text_now, every_second(rows)[1])
        ),
        lambda rows: rows.keep_rows(rows.text | every_second(rows)[0], capacity=60),
        lambda rows: rows.keep_visual(
            every_second(rows)[1], -(rows.visual_ordinal % 2).to(torch.float32)
        ),
        by_hand,
        lambda rows: by_hand(rows, visual=lambda rows, _: torch.tensor(every_second(rows)[1])),
    )
    first = None
    for answer in answers:
        logits, report = prefill(model, Answer(answer))
        assert torch.equal(report.kept[2] & (three()["input_ids"] == IMAGE), expected)
        assert report.visual_tokens_per_layer[2] == [8, 16, 24, 0]
        first = logits if first is None else first
        torch.testing.assert_close(logits, first, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        # more than there is, and numbers that are none
        (lambda r: r.keep_visual([100] * 4, None), "prompt 0: cannot keep 100 of 16 visual tok"),
        (lambda r: r.keep_visual([16, 33, 0, 0], None), "prompt 1: cannot keep 33 of 32 visual"),
        (lambda r: r.keep_visual([0, 0, -1, 0], None), "prompt 2: cannot keep -1 of 48 visual"),
        (lambda r: r.keep_visual([0, 0, 0, 1], None), "prompt 3: cannot keep 1 of 0 visual"),
        (lambda r: r.keep_where(r.visual, [99, 32, 48, 0]), "prompt 0: cannot keep 99 of 16"),
        (
            lambda r: r.keep_rows(r.text, counts=([99] * 4, [0] * 4)),
            r"prompt 0: cannot keep 99 of \d+ text rows",
        ),
        (lambda r: by_hand(r, visual=lambda *_: [100] * 4), "prompt 0: cannot keep 100 of 16"),
        (lambda r: r.keep_visual([1, 2], None), "expected one for each of 4 prompts, got 2"),
        # a choice, and nothing to choose by
        (
            lambda r: r.keep_visual([3, 3, 3, 0], None),
            "scores: there is a choice to make, got None",
        ),
        (
            lambda r: r.keep_visual([3, 3, 3, 0], torch.zeros(4, 3)),
            r"keep_visual: scores must have shape .* got \[4, 3\]",
        ),
        # counts of other rows
        (
            lambda r: r.keep_where(every_second(r)[0], [9, 16, 24, 0]),
            "keep_where, prompt 0: 8 visual tokens stay, and counts say 9",
        ),
        (
            lambda r: r.keep_rows(r.text, counts=(r.text_now, [0, 0, 1, 0])),
            "keep_rows, prompt 2: 0 visual tokens stay, and counts say 1",
        ),
        (
            lambda r: r.keep_rows(r.text, counts=([n - 1 for n in r.text_now], [0] * 4)),
            r"keep_rows, prompt 0: \d+ text rows stay, and counts say \d+",
        ),
        (lambda r: r.keep_rows(r.text, capacity=10), r"\d+ rows stay, and capacity is 10"),
        (
            lambda r: r.keep_rows(r.text, counts=(r.text_now, [0] * 4), capacity=10),
            r"capacity: 10 for \d+ rows that stay",
        ),
        (
            lambda r: by_hand(r, visual=lambda *_: [8, 16, 23, 0]),
            "prompt 2: 24 visual tokens stay, and counts say 23",
        ),
        (
            lambda r: by_hand(r, visual=lambda *_: torch.tensor([8, 17, 24, 0])),
            "prompt 1: 16 visual tokens stay, and counts say 17",
        ),
        (
            lambda r: by_hand(r, text=lambda r, _: [n - 1 for n in r.text_now]),
            r"prompt 0: \d+ text rows stay",
        ),
        # a selection that is none
        (lambda r: by_hand(r, indices=lambda _, i: i.flip(1)), r"selection\.indices must"),
        (
            lambda r: by_hand(r, indices=lambda _, i: i.sub(i.sub(i[:, :1]).eq(1).int())),
            r"selection\.indices must ascend strictly",
        ),
        (lambda r: by_hand(r, indices=lambda _, i: i + 99), r"selection\.indices must be within"),
        (lambda r: by_hand(r, indices=lambda _, i: i[:, :5]), "selection: room for 5 rows"),
        (lambda r: by_hand(r, indices=lambda _, i: i[:2]), r"selection\.indices must have shape"),
        (lambda r: by_hand(r, counts=lambda _, i: torch.zeros(4).int()), "0 text rows stay"),
        # another content for rows that are none, padding, or leave, and for one twice
        (lambda r: merged(r, [[-1], [-1], [99], [-1]]), "with_content, prompt 2: targets: some"),
        (lambda r: merged(r, [[-1], [-1], [-1], [0]]), "with_content, prompt 3: targets: some"),
        (lambda r: merged(r, [[-1], [-1], [5], [-1]]), "with_content, prompt 2: targets: some"),
        (lambda r: merged(r, [[-9], [-1], [-1], [-1]]), "with_content, prompt 0: targets: some"),
        (lambda r: merged(r, [[r.prompt_end, -1, r.prompt_end]] * 4), "a row is named twice"),
        (lambda r: merged(r, [[-1]] * 3), r"with_content: targets must have shape"),
        (lambda r: merged(r, [[-1]] * 4, torch.zeros(4, 2, 64)), "content must have shape"),
        (lambda r: by_hand(r, hidden=lambda r, _: r.hidden[:, 1:]), "hidden must have shape"),
        (
            lambda r: merged(r, [[-1]] * 4, visual=lambda *_: [8, 16, 23, 0]),
            "prompt 2: 24 visual tokens stay, and counts say 23",
        ),
        # the row whose logits are asked for
        (lambda r: r.keep_rows(r.visual), "prompt 0: the last prompt token must stay"),
        (lambda r: r.keep_rows(torch.zeros_like(r.visual)), "the last prompt token must stay"),
        (lambda r: r.keep_rows(r.visual, capacity=60), "the last prompt token must stay"),
        (
            lambda r: r.keep_rows(r.visual, counts=([0] * 4, r.visual_now)),
            "the last prompt token must stay",
        ),
    ],
)
def test_answers_that_cannot_be_carried_out(model, answer, message):
    with pytest.raises(ValueError, match=f"{WHERE}.*{message}"):
        prefill(model, Answer(answer))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda r: every_second(r)[0], r"got a tensor \[4, \d+\] of bool: .*rows\.keep_rows\(mask"),
        (lambda r: [1, 2], r"expected a Kept or None, got \[1, 2\]"),
        (lambda r: Kept(r.hidden, [1], [1]), r"selection: expected a Selection, got a tensor"),
        (lambda r: r.keep_visual([0.5] * 4, None), r"keep_visual: counts: expected ints, got 0\.5"),
        (lambda r: r.keep_visual([float("nan")] * 4, None), "expected ints, got nan"),
        (
            lambda r: r.keep_visual(r.visual.sum(1), None),
            r"a list of ints, got a tensor \[4\] of int64, \.tolist\(\)",
        ),
        (
            lambda r: r.keep_visual([3, 3, 3, 0], r.visual_ordinal),
            "keep_visual: scores must be float16 or .*, got int64",
        ),
        (lambda r: r.keep_rows(r.visual.float()), "keep_rows: stays must be bool, got float32"),
        (lambda r: r.keep_where(r.origin, [0] * 4), "keep_where: kept must be bool, got int64"),
        (lambda r: r.keep_rows(r.text, counts=[1, 2, 3, 4]), "counts: expected those of text and"),
        (lambda r: r.keep_rows(r.text, capacity=60.0), "capacity must be an int, got float"),
        (lambda r: merged(r, [[0.0]] * 4), "with_content: targets must be int64, got float32"),
        (
            lambda r: merged(r, [[-1]] * 4, torch.zeros(4, 1, 64).half()),
            "with_content: content must be float32, got float16",
        ),
        (lambda r: by_hand(r, hidden=lambda r, _: r.hidden.half()), "hidden must be float32, got"),
        (lambda r: by_hand(r, indices=lambda _, i: i.int()), r"selection\.indices must be int64"),
        (
            lambda r: by_hand(r, visual=lambda *_: torch.zeros(4)),
            "counts of visual tokens must be int32 or int64, got float32",
        ),
    ],
)
def test_answers_of_the_wrong_kind(model, answer, message):
    with pytest.raises(TypeError, match=f"{WHERE}.*{message}"):
        prefill(model, Answer(answer))


@pytest.mark.parametrize("drafts", [0, 2])
def test_drafts_must_stay(model, drafts):
    def answer(rows):
        stays = rows.text.clone()
        stays[:, -1 - drafts] = False
        return rows.keep_rows(stays)

    prompts = batch(prompt(1, 9, 0))
    name = "token and the 2 drafts behind it must stay" if drafts else "token must stay"
    with pytest.raises(ValueError, match=f"the last prompt {name}"):
        prefill(model, Answer(answer), prompts, logits_to_keep=1 + drafts)
    # One row further to the front nothing is asked for.
    moved = lambda rows: rows.keep_rows(rows.text & (rows.origin != rows.prompt_end - 1))  # noqa: E731
    assert prefill(model, Answer(moved), prompts, 1 + drafts)[0].shape[1] == 1 + drafts


def test_gathered_rows_are_as_many_as_is_said(model):
    def answer(rows):
        rows.gather(rows.visual, [16, 32, 47, 0])

    with pytest.raises(ValueError, match=f"{WHERE}: gather, prompt 2: 48 rows stay, .* say 47"):
        prefill(model, Answer(answer))


def test_attention_needs_an_observed_layer(model):
    with pytest.raises(RuntimeError, match=f"{WHERE}: no layer was observed: .*observed_layers"):
        prefill(model, Answer(lambda rows: rows.token_contribution()))


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize(
    "answer",
    [
        lambda rows, wrong: rows.keep_where(rows.visual, [16 - wrong, 32, 48, 0]),
        lambda rows, wrong: rows.keep_rows(
            rows.text | rows.visual, counts=(rows.text_now, [16 - wrong, 32, 48, 0])
        ),
        lambda rows, wrong: rows.keep_rows(rows.text, capacity=30 * (1 - wrong)),
        lambda rows, wrong: by_hand(rows, visual=lambda *_: [8 - wrong, 16, 24, 0]),
        lambda rows, wrong: rows.with_content(
            rows.keep_where(rows.visual, rows.visual_now),
            rows.origin[:, -1 - wrong :] * 0 - 1 + wrong * 50,
            rows.hidden[:, -1 - wrong :],
        ),
    ],
    ids=["where", "rows", "padded", "hand", "merged"],
)
def test_nobody_waits_for_a_device_to_check(model, monkeypatch, answer, wrong, request):
    """As on a GPU: values are not read, and what is wrong ends the call all the same."""
    monkeypatch.setattr(_checks, "may_read", lambda x: False)
    reads, check = Reads(), decision._check_rows

    def watched(kept, rows):
        with reads:
            check(kept, rows)

    def answered(rows):
        if "hand" in request.node.name:  # the test itself looks at rows
            return answer(rows, wrong)
        with reads:
            return answer(rows, wrong)

    monkeypatch.setattr(decision, "_check_rows", watched)
    if wrong:
        with pytest.raises(RuntimeError, match=f"{WHERE}.*counts that are not those of the rows"):
            prefill(model, Answer(answered))
    else:
        prefill(model, Answer(answered))
    assert reads.count == 0


def test_compiled_code_checks_too():
    def call(found):
        facts.demand("here", facts.equal("rows", found, 3))
        return found + 1

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    assert compiled(torch.tensor([3, 3])).tolist() == [4, 4]
    with pytest.raises(RuntimeError, match="here: counts that are not those of the rows"):
        compiled(torch.tensor([3, 2]))


# --- what a method says of itself ---------------------------------------------------------------


def says(**answers):
    """A method that gives these answers to what the engine asks before anything runs."""
    settled = {"decision_layers": (2,)} | answers
    methods = {name: lambda self, *_, x=value: x for name, value in settled.items()}
    body = {"decide": lambda self, layer, rows: None, "__module__": __name__} | methods
    return dataclass(frozen=True)(type("Says", (vtp.Method,), body))()


@pytest.mark.parametrize(
    ("answers", "error", "message"),
    [
        ({"decision_layers": 4}, TypeError, r"decision_layers: expected layers, as \(4,\), got 4"),
        ({"decision_layers": None}, TypeError, r"decision_layers: expected layers"),
        ({"decision_layers": (2.0,)}, TypeError, r"decision_layers: a layer is an int, got 2\.0"),
        ({"decision_layers": ("2",)}, TypeError, "decision_layers: a layer is an int, got '2'"),
        ({"decision_layers": (True,)}, TypeError, "decision_layers: a layer is an int, got True"),
        ({"decision_layers": (DEPTH,)}, ValueError, "decision_layers: there is no layer 6"),
        ({"decision_layers": (-1,)}, ValueError, "decision_layers: there is no layer -1"),
        ({"observed_layers": (-1,)}, ValueError, "observed_layers: there is no layer -1"),
        (
            {"observed_layers": (2,)},
            ValueError,
            r"observed_layers: layer 2 is for a decision before layer 3, .* are \[2\]",
        ),
        ({"forgetful_layers": (9,)}, ValueError, "forgetful_layers: there is no layer 9"),
        ({"passive_layers": (1,)}, TypeError, "passive_layers: expected a mapping, got"),
        ({"passive_layers": {1: "drop"}}, TypeError, r"passive_layers\[1\]: expected a PassiveV"),
        (
            {"passive_layers": {8: PassiveVisual("drop", "causal")}},
            ValueError,
            "passive_layers: there is no layer 8",
        ),
        (
            {"vision_source": "similarty", "decision_layers": (0,)},
            ValueError,
            r"vision_source: expected one of .*'hidden'\) or None, got 'similarty'",
        ),
        (
            {"vision_source": "similarity"},
            ValueError,
            r"vision_source: rows\.vision is there before layer 0 only, .* are \[2\]",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_when_applied(model, answers, error, message):
    with pytest.raises(error, match=rf"Says\.{message}"):
        vtp.apply(model, says(**answers))
    vtp.apply(model, vtp.FastV(2)).remove()  # nothing was left behind


def test_layers_in_any_order_and_from_a_range(model):
    vtp.apply(model, says(decision_layers=[4, 2], observed_layers={1, 3})).remove()
    vtp.apply(model, says(decision_layers=range(1, 4))).remove()


# --- classes ------------------------------------------------------------------------------------


class Rule(vtp.Method):
    """What the classes below have in common."""

    def decision_layers(self, depth):
        return (1,)

    def decide(self, layer, rows):
        return None


def test_a_key_that_is_taken(methods):
    with pytest.raises(
        ValueError, match=r"Mine: the key 'fastv' is that of .*fastv\.FastV; choose"
    ):

        class Mine(Rule, key="fastv"):
            pass

    assert methods["fastv"] is vtp.FastV and vtp.method("fastv") == vtp.FastV()


@pytest.mark.parametrize("key", ["", "none", "a:b", "mine.json", "2:0.5", 3])
def test_keys_that_are_no_names(methods, key):
    with pytest.raises(ValueError, match="Mine: a key has letters, digits, _ and -"):

        class Mine(Rule, key=key):
            pass


def test_a_class_defined_again_takes_the_place_of_the_first(methods):
    def define(default):
        @dataclass(frozen=True)
        class Mine(Rule, key="mine"):
            layer: int = default

        return Mine

    first, again = define(1), define(2)
    assert methods["mine"] is again is not first
    assert vtp.Method.from_dict({"method": "mine"}) == again(2)


def test_a_class_with_slots_is_found_as_it_is_in_the_end(methods):
    @dataclass(frozen=True, slots=True)
    class Mine(Rule, key="mine"):
        layer: int = 1

    assert methods["mine"] is Mine
    assert vtp.Method.from_dict(Mine(3).to_dict()) == Mine(3)


def test_a_forgotten_dataclass(methods):
    class Forgotten(Rule, key="mine"):
        layer: int = 1

    class Written(Rule):
        def __init__(self, layer):
            self.layer = layer

    class More(vtp.FastV):
        seed: int = 1

    class Both(Written, vtp.FastV):
        pass

    for make in (Forgotten, lambda: Written(3), More, lambda: Both(3)):
        with pytest.raises(
            TypeError, match=r"a method is a frozen dataclass, put @dataclass\(froz"
        ):
            make()


def test_a_class_with_nothing_to_set_needs_no_decorator(model, methods):
    class Nothing(Rule, key="nothing"):
        counted: ClassVar[int] = 0

    class Renamed(vtp.FastV, key="renamed"):
        def decide(self, layer, rows):
            return None

    assert prefill(model, Nothing())[1].method == {"method": "nothing", "module": __name__}
    assert type(vtp.Method.from_dict({"method": "nothing"})) is Nothing
    assert vtp.Method.from_dict(Renamed(3).to_dict()) == Renamed(3) != vtp.FastV(3)


def test_a_dataclass_that_is_not_frozen():
    @dataclass
    class Loose(Rule):
        layer: int = 1

    with pytest.raises(TypeError, match=r"Loose: .*put @dataclass\(frozen=True\) above the class"):
        Loose()


@pytest.mark.parametrize("name", ["method", "module", "name"])
def test_fields_that_a_file_needs_for_itself(name):
    made = type("Mine", (Rule,), {"__annotations__": {name: int}, "__module__": __name__})
    with pytest.raises(TypeError, match=rf"Mine: \['{name}'\] cannot be fields of a method"):
        dataclass(frozen=True)(made)(3)


def test_a_class_that_tells_of_itself_needs_no_fields(model):
    class Plain(Rule):
        def to_dict(self):
            return {"method": "plain"}

    assert prefill(model, Plain())[1].method == {"method": "plain"}


# --- storage ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unnamed(Rule):
    layer: int = 1
    more: Any = field(default=None)


def test_without_a_key_a_method_has_the_name_of_its_class(tmp_path):
    assert Unnamed(3).to_dict() == {"method": f"{__name__}:Unnamed", "layer": 3, "more": None}
    Unnamed(3).save(tmp_path / "it.json")
    assert vtp.Method.load(tmp_path / "it.json") == Unnamed(3)


def test_a_setting_that_json_has_no_form_for_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"Unnamed\.more is no JSON: .*Tensor"):
        Unnamed(3, torch.zeros(2)).save(tmp_path / "it.json")
    assert not (tmp_path / "it.json").exists()


def test_the_example_of_the_docs(model, methods, tmp_path):
    """As it stands in the docstring, run."""
    example = inspect.getdoc(base).split("in a file of its own:\n")[1].split("\n`vtp.prune(")[0]
    names = {"__name__": "example"}
    exec(textwrap.dedent(example), names)
    method = names["KeepLongest"](layer=2, keep=5)
    hidden = []
    hook = model.model.language_model.layers[2].register_forward_pre_hook(
        lambda module, args, kwargs: hidden.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    inputs = three()
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    lengths = hidden[0].norm(dim=-1)
    report = prefill(model, method, inputs)[1]
    for b, ids in enumerate(inputs["input_ids"]):
        places = (ids == IMAGE).nonzero()[:, 0].tolist()
        longest = sorted(places, key=lambda at: -float(lengths[b, at]))[:5]
        kept = (report.kept[2][b] & (ids == IMAGE)).nonzero()[:, 0].tolist()
        assert kept == sorted(longest)
    assert method.to_dict() == {
        "method": "keeplongest",
        "module": "example",
        "layer": 2,
        "keep": 5,
    }
    assert vtp.method("keeplongest:layer=2,keep=5") == method
