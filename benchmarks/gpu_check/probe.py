"""What machine this is, and whether the library has code for it: a line of JSON.

In a process of its own, so that whoever plans the rest holds no memory of the GPU, and is not held
up by a driver that does not answer.
"""

import argparse
import json

import torch

from benchmarks.identity import identity
from vtp_kernels import reference
from vtp_kernels.machine import describe
from vtp_kernels.ops._dispatch import why_not


def probe(device: str) -> dict:
    cuda = torch.device(device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        return {"device": None, "why": "torch sees no CUDA device"}
    found = {"device": "cpu", "capability": None, **describe(), "identity": identity()}
    if cuda:
        major, minor = torch.cuda.get_device_capability()
        found |= {"device": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}
    reasons = {op: why_not(op, "native", device) for op in reference.__all__}
    return found | {"cannot_serve": {op: why for op, why in reasons.items() if why is not None}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", required=True)
    print(json.dumps(probe(parser.parse_args().device)))
