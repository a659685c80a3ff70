"""Small models that cut pictures up, without a budget: `python plain_tiles.py MODULE FOLDER` prints
what vLLM makes of some prompts, as JSON; with the plugin or without, as the environment says."""

import importlib
import json
import sys

import asking
from tiny_next import drawing

SETTINGS = {"max_model_len": 1024, "max_num_batched_tokens": 48, "max_num_seqs": 4}


def requests(tiny):
    """One picture, several, or none."""
    pictures = [drawing(size, seed) for seed, size in enumerate(tiny.SIZES)]
    some = [pictures[:1], pictures[1:3], [], pictures[3:]]
    return [request(tiny, pictures) for pictures in some]


def request(tiny, pictures, text="7 8"):
    prompt = "5 " + f"{tiny.PLACEHOLDER} " * len(pictures) + text
    return {"prompt": prompt, **({"multi_modal_data": {"image": pictures}} if pictures else {})}


def answers(engine, tiny):
    return [
        [list(output.prompt_token_ids), asking.tokens(output), asking.logprobs(output)]
        for output in asking.ask(engine, requests(tiny))
    ]


if __name__ == "__main__":
    tiny = importlib.import_module(sys.argv[1])
    engine = asking.llm(sys.argv[2], **SETTINGS)
    from vllm import ModelRegistry

    cls = ModelRegistry.models[tiny.ARCHITECTURE].load_model_cls()
    print(json.dumps({"module": cls.__module__, "outputs": answers(engine, tiny)}))
