"""Every method, set for the small models of these tests: what is added here is tested in all."""

import torch

import vtp_kernels as vtp
from vtp_kernels.methods.lvpruning.deciders import Deciders
from vtp_kernels.methods.lvpruning.files import Fit, save_deciders
from vtp_kernels.models.families import parts_of

NAMES = (
    "fastv",
    "pyramiddrop",
    "schedule",
    "random",
    "visipruner",
    "visipruner that skips",
    "visipruner without shallow",
    "lvpruning",
    "inflection",
    "inflection with padding",
    "chain",
)
#: To the engine these are alike but for what is here twice: rows leave before layer 0, or later by
#: what an observed layer has; and some that stay take in others.
SELECTORS = ("visionzip", "sparsevlm", "dart", "vispruner", "hiprune")
MERGING = SELECTORS[:2]
#: Of NAMES, those in which all that happens is that rows leave, so that a mask can do the same.
ONLY_ROWS_LEAVE = tuple(
    name for name in NAMES if name not in ("visipruner", "visipruner that skips")
)
#: Those of them that are tried in every family. What a chain is made of is, in tests of its own.
IN_EVERY_FAMILY = tuple(name for name in ONLY_ROWS_LEAVE if name != "chain")


def pruning_method(name, model, folder):
    """The method of that name; what it needs on disk is put into `folder`."""
    if name == "lvpruning":
        return vtp.LVPruning(deciders(model, folder), layers=(2, 4), ratios=(0.5, 0.2))
    if name.startswith("inflection"):
        return inflection(model, max_keep=6 if name == "inflection with padding" else None)
    thresholds = {"fusion_threshold": 1.1, "token_threshold": 0.2, "exit_threshold": 0.9}
    return {
        "fastv": vtp.FastV(2, 0.5),
        "pyramiddrop": vtp.PyramidDrop((2, 3, 5), (0.5, 0.25, 0.0)),
        "schedule": vtp.Schedule({3: 0.6, 4: 3}, score="contribution"),
        "random": vtp.RandomPruning(0, 0.3),
        "chain": vtp.Chain(vtp.CDPruner(0.7), vtp.FastV(3, 0.25)),
        "visionzip": vtp.VisionZip(0.4, 0.4),
        "vispruner": vtp.VisPruner(0.4),
        "hiprune": vtp.HiPrune(0.5, around=0.6, middle=0),
        "dart": vtp.DART(2, 0.4, visual_pivots=2, text_pivots=2),
        "sparsevlm": vtp.SparseVLM((2, 4), (0.5, 0.2)),
        "visipruner": vtp.VisiPruner(shallow_layers=2, **thresholds),
        "visipruner that skips": vtp.VisiPruner(
            shallow_layers=2, shallow_attention="skip", **thresholds
        ),
        "visipruner without shallow": vtp.VisiPruner(
            ("middle", "deep"), shallow_layers=1, **thresholds
        ),
    }[name]


def inflection(model, max_keep):
    """Both stages, or the second alone where too little is known of the vision tower."""
    parts = parts_of(model)
    tower = parts.page.tower(parts.base)
    source = None if tower is None else tower.scores[-1]  # attention, if that can be told
    return vtp.InflectionPruning(
        source, min_keep=2, max_keep=max_keep, llm_layers=(2, 4), visual_keep=0.5, text_keep=0.75
    )


def deciders(model, folder, layers=(2, 4)):
    """A folder with deciders of random weights that fit the model."""
    torch.manual_seed(0)
    parts = parts_of(model)
    fit = Fit.of(parts.family, parts.text.config, layers, 32)
    save_deciders(folder, Deciders(fit.shape), fit, training={})
    return folder
