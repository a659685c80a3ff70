"""The pruned decoder stack is one graph, and comes to what it comes to without a compiler."""

import contextlib
import logging

import pytest
import torch
import torch._dynamo as dynamo
from pruning_methods import deciders
from tiny_llava import batch, one, prompt, three, tiny_llava
from tiny_models import FAMILIES
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

import vtp_kernels as vtp

FIXED = {"decision": "fixed", "shallow_layers": 1}
DEPTH = 4  # layers: they are what tracing takes its time for
METHODS = {
    "fastv": vtp.FastV(2, 0.5),
    "pyramiddrop": vtp.PyramidDrop((1, 2, 3), (0.5, 0.25, 0.0)),
    "schedule": vtp.Schedule({2: 0.6, 3: 3}, score="contribution"),
    "schedule per picture": vtp.Schedule({1: 0.5, 3: 3}, score="text", per="picture"),
    "random": vtp.RandomPruning(0, 0.3),
    "lvpruning": lambda model, folder: vtp.LVPruning(
        deciders(model, folder, (1, 3)), (1, 3), (0.5, 0.2)
    ),
    "visipruner": vtp.VisiPruner(**FIXED, schedule=vtp.Schedule({2: 0.5, 3: 0})),
    "visipruner that forgets": vtp.VisiPruner(
        **FIXED,
        shallow_first_layer="keep_second_half",
        drop_shallow_kv=True,
        schedule=vtp.Schedule({2: 0.5}, score="text"),
    ),
    "visipruner that skips": vtp.VisiPruner(
        **FIXED, shallow_attention="skip", schedule=vtp.Schedule({2: 5})
    ),
    "inflection of pictures": vtp.InflectionPruning(
        "attention", min_keep=5, max_keep=5, llm_layers=()
    ),
    "inflection of layers": vtp.InflectionPruning(
        None, llm_layers=(1, 3), visual_keep=0.5, text_keep=1.0
    ),
    "inflection of text": vtp.InflectionPruning(
        None, llm_layers=(1, 3), visual_keep=0.5, text_keep=0.75
    ),
    "divprune": vtp.DivPrune(0.4),
    "visionzip": vtp.VisionZip(0.4, 0.4),
    "vispruner": vtp.VisPruner(0.4),
    "hiprune": vtp.HiPrune(0.5, around=0.6, middle=0),
    "dart": vtp.DART(2, 0.4, visual_pivots=2, text_pivots=2),
    "sparsevlm": vtp.SparseVLM((1, 3), (0.5, 0.2)),
    "chain": vtp.Chain(vtp.CDPruner(0.7), vtp.FastV(2, 0.25)),
}


#: Of these, such as are given something else of each row.
UNLIKE = [
    name
    for name in METHODS
    if name not in ("pyramiddrop", "inflection of layers", "visionzip", "hiprune", "dart")
]


@pytest.fixture(scope="module")
def model():
    return tiny_llava(num_hidden_layers=DEPTH)


@pytest.fixture(autouse=True)
def nothing_compiled():
    dynamo.reset()
    counters.clear()


@pytest.fixture(scope="module", autouse=True)
def no_trace():
    """Dynamo notes its every step for whoever listens, and pytest does."""
    trace = logging.getLogger("torch.__trace")
    before, trace.propagate = trace.propagate, False
    yield
    trace.propagate = before


def method_of(name, model, folder):
    method = METHODS[name]
    return method if isinstance(method, vtp.Method) else method(model, folder)


def texts(*words):
    """Batches of the same pictures, in prompts of several lengths: one, two and three, and none."""
    return [
        batch(prompt(1, 9, 0), prompt(2, n, 1), prompt(3, n, 2), prompt(0, 5, 3)) for n in words
    ]


@contextlib.contextmanager
def compiled(text):
    plain = text.forward
    text.forward = torch.compile(plain, fullgraph=True, backend="eager")
    try:
        yield
    finally:
        del text.forward


def told(run):
    """What report() says of a call, but for how it ran."""
    described = run.report().to_dict()
    return {name: x for name, x in described.items() if name not in ("compiled", "scores")}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def graphs():
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def of_dense(model):
    """How many graphs the dense model takes for those inputs."""
    dynamo.reset()
    counters.clear()
    with torch.no_grad(), compiled(model.model.language_model):
        for inputs in texts(3, 6, 8):
            model(**inputs)
    return graphs()


# ---- torch.compile of the decoder stack ---------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_one_graph_for_prompts_of_all_lengths(model, of_dense, name, tmp_path):
    with torch.no_grad(), vtp.prune(model, method_of(name, model, tmp_path)) as run:
        expected = [(model(**inputs).logits[:, -1], told(run)) for inputs in texts(3, 6, 8)]
        with compiled(model.model.language_model):
            for inputs, (logits, report) in zip(texts(3, 6, 8), expected, strict=True):
                close(model(**inputs).logits[:, -1], logits)
                assert told(run) == report
    assert graphs() <= of_dense


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fastv", "made by the model"),
        ("visipruner", "made by the model"),
        ("random", "dynamic"),
        ("fastv", "static"),
    ],
)
def test_caches_and_what_comes_after(model, name, kind):
    """A prompt without padding, its answer, and a second turn with another picture."""
    first, turn = one(), batch(prompt(1, 4, 5), seed=3)
    config = model.config.text_config

    def conversation():
        cache = {
            "made by the model": lambda: None,
            "dynamic": lambda: DynamicCache(config=config),
            "static": lambda: StaticCache(config=config, max_cache_len=80),
        }[kind]()
        found = [model(**first, past_key_values=cache, use_cache=True)]
        cache, rows = found[0].past_key_values, first["input_ids"].shape[1]
        found.append(model(input_ids=torch.tensor([[5]]), past_key_values=cache))
        if kind == "static":  # takes no further pictures
            return [output.logits[:, -1] for output in found]
        rows += 1 + turn["input_ids"].shape[1]
        mask = torch.ones(1, rows, dtype=torch.long)
        found.append(model(**turn | {"attention_mask": mask}, past_key_values=cache))
        found.append(model(input_ids=torch.tensor([[7]]), past_key_values=cache))
        return [output.logits[:, -1] for output in found]

    with torch.no_grad(), vtp.prune(model, METHODS[name]):
        expected = conversation()
        with compiled(model.model.language_model):
            close(conversation(), expected)
    assert not counters["graph_break"]


@pytest.mark.parametrize("way", ["torch.compile", "Module.compile"])
def test_hooks_may_be_compiled_along(way):
    model = tiny_llava(num_hidden_layers=DEPTH)
    text = model.model.language_model
    with torch.no_grad(), vtp.prune(model, vtp.FastV(2, 0.5)) as run:
        expected = model.generate(**three(), max_new_tokens=5), told(run)
        if way == "torch.compile":
            model.model.language_model = torch.compile(text, fullgraph=True, backend="eager")
        else:
            text.compile(fullgraph=True, backend="eager")
        found = model.generate(**three(), max_new_tokens=5), told(run)
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1]
    assert graphs()


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_output_in_rows_of_the_input(model, positions):
    options = {"output_rows": "input", "positions": positions}
    with torch.no_grad(), vtp.prune(model, METHODS["pyramiddrop"], **options):
        expected = model(**three()).logits
        with compiled(model.model.language_model):
            found = model(**three()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mistral3", "internvl", "gemma3"])
def test_other_families(name):
    """M-RoPE, another projector, several pictures a prompt, windows and pictures that see ahead."""
    family = FAMILIES[name]
    model = family.model("sdpa")
    inputs = family.batch(model, ([0], 5), ([1, 0], 3), ([], 6))
    with torch.no_grad(), vtp.prune(model, vtp.FastV(2, 0.5)) as run:
        expected = model(**inputs).logits[:, -1], told(run)
        with compiled(model.get_decoder()):
            close(model(**inputs).logits[:, -1], expected[0])
        assert told(run) == expected[1]
    assert graphs()


# ---- Handle.compile -----------------------------------------------------------------------------

LENGTHS = (64, 72)


def assert_same_rows(found, expected, counts):
    """Of the logits, and of the keys of every layer: the `counts` rows of each prompt. Compiled,
    prompts may have more padding in front of them than they need."""
    layers = zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True)
    for (ours, theirs), of_layer in zip(layers, counts, strict=True):
        for b, rows in enumerate(of_layer):
            close(ours.keys[b, :, -rows:], theirs.keys[b, :, -rows:])
    for b, rows in enumerate(counts[-1]):
        close(found.logits[b, -rows:], expected.logits[b, -rows:])


@pytest.mark.parametrize("name", UNLIKE)
def test_prompts_are_padded_to_a_length(model, name, tmp_path):
    """Of 61 and 64 rows; nothing of the padding is left in what comes out."""
    with torch.no_grad(), vtp.prune(model, method_of(name, model, tmp_path)) as run:
        expected = [(model(**inputs), told(run)) for inputs in texts(3, 6)]
        run.compile((64,), texts(3)[0], backend="eager")
        for inputs, (output, report) in zip(texts(3, 6), expected, strict=True):
            found = model(**inputs)
            assert told(run) == report
            assert_same_rows(found, output, run.report().kv_tokens_per_layer)
    assert graphs() == 1


def test_how_a_call_ran(model):
    with torch.no_grad(), vtp.prune(model, METHODS["fastv"]) as run:
        run.compile(LENGTHS, texts(3)[0], backend="eager")
        assert graphs() == 2
        model(**texts(8)[0])
        assert run.report().compiled["padding"] == 72 - 66
        model(**texts(3)[0])
        assert graphs() == 2
        assert run.report().compiled == {
            "length": 64,
            "padding": 3,
            "lengths": [64, 72],
            "mode": None,
            "variants": 2,
            "bytes": None,
        }
        assert run.report().to_dict()["compiled"]["padding"] == 3
        model(**one())  # of another batch
        assert run.report().compiled["variants"] == 3
        model(**one())
        assert run.report().compiled["variants"] == 3 == graphs()
    with torch.no_grad(), vtp.prune(model, METHODS["fastv"]) as run:
        model(**three())
        assert run.report().compiled is None


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["fastv", "visipruner"])
def test_generation(model, name, static):
    options = {"max_new_tokens": 6}
    if static:
        options |= {"cache_implementation": "static", "disable_compile": True}
    with torch.no_grad(), vtp.prune(model, METHODS[name]) as run:
        expected = model.generate(**three(), **options), model.generate(**one(), **options)
        beams = model.generate(**three(), num_beams=2, **options)
        run.compile(LENGTHS, backend="eager")
        assert torch.equal(model.generate(**three(), **options), expected[0])
        assert run.report().compiled["length"] == 64
        assert torch.equal(model.generate(**one(), **options), expected[1])
        assert torch.equal(model.generate(**three(), num_beams=2, **options), beams)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_a_conversation_goes_on(model, positions):
    """The second turn runs as it is, on a cache that the first one, compiled, has filled."""
    first, turn = three(), batch(*(prompt(1, n, n) for n in (4, 7, 2, 5)), seed=3)
    with torch.no_grad(), vtp.prune(model, METHODS["fastv"], positions=positions) as run:

        def conversation():
            cache = model(**first).past_key_values
            mask = torch.cat((first["attention_mask"], turn["attention_mask"]), 1)
            output = model(**turn | {"attention_mask": mask}, past_key_values=cache)
            return output.logits[:, -1], told(run)

        mask = turn["attention_mask"].bool().all(1)
        assert not mask.all()
        turn = batch(*(prompt(1, 4, n) for n in (4, 7, 2, 5)), seed=3)
        expected = conversation()
        run.compile(LENGTHS, backend="eager")
        logits, report = conversation()
        close(logits, expected[0])
        assert report == expected[1]
        assert "holds rows" in run.report().compiled["why_not"]


def test_output_rows_of_padded_prompts(model):
    with torch.no_grad(), vtp.prune(model, METHODS["fastv"], output_rows="input") as run:
        expected = model(**three()).logits
        run.compile(LENGTHS, backend="eager")
        found = model(**three()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_calls_that_run_as_they_are(model):
    with vtp.prune(model, METHODS["fastv"]) as run:
        run.compile((32,), backend="eager", most=1)

        def why(**more):
            with torch.no_grad():
                model(**one() | more)
            return run.report().compiled.get("why_not")

        assert why() is None
        assert "tensor" in why(logits_to_keep=torch.tensor([-1]))
        assert "output_hidden_states" in why(output_hidden_states=True)
        model.requires_grad_(False)
        model(**one())
        assert "no_grad" in run.report().compiled["why_not"]
        model.requires_grad_(True)
        with torch.no_grad(), pytest.warns(UserWarning, match="64 rows.*longest of lengths is 32"):
            model(**three())
        with torch.no_grad():
            model(**one() | {"use_cache": False})
        assert "one more" in run.report().compiled["why_not"]
        assert graphs() == 1


def test_once_it_is_over_nothing_is_left(model):
    text = model.model.language_model
    with torch.no_grad():
        dense = model(**one()).logits
        with vtp.prune(model, METHODS["fastv"]) as run:
            run.compile((32,), backend="eager")
            run.compile((48,), one(), backend="eager")  # in its place
            model(**one())
            assert run.report().compiled["length"] == 48
        assert "forward" not in vars(text)
        assert torch.equal(model(**one()).logits, dense)
    assert run.report().compiled["length"] == 48
    with pytest.raises(RuntimeError, match="removed"):
        run.compile((32,))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (vtp.VisiPruner(shallow_layers=2), "VisiPruner cannot be compiled.*decision='exact'"),
        (vtp.InflectionPruning("attention", llm_layers=()), "min_keep and max_keep differ"),
        (vtp.InflectionPruning(None, llm_layers=(2,), visual_keep="knee"), "knee"),
        (vtp.Chain(vtp.DivPrune(0.5), vtp.VisiPruner(shallow_layers=2)), "decision='exact'"),
        (vtp.FrameDifference(0.5, frames="pictures"), "visual_left does not say"),
    ],
)
def test_methods_that_decide_by_data_are_refused(model, method, message):
    with vtp.prune(model, method) as run, pytest.raises(NotImplementedError, match=message):
        run.compile((64,))
    assert "forward" not in vars(model.model.language_model)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lengths": ()}, ValueError, "lengths: expected ascending numbers above 0"),
        ({"lengths": (64, 32)}, ValueError, "lengths: expected ascending"),
        ({"lengths": (0, 32)}, ValueError, "lengths: expected ascending"),
        ({"lengths": 64}, TypeError, "lengths: expected ints, got 64"),
        ({"lengths": (64.0,)}, TypeError, "lengths: expected ints"),
        ({"lengths": (32, 64), "most": 1}, ValueError, "most: expected at least 2"),
        ({"lengths": (16,), "inputs": one()}, ValueError, "inputs: prompts have 29 rows"),
        ({"lengths": (64,), "inputs": batch(prompt(0, 5, 0))}, ValueError, "no images among them"),
    ],
)
def test_what_cannot_be_compiled(model, arguments, error, message):
    with vtp.prune(model, vtp.FastV(2)) as run, pytest.raises(error, match=message):
        run.compile(**arguments, backend="eager")
    assert "forward" not in vars(model.model.language_model)


def test_models_that_cannot_be_compiled():
    windows = FAMILIES["gemma3"].model("sdpa")
    with vtp.prune(windows, vtp.FastV(2)) as run:
        with pytest.raises(NotImplementedError, match="sliding windows or linear attention"):
            run.compile((64,))
    flash = tiny_llava("flex_attention")
    with vtp.prune(flash, vtp.FastV(2)) as run:
        with pytest.raises(NotImplementedError, match="'flex_attention' cannot be compiled"):
            run.compile((64,))


def test_code_is_made_anew_when_a_method_comes_or_goes_elsewhere():
    """All of it is forgotten then, and there may be more of it than torch makes without asking."""
    model, other = (tiny_llava(num_hidden_layers=2) for _ in range(2))
    lengths = range(32, 41)
    with torch.no_grad(), vtp.prune(model, vtp.FastV(1, 0.5)) as run:
        expected = model(**one()).logits
        run.compile(lengths, one(), backend="eager")
        assert len(lengths) > dynamo.config.recompile_limit
        vtp.apply(other, vtp.FastV(1, 0.5)).remove()
        for words in range(10, 19):
            model(**batch(prompt(1, words, 0)))
            assert run.report().compiled["variants"] == words - 9
        close(model(**one()).logits, expected)
        assert run.report().compiled["length"] == 32
