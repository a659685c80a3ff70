"""Kernels run on the current stream of the tensors' device, and the host waits for nothing."""

import contextlib

import pytest
import torch
from variants import VARIANTS, assert_same_bits, cloned, each, emptied, flat, refill

CYCLES = 200_000_000  # about a tenth of a second: far longer than the host needs for a call
LENGTH = 577
REHEARSED = ("test_",)


@contextlib.contextmanager
def syncs_are_errors():
    """torch raises where it would wait for the device itself."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_host_waits_for_nothing(draw, variant):
    """Neither through torch, which tells, nor otherwise: the call returns while the device still
    has work queued before it."""
    arguments = variant.draw(draw, LENGTH)
    own = cloned(arguments)
    variant.run(arguments)  # loads the kernels and fills the allocator's cache
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(CYCLES)
    with syncs_are_errors():
        got = variant.call(own)
        done.record()
        returned_first = not done.query()
    variant.check(arguments, got)
    assert returned_first


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_runs_on_the_current_stream(draw, variant):
    """The inputs arrive late, by that stream: work on any other would read what was there before.
    (torch's streams do not wait for the default stream.)"""
    contents = variant.draw(draw, LENGTH)
    arguments = cloned(emptied(variant.draw(draw, LENGTH)))
    variant.run(arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        refill(arguments, contents)
        got = variant.call(arguments)
        later = [x.clone() for x in got]  # ordered behind the op by the stream alone
    stream.synchronize()
    assert_same_bits(later, got)
    assert_same_bits(got, variant.run(contents))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_two_streams_at_once(draw, variant):
    """Calls that overlap share no workspace and no state."""
    inputs = [variant.draw(draw, LENGTH) for _ in range(2)]
    want = [variant.run(arguments) for arguments in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    got: list[list] = [[], []]
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(CYCLES)  # the host queues all calls meanwhile
    for _ in range(10):
        for stream, arguments, results in zip(streams, inputs, got, strict=True):
            with torch.cuda.stream(stream):
                results.append(variant.run(arguments))
    torch.cuda.synchronize()
    for results, expected in zip(got, want, strict=True):
        for result in results:
            assert_same_bits(result, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_tensors_of_another_device(draw, variant):
    """Kernels and outputs go to the device of the tensors; the current device stays what it is."""
    arguments = variant.draw(draw, LENGTH)
    there = each(lambda x: x.to("cuda:1"), arguments)
    assert torch.cuda.current_device() == 0
    got = variant.run(there)
    assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in got)
    torch.cuda.synchronize(1)
    variant.check(arguments, got)
    with torch.cuda.device(1):
        assert_same_bits(variant.run(there), got)
    assert all(x.device.index == 0 for x in flat(arguments))
