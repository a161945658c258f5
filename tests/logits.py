"""The logits of a directory, as qlab reads it and as transformers does."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from qlab.driver.batches import push
from qlab.files.checkpoint import open_checkpoint
from qlab.model.loading import load_block, load_outside
from qlab.model.running import head, record_blocks
from qlab.model.skeleton import Skeleton

IDS = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def qlab_logits(path: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    skeleton = Skeleton(open_checkpoint(path), torch.float32)
    load_outside(skeleton, with_head=True)
    hidden, calls = record_blocks(skeleton, ids)
    state = (hidden,)
    for block, call in calls.items():
        (state,) = push(load_block(skeleton, block, call), iter([(call, state)]))
    return head(skeleton, ids, *state)


@torch.no_grad()
def transformers_logits(
    path: Path, ids: torch.Tensor = IDS, dequantize: bool = False
) -> torch.Tensor:
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model, report = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, **how
    )
    assert (
        not report["missing_keys"]
        and not report["unexpected_keys"]
        and not report["mismatched_keys"]
    )
    return model.eval()(ids).logits


def assert_read_alike(path: Path, dequantize: bool = False) -> None:
    ours, theirs = qlab_logits(path), transformers_logits(path, dequantize=dequantize)
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
