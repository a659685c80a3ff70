"""select_diverse beside torch: the matrix of cosines, then a loop over its rows; and the loops as
they are published, operation by operation. DivPrune's gathers the rows of all that are chosen in
every step, and knows one prompt.

Features are random signs, whose cosines are exact in float32: all choose the same rows, also where
two are as far. No row is like another, which is the hardest there is to choose from. Relevance is
spread evenly from 0 to 1, to which CDPruner scales it.
"""

import torch

import vtp_kernels as vtp
from benchmarks.harness import Case, assert_equal

WIDTHS = {"LLaVA-1.5": 4096, "CLIP": 1024, "LLaVA-NeXT": 4096, "Qwen2.5-VL": 3584}


def signs(batch: int, length: int, width: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """[B, N, C] of +-1 in as many channels as is a power of 4, so that norms are exact, and 0."""
    filled = 4 ** ((width.bit_length() - 1) // 2)
    x = torch.zeros(batch, length, width, dtype=dtype, device=device)
    x[..., :filled] = 2.0 * torch.randint(2, (batch, length, filled), device=device) - 1.0
    return x


def cosines(features):
    x = torch.nn.functional.normalize(features.float(), dim=-1)
    return x @ x.mT


def _row(matrix, pick):
    return matrix.gather(1, pick[..., None].expand(-1, -1, matrix.shape[2]))[:, 0]


def maxmin(features, k):
    distance = 1.0 - cosines(features)
    pick = distance.topk(2, dim=1, largest=False).values[:, 1].argmax(1, keepdim=True)
    nearest, picks = _row(distance, pick), [pick]
    for _ in range(k - 1):
        pick = nearest.argmax(1, keepdim=True)
        nearest = torch.minimum(nearest, _row(distance, pick))
        picks.append(pick)
    return torch.cat(picks, 1).sort(1).values


def published_maxmin(features, k):
    """DivPrune's, one prompt after the other. In float32, so that all choose the same rows."""
    return torch.stack([_published_maxmin(x, k) for x in features.float()])


def _published_maxmin(x, k):
    normalised = x / x.norm(dim=1, keepdim=True)
    distance = 1.0 - torch.mm(normalised, normalised.t())
    chosen = torch.empty(k, dtype=torch.int64, device=x.device)
    for step in range(k):
        if step == 0:
            nearest = torch.topk(distance, 2, dim=0, largest=False).values[1, :]
        else:
            before = torch.index_select(chosen, 0, torch.arange(0, step, device=x.device))
            nearest = torch.min(torch.index_select(distance, 0, before), dim=0).values
        chosen[step] = torch.argmax(nearest)
    return chosen.sort().values


def published_dpp(features, k, relevance):
    """CDPruner's. In float32, as theirs is once rows are normalised."""
    x = features / features.norm(dim=-1, keepdim=True)
    x = x.float()
    cosine = torch.matmul(x, x.transpose(1, 2))
    matrix = relevance.unsqueeze(2) * cosine * relevance.unsqueeze(1)
    batch, length, device = len(x), x.shape[1], x.device
    factor = torch.zeros(k, batch, length, device=device)
    left = torch.diagonal(matrix, dim1=1, dim2=2).clone()
    chosen = torch.empty(k, batch, dtype=torch.int64, device=device)
    for step in range(k):
        pick = torch.argmax(left, dim=-1)
        chosen[step] = pick
        each = torch.arange(batch, device=device)
        across = torch.einsum("tb,tbn->bn", factor[:step, each, pick], factor[:step])
        row = (matrix[each, pick] - across) / torch.sqrt(left[each, pick]).unsqueeze(-1)
        factor[step, :, :] = row
        left -= torch.square(row)
        left[each, pick] = -torch.inf
    return chosen.t().sort().values


def dpp(features, k, relevance):
    matrix = relevance[:, :, None] * cosines(features) * relevance[:, None]
    left = matrix.diagonal(dim1=1, dim2=2).clone()
    factor = matrix.new_zeros(matrix.shape[0], k, matrix.shape[2])
    picks = []
    for step in range(k):
        pick = left.argmax(1, keepdim=True)
        known = factor[:, :step]
        across = known.gather(2, pick[..., None].expand(-1, step, -1))
        row = (_row(matrix, pick) - (across * known).sum(1)) / left.gather(1, pick).sqrt()
        factor[:, step] = row
        left = (left - row.square()).scatter(1, pick, -torch.inf)
        picks.append(pick)
    return torch.cat(picks, 1).sort(1).values


def same_size_of_determinant(ours, theirs) -> None:
    """dpp rounds on its way: two that all but tie may fall either way, and then others follow."""
    (chosen, features, relevance), others = ours, theirs[0]

    def logarithm(indices):
        x = features.gather(1, indices[..., None].expand(-1, -1, features.shape[2])).double()
        x = torch.nn.functional.normalize(x, dim=-1) * relevance.gather(1, indices)[..., None]
        return (x @ x.mT).logdet()

    assert chosen.shape == others.shape
    if not torch.equal(chosen, others):
        torch.testing.assert_close(logarithm(chosen), logarithm(others), rtol=1e-2, atol=0.1)


def case(batch, length, width, k, rule, dtype, device, model="") -> Case:
    name = str(dtype).removeprefix("torch.")
    shape = f"{model and model + ', '}{rule}, B={batch}, N={length}, C={width}, k={k}, {name}"
    moved = batch * (length * width * dtype.itemsize + 8 * k)

    def make():
        features = signs(batch, length, width, dtype, device)
        relevance = torch.rand(batch, length, device=device)
        return (features, k) if rule == "maxmin" else (features, k, relevance)

    if rule == "maxmin":
        rivals = {"torch eager": maxmin, "published loop": published_maxmin}
        ours = lambda features, k: vtp.select_diverse(features, k).indices  # noqa: E731
        return Case("select_diverse", shape, moved, make, ours, rivals, assert_equal)

    def ours(features, k, relevance):
        chosen = vtp.select_diverse(features, k, rule="dpp", relevance=relevance)
        return chosen.indices, features, relevance

    def with_inputs(rival):
        return lambda *inputs: (rival(*inputs), inputs[0], inputs[2])

    rivals = {"torch eager": with_inputs(dpp), "published loop": with_inputs(published_dpp)}
    return Case(
        "select_diverse",
        shape,
        moved + 4 * batch * length,
        make,
        ours,
        rivals,
        same_size_of_determinant,
    )


def cases(device: str) -> list[Case]:
    small = [("CLIP", 1, 576, 64), ("LLaVA-1.5", 1, 576, 64), ("LLaVA-1.5", 8, 576, 64)]
    large = [("LLaVA-NeXT", 1, 2880, 160), ("Qwen2.5-VL", 1, 7168, 256)]
    on_cpu = torch.device(device).type == "cpu"  # where a case of the large ones takes minutes
    shapes = {torch.float32: small + large, torch.bfloat16: small if on_cpu else small + large}
    return [
        case(batch, length, WIDTHS[model], k, rule, dtype, device, model)
        for dtype, of_dtype in shapes.items()
        for model, batch, length, k in of_dtype
        for rule in ("maxmin", "dpp")
    ]
