"""vLLM's server by model runner V2 on a CPU: `python server_v2.py OPTIONS`."""

import runpy

import v2  # noqa: F401

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
