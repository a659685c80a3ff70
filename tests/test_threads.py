"""One thread for each process of a test run, so that none spins while it waits for a core."""

import os
import subprocess
import sys

import torch


def test_the_tests_and_what_they_start_have_the_threads_asked_for():
    """That is one, unless OMP_NUM_THREADS said otherwise from outside."""
    asked = int(os.environ["OMP_NUM_THREADS"])
    assert torch.get_num_threads() == asked
    code = "import torch; print(torch.get_num_threads())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) == asked
