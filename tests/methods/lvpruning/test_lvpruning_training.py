"""Training: what it leaves alone, that it can stop and go on, that processes share it, that it
learns."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("transformers")

from tiny_training import RECIPE, conversations, tiny_model, tiny_processor

import vtp_kernels as vtp
from vtp_kernels.cli import main
from vtp_kernels.methods.lvpruning import Conversation, Recipe, train
from vtp_kernels.methods.lvpruning.data import Collator
from vtp_kernels.methods.lvpruning.decisions import Choosing
from vtp_kernels.methods.lvpruning.files import load_deciders, read_fit
from vtp_kernels.methods.lvpruning.processes import Processes
from vtp_kernels.methods.lvpruning.training import METRICS, _Run
from vtp_kernels.models.families import parts_of
from vtp_kernels.pocket_llava.model import TRAINED

DATA = conversations(16)


def run(out, *, model=None, data=DATA, stop_after=None, **changes):
    recipe = dataclasses.replace(RECIPE, **changes)
    model = tiny_model() if model is None else model
    return train(
        model, data, processor=tiny_processor(), out=out, recipe=recipe, stop_after=stop_after
    )


def metrics(out):
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def weights(out):
    return load_file(out / "deciders.safetensors")


def assert_same_training(ours, theirs, **tolerance):
    for name, tensor in weights(ours).items():
        # A softmax does not see this bias: its gradient is rounding, which AdamW makes large.
        if "k_proj.bias" not in name:
            torch.testing.assert_close(tensor, weights(theirs)[name], **tolerance)
    for line, other in zip(metrics(ours), metrics(theirs), strict=True):
        for name in ("lm_loss", "ratio_loss", "gradient_norm", "kept"):
            assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name


# --- what it leaves alone -----------------------------------------------------------------------


def used(model):
    """After a first call, in which transformers adds hooks of its own."""
    with torch.no_grad():
        model(**Collator(tiny_processor())(DATA[:1]).inputs)
    return model


def hooks_of(model):
    return [
        len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()
    ]


def test_the_model_is_as_it_was(tmp_path):
    model = used(tiny_model()).train()
    model.model.vision_tower.requires_grad_(False)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    modules, hooks = [id(m) for m in model.modules()], hooks_of(model)
    run(tmp_path, model=model, stop_after=2)
    assert model.training and hooks_of(model) == hooks
    assert [id(m) for m in model.modules()] == modules
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())


def test_so_it_is_after_an_error(tmp_path, monkeypatch):
    model = used(tiny_model())
    modules, hooks = [id(m) for m in model.modules()], hooks_of(model)

    def fail(self, layer, hidden):
        raise RuntimeError("here")

    monkeypatch.setattr(Choosing, "decide", fail)
    with pytest.raises(RuntimeError, match="here"):
        run(tmp_path, model=model)
    assert [id(m) for m in model.modules()] == modules and hooks_of(model) == hooks
    assert all(p.requires_grad for p in model.parameters())


def test_random_numbers_of_others_are_left_alone(tmp_path):
    model = tiny_model()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    run(tmp_path, model=model, stop_after=1)
    assert torch.equal(torch.rand(4), expected)


def test_in_training_the_state_dict_has_no_more_keys(tmp_path, monkeypatch):
    model, seen = tiny_model(), []
    before, plain = list(model.state_dict()), Choosing.decide

    def look(self, layer, hidden):
        seen.append(list(model.state_dict()))
        return plain(self, layer, hidden)

    monkeypatch.setattr(Choosing, "decide", look)
    run(tmp_path, model=model, stop_after=1)
    assert seen and all(keys == before for keys in seen)


# --- answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", (1, 2))
def test_answers_do_not_decide(tmp_path, monkeypatch, turns):
    """Other answers, of another length too: the same decisions, and another loss."""
    plain, decisions = Choosing.decide, []

    def note(self, layer, hidden):
        policy = plain(self, layer, hidden)
        decisions[-1].append(self.kept[-1].detach().clone())
        return policy

    monkeypatch.setattr(Choosing, "decide", note)
    data, others = conversations(4, turns), []
    for conversation in data:
        told = tuple((question, "pink ring bottom") for question, _ in conversation.turns)
        others.append(Conversation(conversation.images, told))
    lines = []
    for number, given in enumerate((data, others)):
        decisions.append([])
        lines += metrics(run(tmp_path / str(number), data=given, stop_after=1))
    assert all(torch.equal(a, b) for a, b in zip(*decisions, strict=True)) and decisions[0]
    assert lines[0]["kept"] == lines[1]["kept"] and lines[0]["lm_loss"] != lines[1]["lm_loss"]


def test_the_question_does_decide(tmp_path):
    data = conversations(4)
    others = [
        Conversation(c.images, (("how many shapes is the ring", c.turns[0][1]),)) for c in data
    ]
    kept = [
        metrics(run(tmp_path / name, data=given, stop_after=1))[0]["kept"]
        for name, given in (("a", data), ("b", others))
    ]
    assert kept[0] != kept[1]


# --- stopping and going on ----------------------------------------------------------------------


@pytest.mark.parametrize("stop", (1, 3))
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, stop):
    at_once, in_parts = tmp_path / "at once", tmp_path / "in parts"
    run(at_once, epochs=2, data=DATA[:8])
    run(in_parts, epochs=2, data=DATA[:8], stop_after=stop)
    with (in_parts / METRICS).open("a") as file:  # killed after a step that no checkpoint has
        file.write(json.dumps({"step": stop, "lm_loss": 1e9}) + "\n")
    run(in_parts, epochs=2, data=DATA[:8])
    for name in ("deciders.safetensors", "checkpoint.safetensors", "deciders.json"):
        assert (at_once / name).read_bytes() == (in_parts / name).read_bytes()
    assert metrics(at_once) == metrics(in_parts)
    assert [line["step"] for line in metrics(at_once)] == [0, 1, 2, 3]


def test_a_run_that_is_over_changes_nothing(tmp_path):
    run(tmp_path, data=DATA[:8])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run(tmp_path, data=DATA[:8])
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_other_settings_do_not_go_on(tmp_path):
    run(tmp_path, stop_after=1)
    with pytest.raises(ValueError, match=r"begun here: learning_rate was 0\.01 and is 0\.1; seed"):
        run(tmp_path, learning_rate=0.1, seed=3)
    with pytest.raises(ValueError, match="conversations was 16 and is 12"):
        run(tmp_path, data=DATA[:12])
    run(tmp_path, stop_after=2, micro_batch=4)  # that is no other training


# --- the same, however it is cut ----------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", (1, 3, 4))
def test_micro_batches_add_up(tmp_path, micro_batch):
    run(tmp_path / "one", stop_after=3)
    run(tmp_path / "other", stop_after=3, micro_batch=micro_batch)
    assert_same_training(tmp_path / "one", tmp_path / "other", rtol=1e-3, atol=2e-4)


def test_two_processes_are_one_with_the_double_batch(tmp_path):
    here = Path(__file__).parent
    program = ["--nproc-per-node", "2", str(here / "lvpruning_rank.py")]
    program += [str(tmp_path / "two"), "4", "2", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(here)}
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *program],
        check=True,
        env=environment,
        capture_output=True,
        timeout=300,
    )
    run(tmp_path / "one", data=conversations(12), micro_batch=4)
    assert_same_training(tmp_path / "one", tmp_path / "two", rtol=1e-3, atol=2e-4)
    assert len(metrics(tmp_path / "two")) == 3  # one process writes


# --- learning -----------------------------------------------------------------------------------


def test_ratios_are_learned(tmp_path):
    settings = {"micro_batch": 4, "ratio_weight": 50.0, "ratios": (0.75, 0.25)}
    run(tmp_path, data=conversations(40), epochs=5, save_every=50, **settings)
    last = metrics(tmp_path)[-10:]
    kept = [sum(line["kept"][stage] for line in last) / 10 for stage in range(2)]
    assert kept == pytest.approx([0.75, 0.25], abs=0.08)


def test_what_the_answer_needs_is_kept():
    """The small trained LLaVA, and one question over and over: a decider learns to keep tokens
    without which the answer is lost, against a ratio that wants nearly all of them gone. Early
    on: further down the text has read them."""
    from vtp_kernels.demo import load
    from vtp_kernels.pocket_llava import scenes

    model, processor = load(TRAINED, device="cpu", dtype="float32")
    case = scenes.case("train", 5, ("color",))
    name = scenes.SHAPES.index(case.question.text.split()[-1])
    (thing,) = (i for i, t in enumerate(case.scene.things) if t.shape == name)
    covered = torch.from_numpy(case.scene.coverage[thing]).flatten() > 0.3
    conversation = Conversation(
        (Image.fromarray(case.scene.image),),
        ((case.question.text, case.question.answer),),
    )
    recipe = Recipe(
        layers=(1,), ratios=(0.1,), width=16, batch=2, micro_batch=2, precision="fp32",
        learning_rate=1e-2, ratio_weight=8.0,
    )  # fmt: skip
    data = [conversation] * 24
    with Processes(torch.device("cpu")) as processes:
        training = _Run(
            parts_of(model), data, Collator(processor), Path("unused"), recipe, processes,
            torch.device("cpu"),
        )  # fmt: skip
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for step in range(12):
            training._step(step)
        batch = Collator(processor)([conversation])
        seen = []
        plain = training.deciders[1].forward
        training.deciders[1].forward = lambda *given: seen.append(plain(*given)) or seen[-1]
        training._forward(12, [0], batch)
    margin = (seen[0][0, :, 0] - seen[0][0, :, 1]).detach()
    assert margin[covered].max() > margin[~covered].quantile(0.9)


@pytest.mark.parametrize("precision", ("bf16", "fp32"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_weights_stay_float32_in_any_precision(tmp_path, precision, dtype):
    run(tmp_path, model=tiny_model().to(dtype), precision=precision, stop_after=1)
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.float32}
    (line,) = metrics(tmp_path)
    assert all(torch.tensor(line[name]).isfinite().all() for name in ("lm_loss", "gradient_norm"))


def test_bfloat16_goes_the_way_of_float32(tmp_path):
    lines = [
        metrics(run(tmp_path / precision, precision=precision, stop_after=1))[0]
        for precision in ("bf16", "fp32")
    ]
    assert lines[0]["lm_loss"] == pytest.approx(lines[1]["lm_loss"], rel=0.05)
    assert lines[0]["kept"] == pytest.approx(lines[1]["kept"], abs=0.1)


def test_what_was_trained_prunes(tmp_path):
    model = tiny_model()
    run(tmp_path, model=model, stop_after=2)
    fit = read_fit(tmp_path)
    assert (fit.family, fit.depth, fit.shape.width, fit.shape.layers) == ("llava", 4, 16, (1, 2))
    assert load_deciders(tmp_path).shape == fit.shape
    inputs = Collator(tiny_processor())(DATA[:2]).inputs
    inputs = {k: v[:, :22] if k != "pixel_values" else v for k, v in inputs.items()}
    with torch.no_grad(), vtp.prune(model, vtp.LVPruning(tmp_path, (1, 2), (0.5, 0.25))) as pruned:
        model(**inputs)
    assert pruned.report().visual_tokens_per_layer == [[16] * 2, [8] * 2, [4] * 2, [4] * 2]


# --- settings -----------------------------------------------------------------------------------


def test_the_rate_rises_and_falls():
    recipe = Recipe(warmup=0.1, learning_rate=2.0)
    rates = [recipe.rate(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(2.0) and rates[55] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.01 and rates[9:] == sorted(rates[9:], reverse=True)


def test_noise_may_fall():
    factors = [Recipe(final_noise=0.2).noise(step, 5) for step in range(5)]
    assert factors == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert {Recipe().noise(step, 5) for step in range(5)} == {1.0}


def test_without_noise_the_rank_decides(tmp_path, monkeypatch):
    plain, noises = Choosing.decide, []

    def look(self, layer, hidden):
        noises.append(self.noise[layer].abs().sum().item())
        return plain(self, layer, hidden)

    monkeypatch.setattr(Choosing, "decide", look)
    run(tmp_path, data=DATA[:12], final_noise=0.0, micro_batch=4)
    assert len(noises) == 6 and noises[-2:] == [0.0, 0.0] and all(noises[:4])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, r"Recipe\.batch: expected an int of at least 1, got 0"),
        ({"epochs": 1.5}, r"Recipe\.epochs: expected an int"),
        ({"micro_batch": True}, r"Recipe\.micro_batch"),
        ({"learning_rate": 0.0}, r"Recipe\.learning_rate: expected a number above 0"),
        ({"temperature": float("nan")}, r"Recipe\.temperature"),
        ({"warmup": -0.1}, r"Recipe\.warmup: expected a number of at least 0"),
        ({"precision": "fp8"}, r"Recipe\.precision: got 'fp8', expected one of \('bf16', 'fp32'\)"),
        ({"gradient": "none"}, r"Recipe\.gradient: got 'none'"),
        ({"ratios": (0.5,)}, r"Recipe\.ratios: expected one for each"),
    ],
)
def test_recipes_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**settings)


def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"Recipe\.layers: there is no layer 9, the model has 4"):
        run(tmp_path / "it", layers=(1, 9))
    with pytest.raises(ValueError, match=r"width: .* multiple of 8; got 12"):
        run(tmp_path / "it", width=12)
    with pytest.raises(ValueError, match="3 conversations do not fill one batch of 4"):
        run(tmp_path / "it", data=DATA[:3])
    with pytest.raises(NotImplementedError, match="Linear is not supported"):
        run(tmp_path / "it", model=torch.nn.Linear(2, 2))
    assert not (tmp_path / "it").exists()


def test_command_line(tmp_path, capsys):
    command = ["lvpruning", "train", "--model", str(TRAINED), "--out", str(tmp_path / "it")]
    options = ["--layers", "1,4", "--ratios", "0.5,0.1", "--width", "16", "--batch", "2"]
    options += ["--precision", "fp32", "--learning-rate", "1e-3"]
    assert main([*command, "--data", "pocket:2", *options]) == 0
    assert f"--method lvpruning:{tmp_path / 'it'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "it" / "deciders.json").read_text())["layers"] == [1, 4]
    for wrong, message in (
        (["--data", "pocket:many", *options], "expected pocket:COUNT"),
        (["--data", str(tmp_path / "no.json"), *options], "no.json"),
        (["--data", "pocket:2", *options, "--precision", "int4"], "Recipe.precision"),
    ):
        assert main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err
