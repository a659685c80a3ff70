"""DivPrune and CDPruner against plain loops in float64, written from the papers' formulas."""

import itertools

import numpy as np
import pytest
import torch
from prompt_rows import ASKS, BOS, kept_columns, prompt_rows

import vtp_kernels as vtp
from vtp_kernels.methods.budget import visual_budget
from vtp_kernels.methods.cdpruner import relevance

CASES = 32  # batches of 4 prompts, four times


def cosines(x):
    dots = x @ x.T
    squares = np.diag(dots)
    lengths = np.sqrt(squares[:, None] * squares[None])
    return np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > 0)


def farthest_apart(x, k):
    """Indices of x [N, C], in the order in which max-min takes them."""
    distance, chosen = 1 - cosines(x), []
    for _ in range(k):
        best, at = -np.inf, None
        for i in range(len(x)):
            if i in chosen:
                continue
            others = chosen or [j for j in range(len(x)) if j != i]
            nearest = min((distance[i, j] for j in others), default=np.inf)
            if nearest > best:  # of equals the first
                best, at = nearest, i
        chosen.append(at)
    return chosen


def largest_determinant(x, r, k):
    """The same by greedy MAP of L = diag(r) S diag(r), until what is left of a row's own r ** 2 is
    nothing; then by r."""
    kernel = r[:, None] * cosines(x) * r[None]
    left, rows, chosen = np.diag(kernel).copy(), [], []
    while len(chosen) < k:
        open_ = [i for i in range(len(x)) if i not in chosen and left[i] > 1e-5 * r[i] ** 2]
        if not open_:
            break
        j = max(open_, key=lambda i: (left[i], -i))
        e = (kernel[j] - sum((c[j] * c for c in rows), np.zeros(len(x)))) / np.sqrt(left[j])
        rows.append(e)
        left = left - e**2
        chosen.append(j)
    rest = sorted((i for i in range(len(x)) if i not in chosen), key=lambda i: (-r[i], i))
    return chosen + rest[: k - len(chosen)]


def told_by_text(visual, text):
    """Mean cosine of each visual row to the rows of text, scaled."""
    unit = [[v / np.linalg.norm(v) if v.any() else v for v in rows] for rows in (visual, text)]
    mean = np.array([np.mean([v @ t for t in unit[1]]) for v in unit[0]])
    spread = mean.max() - mean.min()
    return (mean - mean.min() + 1e-6) / spread if spread > 0 else np.ones(len(visual))


def drawn(generator, index):
    """Rows of all lengths; rows with many ties, duplicates and zeros; few rows, many times. What is
    a tie by the formulas is one to the bit: products of such numbers are not rounded."""

    def draw(rows, channels):
        shape = rows, channels
        if index % 3 == 0:
            return generator.choice((-1.0, 1.0), shape) * 2.0 ** generator.integers(-3, 4, shape)
        whole = generator.integers(-1, 2, shape).astype(float)
        return whole if index % 3 == 1 else whole[generator.integers(0, max(rows // 4, 1), rows)]

    return draw


def some_prompts(generator):
    """Four prompts of one to three pictures, of 1 to 12 tokens each."""
    return [
        [BOS, *(("picture", int(generator.integers(1, 13))) for _ in range(pictures)), ASKS]
        for pictures in (1, 2, 3, int(generator.integers(1, 4)))
    ]


@pytest.mark.parametrize("per", ["prompt", "image"])
@pytest.mark.parametrize("kind", [vtp.DivPrune, vtp.CDPruner])
def test_chooses_as_the_formulas_do(kind, per):
    """In padded batches, of prompts with several pictures each."""
    generator = np.random.default_rng(len(per))
    filled = 0
    for index in range(CASES):
        keep = (0.25, 4, 0.5, 7)[index % 4]
        prompts = some_prompts(generator)
        rows = prompt_rows(prompts, drawn(generator, index), int(generator.integers(2, 9)))
        # Of text all alike, rows that differ would be as relevant, but for how sums are rounded.
        words = generator.standard_normal(rows.hidden.shape)
        rows.hidden = torch.where(rows.visual[..., None], rows.hidden, torch.from_numpy(words))
        kept = kind(keep, per).decide(0, rows)
        for b, units in enumerate(rows.units):
            x = rows.hidden[b].numpy()
            visual = rows.visual[b].nonzero()[:, 0].numpy()
            asks = (rows.text[b] & (rows.visual[b].cumsum(0) > 0)).numpy()
            r = dict(zip(visual, told_by_text(x[visual], x[asks]), strict=True))
            if per == "image":
                groups = [unit.columns.numpy() for unit in units]
            else:
                groups = [visual]
            expected = set()
            for group in groups:
                k = visual_budget(keep, len(group))
                if kind is vtp.DivPrune:
                    chosen = farthest_apart(x[group], k)
                else:
                    chosen = largest_determinant(x[group], np.array([r[c] for c in group]), k)
                    filled += k > np.linalg.matrix_rank(x[group])
                expected |= {int(group[i]) for i in chosen}
            assert kept_columns(kept, rows, b) == expected, (index, b)
    assert filled > 10 or kind is vtp.DivPrune


def test_what_is_no_number_is_the_last_to_stay():
    generator = np.random.default_rng(0)
    for kind, count in itertools.product((vtp.DivPrune, vtp.CDPruner), (3, 5)):
        rows = prompt_rows(
            [[BOS, ("picture", 6), ASKS]], lambda *shape: generator.standard_normal(shape), 8
        )
        rows.hidden[0, 3:5] = float("nan")
        found = kept_columns(kind(count).decide(0, rows), rows, 0)
        assert len(found) == count
        assert found & {3, 4} == ({3} if count == 5 else set())


def test_relevance_of_rows_that_are_all_alike():
    rows = prompt_rows([[BOS, ("picture", 4), ASKS]], lambda n, c: np.ones((n, c)), 3)
    assert relevance(rows)[0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0]
    kept = vtp.CDPruner(2).decide(0, rows)
    assert kept_columns(kept, rows, 0) == {2, 3}
