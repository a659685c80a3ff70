"""Pruning between the layers, and families with M-RoPE, need model runner V2, which is chosen
before vLLM is imported: these tests run in a process of their own."""

import importlib.util

if importlib.util.find_spec("vllm"):
    import v2  # noqa: F401
