"""Pruning methods: what to score, at which layer, how many tokens stay. No tensor plumbing here."""

from vtp_kernels.contract.method import METHODS, Method
from vtp_kernels.contract.spec import load_method, method, method_from_spec, method_of

from .fastv import FastV
from .inflection import InflectionPruning
from .lvpruning import LVPruning
from .pyramiddrop import PyramidDrop
from .random import RandomPruning
from .schedule import Schedule
from .visipruner import VisiPruner

__all__ = [
    "METHODS",
    "FastV",
    "InflectionPruning",
    "LVPruning",
    "Method",
    "PyramidDrop",
    "RandomPruning",
    "Schedule",
    "VisiPruner",
    "load_method",
    "method",
    "method_from_spec",
    "method_of",
]
