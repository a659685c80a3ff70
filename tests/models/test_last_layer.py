"""The last layer runs on the rows asked for alone, and nothing comes out otherwise."""

import contextlib
import functools

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_llava import DEPTH, one, three, tiny_llava
from tiny_models import FAMILIES
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import vtp_kernels as vtp

METHOD = vtp.PyramidDrop((2, 4), (0.5, 0.25))


@pytest.fixture(scope="module")
def model():
    return tiny_llava("sdpa")


@contextlib.contextmanager
def rows_of(module):
    """Notes how many rows come in every call, where no hook and no forward shows it."""
    kind, rows, forward = type(module), [], type(module).forward

    def noting(self, hidden, *args, **kwargs):
        if self is module:
            rows.append(hidden.shape[1])
        return forward(self, hidden, *args, **kwargs)

    kind.forward = functools.wraps(forward)(noting)
    try:
        yield rows
    finally:
        kind.forward = forward


@contextlib.contextmanager
def hook(module):
    handle = module.register_forward_hook(lambda module, args, output: None)
    yield
    handle.remove()


def last(model):
    return model.get_decoder().layers[-1]


def rows_and_output(model, watched=None, method=METHOD, **arguments):
    """How many rows the last layer's MLP got, and what the model put out; `watched` has a hook."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(vtp.prune(model, method))
        if watched is not None:
            stack.enter_context(hook(watched))
        rows = stack.enter_context(rows_of(last(model).mlp))
        return rows, model(**arguments)


@pytest.mark.parametrize("kept", [1, 3])
@pytest.mark.parametrize("name", [x for x in FAMILIES if x != "granite4_vision"])  # has no cache
def test_nothing_else_changes(name, kept):
    """Neither logits nor the cache, with padding and without, for one row and for drafts."""
    family = FAMILIES[name]
    model = family.model("sdpa")
    for prompts in ((((0,), 9),), (((0,), 9), ((1, 2), 3), ((), 5))):
        inputs = family.batch(model, *prompts) | {"logits_to_keep": kept}
        few, got = rows_and_output(model, **inputs)
        all_rows, expected = rows_and_output(model, last(model).mlp, **inputs)
        if model._supports_logits_to_keep():
            assert few == [kept] and sum(all_rows) > len(prompts) * kept
        else:  # it puts out all logits, whatever it is told
            assert sum(few) > len(prompts) * kept
        ends = got.logits[:, -kept:], expected.logits[:, -kept:]  # without padding
        torch.testing.assert_close(*ends, rtol=0, atol=2e-5)
        pairs = zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True)
        for layer, (ours, theirs) in enumerate(pairs):
            exact = {"rtol": 0, "atol": 0 if layer < DEPTH - 1 else 2e-5}
            torch.testing.assert_close(ours.keys, theirs.keys, **exact)
            torch.testing.assert_close(ours.values, theirs.values, **exact)


@pytest.mark.parametrize(
    "place",
    [
        "model",
        "model.language_model",
        "model.language_model.norm",
        f"model.language_model.layers.{DEPTH - 1}",
        f"model.language_model.layers.{DEPTH - 1}.mlp.up_proj",
    ],
)
def test_whoever_looks_sees_all_rows(model, place):
    rows, _ = rows_and_output(model, model.get_submodule(place), **three(), logits_to_keep=1)
    assert rows[0] > 1
    rows, _ = rows_and_output(model, **three(), logits_to_keep=1)
    assert rows == [1]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"logits_to_keep": torch.tensor([-1])},
        {"logits_to_keep": 1, "output_hidden_states": True},
        {"logits_to_keep": 1, "use_cache": False},
    ],
    ids=["all logits", "by index", "hidden states", "no cache"],
)
def test_whoever_asks_gets_all_rows(model, arguments):
    rows, output = rows_and_output(model, **three(), **arguments)
    assert rows[0] > 1
    if output.hidden_states is not None:
        assert output.hidden_states[-1].shape[1] > 1


def test_the_base_model_gives_out_all_rows(model):
    """It does not know the argument, and nobody behind it takes the last rows."""
    with vtp.prune(model, METHOD), torch.no_grad():
        expected = model.model(**three()).last_hidden_state
        got = model.model(**three(), logits_to_keep=1).last_hidden_state
    assert got.shape[1] > 1 and torch.equal(got, expected)


def test_where_nothing_leaves_all_rows_run(model):
    """What keeps all is the dense model to the bit."""
    rows, _ = rows_and_output(model, method=vtp.Schedule({2: 1.0}), **three(), logits_to_keep=1)
    assert rows[0] > 1


def test_training_runs_all_rows(model):
    last(model).train()
    try:
        rows, _ = rows_and_output(model, **three(), logits_to_keep=1)
    finally:
        last(model).eval()
    assert rows[0] > 1


def test_a_second_turn(model):
    """With a picture, behind what an earlier call left in the cache."""
    outputs = []
    for watched in (None, last(model).mlp):
        rows, first = rows_and_output(model, watched, **three(), logits_to_keep=1)
        inputs = three()
        mask = inputs["attention_mask"]
        inputs["attention_mask"] = torch.cat((mask, mask), 1)
        again, second = rows_and_output(
            model, watched, **inputs, past_key_values=first.past_key_values, logits_to_keep=1
        )
        outputs.append(second.logits)
        assert (rows == again == [1]) == (watched is None)
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-5)


# ---- models that are not as transformers makes them ------------------------------------------


def hands_over_weights(model):
    kinds = {"preload_module_classes": ["LlamaAttention"], "execution_device": torch.device("cpu")}
    accelerate.cpu_offload(model, **kinds)


def adapts(model):
    kept = ["layers.5.self_attn"]
    get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=kept))
    model.eval()


class Around(torch.nn.Module):
    """An attention around the attention, as some of peft's adapters."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, **kwargs):
        return self.attention(**kwargs)


def wraps_attention(model):
    last(model).self_attn = Around(last(model).self_attn)


def asks_for_all_later(model):
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs | {"logits_to_keep": 0})


def has_a_hook_of_its_own(model):
    def look(module, args, output):
        return None

    look.__module__ = "transformers_addons.hooks"
    last(model).mlp.register_forward_hook(look)


def is_another_class(model):
    kind = type(model)
    model.__class__ = type("Pooling", (kind,), {"__module__": __name__})


def is_another_text_model(model):
    text = model.model.language_model
    text.__class__ = type("Pooling", (type(text),), {"__module__": __name__})


def mixes_rows(model):
    last(model).mlp = torch.nn.Sequential(torch.nn.Softmax(dim=1))


def rounds_all_alike(model):
    del last(model).mlp.act_fn
    last(model).mlp.act_fn = lambda x: x / x.abs().max()


def drops_out(model):
    last(model).mlp.train()


def attends_both_ways_later(model):
    def change(module, args):
        last(model).self_attn.is_causal = False

    model.model.vision_tower.register_forward_pre_hook(change)


def attends_in_its_own_way(model):
    AttentionInterface.register("of_mine", sdpa_attention_forward)
    model.set_attn_implementation("of_mine")


def has_another_norm(model):
    """As the layers of some families, that norm what attention gives out."""
    layer = last(model)
    kind = type(layer)
    layer.norm_of_mine = layer.input_layernorm
    del layer.input_layernorm

    @functools.wraps(kind.forward)
    def forward(self, hidden_states, **kwargs):
        attended, _ = self.self_attn(self.norm_of_mine(hidden_states), **kwargs)
        return hidden_states + self.mlp(self.post_attention_layernorm(attended))

    layer.__class__ = type("Renamed", (kind,), {"forward": forward, "__module__": kind.__module__})


@pytest.mark.parametrize(
    "change",
    [
        hands_over_weights,
        adapts,
        wraps_attention,
        asks_for_all_later,
        has_a_hook_of_its_own,
        is_another_class,
        is_another_text_model,
        mixes_rows,
        rounds_all_alike,
        drops_out,
        attends_both_ways_later,
        attends_in_its_own_way,
        has_another_norm,
    ],
)
def test_whatever_was_changed_runs_all_rows(change):
    model, method = tiny_llava("sdpa"), vtp.RandomPruning(2, 0.3)
    change(model)
    rows, _ = rows_and_output(model, method=method, **one(), logits_to_keep=1)
    assert rows[0] > 1


def test_a_forward_put_into_the_class(model, monkeypatch):
    kind = type(last(model).self_attn)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *a, **more: forward(self, *a, **more))
    rows, _ = rows_and_output(model, **three(), logits_to_keep=1)
    assert rows[0] > 1


def test_hooks_of_all_modules(model):
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        rows, _ = rows_and_output(model, **three(), logits_to_keep=1)
    finally:
        handle.remove()
    assert rows[0] > 1


def test_a_hook_that_asks_for_more(model):
    """It comes behind the one that reads what is asked for."""

    def more(module, args, kwargs):
        return args, kwargs | {"logits_to_keep": 0}

    with vtp.prune(model, METHOD), torch.no_grad():
        expected = model(**three()).logits
        handle = model.register_forward_pre_hook(more, with_kwargs=True)
        got = model(**three(), logits_to_keep=1).logits
        handle.remove()
    assert torch.equal(got, expected)


class OwnCache(DynamicCache):
    pass


def test_a_cache_of_their_own(model):
    rows, _ = rows_and_output(model, **three(), logits_to_keep=1, past_key_values=OwnCache())
    assert rows[0] > 1
