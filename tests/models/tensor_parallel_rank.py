"""One rank of a tensor-parallel model, for test_tensor_parallel.py: prunes, and saves what it kept.

Arguments: this rank, the number of ranks, a folder, and who spreads the model over the ranks, in
turn: "torch", "transformers". The folder has the model and, as inputs.pt, its inputs.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from pruning_methods import NAMES, pruning_method
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import LlavaForConditionalGeneration

import vtp_kernels as vtp

#: Of the others, those that look at what heads have.
BY_HEADS = ("dart", "sparsevlm")
SETTINGS = {
    "max_new_tokens": 5,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def run(model, inputs, folder):
    """{method: what it kept, and what the model said}"""
    answers = {}
    for name in (*NAMES, *BY_HEADS):
        method = pruning_method(name, model, folder)
        with vtp.prune(model, method) as handle:
            output = model.generate(**inputs, **SETTINGS)
        report = handle.report()
        answers[name] = {
            "kept": dict(report.kept),
            "keys": report.kv_tokens_per_layer,
            "sequences": output.sequences,
            "logits": torch.stack(output.logits),
        }
    return answers


def spread(folder, size, by):
    if by == "transformers":
        from transformers.distributed import DistributedConfig

        return LlavaForConditionalGeneration.from_pretrained(
            folder, distributed_config=DistributedConfig(tp_plan="auto")
        )
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    plan = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
    plan = dict.fromkeys([*plan, "mlp.gate_proj", "mlp.up_proj"], ColwiseParallel())
    plan |= dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), RowwiseParallel())
    mesh = init_device_mesh("cpu", (size,))
    for layer in model.model.language_model.layers:
        parallelize_module(layer, mesh, plan)
    return model


@torch.no_grad()
def main(rank, size, folder, ways):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    folder = Path(folder)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size
    )
    inputs = torch.load(folder / "inputs.pt")
    for by in ways:
        model = spread(folder, size, by).eval()
        heads = model.model.language_model.layers[0].self_attn.q_proj.weight.to_local().shape[0]
        assert heads * size == model.model.language_model.config.hidden_size
        answers = run(model, inputs, folder / f"{by}_{rank}")
        torch.save(answers, folder / f"answers_{by}_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
