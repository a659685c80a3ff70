"""Attention under a policy: against loops, its gradients against autograd's through the formula."""

import functools

import pytest
import torch

from vtp_kernels.models.attention.policy_attention import policy_attention


def formula(query, key, value, policy, valid, scale):
    """Row by row and key by key, as the paper writes it; policies of 0 and 1 and all between."""
    batch, heads, rows, _ = query.shape
    groups = heads // key.shape[1]
    outputs = []
    for b in range(batch):
        for h in range(heads):
            for i in range(rows):
                weights, values = [], []
                for j in range(i + 1):
                    if j != i and valid is not None and not valid[b, j]:
                        continue
                    m = torch.ones((), dtype=query.dtype) if i == j else policy[b, j]
                    a = scale * query[b, h, i] @ key[b, h // groups, j]
                    weights.append(a.exp() * m)
                    values.append(value[b, h // groups, j])
                weights = torch.stack(weights)
                outputs.append((weights / weights.sum()) @ torch.stack(values))
    return torch.stack(outputs).view(query.shape)


def inputs(draw, dtype, heads=(4, 2), rows=9):
    query = draw.normal(2, heads[0], rows, 8, dtype=dtype)
    key, value = (draw.normal(2, heads[1], rows, 8, dtype=dtype) for _ in range(2))
    policy = draw.bools(2, rows, p=0.6).to(torch.float64 if dtype == torch.float64 else dtype)
    return [x.requires_grad_() for x in (query, key, value, policy)]


@pytest.mark.parametrize("padding", (None, "left", "right"))
@pytest.mark.parametrize("heads", ((4, 4), (4, 2), (3, 1)))
def test_values_and_gradients_are_those_of_the_formula(draw, padding, heads):
    given = inputs(draw, torch.float64, heads)
    valid, rows = None, given[0].shape[2]
    if padding:
        valid = torch.ones(2, rows, dtype=torch.bool)
        valid[1, slice(0, 3) if padding == "left" else slice(rows - 3, rows)] = False
    weight = draw.normal(*given[0].shape, dtype=torch.float64)
    if valid is not None:
        weight = weight * valid[:, None, :, None]  # nobody reads what padding attends to
    results = []
    ours = functools.partial(policy_attention, secant=False)
    for attention in (ours, formula):
        copies = [x.detach().clone().requires_grad_() for x in given]
        output = attention(*copies, valid=valid, scale=0.3)
        (output * weight).sum().backward()
        results.append((output * (weight != 0), *(x.grad for x in copies)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_secant_is_what_the_row_would_change_by(draw):
    """One row, one key that was let go: the gradient is the change of the output if it returned."""
    query, key, value = (5 * draw.normal(1, 1, 6, 8, dtype=torch.float64) for _ in range(3))
    weight = draw.normal(8, dtype=torch.float64)
    policy = torch.tensor([[1, 0, 1, 1, 1, 1]], dtype=torch.float64, requires_grad=True)

    def last(policy):
        return policy_attention(query, key, value, policy)[0, 0, -1] @ weight

    last(policy).backward()
    with torch.no_grad():
        change = last(torch.ones_like(policy)) - last(policy)
    torch.testing.assert_close(policy.grad[0, 1], change, rtol=1e-4, atol=1e-5)


def test_secant_and_tangent_agree_on_keys_that_stayed(draw):
    given = inputs(draw, torch.float64)
    grads = []
    for secant in (False, True):
        copies = [x.detach().clone().requires_grad_() for x in given]
        policy_attention(*copies, secant=secant).square().sum().backward()
        grads.append([x.grad for x in copies])
    for tangent, secant in zip(*(g[:3] for g in grads), strict=True):
        torch.testing.assert_close(tangent, secant)
    stayed = given[3] > 0
    torch.testing.assert_close(grads[0][3][stayed], grads[1][3][stayed])
    assert (grads[0][3][~stayed] != grads[1][3][~stayed]).any()


def test_nobody_sees_a_row_that_was_let_go_but_itself(draw):
    query, key, value, policy = inputs(draw, torch.float32)
    with torch.no_grad():
        policy.zero_()[:, :2] = 1
        before = policy_attention(query, key, value, policy)
        value[:, :, 4] += 100
        after = policy_attention(query, key, value, policy)
    changed = (before != after).any(-1).any(1)
    assert changed.nonzero()[:, 1].tolist() == [4, 4]


def test_a_policy_of_ones_is_causal_attention(draw):
    query, key, value, policy = inputs(draw, torch.float32, heads=(4, 4))
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(policy_attention(query, key, value, torch.ones_like(policy)), plain)


def test_bfloat16_gradients_are_near_those_of_float32(draw):
    given = inputs(draw, torch.float32)
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        copies = [x.detach().to(dtype).requires_grad_() for x in given[:3]]
        policy = given[3].detach().clone().requires_grad_()
        policy_attention(*copies, policy).float().square().sum().backward()
        assert [x.grad.dtype for x in copies] == [dtype] * 3
        grads.append(policy.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=0.1, atol=0.2)


def test_a_let_go_key_of_overwhelming_weight_keeps_gradients_finite(draw):
    query, key, value, policy = inputs(draw, torch.float32)
    with torch.no_grad():
        policy.fill_(1)[:, 3] = 0
        key[:, :, 3] = 1000 * query[:, ::2].mean(2)
    policy_attention(query, key, value, policy).sum().backward()
    assert all(x.grad.isfinite().all() for x in (query, key, value, policy))
