"""vLLM's model runner V2, on a CPU as well: to be imported before vLLM is.

It is what GPUs run. On a CPU its Triton kernels are interpreted, row by row in Python; vLLM looks
whether Triton has a backend for the machine, and uses nothing of it. torch.compile would, and is
switched off.
"""

import os
import types

import torch

os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

if not torch.cuda.is_available():
    os.environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}

    from triton.backends import backends

    driver = types.SimpleNamespace(is_active=lambda: True)
    backends.setdefault("cpu", types.SimpleNamespace(driver=driver, compiler=None))
