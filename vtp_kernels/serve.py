"""`vtp-kernels serve`: transformers' own OpenAI-compatible server with a method in the model."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import TYPE_CHECKING, Any

import torch

from vtp_kernels.models import apply, handle

if TYPE_CHECKING:
    from vtp_kernels.methods import Method

__all__ = ["listener", "pruned_server", "serve"]

#: What transformers' server imports; accelerate places the model on its device.
PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic", "accelerate")


def serve(
    model: str | os.PathLike,
    method: Method | None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str | None = None,
    dtype: str = "auto",
) -> None:
    """Serve a model with `method` at work until the process is told to stop.

    Parameters
    ----------
    model : a folder or a hub name
        The only one that is served; requests for others are refused.
    method : None serves the model as it is
    host, port : where to listen; port 0 takes a free one and prints it
    device, dtype : as for `vtp-kernels run`

    Raises
    ------
    ImportError
        If a package that the server needs is missing.
    OSError
        If `host` and `port` cannot be listened on, or there is no such model.
    ValueError, NotImplementedError
        If the model lacks weights, or it cannot run the method.
    """
    check_packages()
    with contextlib.closing(listener(host, port)) as listening:  # before the model is loaded
        server = pruned_server(model, method, device=device, dtype=dtype)
        address, port = listening.getsockname()[:2]
        address = f"[{address}]" if ":" in address else address
        print(f"{model} with {method or 'no method'}: http://{address}:{port}/v1", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])


def check_packages() -> None:
    """ImportError that says what to install."""
    from importlib.util import find_spec

    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(f'serving needs {", ".join(missing)}: pip install "vtp_kernels[serve]"')


def listener(host: str, port: int) -> socket.socket:
    """A socket bound to an address, which takes no calls yet. OSError if that cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise OSError(f"port: cannot listen on {host}:{port}: {error.strerror}") from error
    return bound


def pruned_server(
    model: str | os.PathLike,
    method: Method | None,
    *,
    device: str | None = None,
    dtype: str = "auto",
) -> Any:
    """transformers' server, a `uvicorn.Server`, with the model loaded and `method` at work in it.

    It is not running: `server.run(sockets=[...])` does that, until `server.should_exit` is set.
    """
    from transformers import AutoConfig
    from transformers.cli.serve import Serve

    from vtp_kernels.demo import check_checkpoint, device_of

    device = device_of(device)
    check_checkpoint(model)
    applied = []

    class PrunedServe(Serve):
        def start_server(self) -> None:
            # transformers calls this once its model is loaded, to serve it from another thread.
            # Nobody is served before the method is at work; whoever asked starts the server.
            manager = getattr(self, "_model_manager", None)
            if manager is None:
                return
            manager.load_model_and_processor = _pruning(manager.load_model_and_processor, method)
            manager.load_model_and_processor(manager.process_model_name(str(model)))
            applied.append(self)

    # As `run` does: CPUs have no fast float16 arithmetic.
    half = AutoConfig.from_pretrained(model).dtype == torch.float16
    if dtype == "auto" and half and device.type == "cpu":
        dtype = "float32"
    made = PrunedServe(force_model=str(model), device=str(device), dtype=dtype, non_blocking=True)
    if applied != [made]:
        made.server.should_exit = True
        raise NotImplementedError(
            "this version of transformers starts its server in another way: no method could be "
            "applied before it; please report it"
        )
    return made.server


def _pruning(load: Any, method: Method | None) -> Any:
    """`load`, with the method at work in whatever it loads: /reset has the model loaded anew."""
    lock = threading.Lock()

    def load_pruned(*args: Any, **kwargs: Any) -> Any:
        model, processor = load(*args, **kwargs)
        with lock:
            if method is not None and handle(model) is None:
                apply(model, method)
        return model, processor

    return load_pruned
