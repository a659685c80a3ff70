"""Models inside other modules: adapters, data parallelism. Each as the same done by hand."""

import pytest
import torch
from by_hand import KINDS, answers, assert_same_answers, differ, plain_like, prompts
from masked_reference import MaskedReference
from pruning_methods import pruning_method
from tiny_llava import one, tiny_llava
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import vtp_kernels as vtp
from vtp_kernels.models.families import parts_of
from vtp_kernels.models.modules.unwrapping import inside, passed_to

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHOD = vtp.FastV(2, 0.5)


def lora(seed, **settings):
    """Adapters of random weights: LoRA as it begins changes nothing."""
    torch.manual_seed(seed)
    return peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False, **settings
    )


def adapted(task=None):
    """A model with two adapters, "default" and "other"."""
    model = peft.get_peft_model(tiny_llava("sdpa"), lora(1, task_type=task))
    torch.manual_seed(2)
    model.add_adapter("other", lora(2, task_type=task))
    return model.eval()


def added_by_hand(model, *adapters):
    """W + s B A of each adapter named, without peft."""

    def weight_of(module):
        weight = module.base_layer.weight.clone()
        for name in adapters:
            down, up = module.lora_A[name].weight, module.lora_B[name].weight
            weight += module.scaling[name] * up @ down
        return weight

    return plain_like(model.get_base_model(), weight_of)


@pytest.fixture(scope="module")
def models():
    """A PeftModel, and plain models: with the first adapter, with the other, with none."""
    model = adapted()
    plain = {name: added_by_hand(model, *name) for name in ((), ("default",), ("other",))}
    return model, plain


@pytest.mark.parametrize("name", KINDS)
def test_adapters_are_as_weights_added_by_hand(models, name, tmp_path):
    model, plain = models
    method = pruning_method(name, model.get_base_model(), tmp_path)
    expected = {adapters: answers(others, others, method) for adapters, others in plain.items()}
    assert differ(expected[()], expected[("default",)])
    assert_same_answers(answers(model, model, method), expected[("default",)])
    with model.disable_adapter():
        assert_same_answers(answers(model, model, method), expected[()])
    # Applied to what the adapters were put on, or to what is between: the wrapper is called.
    for inner in (model.get_base_model(), model.base_model):
        assert_same_answers(answers(model, inner, method), expected[("default",)])


def test_adapters_may_change_while_a_method_is_at_work(models):
    model, plain = models
    inputs = prompts()

    def logits(of):
        with torch.no_grad():
            return of(**inputs).logits

    by_hand = {}
    for adapters, others in plain.items():
        with vtp.prune(others, METHOD):
            by_hand[adapters] = logits(others)
    with vtp.prune(model, METHOD):
        torch.testing.assert_close(logits(model), by_hand[("default",)], rtol=0, atol=1e-4)
        model.set_adapter("other")
        torch.testing.assert_close(logits(model), by_hand[("other",)], rtol=0, atol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), by_hand[()], rtol=0, atol=1e-4)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), by_hand[("other",)], rtol=0, atol=1e-4)
        model.unmerge_adapter()
        model.set_adapter("default")
        torch.testing.assert_close(logits(model), by_hand[("default",)], rtol=0, atol=1e-4)


def test_two_adapters_at_once():
    model = adapted()
    model.base_model.set_adapter(["default", "other"])
    plain = added_by_hand(model, "default", "other")
    assert_same_answers(answers(model, model, METHOD), answers(plain, plain, METHOD))


def test_merged_for_good():
    model = adapted()
    plain = added_by_hand(model, "default")
    merged = model.merge_and_unload()
    assert_same_answers(answers(merged, merged, METHOD), answers(plain, plain, METHOD))


def test_a_model_for_a_task(models):
    """peft's PeftModelForCausalLM hands calls on by way of LoraModel."""
    model = adapted("CAUSAL_LM")
    plain = models[1][("default",)]
    assert_same_answers(answers(model, model, METHOD), answers(plain, plain, METHOD))


class Prompted(MaskedReference):
    """Of a prompt whose virtual tokens come as embeddings, so that no ids do."""

    def __init__(self, *args, ids, **settings):
        super().__init__(*args, **settings)
        self.ids = ids

    def _begin(self, module, args, kwargs):
        super()._begin(module, args, {"input_ids": self.ids} | kwargs)


@pytest.mark.parametrize("make", [one, prompts])
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_text(kind, make):
    """In front of the left padding, as embeddings or as keys that are in the cache already."""
    stages, inputs = {2: 0.5, 4: 0.25}, make()
    torch.manual_seed(4)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5)
    models = [peft.get_peft_model(tiny_llava(kind), config).eval() for kind in ("sdpa", "eager")]
    models[1].prompt_encoder.load_state_dict(models[0].prompt_encoder.state_dict())
    ids = inputs["input_ids"]
    if kind == "PromptTuningConfig":
        ids = torch.cat((torch.full((len(ids), 5), 1), ids), dim=1)
    method = vtp.PyramidDrop(tuple(stages), tuple(stages.values()))
    with torch.no_grad():
        with vtp.prune(models[0], method) as run:
            got = models[0](**inputs, logits_to_keep=1).logits
        with Prompted(models[1].get_base_model(), stages, ids=ids) as masked:
            expected = models[1](**inputs, logits_to_keep=1).logits
    assert all(torch.equal(run.report().kept[layer], masked.kept[layer]) for layer in stages)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_adapters_may_come_while_a_method_is_at_work(models, tmp_path):
    """Whatever is done to the children of an attention is done to what runs; and it stays."""
    _, plain = models
    inputs = prompts()
    for name in KINDS:
        model = tiny_llava("sdpa")
        method = pruning_method(name, model, tmp_path)
        with torch.no_grad():
            with vtp.prune(plain[("default",)], method):
                expected = plain[("default",)](**inputs).logits
            with vtp.prune(model, method):
                model(**inputs)
                wrapped = peft.get_peft_model(model, lora(1)).eval()
                torch.testing.assert_close(wrapped(**inputs).logits, expected, rtol=0, atol=1e-4)
            torch.testing.assert_close(
                wrapped(**inputs).logits, plain[("default",)](**inputs).logits, rtol=0, atol=1e-4
            )


# ---- wrappers that pass over the hooks of the model -------------------------------------------


class CallsForward(nn.Module):
    """As peft's AdaLoRA, and older versions of its LoRA, call the model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model.forward(*args, **kwargs)


def images_at_the_end():
    """A prompt that ends in visual tokens, so that the logits asked for are theirs."""
    inputs = one()
    end = int((inputs["input_ids"][0] == 99).nonzero()[-1]) + 1
    inputs["input_ids"] = inputs["input_ids"][:, :end]
    inputs["attention_mask"] = inputs["attention_mask"][:, :end]
    return inputs


@pytest.mark.parametrize("of", [lambda model: model, CallsForward], ids=["itself", "wrapped"])
def test_rows_whose_logits_are_asked_for_stay_when_hooks_are_passed_over(of):
    model, inputs, method = tiny_llava(), images_at_the_end(), vtp.Schedule({1: 0})
    wrapped = of(model)
    with vtp.prune(wrapped, method) as run, torch.no_grad():
        expected = model(**inputs, logits_to_keep=4).logits
        kept = run.report().kept[1]
        got = wrapped.forward(**inputs, logits_to_keep=4).logits
        assert kept[0].tolist()[-5:] == [False, True, True, True, True]
        assert torch.equal(run.report().kept[1], kept)
    assert torch.equal(got, expected)


def test_labels_are_refused_when_hooks_are_passed_over():
    model, inputs = tiny_llava(), one()
    with vtp.prune(CallsForward(model), METHOD), torch.no_grad():
        with pytest.raises(ValueError, match="labels"):
            CallsForward(model)(**inputs, labels=inputs["input_ids"])


def test_adalora_is_as_weights_added_by_hand():
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, target_modules=TARGETS, init_lora_weights=False
    )
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny_llava("sdpa"), config).eval()
    for module in model.modules():
        if hasattr(module, "lora_E"):
            nn.init.normal_(module.lora_E["default"], std=0.02)

    def weight_of(module):
        down, up = module.lora_A["default"], module.lora_B["default"]
        rank = module.ranknum["default"] + 1e-5
        delta = up @ (down * module.lora_E["default"]) * module.scaling["default"] / rank
        return module.base_layer.weight + delta

    plain = plain_like(model.get_base_model(), weight_of)
    others = answers(plain, plain, METHOD)
    with model.disable_adapter():
        assert differ(answers(model, model, METHOD), others)
    assert_same_answers(answers(model, model, METHOD), others)


def test_what_a_call_was_given_is_found():
    class Inner(nn.Module):
        def forward(self):
            return passed_to(self.top)

    class Named(nn.Module):
        def forward(self, labels=None, logits_to_keep=0):
            return self.inner()

    class Unnamed(nn.Module):
        def forward(self, *args, **kwargs):
            return self.inner()

    for kind in (Named, Unnamed):
        top = kind()
        top.inner = Inner()
        top.inner.__dict__["top"] = top
        assert top(labels=1, logits_to_keep=2) == {"labels": 1, "logits_to_keep": 2}
        assert top.inner() == {}
        other = kind()
        other.inner = top.inner
        assert other(labels=1) == {}


# ---- data parallelism -------------------------------------------------------------------------


def data_parallel(model):
    wrapper = nn.DataParallel(model)
    wrapper.device_ids = []  # as where there is no GPU
    return wrapper


@pytest.mark.parametrize("kind", ["DistributedDataParallel", "DataParallel", "both"])
def test_data_parallel(alone, kind):
    model, inputs = tiny_llava(), prompts()
    wrapper = model
    if kind != "DistributedDataParallel":
        wrapper = data_parallel(wrapper)
    if kind != "DataParallel":
        wrapper = nn.parallel.DistributedDataParallel(wrapper)
    with torch.no_grad():
        with vtp.prune(model, METHOD):
            expected = model(**inputs, logits_to_keep=2).logits
        with vtp.prune(wrapper, METHOD):
            assert torch.equal(wrapper(**inputs, logits_to_keep=2).logits, expected)
            with pytest.raises(ValueError, match="at work in this model already"):
                vtp.apply(model, METHOD)
            assert vtp.handle(wrapper) is vtp.handle(model) is not None
            vtp.remove(wrapper)
            assert vtp.handle(model) is None
        assert not torch.equal(wrapper(**inputs, logits_to_keep=2).logits, expected)


def test_data_parallel_on_several_devices_is_refused():
    model = tiny_llava()
    wrapper = data_parallel(model)
    wrapper.device_ids = [0, 1]
    with pytest.raises(NotImplementedError, match=r"DataParallel on 2 devices.*DistributedData"):
        vtp.apply(wrapper, METHOD)
    with vtp.prune(model, METHOD), torch.no_grad():
        copy = model._replicate_for_data_parallel()  # what it makes for each device
        with pytest.raises(NotImplementedError, match=r"DataParallel.*DistributedDataParallel"):
            copy(**one())


# ---- what is inside ---------------------------------------------------------------------------


def test_wrappers_in_wrappers():
    model = adapted("CAUSAL_LM")
    base = model.get_base_model()
    wrapped = torch.compile(data_parallel(model), backend="eager")
    assert [type(module).__name__ for module in inside(wrapped)] == [
        "OptimizedModule",
        "DataParallel",
        "PeftModelForCausalLM",
        "LoraModel",
        "LlavaForConditionalGeneration",
    ]
    assert parts_of(wrapped).top is base


def test_other_models_are_refused_by_name_whatever_is_around():
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=16, num_hidden_layers=1)
    )
    with pytest.raises(NotImplementedError, match=r"^DataParallel around LlamaForCausalLM is not"):
        vtp.apply(data_parallel(llama), METHOD)


def test_an_attention_without_projections_is_refused():
    """As peft's adaption prompts put a module of their own in the place of the attention."""
    model = tiny_llava()
    layer = model.model.language_model.layers[0]
    layer.self_attn = nn.Sequential(layer.self_attn)
    with pytest.raises(NotImplementedError, match=r"class Sequential .* no q_proj"):
        vtp.apply(model, METHOD)
