"""What is promised of a quantized weight when it is made, and what can be checked of it in a file.

A certificate holds `hash`, the hash of the numbers that the codes mean, whatever the format that
stores them, and against the weight of the model that was quantized `weight_error`, |W - W'| / |W|,
and `largest_step`, max |W - W'| in units of the scales. Where a method rescaled an input, both are
large and still the ones to be found again; how well the weight was rounded is in the site's row.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.measured import errors_of
from qlab.algebra.qtensor import Leaf, QTensor, dense
from qlab.algebra.qtensor import off_grid as off_grid
from qlab.files.digests import hasher, said
from qlab.files.tensors import bytes_of

DISTANCES = ("weight_error", "largest_step")


def certify(leaf: QTensor, reference: Leaf | None) -> dict[str, Any]:
    """The certificate of a quantized weight [o, k]; without the weight it was made from, the hash
    alone."""
    return {"hash": fingerprint(leaf)} | ({} if reference is None else distances(leaf, reference))


def distances(leaf: QTensor, reference: Leaf) -> dict[str, float]:
    """How far the weight is from the reference's, as a certificate says it. A leaf whose groups are
    permuted has no `largest_step`."""
    # The reference comes from the files, which lie on the CPU.
    dtype = torch.float32 if isinstance(reference, QTensor) else None
    errors = errors_of(dense(reference, dtype).to(leaf.codes.device), leaf, None)
    error = {"weight_error": errors.D / max(errors.W, 1e-30)}
    return error | ({"largest_step": errors.steps} if leaf.perm is None else {})


def promised(certificate: Mapping[str, Any]) -> Any:
    """The hash that a certificate holds: older versions of qlab called it `sha256`."""
    return certificate.get("hash", certificate.get("sha256"))


def fingerprint(leaf: QTensor, like: str | None = None) -> str:
    """The hash of shape, codes, scales, zeros, outer scale and order of channels. like: a hash of
    the kind that is meant (`digests.hasher`).

    Scales and zeros enter as float64, missing zeros as 0 and missing outer scales as 1, so that a
    format's choice of dtype does not show and a changed number does.
    """
    zeros = torch.zeros_like(leaf.scales, dtype=torch.float64) if leaf.zeros is None else leaf.zeros
    outer = torch.ones(1, dtype=torch.float64) if leaf.outer is None else leaf.outer
    perm = torch.arange(leaf.shape[-1]) if leaf.perm is None else leaf.perm
    digest = hasher(like)
    digest.update(f"{leaf.spec.tile} {tuple(leaf.shape)}".encode())
    for part in (leaf.codes, leaf.scales.double(), zeros.double(), outer.double(), perm):
        digest.update(bytes_of(part))
    return said(digest)


def hash_of(tensor: Tensor, like: str | None = None) -> str:
    """The hash of an unquantized tensor: dtype, shape and bytes. like: as of `fingerprint`."""
    digest = hasher(like)
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(bytes_of(tensor))
    return said(digest)


def hash_of_json(value: Any) -> str:
    """sha256 of what a JSON file says; the order of keys says nothing."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
