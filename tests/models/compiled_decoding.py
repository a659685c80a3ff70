"""generate() with a static cache and compiled decoding steps, as it does by itself on a GPU."""

from torch._dynamo.utils import counters
from transformers import CompileConfig


def compiled_decoding(backend="eager"):
    """Settings of generate() by which every step is one graph, or an error, on any device."""
    config = CompileConfig(fullgraph=True, backend=backend, mode="default")
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


class Graphs:
    """How many graphs were compiled since."""

    def __init__(self):
        self.before = counters["stats"]["unique_graphs"]

    def __len__(self):
        return counters["stats"]["unique_graphs"] - self.before
