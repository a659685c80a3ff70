"""vLLM's model runner V2, as the benchmarks run it: to be imported before vLLM is."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))

import benchmarks.vllm_v2  # noqa: F401
