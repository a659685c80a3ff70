"""vLLM's model runner V2 on a CPU: to be imported before vLLM is.

It is what GPUs run. Its Triton kernels are interpreted here; vLLM looks whether Triton has a
backend for this machine, and uses nothing of it. torch.compile would, and is switched off.
"""

import os
import types

os.environ |= {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TORCHDYNAMO_DISABLE": "1",
}

from triton.backends import backends

driver = types.SimpleNamespace(is_active=lambda: True)
backends.setdefault("cpu", types.SimpleNamespace(driver=driver, compiler=None))
