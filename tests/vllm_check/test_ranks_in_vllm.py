"""Tensor parallelism: each rank has half of the tower's heads; all must keep the same tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: run by `make vllm-check`")

import asking

KEEP, COUNT = 64, 20


@pytest.mark.parametrize("score", ["attention", "similarity"])
def test_two_ranks_answer_as_one(engine, score):
    script = Path(asking.__file__).with_name("ranks.py")
    run = subprocess.run(
        [sys.executable, script, str(KEEP), score, str(COUNT)],
        env=os.environ | asking.ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    outputs = asking.ask(
        engine, [asking.request(case, **asking.budget(KEEP, score)) for case in asking.cases(COUNT)]
    )
    expected = [[output.prompt_token_ids, asking.tokens(output)] for output in outputs]
    assert json.loads(run.stdout.splitlines()[-1]) == expected
