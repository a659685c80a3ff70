"""Small models that cut pictures up: `python plain_tiles.py MODULE FOLDER [SETTINGS]` prints what
vLLM makes of some prompts, as JSON; with the plugin or without, as the environment says, and by
model runner V2 if that says so."""

import importlib
import json
import os
import sys
from pathlib import Path

import asking
from tiny_next import drawing

SETTINGS = {"max_model_len": 1024, "max_num_batched_tokens": 48, "max_num_seqs": 4}


def requests(tiny, **more):
    """One picture, several, or none."""
    pictures = [drawing(size, seed) for seed, size in enumerate(tiny.SIZES)]
    some = [pictures[:1], pictures[1:3], [], pictures[3:]]
    return [request(tiny, pictures) | (more if pictures else {}) for pictures in some]


def request(tiny, pictures, text="7 8"):
    prompt = "5 " + f"{tiny.PLACEHOLDER} " * len(pictures) + text
    return {"prompt": prompt, **({"multi_modal_data": {"image": pictures}} if pictures else {})}


def answers(engine, tiny, **more):
    return [
        [list(output.prompt_token_ids), asking.tokens(output), asking.logprobs(output)]
        for output in asking.ask(engine, requests(tiny, **more))
    ]


if __name__ == "__main__":
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        sys.path.append(str(Path(__file__).with_name("stages")))
        import v2  # noqa: F401
    tiny = importlib.import_module(sys.argv[1])
    settings = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    if settings.get("tensor_parallel_size", 1) > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # ranks of one memory node
    engine = asking.llm(sys.argv[2], **SETTINGS | settings)
    from vllm import ModelRegistry

    cls = ModelRegistry.models[tiny.ARCHITECTURE].load_model_cls()
    print(json.dumps({"module": cls.__module__, "outputs": answers(engine, tiny)}))
