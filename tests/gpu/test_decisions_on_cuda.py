"""What a method answers is checked on a GPU too, and nobody waits for it."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

import vtp_kernels as vtp
from vtp_kernels.contract import facts

ERRS = """
import torch
from vtp_kernels.models import facts

found = torch.tensor([3, 2], device="cuda")
facts.demand("Errs.decide before layer 2", facts.equal("rows", found, 3))
torch.cuda.synchronize()
"""


def test_counts_of_other_rows_stop_the_gpu():
    """In a process of its own: a device-side assertion leaves nothing to go on with."""
    done = subprocess.run([sys.executable, "-c", ERRS], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "assert" in done.stderr
    assert "Errs.decide before layer 2" in done.stdout + done.stderr


def test_right_counts_are_not_waited_for():
    found, expected = (torch.tensor([3, 2], device="cuda") for _ in range(2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        facts.demand("decide", facts.equal("rows", found, expected))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_debug_says_what_is_wrong():
    found = torch.tensor([3, 2], device="cuda")
    vtp.debug(True)
    try:
        with pytest.raises(ValueError, match="decide, prompt 1: 2 rows stay, and counts say 3"):
            facts.demand("decide", facts.equal("rows", found, 3))
    finally:
        vtp.debug(False)
