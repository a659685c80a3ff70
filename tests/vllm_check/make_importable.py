"""Run once in the environment of `make vllm-check`. vLLM's CPU build takes a torch without CUDA,
and package indexes have torchvision for CUDA only. Its Python part serves, once the operators that
it describes are there; no model here asks what they would compute."""

import importlib.util
from pathlib import Path

SCHEMAS = """
if not _has_ops():
    for _name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
"""

if __name__ == "__main__":
    package = Path(importlib.util.find_spec("torchvision").origin).parent
    extension = package / "extension.py"
    text = extension.read_text()
    if SCHEMAS not in text:
        extension.write_text(text + SCHEMAS)
    import torchvision

    print(f"torchvision {torchvision.__version__} can be imported")
