"""Weights that are rounded one by one share a global scale with their parent's others, of which
engines make one weight."""

import pytest
import torch
from model_folders import tensors

from qlab.algebra.qtensor import shared_outer
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import at, chain, outside
from qlab.directories.convert import convert
from qlab.directories.model_free import quantize_files
from qlab.directories.verify import verify
from qlab.driver.quantize import quantize
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.rtn import rtn

NVFP4 = parse_spec("nvfp4")


def tower(source, out):
    recipe = chain(rtn(parse_spec("int4-g32")), at("*vision*layers*", outside(rtn(NVFP4))))
    return quantize(open_checkpoint(source), recipe, None, out).path


def requantized(source, out):
    eight = quantize(
        open_checkpoint(source), rtn(parse_spec("int8-channel")), None, out / "int8"
    ).path
    return convert(eight, "compressed-tensors", out / "nvfp4", requantize=NVFP4).path


@pytest.mark.parametrize(
    "family, write, children",
    [
        ("llama", lambda source, out: quantize_files(source, rtn(NVFP4), out).path, [4, 3]),
        (
            "mixtral",
            lambda source, out: quantize_files(source, rtn(NVFP4), out).path,
            [4, 3],
        ),  # each expert a parent of its own
        ("llava", tower, [4, 2]),
        ("llama", requantized, [4, 3]),
    ],
)
def test_children_of_one_parent_share_it(family, write, children, saved, tmp_path):
    source = saved(family, torch.bfloat16, "20KB")  # siblings in different files
    model = open_checkpoint(write(source, tmp_path / "out"))
    families = {}
    for module, spec in model.quantized.items():
        if spec.outer:
            families.setdefault(module.rpartition(".")[0], []).append(
                model.leaf(f"{module}.weight").outer
            )
    assert {len(outers) for outers in families.values()} == set(children)
    for parent, outers in families.items():
        assert all(torch.equal(outer, outers[0]) for outer in outers)
        weights = [
            W.float()
            for name, W in tensors(source).items()
            if name.rsplit(".", 2)[0] == parent and W.ndim == 2
        ]
        assert write is requantized or torch.equal(outers[0], shared_outer(weights, NVFP4))
    assert len({float(outers[0]) for outers in families.values()}) == len(families)
    assert write is requantized or verify(model, source).faults == []
