"""Pruning methods: what to score, at which layer, how many tokens stay. No tensor plumbing here."""

from vtp_kernels.contract.method import METHODS, Method
from vtp_kernels.contract.spec import load_method, method, method_from_spec, method_of

from .cdpruner import CDPruner
from .chain import Chain
from .dart import DART
from .divprune import DivPrune
from .fastv import FastV
from .framedifference import FrameDifference
from .hiprune import HiPrune
from .inflection import InflectionPruning
from .lvpruning import LVPruning
from .pyramiddrop import PyramidDrop
from .random import RandomPruning
from .schedule import Schedule
from .sparsevlm import SparseVLM
from .vidcom2 import VidCom2
from .visionzip import VisionZip
from .visipruner import VisiPruner
from .vispruner import VisPruner

__all__ = [
    "DART",
    "METHODS",
    "CDPruner",
    "Chain",
    "DivPrune",
    "FastV",
    "FrameDifference",
    "HiPrune",
    "InflectionPruning",
    "LVPruning",
    "Method",
    "PyramidDrop",
    "RandomPruning",
    "Schedule",
    "SparseVLM",
    "VidCom2",
    "VisPruner",
    "VisiPruner",
    "VisionZip",
    "load_method",
    "method",
    "method_from_spec",
    "method_of",
]
