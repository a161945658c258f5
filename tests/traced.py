"""Blocks that ranks run, traced: they are forked from a process that imports this."""

import tempfile

import torch
from families import tiny
from model_folders import random_tokens
from ranks import LENGTH

from qlab.driver.sites import trace_all
from qlab.files.checkpoint import open_checkpoint
from qlab.model.skeleton import Skeleton

torch.set_num_threads(1)  # a thread of torch's would be missing in a fork
for family in ("llama", "qwen3_moe"):
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        tiny(family).save_pretrained(folder)
        for samples in (1, 5):  # in a batch of a run, and of its plan
            data = random_tokens(folder, samples=samples, length=LENGTH)
            trace_all(Skeleton(open_checkpoint(folder), torch.float32), data)
