"""A small model whose images lie in grids: `python plain_grids.py FOLDER SETTINGS` prints what vLLM
makes of some prompts, as JSON; with the plugin or without, as the environment says."""

import json
import os
import sys
from pathlib import Path

import v2  # noqa: F401

sys.path.append(str(Path(__file__).parents[1]))

import asking
from tiny_grids import PICTURE, SIZES
from tiny_next import drawing

SETTINGS = {
    "max_model_len": 1024,
    "max_num_batched_tokens": 24,  # images are cut up
    "max_num_seqs": 4,
    "limit_mm_per_prompt": {"image": 3, "video": 1},
    "enable_mm_embeds": False,
}


def pictures(*numbers):
    return [drawing(SIZES[number], number) for number in numbers]


def request(images, text="7 8 9", **more):
    """Text before the first image and between images."""
    prompt = "5 6 " + " 4 ".join([PICTURE] * len(images)) + f" {text}"
    return {"prompt": prompt, **({"multi_modal_data": {"image": images}} if images else {}), **more}


def answers(engine, **more):
    some = [pictures(0), pictures(1, 2), [], pictures(3), pictures(4)]
    return [
        [list(output.prompt_token_ids), asking.tokens(output), asking.logprobs(output)]
        for output in asking.ask(engine, [request(images, **more) for images in some])
    ]


if __name__ == "__main__":
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # ranks of one memory node
    print(json.dumps(answers(asking.llm(sys.argv[1], **SETTINGS | json.loads(sys.argv[2])))))
