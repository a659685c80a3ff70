"""vLLM without the plugin: `python plain.py MODEL COUNT` prints what it answers, as JSON.

vLLM 0.32 does not load the names that transformers 5 gives to the tower's weights: MODEL is a copy
under the old ones.
"""

import json
import sys

import asking


def main(model, count, **settings):
    engine = asking.llm(model, **settings)
    outputs = asking.ask(engine, [asking.request(case) for case in asking.cases(count)])
    from vllm import ModelRegistry

    found = [
        [list(output.prompt_token_ids), asking.tokens(output), asking.logprobs(output)]
        for output in outputs
    ]
    cls = ModelRegistry.models["LlavaForConditionalGeneration"].load_model_cls()
    print(json.dumps({"class": f"{cls.__module__}.{cls.__name__}", "outputs": found}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
