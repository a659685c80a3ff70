"""Questions about pictures for the small LLaVA in vLLM, and for the same model in transformers."""

import functools
import os

from PIL import Image

from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.model import TRAINED

#: vLLM in this very process, with the plugin; what it is told before it is imported.
ENVIRONMENT = {
    "VLLM_PLUGINS": "vtp_kernels",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
SETTINGS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "limit_mm_per_prompt": {"image": 3},
    "enable_mm_embeds": True,
    "block_size": 32,  # the least there is on a CPU, so that pruned prompts fill some
    "seed": 0,
}
LONGEST_ANSWER = 4

_engines = []


def llm(model=TRAINED, **settings):
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    from vllm import LLM

    _engines.append(LLM(str(model), **SETTINGS | settings))
    return _engines[-1]  # one that is let go of takes what all in this process share with it


@functools.cache
def cases(count):
    return list(scenes.cases("test", count))


def picture(case):
    return Image.fromarray(case.scene.image)


def budget(keep, score="attention", **more):
    """What a request says to have its images pruned; keep None: nothing."""
    if keep is None:
        return {}
    settings = {"keep": keep, "score": score, **more}
    return {"mm_processor_kwargs": {"images_kwargs": {"vtp": settings}}}


def request(case, images=1, **more):
    """A prompt as the model's chat template makes it; `images` of them, or embeddings."""
    if isinstance(images, int):
        images = [picture(case)] * images
    prompt = "<image> " * len(images) + case.question.text + " "
    return {"prompt": prompt, **({"multi_modal_data": {"image": images}} if images else {}), **more}


def ask(engine, requests):
    """vLLM's greedy answers, with the logarithm of each token's probability."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=LONGEST_ANSWER, logprobs=1)
    return engine.generate(requests, sampling, use_tqdm=False)


def answer(output):
    return output.outputs[0].text.strip()


def tokens(output):
    return list(output.outputs[0].token_ids)


def logprobs(output):
    found = output.outputs[0]
    return [
        step[token].logprob for token, step in zip(found.token_ids, found.logprobs, strict=True)
    ]


def forget(engine):
    """Empties every cache between a request and its answer."""
    engine.reset_prefix_cache()
    engine.reset_mm_cache()
    engine.llm_engine.reset_encoder_cache()
