"""Existing codes in the form that another format can hold."""

from dataclasses import replace

import torch

from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int, Spec
from qlab.codecs import CODECS
from qlab.driver.admissible import Admission
from qlab.errors import QlabError


def express(leaf: QTensor, target: Spec, admission: Admission) -> QTensor:
    """The same numbers as a leaf of the target's spec that the format can hold; refuses whatever
    would be lost."""
    leaf = in_order(leaf)
    zeros = leaf.zeros
    if isinstance(target, Int) != isinstance(leaf.spec, Int) or (
        leaf.spec.bits,
        leaf.spec.tile,
    ) != (target.bits, target.tile):
        raise QlabError(f"its codes lie on {leaf.spec}, not on {target}")
    if target.symmetric and zeros is not None:
        if (zeros != 0).any():
            raise QlabError("zero points that are not 0 would be lost")
        zeros = None
    elif not target.symmetric and zeros is None:
        zeros = torch.zeros_like(leaf.scales, dtype=torch.int8)
    dtypes = admission.scale_dtypes(target, leaf.scales.dtype)
    if not dtypes:
        reason = CODECS[admission.codec].refusal(target)
        raise QlabError(reason or f"its format has no scales of {target}")
    for dtype in dtypes:
        scales = leaf.scales.to(dtype)
        if torch.equal(scales.double(), leaf.scales.double()):
            return QTensor(
                leaf.codes, scales, zeros, replace(target, scale_dtype=dtype), leaf.outer, leaf.perm
            )
    raise QlabError(
        f"{leaf.scales.dtype} scales would be rounded to {dtypes[0]}".replace("torch.", "")
    )


def in_order(leaf: QTensor) -> QTensor:
    """The leaf without `perm` where every group still consists of neighbouring channels; else as it
    is."""
    if leaf.perm is None:
        return leaf
    k = leaf.shape[-1]
    cols = leaf.spec.tile.cols or k
    if k % cols:
        return leaf
    place = leaf.perm.argsort()  # input channel -> column of codes
    group = (place // cols).reshape(-1, cols)
    if (group != group[:, :1]).any():
        return leaf
    order = group[:, 0]
    zeros = None if leaf.zeros is None else leaf.zeros[..., order]
    return QTensor(leaf.codes[..., place], leaf.scales[..., order], zeros, leaf.spec, leaf.outer)
