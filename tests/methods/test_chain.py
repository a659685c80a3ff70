"""Methods that act one after the other as one."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from masked_reference import MaskedReference
from tiny_llava import IMAGE, three, tiny_llava

import vtp_kernels as vtp
from vtp_kernels.accounting import Course, account

GREEDY = {"max_new_tokens": 2, "do_sample": False}
LOGITS = {"output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def models():
    return {kind: tiny_llava(kind) for kind in ("sdpa", "eager")}


def pruned(model, method, inputs=None):
    with vtp.prune(model, method) as run:
        output = model.generate(**inputs or three(), **GREEDY, **LOGITS)
    return output, run.report()


def test_shares_are_of_the_original_tokens(models):
    """And FastV looks at the rows that DivPrune left: as the masked reference, told what these are,
    does."""
    method = vtp.Chain(vtp.DivPrune(keep=20), vtp.FastV(2, 0.25))
    output, report = pruned(models["sdpa"], method)
    assert report.visual_tokens_per_layer[0] == [16, 20, 20, 0]
    assert report.visual_tokens_per_layer[2] == [4, 8, 12, 0]
    (alone, first) = pruned(models["sdpa"], vtp.DivPrune(keep=20))
    assert torch.equal(report.kept[0], first.kept[0])
    del alone

    class Told(MaskedReference):
        def _choose(self, layer):
            if layer == 0:
                self.open = report.kept[0] & self.real
                return self.open.clone()
            return super()._choose(layer)

    with Told(models["eager"], {0: None, 2: 0.25}) as masked:
        reference = models["eager"].generate(**three(), **GREEDY, **LOGITS)
    assert torch.equal(report.kept[2], masked.kept[2])
    for now, then in zip(output.logits, reference.logits, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=2e-5)


def test_budgets_of_pictures_behind_one_of_the_prompt(models):
    """How many each picture has left is counted."""
    method = vtp.Chain(vtp.CDPruner(keep=12), vtp.PyramidDrop((2, 4), (0.25, 1), per="picture"))
    _, report = pruned(models["sdpa"], method)
    for unit in report.units:
        kept = unit["kept"]
        assert kept[2] == min(kept.get(0, 16), 4) and kept[4] == min(kept[2], 1)
    with_all = [unit for unit in report.units if unit["prompt"] == 0]
    assert with_all[0]["kept"][0] == 12 and len({u["kept"][0] for u in report.units}) > 2


def test_counts_that_the_device_has(models):
    """Of a stage that pads, the host reads them when the next method begins."""
    padded = vtp.InflectionPruning(max_keep=9, llm_layers=())
    for after in (
        vtp.FastV(3, 4),
        vtp.Schedule({3: 4}, per="picture"),
        vtp.InflectionPruning(None, llm_layers=(3,), visual_keep=4, text_keep=0.5),
        vtp.VisiPruner(("middle",), 1, 2.0, 1e9, min_keep=4),
    ):
        _, report = pruned(models["sdpa"], vtp.Chain(padded, after))
        now, at_last = report.visual_tokens_per_layer[0], report.visual_tokens_per_layer[5]
        each = [1, 2, 3, 0] if getattr(after, "per", "") == "picture" else [1, 1, 1, 0]
        assert all(n <= 4 * most for n, most in zip(at_last, each, strict=True))
        assert sum(at_last) < sum(now) < 96


def test_with_passive_layers(models):
    thresholds = {"fusion_threshold": 1.1, "token_threshold": 0.2, "exit_threshold": 0.9}
    visipruner = vtp.VisiPruner(shallow_layers=2, drop_shallow_kv=True, **thresholds)
    chain = vtp.Chain(vtp.RandomPruning(0, 0.5), visipruner)
    assert chain.passive_layers(6) == visipruner.passive_layers(6)
    assert chain.forgetful_layers(6) == (0, 1)
    _, report = pruned(models["sdpa"], chain)
    assert report.visual_tokens_per_layer[0] == [8, 16, 24, 0]
    assert report.kv_tokens_per_layer[0][0] == report.dense_tokens[0] - 16
    assert {"fusion"} <= {event["event"] for event in report.events}


@dataclass(frozen=True)
class Notes(vtp.Method):
    """Notes where it decided, as every one of its class does."""

    layers: tuple = (1,)

    def decision_layers(self, depth):
        return self.layers

    def decide(self, layer, rows):
        rows.memory.setdefault("seen", []).append(layer)

    def events(self, memory):
        return [{"layer": self.layers[0], "event": "seen", "layers": memory["seen"]}]

    def decision_flops(self, layer, config, text, visual, kept):
        return 10**9 * self.layers[0]


def test_what_each_notes_is_its_own(models):
    _, report = pruned(models["sdpa"], vtp.Chain(Notes((1, 2)), Notes((3, 5))))
    assert [event["layers"] for event in report.events] == [[1, 2], [3, 5]]


@dataclass(frozen=True)
class Half(Notes):
    def decide(self, layer, rows):
        super().decide(layer, rows)
        return rows.keep_visual([n // 2 for n in rows.visual_now], rows.visual_ordinal.float())


def test_what_each_costs_is_added(models):
    _, one = pruned(models["sdpa"], Half((1,)))
    _, both = pruned(models["sdpa"], vtp.Chain(Half((1,)), Half((4,))))
    assert one.prefill_flops // 10**9 == 4 and both.prefill_flops // 10**9 == 4 * (1 + 4)


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (
            (vtp.FastV(2), vtp.Schedule({2: 0.1})),
            "Chain.parts: FastV and Schedule both decide before layer 2$",
        ),
        (
            (vtp.DivPrune(), vtp.RandomPruning(0)),
            "Chain.parts: DivPrune and RandomPruning both decide before layer 0$",
        ),
        (
            (vtp.FastV(2), vtp.DivPrune()),
            "FastV decides before layers 2 to 2, and DivPrune, which comes after it, before layer "
            "0; a method has to have done",
        ),
        (
            (vtp.PyramidDrop((1, 4), (0.5, 0.1)), vtp.FastV(2)),
            "PyramidDrop decides before layers 1 to 4, and FastV, which .* before layer 2;",
        ),
        (
            (vtp.VisiPruner(shallow_layers=2), vtp.FastV(4)),
            "VisiPruner and FastV both decide before layer 4$",
        ),
        (
            (vtp.VisiPruner(("shallow",), 1), vtp.VisiPruner(("shallow",), 2)),
            "VisiPruner and VisiPruner both have layers with passive visual tokens",
        ),
        ((vtp.DivPrune(), vtp.FastV(6)), r"FastV\.layer: there is no layer 6"),
        (
            (vtp.FrameDifference(), vtp.FastV()),
            r"FrameDifference\.frames: it is not known of llava",
        ),
        ((vtp.DivPrune(), vtp.LVPruning(layers=(2, 3), ratios=(0.5, 0.1))), "needs trained decid"),
        ((Notes((1,)), Notes(("2",))), "a layer is an int, got '2'"),
    ],
)
def test_chains_that_a_model_cannot_have(models, chain, message):
    with pytest.raises((ValueError, TypeError), match=message):
        vtp.apply(models["sdpa"], vtp.Chain(*chain))
    assert vtp.handle(models["sdpa"]) is None


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ((), ValueError, "Chain.parts: expected two methods or more, got 0"),
        ((vtp.FastV(),), ValueError, "expected two methods or more, got 1"),
        ((vtp.FastV(), "random"), TypeError, r"Chain\.parts\[1\]: expected a Method, got 'random'"),
        (
            (vtp.FastV, vtp.FastV()),
            TypeError,
            r"parts\[0\]: expected a Method, got the class FastV",
        ),
        (([vtp.DivPrune(), vtp.FastV()],), TypeError, r"parts\[0\]: expected a Method, got a list"),
        (
            (vtp.Chain(vtp.DivPrune(), vtp.FastV()), vtp.FastV(4)),
            ValueError,
            r"Chain\.parts\[0\]: a chain within a chain",
        ),
    ],
)
def test_parts_that_make_no_chain(parts, error, message):
    with pytest.raises(error, match=message):
        vtp.Chain(*parts)


def test_accounts(models):
    """As few tokens as any of them leaves, and what it costs to choose them."""
    config = models["sdpa"].config.text_config
    prompt = {"text": 15, "before": 4, "visual": 16}
    chain = vtp.Chain(vtp.DivPrune(12), vtp.PyramidDrop((2, 4), (0.25, 0.125)))
    found = account(config, chain, **prompt, course=Course())
    assert found.visual_per_layer == [12, 12, 4, 4, 2, 2]
    given = {name: value[:1] for name, value in three().items()}
    given["input_ids"] = given["input_ids"][given["attention_mask"] == 1][None]
    del given["attention_mask"]
    assert int((given["input_ids"] == IMAGE).sum()) == 16 and given["input_ids"].shape[1] == 31
    _, report = pruned(models["sdpa"], chain, given)
    assert found.flops == report.prefill_flops
    assert account(config, vtp.FastV(2, 4), **prompt, course=Course()).flops < found.flops + 10**9
    with pytest.raises(
        NotImplementedError, match="vidcom2 keeps of each frame depends on how many"
    ):
        account(config, vtp.Chain(vtp.VidCom2(), vtp.FastV(2)), **prompt, course=Course())
