"""Pruning between the layers in vLLM, as far as it needs no vLLM: what may be asked for, how many
rows each request has, and which of a step's rows stay."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch

import vtp_kernels as vtp
from near_ties import cut, until_clear
from vtp_kernels.contract.backends import Backends
from vtp_kernels.models.attention.ranks import AllHeads
from vtp_kernels.vllm.stages.accounting import Accounts, Prompt
from vtp_kernels.vllm.stages.choice import Choice, Heads, Rows, Seen
from vtp_kernels.vllm.stages.settings import REQUESTS, SCHEDULER, Settings, check_engine

DEPTH, CPU = 8, torch.device("cpu")


def config(vtp=None, **changes):
    """As much of vLLM's configuration as is looked at; changes as `part__option=value`."""
    text = SimpleNamespace(
        num_hidden_layers=DEPTH, model_type="llama", hidden_size=256, num_attention_heads=4
    )
    hf_config = SimpleNamespace(model_type="llava", get_text_config=lambda: text)
    found = SimpleNamespace(
        additional_config={} if vtp is None else {"vtp": vtp},
        use_v2_model_runner=True,
        model_config=SimpleNamespace(
            hf_config=hf_config,
            enable_prompt_embeds=False,
            runner_type="generate",
            logits_processors=["some:Other", REQUESTS],
        ),
        scheduler_config=SimpleNamespace(
            scheduler_cls=SCHEDULER,
            enable_chunked_prefill=False,
            long_prefill_token_threshold=0,
            disable_hybrid_kv_cache_manager=None,
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            data_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            use_ubatching=False,
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False, kv_offloading_size=None),
        compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(name="NONE")),
        device_config=SimpleNamespace(device_type="cuda"),
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
    )
    for name, value in changes.items():
        *parts, option = name.split("__")
        setattr(getattr(found, parts[0]) if parts else found, option, value)
    return found


def settings(method):
    return Settings.of(config({"method": method}))


# ---- settings ---------------------------------------------------------------------------------


def test_a_method_is_given_as_everywhere(tmp_path):
    fastv = vtp.FastV(3, 0.25)
    fastv.save(tmp_path / "it.json")
    for given in ("fastv:3:0.25", str(tmp_path / "it.json"), fastv.to_dict()):
        assert settings(given) == Settings(fastv, (3,), DEPTH)
    for nothing in (None, {"method": "none"}, {"method": None}):
        assert Settings.of(config(nothing)) is None
    found = settings("pyramiddrop:2=0.5,4=0.25,6=16")
    assert [found.stage_of(layer) for layer in range(DEPTH)] == [None, None, 0, 0, 1, 1, 2, 2]
    assert found.most([100, 11]) == [56, 28, 16]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("fastv:2:0.5", TypeError, r"additional_config\.vtp: expected .* got 'fastv:2:0.5'"),
        ({}, ValueError, r"vtp\.method: expected a method, got nothing"),
        ({"method": "fastv", "keep": 1}, ValueError, "there is no keep; expected 'method'"),
        (
            {"method": "fastv", "packed": 1},
            TypeError,
            r"vtp\.packed: expected true or false, got 1",
        ),
        (
            {"method": "fastv:3:0.5", "packed": True},
            ValueError,
            r"vtp\.packed: .* twice as many layers .* decides before layers \(3,\) of 8",
        ),
        ({"method": 3}, TypeError, r"vtp\.method: expected a string .* got 3"),
        ({"method": "fastvv"}, ValueError, r"vtp\.method: there is no method 'fastvv'"),
        ({"method": {"method": "fastv", "ratio": 1}}, ValueError, r"vtp\.method: .*no \['ratio'\]"),
        ({"method": f"fastv:{DEPTH}"}, ValueError, "there is no layer 8"),
        (
            {"method": {"method": "lvpruning", "layers": [1], "ratios": [0.5]}},
            ValueError,
            r"LVPruning\.modules_path",
        ),
        (
            {"method": "inflection:llm_layers=2"},
            NotImplementedError,
            "InflectionPruning .*vision tower",
        ),
        (
            {"method": "visipruner:shallow_layers=2,drop_shallow_kv=true"},
            NotImplementedError,
            "forgetful_layers",
        ),
        (
            {"method": "chain:fastv:2:0.5 + fastv:4:0.5"},
            NotImplementedError,
            "does not tell beforehand how many .*visual_most",
        ),
        ({"method": "schedule:"}, ValueError, "LAYER=KEEP"),
    ],
)
def test_what_cannot_be_had_is_named(given, error, message):
    with pytest.raises(error, match=message):
        Settings.of(config(given))


def test_memory_is_for_what_may_stay():
    live = settings("visipruner:shallow_layers=2")
    assert not live.counted and live.most([7, 5]) == [12] * 4
    assert live.changes([1]) and not live.changes([])
    knee = settings("inflection:source=none,llm_layers=2+4,visual_keep=knee,text_keep=1.0")
    assert not knee.counted and knee.most([7, 5]) == [12, 12]
    text = settings("inflection:source=none,llm_layers=2+4")
    assert not text.counted and text.most([7, 5]) == [6, 3]
    visual = settings("inflection:source=none,llm_layers=2+4,text_keep=1.0")
    assert visual.counted and visual.most([7, 6]) == [7, 4]
    assert settings("fastv:2:0.5").counted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler_config__scheduler_cls": None}, "scheduler_cls: expected 'vtp_kernels"),
        ({"model_config__logits_processors": None}, "logits_processors: expected 'vtp_kernels"),
        ({"scheduler_config__enable_chunked_prefill": True}, "enable_chunked_prefill: expected"),
        ({"scheduler_config__long_prefill_token_threshold": 9}, "long_prefill_token_threshold"),
        ({"scheduler_config__disable_hybrid_kv_cache_manager": True}, "disable_hybrid_kv_cache"),
        ({"speculative_config": SimpleNamespace()}, "speculative_config: expected None"),
        ({"lora_config": SimpleNamespace()}, "enable_lora: expected False"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline_parallel_size: expected 1 "),
        ({"parallel_config__data_parallel_size": 2}, "data_parallel_size"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode_context_parallel_size"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill_context_parallel_size"),
        ({"parallel_config__use_ubatching": True}, "enable_dbo"),
        ({"kv_transfer_config": SimpleNamespace()}, "kv_transfer_config: expected None"),
        ({"ec_transfer_config": SimpleNamespace()}, "ec_transfer_config"),
        ({"cache_config__kv_offloading_size": 1.0}, "kv_offloading_size"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"model_config__enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ({"model_config__runner_type": "pooling"}, "runner: expected 'generate'"),
        (
            {"compilation_config__cudagraph_mode": SimpleNamespace(name="FULL_AND_PIECEWISE")},
            "cudagraph_mode: expected one of .*FULL_DECODE_ONLY.* got 'FULL_AND_PIECEWISE'",
        ),
        ({"use_v2_model_runner": False}, "VLLM_USE_V2_MODEL_RUNNER=1"),
    ],
)
def test_options_that_do_not_go_with_it_are_named(changes, message):
    check_engine(config(), "0.32.0", None)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        check_engine(config(**changes), "0.32.0", None)
    with pytest.raises(NotImplementedError, match=r"made for vLLM 0\.32, this is 0\.33\.1"):
        check_engine(config(), "0.33.1", None)


def test_unlike_groups_need_a_layout_for_them():
    packed = {"method": "fastv:2:0.5", "packed": True}
    assert Settings.of(config(packed)).times == 3
    check_engine(config(packed), "0.32.0", "BLNHC")
    with pytest.raises(ValueError, match=r"VLLM_KV_CACHE_LAYOUT: expected one of .* got 'NHD'"):
        check_engine(config(packed), "0.32.0", "NHD")
    with pytest.raises(NotImplementedError, match=r"vtp\.packed: vLLM's attention on a CPU"):
        check_engine(config(packed, device_config__device_type="cpu"), "0.32.0", "BLNHC")


# ---- which rows there are ---------------------------------------------------------------------


def test_the_last_token_of_a_prompt_is_none_of_its_images():
    prompt = Prompt.of([[(6, 9)], [(1, 2), (4, 4)]], 10)
    assert prompt.visual.tolist() == [1, 2, 4, 6, 7, 8]
    assert prompt.picture.tolist() == [0, 0, 0, 1, 1, 1] and prompt.pictures == [3, 3]
    assert Prompt.of([], 3) == (3, *(pytest.approx(np.zeros(0)),) * 2, [])


def new_accounts(method, prompts):
    accounts = Accounts(settings(method), 16, CPU)
    for slot, (name, prompt) in enumerate(prompts.items()):
        accounts.add(name, slot, prompt)
    return accounts


def take(accounts, names, computed, lengths):
    slots = np.array([accounts.prompts[name][0] for name in names])
    arrays = (np.array(x, dtype=np.int32) for x in (computed, lengths))
    return accounts.step(names, slots, torch.from_numpy(slots), *arrays)


def test_lengths_and_starts_of_a_step():
    """A prompt beside one that is answered already, text, and one that was preempted and comes back
    with two tokens of its answer."""
    prompts = {
        "new": Prompt.of([[(1, 8)]], 12),
        "answered": Prompt.of([[(0, 7)]], 10),
        "text": Prompt.of([], 6),
        "back": Prompt.of([[(0, 3)], [(5, 8)]], 11),
    }
    accounts = new_accounts("pyramiddrop:2=0.5,4=2", prompts)
    step = take(accounts, list(prompts), [0, 14, 0, 0], [12, 1, 6, 13])
    assert step.fresh.tolist() == [0, 3] and step.rows == 32
    first, second = step.stages
    assert first.gone.tolist() == [4, 4, 0, 4] and second.gone.tolist() == [6, 6, 0, 6]
    assert first.starts.tolist() == [0, 8, 9, 15, 24]
    assert second.starts.tolist() == [0, 6, 7, 13, 20]
    request, place = second.places(second.starts.long(), torch.tensor([6, 9, 6, 7]), 20)
    assert request.tolist() == [0] * 6 + [1] + [2] * 6 + [3] * 7
    assert place.tolist() == [*range(6), 8, *range(6), *range(7)]
    sources, places = step.staying(0, 1)
    assert sources.tolist() == [8, *range(9, 15), 22, 23]
    assert places.tolist() == [6, *range(7, 13), 18, 19]
    answering = take(accounts, list(prompts), [12, 15, 6, 13], [1, 1, 1, 1])
    assert not len(answering.fresh) and answering.stages[1].starts is None
    assert answering.stages[1].gone.tolist() == [6, 6, 0, 6]


def test_batches_that_vllm_makes_up_are_no_steps():
    accounts = new_accounts("fastv:2:0.5", {"a": Prompt.of([[(0, 7)]], 10)})
    assert accounts.step(["b"], *[np.zeros(1, dtype=np.int64)] * 4) is None
    accounts.remove("a")
    assert accounts.step(["a"], *[np.zeros(1, dtype=np.int64)] * 4) is None


def test_a_prompt_that_was_cut_up_is_an_error():
    accounts = new_accounts("fastv:2:0.5", {"a": Prompt.of([[(2, 7)]], 10)})
    for computed, length in ((0, 9), (1, 9)):
        with pytest.raises(RuntimeError, match="cut up"):
            take(accounts, ["a"], [computed], [length])


def test_what_loses_nothing_may_be_read_in_any_way():
    accounts = new_accounts("fastv:2:9", {"a": Prompt.of([[(2, 7)]], 10)})
    step = take(accounts, ["a"], [4], [3])
    assert not len(step.fresh) and step.stages[0].gone.tolist() == [0]


# ---- which rows stay --------------------------------------------------------------------------

HEADS, KEYS, SIZE = 4, 2, 8


def new_step(draw, method, prompts, computed, lengths):
    accounts = new_accounts(method, prompts)
    step = take(accounts, list(prompts), computed, lengths)
    together = AllHeads(HEADS, None)
    return accounts.settings, step, Heads(HEADS, KEYS, SIZE, 0.3, together)


def states(draw, rows, heads):
    return [draw.normal(rows, n * SIZE) for n in (HEADS, KEYS, KEYS)]


def by_hand(scorer, query, key, value, visual):
    """Scores of a prompt's rows: [rows, heads * SIZE] each."""
    rows = len(query)
    query, key, value = (x.double().view(rows, -1, SIZE) for x in (query, key, value))
    key, value = (x.repeat_interleave(HEADS // KEYS, 1) for x in (key, value))
    logits = 0.3 * torch.einsum("mhd,nhd->hmn", query, key)
    causal = torch.ones(rows, rows, dtype=torch.bool).tril()
    weights = logits.masked_fill(~causal, -torch.inf).softmax(-1)
    if scorer == "last_token":
        return weights[:, -1].mean(0)
    if scorer == "text":
        asking = ~visual & (visual.cumsum(0) > 0)
        return weights[:, asking].mean((0, 1))
    return (weights[:, -1, :, None] * value.transpose(0, 1)).square().sum((0, 2)).sqrt()


def mixed_step():
    """Prompts of very different lengths, rows of each that have been read before, and rows of each
    in this step: one is decoded, and one comes back with its answer."""
    prompts = {
        "long": Prompt.of([[(3, 40)], [(44, 70)]], 75),
        "text": Prompt.of([], 5),
        "short": Prompt.of([[(1, 9)]], 12),
        "answered": Prompt.of([[(0, 7)]], 10),
        "back": Prompt.of([[(0, 30)]], 64),
    }
    return prompts, [0, 0, 0, 12, 0], [75, 5, 12, 1, 66]


@pytest.mark.parametrize("scorer", ["last_token", "text", "contribution"])
def test_rows_that_stay_are_those_chosen_one_by_one(draw, scorer):
    """Of prompts of very different lengths, beside requests that lose nothing, over two stages."""
    until_clear(check_two_stages, draw, scorer)


def check_two_stages(draw, scorer):
    prompts, computed, lengths = mixed_step()
    names = list(prompts)
    asked, step, heads = new_step(draw, f"schedule:2=0.5,5=7:{scorer}", prompts, computed, lengths)
    choice = Choice(asked, step, Backends(None))
    before = [list(range(n)) for n in lengths]  # places of each request's rows that are left
    for stage, keep in enumerate((0.5, 7)):
        rows = sum(map(len, before))
        seen = states(draw, rows, heads)
        places = torch.tensor([at for some in before for at in some])
        visual = torch.cat(
            [
                torch.from_numpy(np.isin(at, prompts[n].visual) & (c == 0))
                for n, at, c in zip(names, before, computed, strict=True)
            ]
        )
        there = Rows(draw.normal(rows, 6), visual, places)
        stays = choice.stays(stage, there, Seen(heads, *seen))
        expected, after, first = [], [], 0
        for name, some, done in zip(names, before, computed, strict=True):
            prompt, at = prompts[name], np.array(some)
            own = slice(first, first + len(some))
            head = int((at < prompt.length).sum())
            chosen = np.ones(len(some), dtype=bool)
            if done == 0 and len(prompt.visual):
                part = [x[own][:head] for x in seen]
                scores = by_hand(scorer, *part, visual[own][:head])
                tokens = np.flatnonzero(visual[own].numpy())
                total = len(prompt.visual)
                count = int(total * keep + 0.5) if keep < 1 else min(keep, len(tokens))
                ranked = tokens[np.argsort(-scores[tokens].numpy(), kind="stable")]
                cut(scores[ranked].tolist(), count)
                chosen[ranked[count:]] = False
            expected += (first + np.flatnonzero(chosen)).tolist()
            after.append(at[chosen].tolist())
            first += len(some)
        assert stays.tolist() == expected
        assert len(expected) == int(step.begins(stage)[-1])
        before = after


def test_each_picture_keeps_its_own(draw):
    prompt = Prompt.of([[(1, 10)], [(12, 15)]], 18)
    asked, step, heads = new_step(
        draw, "schedule:2=0.5:last_token:picture", {"a": prompt}, [0], [18]
    )
    there = Rows(draw.normal(18, 6), step.visual, torch.arange(18))
    seen = Seen(heads, *states(draw, 18, heads))
    stays = Choice(asked, step, Backends(None)).stays(0, there, seen)
    found = np.bincount(prompt.picture[np.isin(prompt.visual, stays)])
    assert found.tolist() == [5, 2]


def test_a_choice_by_chance_is_that_of_the_method(draw):
    prompts = {"a": Prompt.of([[(2, 30)]], 40), "b": Prompt.of([[(0, 9)]], 33)}
    asked, step, _ = new_step(draw, "random:0.3:0:7", prompts, [0, 0], [40, 33])
    there = Rows(draw.normal(73, 6), step.visual, torch.tensor([*range(40), *range(33)]))
    stays = Choice(asked, step, Backends(None)).stays(0, there, None)
    alone, begins = [], [0, 40]
    for (name, prompt), first in zip(prompts.items(), begins, strict=True):
        asked, step, _ = new_step(draw, "random:0.3:0:7", {name: prompt}, [0], [prompt.length])
        rows = Rows(draw.normal(prompt.length, 6), step.visual, torch.arange(prompt.length))
        alone.append(first + Choice(asked, step, Backends(None)).stays(0, rows, None))
    assert torch.equal(stays, torch.cat(alone))


def test_a_method_that_breaks_its_promise_is_named(draw):
    class Liar(vtp.Schedule):
        def visual_left(self, layer, pictures):
            return super().visual_left(layer, pictures) - 1

    prompt = Prompt.of([[(1, 10)]], 12)
    accounts = Accounts(Settings(Liar({2: 0.5}, score="random"), (2,), DEPTH), 4, CPU)
    accounts.add("a", 0, prompt)
    step = take(accounts, ["a"], [0], [12])
    there = Rows(draw.normal(12, 6), step.visual, torch.arange(12))
    with pytest.raises(RuntimeError, match=r"Liar\.visual_left promised \[4\] .* left \[5\]"):
        Choice(accounts.settings, step, Backends(None)).stays(0, there, None)


class Positive(vtp.Method):
    """Rows stay whose first feature is positive, of visual tokens and of text but the ends."""

    def decision_layers(self, depth):
        return 2, 5

    def visual_most(self, layer, pictures):
        return sum(pictures)

    def decide(self, layer, rows):
        ends = rows.text & ((rows.origin == 0) | (rows.origin == rows.origin[:, -1:]))
        kept = (rows.hidden[..., 0] > 0) | ends
        return rows.keep_rows(kept & (rows.text | rows.visual))


def test_counts_that_only_the_method_can_tell_are_settled(draw):
    """Of visual tokens and text, beside others, over two stages; and later steps know them. One
    that was preempted and comes back begins with the bound again."""
    prompts, computed, lengths = mixed_step()
    names = list(prompts)
    accounts = Accounts(Settings(Positive(), (2, 5), DEPTH), 16, CPU)
    for slot, (name, prompt) in enumerate(prompts.items()):
        accounts.add(name, slot, prompt)
    assert not accounts.gone.any()
    answered = np.array([3])
    accounts.note(answered, 0, np.array([[2], [6]], dtype=np.int32))
    step = take(accounts, names, computed, lengths)
    choice = Choice(accounts.settings, step, Backends(None))
    before = [list(range(n)) for n in lengths]
    visual = step.visual
    for stage in range(2):
        rows = sum(map(len, before))
        hidden = draw.normal(rows, 6)
        places = torch.tensor([at for some in before for at in some])
        stays = choice.stays(stage, Rows(hidden, visual, places), None)
        expected, after, first = [], [], 0
        for name, some in zip(names, before, strict=True):
            length, fresh = prompts[name].length, name in ("long", "short", "back")
            chosen = [
                row
                for row, at in enumerate(some)
                if not fresh
                or at >= length - 1
                or hidden[first + row, 0] > 0
                or (at == 0 and name != "back")
            ]
            expected += [first + row for row in chosen]
            after.append([some[row] for row in chosen])
            first += len(some)
        assert stays.tolist() == expected
        gone = [0, 0, 0, (2, 6)[stage], 0]
        gone = [n - len(some) + g for n, some, g in zip(lengths, after, gone, strict=True)]
        told = step.stages[stage]
        assert told.gone.tolist() == told.gone_host.tolist() == gone
        assert told.starts_host.tolist() == [0, *np.cumsum(list(map(len, after)))]
        assert accounts.gone[1, :5].tolist() >= gone
        before, visual = after, visual[stays]
    later = take(accounts, names, [75, 5, 12, 13, 66], [1] * 5)
    assert not len(later.fresh)
    assert later.stages[1].gone.tolist() == gone and later.stages[1].starts is None
    assert accounts.gone[0, 4] > 0
    take(accounts, ["back"], [0], [70])
    assert accounts.gone[:, 4].tolist() == accounts.gone_there[:, 4].tolist() == [0, 0]


def test_more_than_was_promised_at_most_is_named(draw):
    class Liar(Positive):
        def visual_most(self, layer, pictures):
            return 1

    prompt = Prompt.of([[(1, 10)]], 12)
    accounts = Accounts(Settings(Liar(), (2, 5), DEPTH), 4, CPU)
    accounts.add("a", 0, prompt)
    step = take(accounts, ["a"], [0], [12])
    there = Rows(torch.ones(12, 6), step.visual, torch.arange(12))
    with pytest.raises(RuntimeError, match=r"Liar\.visual_most promised \[1\] .* left \[10\]"):
        Choice(accounts.settings, step, Backends(None)).stays(0, there, None)


def test_rows_that_take_in_others_are_refused(draw):
    class Merging(Positive):
        def decide(self, layer, rows):
            kept = super().decide(layer, rows)
            return rows.with_content(kept, torch.zeros(1, 1).long(), rows.hidden[:, :1])

    prompt = Prompt.of([[(1, 10)]], 12)
    accounts = Accounts(Settings(Merging(), (2, 5), DEPTH), 4, CPU)
    accounts.add("a", 0, prompt)
    step = take(accounts, ["a"], [0], [12])
    there = Rows(draw.normal(12, 6), step.visual, torch.arange(12))
    with pytest.raises(NotImplementedError, match=r"Merging\.decide before layer 2 merges"):
        Choice(accounts.settings, step, Backends(None)).stays(0, there, None)
