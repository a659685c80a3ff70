"""What is done to a model before a method is applied, or while it is at work, has its effect.

The module that users know stays in the tree, and what they do to it is done to what runs. Expected
is what the same model says with the same done by hand, by weights, or under a masked reference.
"""

import contextlib
import copy
import functools
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from masked_reference import MaskedReference
from pruning_methods import NAMES, pruning_method
from test_generation import DETAILS, GREEDY, assert_same
from tiny_llava import IMAGE, batch, one, prompt, three, tiny_llava
from torch import nn

import vtp_kernels as vtp

SETTINGS = GREEDY | DETAILS | {"suppress_tokens": [IMAGE]}
STAGES = {1: 0.5, 3: 0.25}
PYRAMID = vtp.PyramidDrop(tuple(STAGES), tuple(STAGES.values()))


def attentions(model):
    return [layer.self_attn for layer in model.model.language_model.layers]


def generate(model, inputs):
    return model.generate(**inputs, **SETTINGS)


class Adapted(nn.Module):
    """A linear layer and a product of low rank beside it, as adapters are."""

    def __init__(self, plain, seed):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.plain = plain
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.down = nn.Parameter(0.2 * torch.randn(2, plain.in_features, generator=draw))
        self.up = nn.Parameter(0.2 * torch.randn(plain.out_features, 2, generator=draw))

    def forward(self, x):
        return self.plain(x) + x @ self.down.T @ self.up.T


def adapt(model, merged):
    """Put an adapter beside every projection of every attention, or add it to the weights."""
    for layer, attention in enumerate(attentions(model)):
        for number, name in enumerate(("q_proj", "k_proj", "v_proj", "o_proj")):
            adapted = Adapted(getattr(attention, name), seed=10 * layer + number)
            if merged:
                adapted.plain.weight.data += adapted.up.data @ adapted.down.data
            else:
                setattr(attention, name, adapted)


@pytest.mark.parametrize("name", NAMES)
def test_children_that_are_swapped(name, tmp_path):
    """As by peft or bitsandbytes: while the method is at work, and for good."""
    model, by_hand, inputs = tiny_llava(), tiny_llava(), three()
    method = pruning_method(name, model, tmp_path)
    adapt(by_hand, merged=True)
    dense = generate(by_hand, inputs)
    with vtp.prune(by_hand, method):
        expected = generate(by_hand, inputs)
    before = attentions(model)
    with vtp.prune(model, method):
        assert all(a is b for a, b in zip(attentions(model), before, strict=True))
        adapt(model, merged=False)
        assert_same(generate(model, inputs), expected)
    assert_same(generate(model, inputs), dense)
    with vtp.prune(model, method):  # from before it was applied
        assert_same(generate(model, inputs), expected)


@pytest.mark.parametrize("name", ["fastv", "visipruner", "visipruner that skips"])
def test_modes(name, tmp_path):
    """train() and eval() reach the attention that runs: dropout is on in one, off in the other."""
    model, inputs = tiny_llava(attention_dropout=0.5), three()
    method = pruning_method(name, model, tmp_path)

    def logits():
        with torch.no_grad():
            return model(**inputs, logits_to_keep=1).logits

    with vtp.prune(model, method):
        expected = logits()
        model.train()
        assert all(attention.training for attention in attentions(model))
        assert not torch.equal(logits(), logits())
    assert all(attention.training for attention in attentions(model))
    with vtp.prune(model, method):
        model.eval()
        assert torch.equal(logits(), expected)
    assert not any(attention.training for attention in attentions(model))


def halves(module, args, output):
    return (0.5 * output[0], *output[1:]) if isinstance(output, tuple) else 0.5 * output


def turns_around(module, args, output):
    """Depends on the row's place in its prompt, and on there being a batch: the last row of each
    prompt gets the negative."""
    first = output[0] if isinstance(output, tuple) else output
    sign = torch.ones(first.shape[1]).index_fill(0, torch.tensor(-1), -1.0)
    first = first * sign[:, None]
    return (first, *output[1:]) if isinstance(output, tuple) else first


PLACES = {
    "attention": lambda layer: layer.self_attn,
    "projection": lambda layer: layer.self_attn.v_proj,
    "mlp": lambda layer: layer.mlp,
    "norm": lambda layer: layer.input_layernorm,
    "layer": lambda layer: layer,
}


def in_front(hook, module, args, kwargs):
    if args:
        return (hook(module, None, args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": hook(module, None, kwargs["hidden_states"])}


def hooked(model, place, hook, before):
    """Hooks on all layers: behind the modules, or in front of them."""
    hooks = []
    for layer in model.model.language_model.layers:
        module = PLACES[place](layer)
        if before:
            front = functools.partial(in_front, hook)
            hooks.append(module.register_forward_pre_hook(front, with_kwargs=True))
        else:
            hooks.append(module.register_forward_hook(hook))
    return hooks


@pytest.mark.parametrize("when", ["earlier", "later"])
@pytest.mark.parametrize("before", [False, True], ids=["behind", "in front"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("hook", [halves, turns_around])
def test_hooks(hook, place, before, when):
    """On a batch in which one prompt keeps much more than others, so that its rows would come
    without the padding between them."""
    model, reference, inputs = tiny_llava("sdpa"), tiny_llava("eager"), three()
    hooked(reference, place, hook, before)
    stages = {2: 0.5}
    # The method observes what attention is given, whoever changed it on the way.
    with MaskedReference(reference, stages) as masked:
        expected = generate(reference, inputs)
    if when == "earlier":
        hooked(model, place, hook, before)
    with vtp.prune(model, vtp.FastV(2, 0.5)) as run:
        if when == "later":
            hooked(model, place, hook, before)
        got = generate(model, inputs)
    assert torch.equal(run.report().kept[2], masked.kept[2])
    assert_same(got, expected)


def with_half_the_attention(method, inputs):
    """Half of what attention puts out is what half of its output projection puts out."""
    model = tiny_llava()
    for attention in attentions(model):
        attention.o_proj.weight.data *= 0.5
    with vtp.prune(model, method):
        return generate(model, inputs)


@pytest.mark.parametrize("name", ["visipruner", "visipruner that skips"])
def test_hooks_on_passive_layers(name, tmp_path):
    model, inputs = tiny_llava(), three()
    method = pruning_method(name, model, tmp_path)
    expected = with_half_the_attention(method, inputs)
    with vtp.prune(model, method):
        hooks = hooked(model, "attention", halves, before=False)
        assert_same(generate(model, inputs), expected)
        for hook in hooks:
            hook.remove()
    hooked(model, "attention", halves, before=False)
    with vtp.prune(model, method):
        assert_same(generate(model, inputs), expected)


def patch(model):
    """A forward of one's own for every attention, which calls the one that was there."""
    for attention in attentions(model):
        attention.forward = Patched(attention.forward)


class Patched:
    def __init__(self, before):
        self.before = before

    def __call__(self, *args, **kwargs):
        output, weights = self.before(*args, **kwargs)
        return 0.5 * output, weights


@pytest.mark.parametrize("when", ["earlier", "later"])
def test_a_forward_of_one_s_own(when):
    model, reference, inputs = tiny_llava("sdpa"), tiny_llava("eager"), three()
    patch(reference)
    dense = generate(reference, inputs)
    with MaskedReference(reference, STAGES):
        expected = generate(reference, inputs)
    if when == "earlier":
        patch(model)
    with vtp.prune(model, PYRAMID):
        if when == "later":
            patch(model)
        assert_same(generate(model, inputs), expected)
    assert all(isinstance(attention.forward, Patched) for attention in attentions(model))
    assert_same(generate(model, inputs), dense)
    with vtp.prune(model, PYRAMID):
        assert_same(generate(model, inputs), expected)


@pytest.mark.parametrize("name", ["visipruner", "visipruner that skips"])
def test_a_forward_of_one_s_own_on_passive_layers(name, tmp_path):
    model, inputs = tiny_llava(), three()
    method = pruning_method(name, model, tmp_path)
    expected = with_half_the_attention(method, inputs)
    with vtp.prune(model, method):
        patch(model)
        assert_same(generate(model, inputs), expected)
    if name == "visipruner":
        with pytest.raises(NotImplementedError, match="layer 0: the forward of its self_attn"):
            vtp.apply(model, method)
        assert vtp.handle(model) is None
    else:
        with vtp.prune(model, method):
            assert_same(generate(model, inputs), expected)


def test_a_forward_that_calls_nothing_is_noticed():
    model = tiny_llava()
    with vtp.prune(model, PYRAMID):
        attention = attentions(model)[2]
        attention.forward = type(attention).forward.__get__(attention)
        with torch.no_grad(), pytest.raises(RuntimeError, match="layer 2: the forward of its self"):
            model(**one())


# --- copies --------------------------------------------------------------------------------------

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_dense(name, kind, tmp_path):
    model, inputs = tiny_llava(), three()
    method = pruning_method(name, model, tmp_path)
    with vtp.prune(model, method) as run:
        other = COPIES[kind](model)  # transformers' own hooks, put on at first use, are not pickled
        pruned = generate(model, inputs)
        dense = generate(tiny_llava(), inputs)
        assert vtp.handle(other) is None and vtp.handle(model) is run
        assert_same(generate(other, inputs), dense, tolerance=0)
        with torch.no_grad():
            for parameter in model.parameters():  # the copy has weights of its own
                parameter.mul_(1.25)
        assert_same(generate(other, inputs), dense, tolerance=0)
        with vtp.prune(other, method):
            assert_same(generate(other, inputs), pruned, tolerance=0)
    assert_same(generate(other, inputs), dense, tolerance=0)
    assert not any(module._forward_pre_hooks for module in other.model.language_model.layers)


def test_a_copy_of_a_layer_in_a_pruned_model():
    model = tiny_llava()
    with vtp.prune(model, PYRAMID):
        layers = model.model.language_model.layers
        layers[4] = copy.deepcopy(layers[4])
        with torch.no_grad(), pytest.raises(RuntimeError, match="layer 4 is a copy"):
            model(**one())
    with vtp.prune(model, PYRAMID), torch.no_grad():
        model(**one())


@pytest.mark.parametrize("model", ["llava-hf/llava-1.5-7b-hf", [tiny_llava()], None])
def test_what_is_no_model(model):
    with pytest.raises(TypeError, match="model: expected a model that is loaded, got"):
        vtp.apply(model, PYRAMID)


def test_a_model_goes_through_a_file(tmp_path):
    model, inputs = tiny_llava(), one()
    dense = generate(tiny_llava(), inputs)
    with vtp.prune(model, vtp.InflectionPruning("attention", llm_layers=(2,))):
        torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_same(generate(other, inputs), dense, tolerance=0)
    model.save_pretrained(tmp_path / "model")
    assert type(other) is type(model)


# --- handles -------------------------------------------------------------------------------------


def test_a_lost_handle_is_found():
    model, other = tiny_llava(), tiny_llava(seed=1)
    assert vtp.handle(model) is None
    vtp.remove(model)
    vtp.apply(model, PYRAMID)
    assert vtp.handle(model).method == PYRAMID and vtp.handle(other) is None
    model.generate(**one(), **GREEDY)
    assert vtp.handle(model).report().dense_tokens
    with pytest.raises(ValueError, match=r"vtp\.remove\(model\)"):
        vtp.apply(model, vtp.FastV(2))
    vtp.remove(model)
    assert vtp.handle(model) is None
    vtp.apply(model, vtp.FastV(2)).remove()


def test_a_removed_handle_is_not_begun_again():
    model = tiny_llava()
    run = vtp.prune(model, PYRAMID)
    with run:
        pass
    with pytest.raises(RuntimeError, match="this handle was removed"):
        with run:
            pass
    with vtp.prune(model, vtp.FastV(2)) as other:
        run.remove()  # of no effect on whoever came later
        assert vtp.handle(model) is other


def test_a_handle_that_is_kept_does_not_keep_the_model():
    model = tiny_llava()
    with vtp.prune(model, PYRAMID) as run:
        model.generate(**one(), **GREEDY)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert run.report().dense_tokens


# --- a cache and its method ----------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [one, three])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "method", [PYRAMID, vtp.RandomPruning(0, 0.3), vtp.FastV(2, 1.0)], ids=lambda m: m.name
)
def test_a_cache_without_its_method_is_refused(method, rows, inputs):
    model, inputs = tiny_llava(), inputs()
    batch_rows = len(inputs["input_ids"])
    with torch.no_grad():
        with vtp.prune(model, method):
            cache = model(**inputs).past_key_values
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, rows), value=1)
        call = {
            "input_ids": torch.full((batch_rows, rows), 5),
            "attention_mask": mask,
            "past_key_values": cache,
        }
        with pytest.raises(RuntimeError, match="no pruning method is at work"):
            model(**call)
        assert [layer.keys.shape[2] for layer in cache.layers] == lengths
        with vtp.prune(model, method):
            after = model(**call | {"past_key_values": copy.deepcopy(cache)}).logits
        # What goes on from a cache goes by what is in it, and any method may be at work.
        with vtp.prune(model, vtp.VisiPruner(shallow_layers=2), positions="contiguous"):
            assert torch.equal(model(**call).logits, after)


def test_a_call_that_breaks_off_leaves_the_cache_refused(monkeypatch):
    model, inputs = tiny_llava(), one()
    with torch.no_grad():
        with vtp.prune(model, PYRAMID):
            cache = model(**inputs).past_key_values
            step = {"input_ids": torch.full((1, 1), 5), "past_key_values": cache}
            with monkeypatch.context() as patched:
                mlp = model.model.language_model.layers[4].mlp
                patched.setattr(mlp, "forward", lambda x: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    model(**step)
        with pytest.raises(RuntimeError, match="no pruning method is at work"):
            model(**step)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_a_method_that_is_taken_off_in_the_middle_of_a_call(positions):
    """As where a block ends while another thread still generates: never another answer."""
    model, inputs = tiny_llava(), one()
    layer = model.model.language_model.layers[4]
    with torch.no_grad(), vtp.prune(model, "random:0.3", positions=positions) as run:
        cache = model(**inputs).past_key_values
        step = {"input_ids": torch.full((1, 1), 5), "past_key_values": cache}
        hook = layer.register_forward_pre_hook(lambda module, args: run.remove())
        with pytest.raises(RuntimeError, match="no pruning method is at work"):
            model(**step)
        hook.remove()
        with pytest.raises(RuntimeError, match="no pruning method is at work"):
            model(**step)


def test_an_interrupted_call_leaves_the_cache_refused():
    """Nobody tells hooks of a KeyboardInterrupt."""
    model, inputs = tiny_llava(), one()
    with torch.no_grad():
        with vtp.prune(model, "random:0.3"):
            cache = model(**inputs).past_key_values
            step = {"input_ids": torch.full((1, 1), 5), "past_key_values": cache}
            hook = model.model.language_model.layers[0].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(**step)
            hook.remove()
        with pytest.raises(RuntimeError, match="no pruning method is at work"):
            model(**step)


def interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("index", [[1], [-1], [2, 0], [3, 3, 1], [False, True, False, True]])
def test_prompts_chosen_from_a_cache(index):
    model, inputs = tiny_llava(), three()
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    index = torch.tensor(index)

    def step(cache, rows):
        return model(
            input_ids=torch.full((len(rows), 1), 5),
            attention_mask=rows,
            position_ids=rows.sum(1, keepdim=True) - 1,
            past_key_values=cache,
        ).logits

    for positions in ("original", "contiguous"):
        with torch.no_grad(), vtp.prune(model, PYRAMID, positions=positions):
            cache = model(**inputs).past_key_values
            chosen = copy.deepcopy(cache)
            chosen.batch_select_indices(index)
            expected = step(cache, mask)[index]
            torch.testing.assert_close(step(chosen, mask[index]), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("text_only", [False, True])
def test_a_later_picture_under_other_positions(text_only):
    """Rows that closed up in the first turn stay where they are; those of the second keep their
    distances. The reference is the model itself, told which positions each layer's rows have."""
    model, method = tiny_llava(), vtp.RandomPruning(2, 0.5)
    first = batch(prompt(1, 5, 0), prompt(1, 3, 1))
    later = (prompt(0, 30, 2), prompt(1, 4, 3)) if text_only else (prompt(1, 4, 2), prompt(1, 6, 3))
    second = batch(*later, seed=2)
    mask = torch.cat((first["attention_mask"], second["attention_mask"]), dim=1)
    with torch.no_grad():
        with vtp.prune(model, method, positions="contiguous") as run:
            cache = model(**first).past_key_values
            gone = ~run.report().kept[2] & first["attention_mask"].bool()
        with vtp.prune(model, method) as run:
            logits = model(
                **second | {"attention_mask": mask}, past_key_values=cache, logits_to_keep=1
            ).logits
            kept = torch.cat((~gone, run.report().kept[2]), dim=1)
    expected = closed_up_then_masked(first, second, mask, gone, kept)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


def closed_up_then_masked(first, second, mask, gone, kept):
    """The last logits of both turns in one: from layer 2 on, rows not kept are masked, and
    positions fall by what was gone before them. Positions are those a plain call counts."""
    model = tiny_llava("eager")
    text, width = model.model.language_model, first["input_ids"].shape[1]
    both = torch.cat((first["input_ids"], second["input_ids"]), dim=1)
    pixels = torch.cat((first["pixel_values"], second["pixel_values"]))
    order = torch.cat(((first["input_ids"] == IMAGE).sum(1), (second["input_ids"] == IMAGE).sum(1)))
    assert int(order.sum()) == 16 * len(pixels)
    positions = torch.arange(both.shape[1]).expand(len(both), -1)
    shift = torch.nn.functional.pad(gone, (0, second["input_ids"].shape[1])).cumsum(1)
    least = torch.finfo(torch.float32).min

    def before(module, args, kwargs):
        closed = torch.zeros(kept.shape).masked_fill(~kept, least)[:, None, None]
        kwargs["attention_mask"] = (kwargs["attention_mask"] + closed).clamp(min=least)
        embeddings = text.rotary_emb(args[0], position_ids=positions - shift)
        return args, kwargs | {"position_embeddings": embeddings}

    # Pictures in the order in which rows stand in the joined prompts.
    turns = [(first, 0), (second, int((first["input_ids"] == IMAGE).sum()) // 16)]
    pictures = []
    for b in range(len(both)):
        for inputs, start in turns:
            before_b = int((inputs["input_ids"][:b] == IMAGE).sum()) // 16
            count = int((inputs["input_ids"][b] == IMAGE).sum()) // 16
            pictures += range(start + before_b, start + before_b + count)
    for layer in text.layers[2:]:
        layer.register_forward_pre_hook(before, with_kwargs=True)
    assert width + second["input_ids"].shape[1] == both.shape[1]
    with torch.no_grad():
        return model(
            input_ids=both,
            attention_mask=mask,
            position_ids=positions,
            pixel_values=pixels[pictures],
            logits_to_keep=1,
        ).logits


# --- which rows come out -------------------------------------------------------------------------


def test_logits_of_rows_asked_for_by_index():
    """They stay, and their logits are theirs."""
    model, reference, inputs = tiny_llava("sdpa"), tiny_llava("eager"), three()
    width = inputs["input_ids"].shape[1]
    text = (inputs["input_ids"] != IMAGE).all(0) & (inputs["attention_mask"] > 0).all(0)
    rows = text.nonzero()[:, 0]
    assert len(rows) >= 3
    with vtp.prune(model, vtp.FastV(2, 0.5)), torch.no_grad():
        last = model(**inputs, logits_to_keep=1).logits
        by_index = model(**inputs, logits_to_keep=rows).logits
        negative = model(**inputs, logits_to_keep=rows - width).logits
        as_bools = model(**inputs, logits_to_keep=text).logits
    with MaskedReference(reference, {2: 0.5}), torch.no_grad():
        expected = reference(**inputs).logits
    torch.testing.assert_close(by_index, expected[:, rows], rtol=0, atol=2e-5)
    torch.testing.assert_close(last, expected[:, -1:], rtol=0, atol=2e-5)
    assert torch.equal(negative, by_index) and torch.equal(as_bools, by_index)


def test_visual_rows_asked_for_by_index_stay():
    model, inputs = tiny_llava(), one()
    visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    asked = visual[[2, 9]]
    with vtp.prune(model, vtp.Schedule({1: 0})) as run, torch.no_grad():
        logits = model(**inputs, logits_to_keep=asked).logits
    assert logits.shape[1] == 2 and logits.isfinite().all()
    assert run.report().kept[1][0, visual].nonzero()[:, 0].tolist() == [2, 9]


def test_rows_asked_for_that_leave_or_are_not_there():
    model, inputs = tiny_llava(), one()
    width = inputs["input_ids"].shape[1]
    method = vtp.InflectionPruning(None, llm_layers=(2,), visual_keep=0.5, text_keep=0.1)
    with vtp.prune(model, method), torch.no_grad():
        with pytest.raises(ValueError, match="logits_to_keep: it asks for row 21 of every prompt"):
            model(**inputs, logits_to_keep=torch.tensor([21, width - 1]))
        assert model(**inputs, logits_to_keep=torch.tensor([width - 1])).logits.shape[1] == 1
        for wrong in (torch.tensor([width]), torch.tensor([-width - 1]), torch.ones(3).bool()):
            with pytest.raises(IndexError, match="logits_to_keep"):
                model(**inputs, logits_to_keep=wrong)


def test_padding_may_be_asked_for_by_index():
    model, inputs = tiny_llava(), three()
    asked = torch.tensor([0, inputs["input_ids"].shape[1] - 1])
    with vtp.prune(model, PYRAMID), torch.no_grad():
        logits = model(**inputs, logits_to_keep=asked).logits
        last = model(**inputs).logits[:, -1:]
    real = inputs["attention_mask"][:, 0].bool()
    assert torch.equal(logits[:, 1:], last)
    assert logits[real, 0].isfinite().all() and logits[~real, 0].isnan().all()


def test_a_mask_of_another_width_is_refused():
    model, inputs = tiny_llava(), three()
    inputs["attention_mask"] = inputs["attention_mask"][:, -5:]
    with vtp.prune(model, PYRAMID), torch.no_grad():
        with pytest.raises(ValueError, match=r"attention_mask: expected \[B, 64\]"):
            model(**inputs)


@pytest.mark.parametrize("method", [PYRAMID, vtp.RandomPruning(0, 0.3)], ids=lambda m: m.name)
def test_output_in_the_rows_of_the_input(method):
    """For scorers that count rows from the front; what left is no number."""
    model, inputs = tiny_llava(), three()
    with torch.no_grad():
        with vtp.prune(model, method) as run:
            left = model(**inputs).logits
            generated = generate(model, inputs)
        with vtp.prune(model, method, output_rows="input"):
            logits = model(**inputs).logits
            states = model.model(**inputs).last_hidden_state
            as_tuple = model(**inputs, return_dict=False)[0]
            assert_same(generate(model, inputs), generated, tolerance=0)
    kept = run.report().kept[max(run.report().kept)]
    assert logits.shape[:2] == inputs["input_ids"].shape
    assert torch.equal(logits.isfinite().all(2), kept)
    assert torch.equal(states.isfinite().all(2), kept)
    assert torch.equal(logits.isnan().any(2), ~kept)
    assert torch.equal(as_tuple.nan_to_num(), logits.nan_to_num())
    for b, rows in enumerate(kept):
        count = int(rows.sum())
        torch.testing.assert_close(logits[b, rows], left[b, -count:], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="output_rows: got 'all', expected one of"):
        vtp.apply(model, method, output_rows="all")


# --- embeddings ----------------------------------------------------------------------------------


def test_merged_embeddings_are_warned_of_once():
    model, inputs = tiny_llava(), one()
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        merged = model.get_input_embeddings()(inputs["input_ids"])
        merged[inputs["input_ids"] == IMAGE] = torch.cat(list(features)).to(merged.dtype)
        call = {"inputs_embeds": merged, "attention_mask": inputs["attention_mask"]}
        dense = model(**call).logits
        with vtp.prune(model, PYRAMID):
            with pytest.warns(UserWarning, match="inputs_embeds came without pixel values"):
                assert torch.equal(model(**call).logits, dense)
            with no_warnings():
                model(**call)
                model.generate(**inputs, **GREEDY)
        with vtp.prune(model, PYRAMID), no_warnings():
            text = batch(prompt(0, 5, 0))
            model.generate(**text, **GREEDY)
            embeddings = model.get_input_embeddings()(inputs["input_ids"])
            del inputs["input_ids"]
            model.generate(**inputs, inputs_embeds=embeddings, **GREEDY)


@contextlib.contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
