"""One process of a training run: `torchrun lvpruning_rank.py OUT BATCH MICRO_BATCH STEPS`."""

import dataclasses
import sys

import torch
from tiny_training import RECIPE, conversations, tiny_model, tiny_processor

from vtp_kernels.methods.lvpruning import train

torch.set_num_threads(1)
out, batch, micro_batch, steps = sys.argv[1], *map(int, sys.argv[2:])
recipe = dataclasses.replace(RECIPE, batch=batch, micro_batch=micro_batch)
data = conversations(batch * steps)
train(tiny_model(), data, processor=tiny_processor(), out=out, recipe=recipe)
