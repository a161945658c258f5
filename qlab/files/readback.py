"""What was written to a file, read back as readers do and compared with what was to be written.

A codec that packs codes in another order, or stores the scales of another weight, gives a file that
loads and computes garbage. It is found here, while what was meant is still known.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.graph import Op
from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import Leaf, QTensor, dense
from qlab.algebra.spec import Spec
from qlab.codecs import Codec
from qlab.codecs.cache_scales import scales_of
from qlab.errors import QlabError
from qlab.files.certificate import fingerprint
from qlab.files.digests import BLOCK, hasher, said
from qlab.files.directory import Stored, read_header
from qlab.files.tensors import bytes_of, dtype_of, read

MARKS = "marks"  # section of notes, until they are written: name of a leaf -> its mark
WORDS = 1 << 16  # of 64 bits that are compared at once
PAGE = 1 << 12  # bytes of a tensor that are summed as 64-bit words, modulo 2^64


@dataclass(frozen=True)
class Mark:
    """What tells a leaf from others once it is let go of: its fingerprint, and the spec of a
    quantized one."""

    hash: str
    spec: Spec | None


def mark(leaf: Leaf) -> Mark:
    """The mark of a leaf. That of an unquantized one is made of its dtype, its shape and the sums
    of its pages, which are found in a fraction of the time that a hash of all bytes takes."""
    if isinstance(leaf, QTensor):
        return Mark(fingerprint(leaf), leaf.spec)
    return _mark_of(leaf.dtype, tuple(leaf.shape), [bytes_of(leaf)])


def _mark_in_file(name: str, stored: Stored) -> Mark:
    """The mark of an unquantized tensor of a file, of which a part is in memory at a time."""
    block = memoryview(bytearray(min(BLOCK, stored.nbytes)))

    def parts(file: Any) -> Iterator[memoryview]:
        for done in range(0, stored.nbytes, BLOCK):
            yield block[: file.readinto(block[: stored.nbytes - done])]

    with stored.file.open("rb") as file:
        file.seek(stored.start)
        return _mark_of(dtype_of(name, stored), stored.shape, parts(file))


def _mark_of(dtype: torch.dtype, shape: tuple[int, ...], parts: Iterable[memoryview]) -> Mark:
    """parts: the bytes in their order, each but the last one of whole pages."""
    digest = hasher()
    digest.update(f"{dtype} {shape}".encode())
    for part in parts:
        pages = len(part) // PAGE
        if pages:
            words = torch.frombuffer(part, dtype=torch.int64, count=pages * PAGE // 8)
            digest.update(bytes_of(words.view(pages, -1).sum(1)))
        digest.update(part[pages * PAGE :])
    return Mark(said(digest), None)


def refuse_misread(
    path: Path,
    leaves: Mapping[str, Leaf | Mark],
    codec: Codec,
    online: Mapping[str, tuple[Op, ...]] | None = None,
) -> None:
    """Refuse a file that does not give back the leaves that it was written from, by name.

    Args:
        path: the file.
        leaves: what was written, or the marks of that, by its names in the files.
        codec: the format.
        online: what happens to the inputs of leaves at run time, which the format holds beside
            them.
    """
    stored = read_header(path)
    of_module: dict[str, list[str]] = {}
    scales_of_cache = set(scales_of(stored))  # which are no part of a weight
    for name in (name for name in stored if name not in scales_of_cache):
        of_module.setdefault(name.rpartition(".")[0], []).append(name)
    for name, leaf in leaves.items():
        module = name.rpartition(".")[0]
        if isinstance(leaf, Tensor) or leaf.spec is None:
            why = "it is not there"
            if name in stored:
                why = _other_tensor(_mark_in_file(name, stored[name]), leaf)
        else:
            tensors = {part: read(part, stored[part]) for part in of_module.get(module, ())}
            why = _other_codes(module, tensors, codec, leaf)
            why = why or _other_input(module, tensors, codec, (online or {}).get(name, ()))
        _refuse(name, f"from {path.name}", why)


def refuse_misencoded(
    name: str, tensors: Mapping[str, Tensor], leaf: QTensor, codec: Codec
) -> dict[str, Mark]:
    """Refuse tensors that do not give back the leaf that a codec made them of. Returns the marks of
    these tensors, by which `refuse_misread` finds them in a file without decoding them again."""
    why = _other_codes(name.rpartition(".")[0], tensors, codec, leaf)
    _refuse(name, "from its tensors", why)
    return {part: mark(tensor) for part, tensor in tensors.items()}


def _refuse(name: str, source: str, why: str) -> None:
    if why:
        raise QlabError(
            f"{name} does not read back {source} as it was written ({why}), so the directory would "
            "compute something else and is not put in place; report this, and choose another "
            "--codec until it is mended"
        )


def _other_tensor(there: Mark, leaf: Tensor | Mark) -> str:
    """Why an unquantized tensor is not the one that was written; empty where it is."""
    expected = leaf if isinstance(leaf, Mark) else mark(leaf)
    return "" if there == expected else "its dtype, its shape or its numbers are others"


def _other_codes(
    module: str, tensors: Mapping[str, Tensor], codec: Codec, leaf: QTensor | Mark
) -> str:
    """Why the tensors of a module do not mean the weight that was written; empty where they do."""
    try:
        decoded = codec.decode(module, tensors, leaf.spec)
    except QlabError as error:
        return str(error)
    if not isinstance(decoded, QTensor):
        return "its codes read as a dense weight"
    if isinstance(leaf, Mark):
        same = mark(decoded) == leaf
        return "" if same else "its codes, scales or zero points are others"
    if decoded.shape != leaf.shape:
        return f"its shape is {tuple(decoded.shape)} for {tuple(leaf.shape)}"
    if _ordered(decoded) != _ordered(leaf):  # a format may put channels of a group in order
        here = dense(decoded, torch.float32)
        same = torch.equal(here, dense(leaf, torch.float32).to(here.device))
        return "" if same else "its weight is another"
    for part in ("codes", "scales", "zeros", "outer", "perm"):
        if not _equal(getattr(decoded, part), getattr(leaf, part)):
            return f"its {part} are others"
    return ""


def _ordered(leaf: QTensor) -> tuple[int, ...] | None:
    """The order of a leaf's channels, or None where they are in their own."""
    return None if leaf.perm is None else tuple(leaf.perm.tolist())


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two parts of a leaf are the same numbers, in whatever dtype and place."""
    if a is None or b is None:
        return a is b
    b = b.to(a.device)
    if a.dtype != b.dtype or a.shape != b.shape:
        return torch.equal(a.double(), b.double())
    wide = all(t.is_contiguous() and t.nbytes % 8 == 0 == t.storage_offset() % 8 for t in (a, b))
    if not wide or a.device.type != "cpu":
        return torch.equal(a, b)
    ours, theirs = (
        t.reshape(-1).view(torch.int64).numpy() for t in (a, b)
    )  # eight codes at a time
    return all(  # in parts that stay in a core's cache; a comparison of numpy's is the faster one
        bool((ours[first : first + WORDS] == theirs[first : first + WORDS]).all())
        for first in range(0, len(ours), WORDS)
    )


def _other_input(
    module: str, tensors: Mapping[str, Tensor], codec: Codec, ops: tuple[Op, ...]
) -> str:
    """Why the rounding of a module's inputs does not read back; empty where it does."""
    for op in ops:
        if not isinstance(op, QuantizeInput) or codec.decode_input is None:
            continue
        decoded = codec.decode_input(module, tensors, op.input_spec)
        parts, expected = (
            [getattr(each, part, None) for part in ("scales", "zeros", "outer")]
            for each in (decoded, op)
        )
        if not all(_equal(a, b) for a, b in zip(parts, expected)):
            return "the rounding of its inputs is another"
    return ""
