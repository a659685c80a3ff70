"""One engine for all tests that need no settings of their own: starting one is what takes time."""

import shutil

import pytest


@pytest.fixture(scope="session")
def engine():
    """Started without a budget: requests bring theirs."""
    import asking

    return asking.llm()


@pytest.fixture(scope="session")
def old_names(tmp_path_factory):
    """The checkpoint with the tower's weights named as before transformers 5."""
    from safetensors.torch import load_file, save_file

    from vtp_kernels.pocket_llava.model import TRAINED

    folder = tmp_path_factory.mktemp("old") / "model"
    shutil.copytree(TRAINED, folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weight
        for name, weight in weights.items()
    }
    assert renamed.keys() != weights.keys()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
