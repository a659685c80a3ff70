"""Pruning methods: what to score, at which layer, how many tokens stay. No tensor plumbing here."""

from vtp_kernels.contract.method import METHODS, Method
from vtp_kernels.contract.spec import load_method, method, method_from_spec, method_of

from .cdpruner import CDPruner
from .chain import Chain
from .divprune import DivPrune
from .fastv import FastV
from .framedifference import FrameDifference
from .inflection import InflectionPruning
from .lvpruning import LVPruning
from .pyramiddrop import PyramidDrop
from .random import RandomPruning
from .schedule import Schedule
from .vidcom2 import VidCom2
from .visipruner import VisiPruner

__all__ = [
    "METHODS",
    "CDPruner",
    "Chain",
    "DivPrune",
    "FastV",
    "FrameDifference",
    "InflectionPruning",
    "LVPruning",
    "Method",
    "PyramidDrop",
    "RandomPruning",
    "Schedule",
    "VidCom2",
    "VisiPruner",
    "load_method",
    "method",
    "method_from_spec",
    "method_of",
]
