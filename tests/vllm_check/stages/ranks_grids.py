"""Two ranks that share the heads of a small model with M-RoPE, on a CPU: `python ranks_grids.py
FAMILY FOLDER KEEP [METHOD]` prints what they answer to prompts with pictures, as JSON; with a
method between the layers, if one is given."""

import json
import os
import sys
from pathlib import Path

import v2  # noqa: F401

sys.path.append(str(Path(__file__).parents[1]))

import asking
import plain_tiles
import staged
import tiny_grids


def answers(engine, tiny, keep):
    requests = plain_tiles.requests(tiny, **asking.budget(keep))
    outputs = asking.ask(engine, requests)
    return [[list(output.prompt_token_ids), asking.tokens(output)] for output in outputs]


if __name__ == "__main__":
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # two ranks of one memory node
    settings = staged.method_settings(sys.argv[4]) if sys.argv[4:] else plain_tiles.SETTINGS
    engine = asking.llm(sys.argv[2], **settings, tensor_parallel_size=2)
    print(json.dumps(answers(engine, tiny_grids.FAMILIES[sys.argv[1]], float(sys.argv[3]))))
