"""Pruning between the layers of the small LLaVA in vLLM, against transformers."""

import pytest

pytest.importorskip("vllm", reason="needs vLLM: run by `make vllm-check`")

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import asking
import staged
import tiny_next
import torch
from transformers import LlavaForConditionalGeneration, LlavaNextProcessor
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams
from vllm.v1.core.sched.scheduler import Scheduler

import vtp_kernels as vtp
from vtp_kernels import vllm as plugin
from vtp_kernels.chat import chat_inputs, greedy_answers
from vtp_kernels.pocket_llava.model import TRAINED, processor

COUNT = 500
PATCHES, BLOCK = 256, 32
DECIDERS = TRAINED.parent / "deciders" / "seed-0"
METHODS = {
    "fastv": "fastv:2:0.02",
    "pyramiddrop": "pyramiddrop:2=0.5,4=0.1,6=0.02",
    "all leave": "pyramiddrop:2=0.05,5=0",
    "text": "schedule:3=0.05:text",
    "contribution": "schedule:3=0.05:contribution",
    "random": "random:0.1:3:5",
    "random before layer 0": "random:0.3:0",
    "lvpruning": f"lvpruning:{DECIDERS}:0.5,0.3,0.05",
    "visipruner": {
        "method": "visipruner",
        "shallow_layers": 1,
        "decision": "fixed",
        "schedule": {"method": "schedule", "keep": {"3": 0.05, "6": 0}, "score": "contribution"},
    },
    "visipruner, as for 13B": {
        "method": "visipruner",
        "shallow_layers": 2,
        "shallow_first_layer": "keep_second_half",
        "decision": "fixed",
        "schedule": {"method": "schedule", "keep": {"4": 300}},
    },
    "visipruner, live": "visipruner:shallow_layers=1,fusion_threshold=0.99",
    "visipruner, pipelined": "visipruner:stages=middle+deep,shallow_layers=0,min_keep=5,"
    "decision=pipelined",
    "inflection": "inflection:source=none,llm_layers=2+4,visual_keep=knee,text_keep=knee",
    "inflection, padded": "inflection:source=none,llm_layers=2+4,visual_keep=knee,text_keep=0.5,"
    "max_keep=64,score_without_rope=false",
    "inflection, counted": "inflection:source=none,llm_layers=2+4,visual_keep=0.1,text_keep=1.0",
}


@pytest.fixture(scope="module")
def model():
    return LlavaForConditionalGeneration.from_pretrained(TRAINED)


@pytest.fixture(scope="module")
def pyramid():
    """Tokens leave in three steps; prefixes are remembered."""
    return staged.llm("pyramiddrop:2=0.5,4=0.25,6=0.125")


def method_of(given):
    return vtp.Method.from_dict(given) if isinstance(given, dict) else vtp.method(given)


def transformers_answers(model, method, count):
    cases, found = asking.cases(count), []
    for first in range(0, count, 20):
        batch = cases[first : first + 20]
        pictures = [asking.picture(case) for case in batch]
        inputs = chat_inputs(processor(), pictures, [case.question.text for case in batch])
        with vtp.prune(model, method):
            found += greedy_answers(model, processor(), inputs, asking.LONGEST_ANSWER)
    return found


def long_answers(engine, requests, tokens=24):
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1)
    return engine.generate(requests, sampling, use_tqdm=False)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.prompt_token_ids == b.prompt_token_ids
        assert asking.tokens(a) == asking.tokens(b)
        difference = torch.tensor(asking.logprobs(a)) - torch.tensor(asking.logprobs(b))
        assert difference.abs().max() < 1e-3


def alone(engine, requests, ask=asking.ask):
    found = []
    for request in requests:
        asking.forget(engine)
        found += ask(engine, [request])
    return found


# ---- answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_answers_are_those_of_transformers(model, name):
    given = METHODS[name]
    theirs = transformers_answers(model, method_of(given), COUNT)
    engine = staged.llm(given)
    cases = asking.cases(COUNT)
    outputs = asking.ask(engine, [asking.request(case) for case in cases])
    assert [asking.answer(output) for output in outputs] == theirs
    # Strong enough to be seen: a dense model answers all of these.
    right = [case.question.answer for case in cases]
    if name not in ("lvpruning", "all leave"):
        assert theirs != right
    asking.forget(engine)
    staged.assert_all_free(engine)


def test_blocks_are_those_of_the_rows_that_stay():
    """A prompt of 262 rows and up to 4 tokens of an answer: 9 blocks of 32 in layers 0 and 1, and
    in six others 1 block for 6 + 5 rows."""
    engine = staged.llm("fastv:2:0.02", enable_prefix_caching=False)
    seen = staged.watch(engine)
    (output,) = asking.ask(engine, [asking.request(asking.cases(1)[0])])
    assert len(output.prompt_token_ids) == PATCHES + 6
    assert seen.most == 9 + 3 * 1
    staged.assert_all_free(engine)


def test_blocks_are_those_of_the_rows_that_may_stay():
    """Of 256 tokens 51 in layers 2 and 3, and 10 from layer 4 on. Of 6 rows of text 4 and 3, but
    blocks are for all of it; what the attention is told are exact lengths."""
    method = "inflection:source=none,llm_layers=2+4,visual_keep=0.2,text_keep=0.5"
    engine = staged.llm(method, enable_prefix_caching=False)
    seen = staged.watch(engine)
    state = engine.llm_engine.model_executor.driver_worker.worker.model_runner.model_state
    (output,) = asking.ask(engine, [asking.request(asking.cases(1)[0])])
    assert len(output.prompt_token_ids) == PATCHES + 6
    assert seen.most == 9 + 2 + 2 * 1
    assert state.accounts.gone.max(1).tolist() == [PATCHES - 51 + 2, PATCHES - 10 + 3]
    staged.assert_all_free(engine)


@pytest.mark.parametrize("spec", ["fastv:1:0.3", "schedule:1=0.5,2=9:text:picture"])
def test_llava_next(spec, tmp_path):
    """Images of several sizes in a batch: probabilities of the next token as in transformers."""
    model = tiny_next.new_model()
    engine = staged.llm(spec, tiny_next.save(model, tmp_path), max_model_len=400)
    processor = LlavaNextProcessor.from_pretrained(tmp_path)
    images = [tiny_next.drawing(size, seed) for seed, size in enumerate(tiny_next.SIZES)]
    asked = [("5 <image> 7 8", images[:1]), ("6 <image> 2 <image> 9", images[1:3])]
    asked += [("<image> 3", images[3:]), ("8 <image>", images[2:3])]
    requests = [{"prompt": prompt, "multi_modal_data": {"image": shown}} for prompt, shown in asked]
    sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=tiny_next.BEST)
    outputs = engine.generate(requests, sampling, use_tqdm=False)
    for (prompt, shown), output in zip(asked, outputs, strict=True):
        inputs = processor(images=shown, text=prompt, return_tensors="pt")
        assert output.prompt_token_ids == inputs["input_ids"][0].tolist()
        with torch.no_grad(), vtp.prune(model, vtp.method(spec)) as run:
            expected = model(**inputs).logits[0, -1].log_softmax(-1)
        assert run.report().visual_tokens_per_layer[-1][0] < 88
        for token, found in output.outputs[0].logprobs[0].items():
            assert abs(found.logprob - expected[token].item()) < 1e-3
    staged.assert_all_free(engine)


def test_a_budget_before_the_layers_goes_with_it(model):
    """64 tokens of an image enter, and 8 go on: as in transformers of a model that sees 64."""
    count, keep, fastv = 40, 64, vtp.FastV(2, 8)
    engine = staged.llm(fastv.to_dict(), **asking.budget(keep))
    cases = asking.cases(count)
    outputs = asking.ask(engine, [asking.request(case) for case in cases])
    chosen = vtp.InflectionPruning(min_keep=keep, max_keep=keep, llm_layers=(), source="attention")
    pictures = [asking.picture(case) for case in cases]
    rows = plugin.encode(pictures, plugin.Encoder(model, processor()), chosen)
    sees, theirs = model.model.get_image_features, []
    try:
        for output, image in zip(outputs, rows, strict=True):
            seen = SimpleNamespace(pooler_output=[image])
            model.model.get_image_features = lambda *args, seen=seen, **kwargs: seen
            ids = torch.tensor([output.prompt_token_ids])
            with torch.no_grad(), vtp.prune(model, fastv):
                logits = model(input_ids=ids, pixel_values=torch.zeros(1, 3, 8, 8)).logits
            theirs.append(logits[0, -1].log_softmax(-1))
    finally:
        model.model.get_image_features = sees
    image = model.config.image_token_id
    assert {output.prompt_token_ids.count(image) for output in outputs} == {keep}
    for output, expected in zip(outputs, theirs, strict=True):
        token = asking.tokens(output)[0]
        assert token == expected.argmax()
        assert abs(asking.logprobs(output)[0] - expected[token].item()) < 1e-3


# ---- what happens in a server -----------------------------------------------------------------


def mixed(count):
    """Prompts of 0 to 3 images."""
    return [asking.request(case, images=n % 4) for n, case in enumerate(asking.cases(count))]


def test_prompts_of_all_kinds_meet_in_one_batch(pyramid):
    """Read beside answers that go on, each as if it were alone."""
    requests = mixed(16)
    asking.forget(pyramid)
    seen = staged.watch(pyramid)
    together = long_answers(pyramid, requests, 8)
    assert seen.requests > 8
    staged.assert_all_free(pyramid)
    assert_same(together, alone(pyramid, requests, lambda *x: long_answers(*x, 8)))


@pytest.mark.parametrize(
    ("method", "blocks"),
    [
        ("pyramiddrop:2=0.5,4=0.25,6=0.125", 118),
        (METHODS["visipruner, live"], 237),
        ("inflection:source=none,llm_layers=2+4,visual_keep=0.2,text_keep=knee", 118),
    ],
)
def test_requests_that_are_preempted_come_back_as_they_were(method, blocks):
    """In a cache that cannot hold all of them. The choice follows the prompt, not the answer that
    was begun; where counts depend on it, they are the same again."""
    requests = mixed(12)
    expected = long_answers(staged.llm(method), requests, 40)
    small = staged.llm(method, num_gpu_blocks_override=blocks, max_model_len=900)
    seen = staged.watch(small)
    found = long_answers(small, requests, 40)
    assert seen.preempted
    staged.assert_all_free(small)
    assert_same(found, expected)


def test_images_that_the_encoder_has_no_room_for_wait(pyramid, monkeypatch):
    """vLLM alone would read such a prompt up to the image."""
    asking.forget(pyramid)
    pictures = [asking.picture(case) for case in asking.cases(26)]
    requests = [
        asking.request(case, images=pictures[3 * n : 3 * n + 3])
        for n, case in enumerate(asking.cases(8))
    ]
    expected = asking.ask(pyramid, requests)
    asking.forget(pyramid)
    encoder = staged.core(pyramid).scheduler.encoder_cache_manager
    fits, turns = encoder.can_allocate, itertools.count()
    monkeypatch.setattr(encoder, "can_allocate", lambda *x: next(turns) % 5 != 1 and fits(*x))
    plain, cut = Scheduler._try_schedule_encoder_inputs, []

    def watched(scheduler, request, computed, asked, *args, **kwargs):
        found = plain(scheduler, request, computed, asked, *args, **kwargs)
        cut.append(0 < found[1] < asked)
        return found

    monkeypatch.setattr(Scheduler, "_try_schedule_encoder_inputs", watched)
    assert_same(asking.ask(pyramid, requests), expected)
    assert any(cut)
    staged.assert_all_free(pyramid)


def test_prefixes_are_shared_as_far_as_they_are_the_same(pyramid):
    """Text-only prompts wholly, others up to their first image; after either, answers are as from
    an empty cache."""
    text = "what color is the circle ? " * 30
    picture = asking.picture(asking.cases(1)[0])
    requests = [{"prompt": text + str(n % 2)} for n in range(4)]
    requests += [
        {"prompt": f"{text}<image> {case.question.text} ", "multi_modal_data": {"image": picture}}
        for case in asking.cases(4)
    ]
    expected = alone(pyramid, requests)
    asking.forget(pyramid)
    for again in range(2):
        for request, first in zip(requests, expected, strict=True):
            (output,) = asking.ask(pyramid, [request])
            assert_same([output], [first])
            if "multi_modal_data" in request:
                assert not output.num_cached_tokens
            elif again:
                assert output.num_cached_tokens > len(output.prompt_token_ids) - 2 * BLOCK
    # A text that goes on where the others had an image.
    (output,) = asking.ask(pyramid, [{"prompt": text + "<s> what shape ? "}])
    assert output.num_cached_tokens > 0
    asking.forget(pyramid)
    assert_same([output], asking.ask(pyramid, [{"prompt": text + "<s> what shape ? "}]))
    staged.assert_all_free(pyramid)


def test_requests_are_aborted_in_the_middle(pyramid):
    """Of some prompts and answers, before and while they are read or answered."""
    asking.forget(pyramid)
    requests = mixed(24)
    expected = long_answers(pyramid, requests, 12)
    asking.forget(pyramid)
    engine = pyramid.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    for n, request in enumerate(requests):
        engine.add_request(f"of {n}", request, sampling)
    finished, steps = {}, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                finished[int(output.request_id.split()[1])] = output
        steps += 1
        if steps in (1, 2, 5):
            engine.abort_request([f"of {n}" for n in range(steps % 3, 24, 3)])
    assert 0 < len(finished) < 24
    for n, output in finished.items():
        assert asking.tokens(output) == asking.tokens(expected[n])
    staged.assert_all_free(pyramid)


def test_what_a_decode_graph_keeps_stays_where_it_is(pyramid):
    """A graph of vLLM's for decoding reads these tensors, and runs no Python."""
    runner = pyramid.llm_engine.model_executor.driver_worker.worker.model_runner
    state, found = runner.model_state, []
    prepare = state.prepare_attn

    def watched(batch, *args, **kwargs):
        metadata = prepare(batch, *args, **kwargs)
        for name, given in metadata.items():
            if batch.num_tokens == batch.num_reqs == 3:
                parts = (given.seq_lens, given.block_table, given.slot_mapping)
                found.append((name, *(part.data_ptr() for part in parts)))
                rows = given.seq_lens - 1
                blocks = given.block_table.gather(1, (rows // BLOCK)[:, None].long())[:, 0]
                slots = blocks * BLOCK + rows % BLOCK
                assert torch.equal(given.slot_mapping[:3], slots)
        return metadata

    state.prepare_attn = watched
    try:
        long_answers(pyramid, mixed(4)[1:], 8)
    finally:
        state.prepare_attn = prepare
    assert len(found) > 40 and len(set(found)) == 8  # one address for each layer


def test_two_ranks_choose_as_one(model):
    for name in ("pyramiddrop", "contribution", "lvpruning", "inflection"):
        script = Path(__file__).with_name("ranks_v2.py")
        run = subprocess.run(
            [sys.executable, script, json.dumps(METHODS[name]), "40"],
            env=os.environ | asking.ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        theirs = transformers_answers(model, method_of(METHODS[name]), 40)
        assert json.loads(run.stdout.splitlines()[-1]) == theirs


# ---- off --------------------------------------------------------------------------------------


def test_without_a_method_all_is_as_in_vllm_alone(old_names):
    """To the last bit, with vLLM's scheduler and with ours."""
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("plain_v2.py"), old_names, "20"],
        env=os.environ | asking.ENVIRONMENT | {"VLLM_PLUGINS": "none"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    plain = json.loads(run.stdout.splitlines()[-1])
    assert plain["class"].startswith("vllm.model_executor.models.llava.")
    requests = [asking.request(case) for case in asking.cases(20)]
    for settings in ({}, {"scheduler_cls": staged.OPTIONS["scheduler_cls"]}):
        engine = asking.llm(old_names, max_num_seqs=16, **settings)
        found = asking.ask(engine, requests)
        ours = [[o.prompt_token_ids, asking.tokens(o), asking.logprobs(o)] for o in found]
        assert ours == plain["outputs"]
        groups = staged.core(engine).scheduler.kv_cache_config.kv_cache_groups
        assert [len(group.layer_names) for group in groups] == [8]


# ---- refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("fastv:2:0.5", {"enable_chunked_prefill": True}, "enable_chunked_prefill: expected False"),
        ("fastv:2:0.5", {"scheduler_cls": None}, "scheduler_cls: expected 'vtp_kernels"),
        ("fastv:2:0.5", {"logits_processors": None}, "logits_processors: expected 'vtp_kernels"),
        ("fastv:9:0.5", {}, "there is no layer 9"),
        ("visipruner:drop_shallow_kv=true", {}, "vLLM cannot have VisiPruner"),
        ("fastvv", {}, "there is no method 'fastvv'"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_loaded(method, settings, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        staged.llm(method, load_format="dummy", **settings)


@pytest.mark.parametrize("named", ["scheduler_cls", "logits_processors"])
def test_one_option_alone_is_refused_and_not_served_dense(named):
    """Without the plugin vLLM's own model is loaded, which looks at no method."""
    settings = staged.method_settings("fastv:2:0.5") | {"load_format": "dummy"}
    for option in {"scheduler_cls", "logits_processors"} - {named}:
        del settings[option]
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("refused_v2.py"), json.dumps(settings)],
        env=os.environ | asking.ENVIRONMENT | {"VLLM_PLUGINS": "none"},
        capture_output=True,
        text=True,
    )
    assert run.returncode
    message = {
        "scheduler_cls": "the model is not one of this plugin's",
        "logits_processors": "scheduler_cls: expected 'vtp_kernels.vllm.StagedScheduler'",
    }
    assert message[named] in run.stderr


def test_a_request_that_cannot_be_served_is_an_error_of_its_own(pyramid):
    """vLLM asks for parameters before it reads a prompt; one who hands over what is ready is told
    by the scheduler."""
    asking.forget(pyramid)
    case = asking.request(asking.cases(1)[0])
    (expected,) = asking.ask(pyramid, [case])
    scoring = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=1)
    with pytest.raises(VLLMValidationError, match="prompt_logprobs: expected None"):
        pyramid.generate([case], scoring, use_tqdm=False)
    with pytest.raises(VLLMValidationError, match="use_beam_search: expected False"):
        pyramid.beam_search([case], BeamSearchParams(beam_width=2, max_tokens=2))
    engine = pyramid.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=4)
    ready = engine.input_processor.process_inputs("ready", case, sampling, ("generate",))
    ready.sampling_params.prompt_logprobs = 1
    engine.add_request("ready", ready, ready.sampling_params)
    outputs = [output for _ in range(3) for output in engine.step()]
    assert outputs[0].outputs[0].finish_reason == "error" and len(outputs) == 1
    assert_same(asking.ask(pyramid, [case]), [expected])
    staged.assert_all_free(pyramid)
