"""The plan: what is done in which order, and which share of the time each step has.

The order is that of the evidence: whoever is stopped after a minute knows whether the kernels run
and are right. Time that a step does not need goes to those after it.
"""

import dataclasses
from collections.abc import Callable

from benchmarks.gpu_check import steps
from benchmarks.gpu_check.check import Check
from benchmarks.gpu_check.steps import Cells, EndToEnd, Tests

SMALL = "tests/gpu/test_small_inputs.py"
STREAMS = "tests/gpu/test_streams_and_devices.py"  # these put the device to sleep, and look
OPS = "tests/ops"
ONE_OP = "tests/ops/test_select_topk.py"
COMPILED = "tests/triton_kernels/test_ahead_of_time.py"


@dataclasses.dataclass(frozen=True)
class Step:
    """`share`: of the time, in parts of the sum of all shares. `least`: seconds it has anyway.
    `every_call`: a later call, maybe on another machine, does it again."""

    name: str
    share: float
    what: str
    run: Callable[[Check, str, float], dict]
    least: float = 0.0
    every_call: bool = False


def sanitized(tool: str, keyword: str | None = None) -> Tests:
    picked = () if keyword is None else ("-k", keyword)
    return Tests((SMALL, *picked), (SMALL, *picked), workers=6, tool=tool)


STEPS = (
    Step(  # the first import of torch takes long
        *("machine", 30, "what machine this is", steps.look), least=30.0, every_call=True
    ),
    Step(
        *("library", 90, "the native library; built if none was brought", steps.build),
        least=200.0,
        every_call=True,
    ),
    Step(
        *("small-inputs", 45, "every op on every path, beside float64"),
        Tests((SMALL,), (SMALL,), workers=6, most=8),
    ),
    Step("benchmarks", 120, "the cells that carry goals, bfloat16", Cells()),
    Step(
        *("ops", 45, "the whole matrix of inputs, native kernels"),
        Tests(
            (OPS, "-k", "cuda-native"), (OPS, "-k", "emulated or cpu-native"), workers=10, most=8
        ),
    ),
    Step(
        *("gpu", 55, "graphs, exact repeats, memory, fallbacks, a model"),
        Tests(
            ("tests/gpu", f"--ignore={SMALL}", f"--ignore={STREAMS}"),
            ("tests/gpu", f"--ignore={SMALL}", f"--ignore={STREAMS}"),
            workers=8,
            most=8,
        ),
    ),
    Step(*("streams", 20, "streams and devices, alone"), Tests((STREAMS,), (STREAMS,))),
    *(
        Step(f"end-to-end-{model}", 50, "dense and pruned, random weights", EndToEnd(model))
        for model in steps.MODELS
    ),
    Step("compiled", 60, "the decoder stack as a CUDA graph", steps.compile_stack),
    Step("racecheck", 40, "races in compiled code", sanitized("racecheck", "65 or 200")),
    Step("ncu", 35, "counters of the kernels of nine ops", steps.count),
    Step("plain-launches", 25, "the same cells, no launches that overlap", Cells(plain=True)),
    Step("memcheck", 40, "stray accesses", sanitized("memcheck")),
    Step(
        *("triton", 50, "Triton's kernels, the whole matrix of inputs"),
        Tests(
            (OPS, "-k", "cuda-triton"),
            (COMPILED, "-k", "new_shapes and compact_rows"),
            workers=12,
            environment=steps.triton_environment,
        ),
    ),
    Step("synccheck", 20, "barriers", sanitized("synccheck", "65 or 200")),
    Step("initcheck", 25, "reads of what nobody wrote", sanitized("initcheck", "65 or 200")),
    Step(
        *("reference", 20, "the reference on CUDA tensors"),
        Tests((OPS, "-k", "cuda-reference"), (ONE_OP, "-k", "cpu-reference"), workers=10),
    ),
)
