"""Pictures of what pruning did. They are drawn with matplotlib, the extra `plot`."""

from .curve import curve
from .figure import check_matplotlib
from .layers import layers
from .names import readable
from .over_time import over_time
from .page import page
from .tokens import methods, tokens
from .tradeoff import tradeoff

__all__ = [
    "check_matplotlib",
    "curve",
    "layers",
    "methods",
    "over_time",
    "page",
    "readable",
    "tokens",
    "tradeoff",
]
