"""A small model with M-RoPE without a budget, by model runner V2: `python plain_grids.py FAMILY
FOLDER` prints what vLLM makes of some prompts, as JSON."""

import json
import sys
from pathlib import Path

import v2  # noqa: F401

sys.path.append(str(Path(__file__).parents[1]))

import asking
import plain_tiles
import tiny_grids

if __name__ == "__main__":
    tiny = tiny_grids.FAMILIES[sys.argv[1]]
    engine = asking.llm(sys.argv[2], **plain_tiles.SETTINGS)
    from vllm import ModelRegistry

    cls = ModelRegistry.models[tiny.ARCHITECTURE].load_model_cls()
    print(json.dumps({"module": cls.__module__, "outputs": plain_tiles.answers(engine, tiny)}))
