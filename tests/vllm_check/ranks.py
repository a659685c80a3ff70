"""Two ranks that share the model's heads, on a CPU: `python ranks.py KEEP SCORE COUNT` prints what
they answer, as JSON."""

import json
import os
import sys

import asking


def main(keep, score, count):
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # two ranks of one memory node
    engine = asking.llm(tensor_parallel_size=2, **asking.budget(keep, score))
    outputs = asking.ask(engine, [asking.request(case) for case in asking.cases(count)])
    print(json.dumps([[output.prompt_token_ids, asking.tokens(output)] for output in outputs]))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
