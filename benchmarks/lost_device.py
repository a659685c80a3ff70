"""A kernel can leave the device in a state that only a new process ends."""

import sys

DEVICE_LOST = 70  # exit status of a process that says so


def why_lost() -> str | None:
    """Why no kernel can run in this process any more, or None if one can, or none has run yet."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).split("\n")[0]
    return None
