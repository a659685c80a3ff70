"""Weights that are elsewhere until a module runs: offloaded by accelerate, or in pieces."""

import pytest
import torch
import torch.distributed as dist
from by_hand import KINDS, answers, assert_same_answers, prompts
from pruning_methods import pruning_method
from tiny_llava import DEPTH, tiny_llava
from tiny_models import FAMILIES
from torch import nn
from torch.distributed.fsdp import fully_shard

import vtp_kernels as vtp
from vtp_kernels.models.modules.placement import device_of, key_dtype, like_hidden, why_gone

accelerate = pytest.importorskip("accelerate")


def to_cpu(model, folder):
    return accelerate.cpu_offload(model, execution_device="cpu")


def to_disk(model, folder):
    accelerate.disk_offload(model, folder, execution_device="cpu")
    return model


def to_both(model, folder):
    places = dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "lm_head"), "cpu")
    text = "model.language_model"
    places |= {f"{text}.embed_tokens": "cpu", f"{text}.norm": "disk", f"{text}.rotary_emb": "cpu"}
    places |= {
        f"{text}.layers.{index}": "cpu" if index < DEPTH // 2 else "disk" for index in range(DEPTH)
    }
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True
    )


PLACES = {"cpu": to_cpu, "disk": to_disk, "both": to_both}


@pytest.fixture(scope="module", params=PLACES)
def models(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("offloaded")
    return PLACES[request.param](tiny_llava("sdpa"), str(folder)), tiny_llava("sdpa")


@pytest.mark.parametrize("name", KINDS)
def test_offloaded_models_are_as_models_in_memory(models, name, tmp_path):
    model, plain = models
    last = model.model.language_model.layers[-1].self_attn.q_proj
    assert last.weight.is_meta
    method = pruning_method(name, plain, tmp_path)
    assert_same_answers(answers(model, model, method), answers(plain, plain, method), atol=2e-5)
    assert last.weight.is_meta  # and it is put away again


@torch.no_grad()
def test_an_offloaded_tower_with_parameters_of_its_attention():
    """Which are there while it runs, and not before."""
    family, kept = FAMILIES["got_ocr2"], []
    model = family.model("sdpa")
    inputs = family.batch(model, ((0,), 4))
    for place in (lambda model, _: model, to_cpu):
        with vtp.prune(
            place(model, None), vtp.InflectionPruning("attention", llm_layers=())
        ) as run:
            model(**inputs)
        kept.append(run.report().kept[0])
    assert model.model.vision_tower.layers[-1].attn.rel_pos_h.is_meta
    assert torch.equal(*kept) and not kept[0].all()


def test_offloaded_while_a_method_is_at_work(tmp_path):
    model, plain, inputs = tiny_llava("sdpa"), tiny_llava("sdpa"), prompts()
    method = pruning_method("visipruner", plain, tmp_path)
    with torch.no_grad(), vtp.prune(plain, method):
        expected = plain(**inputs).logits
    with torch.no_grad(), vtp.prune(model, method):
        to_cpu(model, tmp_path)
        assert torch.equal(model(**inputs).logits, expected)


def test_weights_that_come_and_go_with_their_layer_are_refused():
    """torch multiplies by them as if they were there, and gets what happens to be in memory."""
    model, plain, inputs = tiny_llava("sdpa"), tiny_llava("sdpa"), prompts()
    with torch.no_grad(), vtp.prune(model, vtp.FastV(2, 0.5)):
        accelerate.cpu_offload(
            model, execution_device="cpu", preload_module_classes=["LlamaDecoderLayer"]
        )
        with pytest.raises(NotImplementedError, match=r"FastV .* layer 1 .*preload_module_classes"):
            model(**inputs)
    with pytest.raises(NotImplementedError, match=r"FastV .* layer 1 .*preload_module_classes"):
        vtp.apply(model, vtp.FastV(2, 0.5))
    random = vtp.RandomPruning(2, 0.5)  # looks at no layer
    assert_same_answers(answers(model, model, random), answers(plain, plain, random), atol=2e-5)


def test_sharded_weights(alone):
    """In pieces as a whole, they are there while the model runs; layer by layer, they are not."""
    mesh = dist.init_device_mesh("cpu", (1,))
    method, random = vtp.FastV(2, 0.5), vtp.RandomPruning(2, 0.5)
    plain, inputs = tiny_llava("sdpa"), prompts()
    whole = fully_shard(tiny_llava("sdpa"), mesh=mesh)
    by_layer = tiny_llava("sdpa")
    for layer in by_layer.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(by_layer, mesh=mesh)
    for model, works in ((whole, method), (whole, random), (by_layer, random)):
        with torch.no_grad(), vtp.prune(plain, works), vtp.prune(model, works):
            assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    with pytest.raises(NotImplementedError, match=r"FastV .* layer 1 .*sharded.*tp_plan"):
        vtp.apply(by_layer, method)


# ---- where, and in what -----------------------------------------------------------------------


def test_device_of_offloaded_parameters():
    module = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2)).to("meta")
    with pytest.raises(ValueError, match="meta device"):
        device_of(module)
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cuda:1", offload=True)
    other = accelerate.hooks.ModelHook()
    module[0]._hf_hook = accelerate.hooks.SequentialHook(other, hook)
    assert device_of(module) == torch.device("cuda:1")
    module[0].to_empty(device="cpu")
    assert device_of(module) == torch.device("cpu")


def test_what_decides_on_the_backend(tmp_path):
    model = to_disk(tiny_llava("sdpa", dtype=torch.bfloat16), str(tmp_path))
    text = model.model.language_model
    assert next(text.parameters()).is_meta
    like = like_hidden(text)
    assert like.device.type == "cpu" and like.dtype == torch.bfloat16


def test_bytes_of_keys_are_those_of_the_cache(monkeypatch):
    """Under autocast they may be other numbers than the weights."""
    model, inputs = tiny_llava("sdpa", dtype=torch.bfloat16), prompts()
    text = model.model.language_model
    forward = text.forward
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    for autocast in (False, True):
        within = torch.autocast("cpu", torch.float16, enabled=autocast)
        monkeypatch.setattr(text, "forward", within(forward))
        with torch.no_grad(), vtp.prune(model, vtp.RandomPruning(2, 0.5)) as run:
            cache = model.model(**inputs).past_key_values
            report = run.report()
        held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        assert {t.dtype for t in held} == {torch.float32 if autocast else torch.bfloat16}
        per_token = sum(t[0, :, 0].nbytes for t in held) / len(cache.layers)
        assert report.kv_bytes == per_token * sum(map(sum, report.kv_tokens_per_layer))
    assert key_dtype(None, text) == torch.bfloat16


def test_layers_whose_weights_are_there():
    model = tiny_llava()
    assert why_gone(model.model.language_model.layers[0]) is None
    to_cpu(model, None)
    assert why_gone(model.model.language_model.layers[0]) is None
