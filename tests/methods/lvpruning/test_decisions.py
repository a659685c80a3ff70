"""Decisions that can be learned: hard forward, soft backward, the same for a sample anywhere."""

import pytest
import torch

from vtp_kernels.methods.lvpruning.deciders import Deciders, Shape
from vtp_kernels.methods.lvpruning.decisions import Choosing, Sides, gumbel_keep, gumbel_noise

SHAPE = Shape(16, 8, (1, 3))


def test_hard_forward_soft_backward(draw):
    logits = draw.normal(3, 5, 2).requires_grad_()
    noise, weight = gumbel_noise(0, 0, 0, (3, 5, 2)), draw.normal(3, 5)
    kept = gumbel_keep(logits, noise, temperature=0.7)
    assert torch.equal(kept.detach(), (logits + noise).argmax(-1).eq(0).float())
    (kept * weight).sum().backward()
    copy = logits.detach().clone().requires_grad_()
    (((copy + noise) / 0.7).softmax(-1)[..., 0] * weight).sum().backward()
    torch.testing.assert_close(logits.grad, copy.grad)


def test_keeping_is_as_likely_as_the_softmax_says():
    logits = torch.tensor([1.2, -0.3]).expand(200_000, 2)
    kept = gumbel_keep(logits, gumbel_noise(1, 2, 3, (200_000, 2)), 1.0)
    assert kept.mean().item() == pytest.approx(logits[0].softmax(0)[0].item(), abs=5e-3)


def test_noise_is_gumbel():
    noise = gumbel_noise(3, 1, 4, (100_000,))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.std().item() == pytest.approx(torch.pi / 6**0.5, abs=0.02)


def test_every_sample_of_every_step_has_noise_of_its_own():
    places = [(seed, step, sample) for seed in range(4) for step in range(9) for sample in range(9)]
    drawn = {tuple(gumbel_noise(*place, (3,)).tolist()) for place in places}
    assert len(drawn) == len(places)
    assert torch.equal(gumbel_noise(1, 2, 3, (5,)), gumbel_noise(1, 2, 3, (5,)))


@pytest.fixture
def case(draw):
    """Two prompts: visual rows 1 to 5, and 2 to 4; text elsewhere, the last row answers."""
    visual = torch.zeros(2, 9, dtype=torch.bool)
    visual[0, 1:6] = visual[1, 2:5] = True
    text = ~visual
    text[:, -1] = False
    torch.manual_seed(0)
    noise = {layer: gumbel_noise(0, layer, 0, (2, 5, 2)) for layer in (1, 3)}
    return Choosing(Deciders(SHAPE), Sides.of(visual, text), noise, 1.0), visual


def test_a_policy_spares_text_and_decisions_add_up(case, draw):
    choosing, visual = case
    hidden = draw.normal(2, 9, 16)
    first, second = (choosing.decide(layer, hidden) for layer in (1, 3))
    assert (first[~visual] == 1).all() and (second[~visual] == 1).all()
    assert set(first[visual].tolist()) <= {0.0, 1.0} and (second <= first).all()
    for policy, kept in zip((first, second), choosing.kept, strict=True):
        assert policy[0, 1:6].tolist() == kept[0].tolist()
        assert policy[1, 2:5].tolist() == kept[1, :3].tolist()


def test_shares_and_ratio_losses(case, draw):
    choosing, visual = case
    policies = [choosing.decide(layer, draw.normal(2, 9, 16)) for layer in (1, 3)]
    losses = choosing.ratio_losses((0.5, 0.2))
    for b in range(2):
        shares = [policy[b][visual[b]].mean().item() for policy in policies]
        assert [share[b].item() for share in choosing.shares()] == pytest.approx(shares)
        expected = sum((r - s) ** 2 for r, s in zip((0.5, 0.2), shares, strict=True)) / 2
        assert losses[b].item() == pytest.approx(expected)


def test_gradients_reach_every_weight_but_none_through_rows_that_answer(case, draw):
    choosing, _ = case
    hidden = draw.normal(2, 9, 16).requires_grad_()
    for layer in (1, 3):
        choosing.decide(layer, hidden)
    choosing.ratio_losses((0.5, 0.2)).sum().backward()
    # A softmax does not see what is added to all keys, so that bias has no gradient.
    grads = {n: p.grad for n, p in choosing.deciders.named_parameters() if "k_proj.bias" not in n}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())
    assert (hidden.grad[:, -1] == 0).all() and (hidden.grad[:, 0] != 0).any()
