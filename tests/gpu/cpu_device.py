"""torch.cuda on a CPU, as far as tests of this folder ask: for a rehearsal of what they do.

A stream's work is done as it is called. A graph notes the calls of its capture and makes them
again, into the memory of the first results. The device is busy from `_sleep` to the next wait.
None of that tells anything of a GPU: it tells whether the tests do what they are meant to.
"""

import contextlib
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    def __init__(self, calls: list) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


class Graph:
    def __init__(self) -> None:
        self.calls: list = []

    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    def wait_stream(self, other) -> None:
        pass

    def synchronize(self) -> None:
        STATE.busy = False


class Event:
    def record(self) -> None:
        pass

    def query(self) -> bool:
        return not STATE.busy


class OnTheCpu(TorchFunctionMode):
    """What is asked for on the GPU is made on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cuda:
            return args[0]
        kwargs = dict(kwargs or {})
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


STATE = SimpleNamespace(busy=False)
CURRENT = Stream()


@contextlib.contextmanager
def installed(monkeypatch):
    STATE.busy = False
    for name, value in {
        "CUDAGraph": Graph,
        "graph": lambda graph: Recorder(graph.calls),
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda: CURRENT,
        "synchronize": CURRENT.synchronize,
        "set_sync_debug_mode": lambda mode: None,
        "_sleep": lambda cycles: setattr(STATE, "busy", True),
        "empty_cache": lambda: None,
        "memory_allocated": lambda: 0,
        "memory_stats": lambda: {"allocation.all.allocated": 0},
    }.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    with OnTheCpu():
        yield
