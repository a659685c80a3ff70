"""Two ranks that share the model's heads, on a CPU: `python ranks_v2.py METHOD COUNT` prints what
they answer to as many questions, as JSON."""

import json
import os
import sys
from pathlib import Path

import v2  # noqa: F401

sys.path.append(str(Path(__file__).parents[1]))

import asking
import staged


def main(method, count):
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # two ranks of one memory node
    engine = staged.llm(json.loads(method), tensor_parallel_size=2)
    outputs = asking.ask(engine, [asking.request(case) for case in asking.cases(count)])
    print(json.dumps([asking.answer(output) for output in outputs]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
