"""FrameDifference (EVS) and VidCom2 against numpy, and what they leave alone."""

import numpy as np
import pytest
import torch
from prompt_rows import ASKS, BOS, kept_columns, prompt_rows

import vtp_kernels as vtp
from vtp_kernels.methods.budget import visual_budget

CASES = 60


def differences(x, keep):
    """bool [T, N]: EVS, of x [T, N, C]."""
    frames, tokens, _ = x.shape
    scores = np.full((frames, tokens), 255.0)
    for t in range(1, frames):
        for n in range(tokens):
            a, b = x[t, n], x[t - 1, n]
            length = np.sqrt(np.dot(a, a) * np.dot(b, b))
            scores[t, n] = 1 - (np.dot(a, b) / length if length else 0)
    count = max(visual_budget(keep, frames * tokens), tokens)
    stays = np.zeros(frames * tokens, bool)
    stays[np.argsort(-scores.reshape(-1), kind="stable")[:count]] = True
    return stays.reshape(frames, tokens)


def standing_out(x, keep):
    """The same of VidCom2: budgets, and then the least similar of each frame."""
    frames, tokens, channels = x.shape
    varying = x.reshape(-1, channels).var(0)
    steady = np.argsort(varying, kind="stable")[: max(channels // 2, 1)]
    part = x[:, :, np.sort(steady)]
    lengths = np.linalg.norm(part, axis=2, keepdims=True)
    part = np.divide(part, lengths, out=np.zeros_like(part), where=lengths > 0)

    def like(centre):
        distance = ((part - centre) ** 2).sum(2)
        return sum(np.exp(-distance / (2 * a)) for a in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    of_video, of_frame = like(part.mean((0, 1))), like(part.mean(1)[:, None])
    share = np.exp((of_video.mean(1).min() - of_video.mean(1)) / 0.01)
    share /= share.sum()
    count = max(visual_budget(keep, frames * tokens), frames)
    budget = count / frames * (1 + share - share.mean())
    given = [1] * frames
    while sum(given) < count:
        lacking = [budget[t] - given[t] if given[t] < tokens else -np.inf for t in range(frames)]
        given[int(np.argmax(lacking))] += 1
    stays = np.zeros((frames, tokens), bool)
    for t, row in enumerate(of_video + of_frame):
        stays[t, np.argsort(row, kind="stable")[: given[t]]] = True
    return stays


def drawn(generator, ties):
    """Scenes that change a little; or rows with ties and zeros, whose products are not rounded."""

    def draw(rows, channels):
        if ties:
            return generator.integers(-1, 2, (rows, channels)).astype(float)
        return generator.standard_normal((1, channels)) + 0.3 * generator.standard_normal(
            (rows, channels)
        )

    return draw


def a_prompt(generator):
    """Videos, with text between their frames or an `image_newline` behind them, and pictures."""
    video = ("video", *(int(generator.integers(1, 7)) for _ in range(2)), 0, True)
    timed = ("video", *(int(generator.integers(2, 5)) for _ in range(2)), 2, False)
    parts = [("picture", 4), video, timed][: int(generator.integers(1, 4))]
    return [BOS, *parts, ASKS]


@pytest.mark.parametrize(
    ("kind", "choose"), [(vtp.FrameDifference, differences), (vtp.VidCom2, standing_out)]
)
def test_chooses_as_numpy_does(kind, choose):
    generator = np.random.default_rng(1)
    for index in range(CASES):
        keep = (0.3, 0.5, 7, 0.05)[index // 2 % 4]
        ties = kind is vtp.FrameDifference and index % 2  # sums of exponentials are rounded
        prompts = [a_prompt(generator) for _ in range(3)]
        rows = prompt_rows(prompts, drawn(generator, ties), int(generator.integers(4, 12)))
        kept = kind(keep).decide(0, rows)
        for b, units in enumerate(rows.units):
            expected = set(rows.visual[b].nonzero()[:, 0].tolist())
            for video in {unit.video for unit in units} - {None}:
                columns = torch.cat([unit.grid for unit in units if unit.video == video]).numpy()
                leaves = ~choose(rows.hidden[b].numpy()[columns], keep)
                expected -= set(columns[leaves].tolist())
            if kept is None:
                assert expected == set(rows.visual[b].nonzero()[:, 0].tolist())
            else:
                assert kept_columns(kept, rows, b) == expected, (index, b)


@pytest.mark.parametrize("kind", [vtp.FrameDifference, vtp.VidCom2])
def test_frames_that_come_as_pictures(kind):
    """They are chosen as those of a video are."""
    generator = np.random.default_rng(0)

    def draw(rows, channels):
        return np.random.default_rng(5).standard_normal((rows, channels))

    pictures = prompt_rows([[BOS, *[("picture", 5)] * 4, ASKS]], draw, 8)
    video = prompt_rows([[BOS, ("video", 4, 5, 0, False), ASKS]], draw, 8)
    assert kind(0.4).decide(0, pictures) is None
    as_frames = kept_columns(kind(0.4, "pictures").decide(0, pictures), pictures, 0)
    assert as_frames == kept_columns(kind(0.4).decide(0, video), video, 0)
    assert len(as_frames) == 8
    uneven = prompt_rows([a_prompt(generator), [BOS, ("picture", 5), ("picture", 4)]], draw, 8)
    message = rf"{kind.__name__}\.frames, prompt 1: the pictures have \[4, 5\] tokens, and frames"
    with pytest.raises(ValueError, match=message):
        kind(0.4, "pictures").check_units(uneven.units)
    kind(0.4).check_units(uneven.units)


def test_frames_of_unlike_size_are_refused():
    rows = prompt_rows([[BOS, ("video", 3, 4, 0, False)]], lambda *shape: np.ones(shape), 4)
    units = [[unit._replace(grid=unit.grid[:, : 4 - i]) for i, unit in enumerate(rows.units[0])]]
    with pytest.raises(
        ValueError, match=r"VidCom2\.frames, prompt 0: the frames of video 0 have \[2, 3, 4\] tok"
    ):
        vtp.VidCom2().check_units(units)


def test_a_video_of_one_frame_is_refused():
    """It has nothing to be compared with. One picture, where pictures are frames, is none."""
    generator = np.random.default_rng(2)
    one = [[ASKS], [BOS, ("video", 3, 4, 0, False), ("video", 1, 8, 1, False), ASKS]]
    rows = prompt_rows(one, lambda *shape: generator.standard_normal(shape), 6)
    for kind in (vtp.FrameDifference, vtp.VidCom2):
        message = (
            f"{kind.__name__}: expected videos of two frames or more, got one .*video 1 of .*1"
        )
        with pytest.raises(ValueError, match=message):
            kind(0.25).check_units(rows.units)
    picture = [[BOS, ("picture", 8), ASKS]]
    rows = prompt_rows(picture, lambda *shape: generator.standard_normal(shape), 6)
    for kind, stay in ((vtp.FrameDifference, 8), (vtp.VidCom2, 2)):
        method = kind(0.25, "pictures")
        method.check_units(rows.units)
        kept = method.decide(0, rows)
        assert (8 if kept is None else len(kept_columns(kept, rows, 0))) == stay


def test_a_frame_that_stands_out_keeps_more():
    def draw(rows, channels):
        x = np.random.default_rng(3).standard_normal((1, channels)).repeat(rows, 0)
        x += 0.01 * np.random.default_rng(4).standard_normal(x.shape)
        x[14:18] *= -1  # the last frame
        return x

    rows = prompt_rows([[BOS, ("video", 4, 4, 0, False), ASKS]], draw, 16)
    for kind in (vtp.FrameDifference, vtp.VidCom2):
        kept = kept_columns(kind(0.5).decide(0, rows), rows, 0)
        assert len(kept) == 8 and len(kept & {14, 15, 16, 17}) >= 3


@pytest.mark.parametrize("kind", [vtp.FrameDifference, vtp.VidCom2])
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"keep": 1.5}, ValueError, r"\.keep: a share lies between"),
        ({"keep": "half"}, TypeError, r"\.keep: keep is an int"),
        ({"frames": "images"}, ValueError, r"\.frames: got 'images', expected one of \['videos'"),
    ],
)
def test_settings_that_make_no_sense(kind, settings, error, message):
    with pytest.raises(error, match=f"{kind.__name__}{message}"):
        kind(**settings)
