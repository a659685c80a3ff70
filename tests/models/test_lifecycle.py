"""Putting a method to work in a model, and taking it out again without a trace."""

import threading

import pytest
import torch
from pruning_methods import NAMES, pruning_method
from tiny_llava import batch, one, prompt, three, tiny_llava
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

import vtp_kernels as vtp
from vtp_kernels.methods import Method

GREEDY = {"max_new_tokens": 4, "do_sample": False}
METHOD = vtp.PyramidDrop((2, 4), (0.5, 0.25))


@pytest.fixture
def model():
    model = tiny_llava("sdpa")
    model.generate(**one(), **GREEDY)  # transformers hooks into its vision tower at first use
    return model


def traces(model):
    """All that hooks and attributes could be found in."""
    return [
        (
            name,
            sorted(vars(module)),
            len(module._forward_pre_hooks) + len(module._forward_hooks),
            getattr(module.forward, "__func__", None),
        )
        for name, module in model.named_modules()
    ]


def test_remove_leaves_nothing_behind(model):
    inputs = three()
    before, weights = traces(model), list(model.state_dict())
    dense = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    handle = vtp.apply(model, METHOD)
    assert traces(model) != before
    assert list(model.state_dict()) == weights
    pruned = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    assert not torch.equal(pruned.logits[0], dense.logits[0])
    handle.remove()
    handle.remove()
    assert traces(model) == before
    again = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    assert all(torch.equal(a, b) for a, b in zip(dense.logits, again.logits, strict=True))
    assert handle.report().dense_tokens  # still to be had


@pytest.mark.parametrize("place", ["scorer", "layer", "processor"])
def test_an_exception_leaves_nothing_behind(model, place, monkeypatch):
    inputs, before = one(), traces(model)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt("stop")

    expected = model.generate(**inputs, **GREEDY)
    with pytest.raises(KeyboardInterrupt):
        with vtp.prune(model, METHOD) as run:
            pruned = model.generate(**inputs, **GREEDY)
            report = run.report()
            settings = {}
            if place == "scorer":
                monkeypatch.setattr("vtp_kernels.contract.rows.run_attention_topk", fail)
            elif place == "layer":
                monkeypatch.setattr(model.model.language_model.layers[3].mlp, "forward", fail)
            else:
                settings["logits_processor"] = [fail]
            with pytest.raises(KeyboardInterrupt):
                model.generate(**inputs, **GREEDY, **settings)
            monkeypatch.undo()
            # The method is still at work, and the next call is as the first.
            assert torch.equal(model.generate(**inputs, **GREEDY), pruned)
            assert str(run.report()) == str(report)
            fail()
    assert traces(model) == before
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)


@pytest.mark.parametrize(
    "method",
    [METHOD, vtp.RandomPruning(0, 0.5), vtp.VisiPruner(shallow_layers=2, shallow_attention="skip")],
    ids=lambda method: method.name,
)
def test_applying_twice(model, method):
    with vtp.prune(model, method):
        with pytest.raises(ValueError, match="at work in this model already"):
            vtp.apply(model, vtp.FastV(2))
        with pytest.raises(ValueError, match="at work in this model already"):
            vtp.apply(torch.compile(model, backend="eager"), vtp.FastV(2))
    vtp.apply(model, vtp.FastV(2)).remove()


def test_a_method_that_does_not_fit_leaves_nothing_behind(model):
    before = traces(model)
    message = r"PyramidDrop\.layers\[0\]: there is no layer 8, the model has 6 decoder layers"
    with pytest.raises(ValueError, match=message):
        vtp.apply(model, vtp.PyramidDrop())
    with pytest.raises(TypeError, match=r"method: expected a Method, or a string .* got 3"):
        vtp.apply(model, 3)
    with pytest.raises(ValueError, match="positions: got 'new', expected one of"):
        vtp.apply(model, METHOD, positions="new")
    assert traces(model) == before
    vtp.apply(model, METHOD).remove()


def test_a_backend_that_cannot_serve_says_so(model):
    before = traces(model)
    with pytest.raises(NotImplementedError, match="backend 'triton' cannot serve cpu tensors"):
        vtp.apply(model, METHOD, backend="triton")
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'fast'"):
        vtp.apply(model, METHOD, backend="fast")
    assert traces(model) == before
    with vtp.prune(model, METHOD, backend="reference"):
        model.generate(**one(), **GREEDY)


def test_other_models_are_refused():
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=16, num_hidden_layers=1)
    )
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM is not supported"):
        vtp.apply(llama, METHOD)


def test_subclasses_are_supported():
    class MyLlava(LlavaForConditionalGeneration):
        pass

    model = tiny_llava("sdpa")
    model.__class__ = MyLlava
    with vtp.prune(model, METHOD) as run:
        model.generate(**one(), **GREEDY)
        assert run.report().visual_tokens_per_layer[5] == [4]


def test_supported_models():
    families = vtp.supported_models()
    assert families["llava"]["architectures"] == ["LlavaForConditionalGeneration"]
    assert {"fastv", "pyramiddrop", "random", "schedule"} <= set(families["llava"]["methods"])


@pytest.mark.parametrize("name", NAMES)
def test_no_method_leaves_anything_behind(model, name, tmp_path, monkeypatch):
    """Not when it is removed, and not when a call breaks off in the middle, at whatever layer."""
    inputs, before, weights = three(), traces(model), list(model.state_dict())
    dense = model.generate(**inputs, **GREEDY)
    method = pruning_method(name, model, tmp_path)
    layers = model.model.language_model.layers
    with vtp.prune(model, method) as run:
        assert traces(model) != before and list(model.state_dict()) == weights
        pruned, report = model.generate(**inputs, **GREEDY), str(run.report())
        for layer in (0, 2, 4, 5):
            monkeypatch.setattr(layers[layer].mlp, "forward", interrupt)
            for call in (model, model.generate):
                with torch.no_grad(), pytest.raises(KeyboardInterrupt):
                    call(**inputs)
            monkeypatch.undo()
            assert torch.equal(model.generate(**inputs, **GREEDY), pruned)
            assert str(run.report()) == report
        monkeypatch.setattr(layers[4].mlp, "forward", interrupt)
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            model(**inputs)
        monkeypatch.undo()
    assert traces(model) == before and list(model.state_dict()) == weights
    assert torch.equal(model.generate(**inputs, **GREEDY), dense)


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt("stop")


def assert_threads_do_not_meet(model, prompts, times):
    """A thread a batch of prompts says `times` times what is said without the others."""
    expected = [model.generate(**inputs, **GREEDY) for inputs in prompts]
    outputs = [[] for _ in prompts]

    def work(i):
        for _ in range(times):
            outputs[i].append(model.generate(**prompts[i], **GREEDY))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for wanted, got in zip(expected, outputs, strict=True):
        assert len(got) == times and all(torch.equal(wanted, output) for output in got)


@pytest.mark.parametrize("name", NAMES)
def test_threads_do_not_meet_whatever_the_method(model, name, tmp_path):
    prompts = [one(), three(), batch(prompt(2, 4, 6), seed=5)]
    with vtp.prune(model, pruning_method(name, model, tmp_path)):
        assert_threads_do_not_meet(model, prompts, times=2)


def test_two_models_at_once(model):
    other = tiny_llava("sdpa", seed=1)
    inputs, fastv = three(), vtp.FastV(1, 3)
    with vtp.prune(model, METHOD):
        first = model.generate(**inputs, **GREEDY)
    with vtp.prune(other, fastv):
        second = other.generate(**inputs, **GREEDY)
    with vtp.prune(model, METHOD) as run, vtp.prune(other, fastv) as other_run:
        assert torch.equal(model.generate(**inputs, **GREEDY), first)
        assert torch.equal(other.generate(**inputs, **GREEDY), second)
        assert run.report().method != other_run.report().method


def test_two_threads_on_one_model(model):
    prompts = [one(), three(), batch(prompt(2, 4, 6)), batch(prompt(0, 4, 6))]
    with vtp.prune(model, METHOD):
        assert_threads_do_not_meet(model, prompts, times=3)


def test_a_method_of_one_s_own_sees_the_rows(model):
    seen = {}

    class Watch(Method):
        def decision_layers(self, depth):
            return (0, 3)

        def observed_layers(self, depth):
            return (2,)

        def to_dict(self):
            return {"method": "watch"}

        def decide(self, layer, rows):
            seen[layer] = rows
            if layer == 0:
                return None
            return rows.keep_visual(
                [min(2, n) for n in rows.visual_now], rows.visual_ordinal.float()
            )

    inputs = three()
    with vtp.prune(model, Watch()) as run:
        model.generate(**inputs, **GREEDY)
    rows = seen[3]
    assert torch.equal(rows.valid, inputs["attention_mask"].bool())
    assert torch.equal(rows.text, rows.valid & ~rows.visual)
    assert rows.visual_at_start == rows.visual_now == [16, 32, 48, 0]
    assert rows.prompt_end == inputs["input_ids"].shape[1] - 1
    assert run.report().visual_tokens_per_layer[3] == [2, 2, 2, 0]
    kept = run.report().kept[3] & (inputs["input_ids"] == 99)
    for row, images in enumerate((16, 32, 48)):  # the highest ordinals: the last two
        columns = (inputs["input_ids"][row] == 99).nonzero()[:, 0].tolist()
        assert kept[row].nonzero()[:, 0].tolist() == columns[images - 2 :]
    with pytest.raises(RuntimeError, match="observed_layers"):
        seen[0].attention_scores(slice(0, 1))


# --- what it costs ------------------------------------------------------------------------------


class HostReads(torch.overrides.TorchFunctionMode):
    """Counts what would make the host wait for a GPU."""

    NAMES = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "nonzero")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.NAMES:
            self.count += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (one, METHOD),
        (three, METHOD),
        (three, vtp.DivPrune(6)),
        (three, vtp.Chain(vtp.CDPruner(6), vtp.FastV(2, 3))),
    ],
)
def test_one_host_read_per_prefill_and_none_per_step(model, make, method, monkeypatch):
    # The ops check indices of CPU tensors by reading them; on a GPU they do not.
    monkeypatch.setattr("vtp_kernels.ops._checks.may_read", lambda *tensors: False)
    inputs = make()
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    counts = {}
    for label in ("dense", "pruned"):
        handle = vtp.apply(model, method) if label == "pruned" else None
        with torch.no_grad():
            with HostReads() as prefill:
                cache = model(**inputs).past_key_values
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            with HostReads() as step:
                model(
                    input_ids=torch.full((mask.shape[0], 1), 5),
                    attention_mask=mask,
                    position_ids=inputs["position_ids"][:, -1:] + 1,
                    past_key_values=cache,
                )
        counts[label] = (prefill.count, step.count)
        if handle:
            handle.remove()
    assert counts["pruned"][0] <= counts["dense"][0] + 1
    assert counts["pruned"][1] <= counts["dense"][1]
