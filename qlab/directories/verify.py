"""Is a quantized directory what it claims to be?

Every site is checked against its grid, its certificate and the model it was made from; every other
tensor against that model.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.qtensor import Leaf, QTensor, dense
from qlab.codecs.around import SECTION as AROUND
from qlab.codecs.around import hash_of_numbers, hashes
from qlab.directories.covered import unlike_recipe
from qlab.directories.settings import differences
from qlab.directories.verdict import Verdict
from qlab.errors import QlabError
from qlab.files.certificate import (
    distances,
    fingerprint,
    hash_of,
    hash_of_json,
    off_grid,
    promised,
)
from qlab.files.checkpoint import GGUF, Checkpoint, open_checkpoint
from qlab.files.record import recorded
from qlab.files.shardwise import leaves_by_file
from qlab.model.alike import Alike, alike
from qlab.model.modules import Modules
from qlab.process.extras import needed
from qlab.process.surroundings import undisturbed

Certificates = Mapping[str, Mapping[str, Any]]  # module -> what was certified of its weight

SLACK = 1e-4  # relative: how far a sum of squares in fp32 may differ between machines
DISTANCES = {"weight_error": "weight error", "largest_step": "largest error in steps"}


def verify(directory: Checkpoint | str | Path, against: Checkpoint | str | Path) -> Verdict:
    """Check a quantized directory against the model it was made from, one tensor at a time.

    Every site's codes decode, lie on the grid that the configuration claims, hash to the
    certificate that was recorded when they were made, and are as far from the reference's weight as
    it says. Every tensor of the reference is there, and every unquantized one is the reference's
    own or the one that the recipe is recorded to have written. config.json says of the model what
    the reference's says.

    Args:
        directory: A quantized model directory, in any format that qlab reads, or what `open`
            returned for it, or a GGUF file.
        against: The directory of the model that it was made from, which may be unquantized or
            quantized itself, or what `open` returned for it.

    Returns:
        What was checked; `faults` has one sentence for each thing that is wrong, and is empty where
        the directory is what it claims to be.

    Raises:
        QlabError: The directory is not quantized, or one of the two cannot be read.

    Example:
        >>> import qlab
        >>> verdict = qlab.verify("demo-int4", qlab.open("demo"))
        >>> verdict.faults, verdict.certified
        ([], True)
    """
    if isinstance(directory, Checkpoint):
        return _verdict(directory, against)
    file = Path(directory).expanduser()
    if file.suffix != GGUF or not file.is_file():
        return _verdict(open_checkpoint(file), against)
    needed("gguf", "gguf")  # directories do without it
    from qlab.directories.gguf import from_gguf

    with TemporaryDirectory() as folder:  # what qlab reads the file as
        read = from_gguf(file, "compressed-tensors", Path(folder) / "model", False, False)
        return replace(_verdict(open_checkpoint(read), against), path=file)


@undisturbed
@torch.no_grad()
def _verdict(checkpoint: Checkpoint, against: Checkpoint | str | Path) -> Verdict:
    original = against if isinstance(against, Checkpoint) else open_checkpoint(against)
    record = recorded(checkpoint.path)
    if not checkpoint.quantized and not (record.get("changed") or record.get(AROUND)):
        raise QlabError(
            f"{checkpoint.path} is not quantized, so there is nothing to verify; give a quantized "
            "directory"
        )
    model, reference = Modules(checkpoint), Modules(original)
    model.refuse_unheld()
    reference.refuse_unheld()
    certificates = record.get("certificates", {})
    both = alike(model, reference)
    checkpoint, original = both.model.checkpoint, both.reference.checkpoint
    sites = _sites(both, certificates)
    changed = _changed(both, sites, record.get("changed", {}))
    extras = _extras(checkpoint, hashes(record.get(AROUND, {})))
    return Verdict(
        path=checkpoint.path,
        sites=sites,
        missing=_missing(both, sites, certificates),
        extra=_extra(both, extras, certificates, record.get("changed", {})),
        changed=changed,
        certified=bool(certificates),
        extras=extras,
        config=differences(checkpoint, original, both.mistied),
        retold=_says_otherwise(checkpoint, record),
        lost=bool(checkpoint.quantized and record and not certificates)
        and _certifies(record.get("job", {})),
        unlike=unlike_recipe(both.model, record),
    )


def _extras(checkpoint: Checkpoint, written: Mapping[str, str]) -> dict[str, str | None]:
    """Name of a tensor of what happens at run time -> what is wrong with it, or None. written: the
    hashes of those that qlab wrote."""
    faults: dict[str, str | None] = {}
    for extra in checkpoint.extras:
        for name in extra.tensors:
            tensor = checkpoint.tensor(name)
            faults[name] = extra.fault(tensor)
            if (
                faults[name] is None
                and name in written
                and hash_of_numbers(tensor) != written[name]
            ):
                faults[name] = "is not what the recipe wrote"
    return faults


def _leaves(model: Modules) -> set[str]:
    return {name for file in leaves_by_file(model.checkpoint) for name in file}


def _says_otherwise(checkpoint: Checkpoint, record: Mapping[str, Any]) -> bool:
    """Whether the quantization_config is not the one that was written with the certificates."""
    if not any(record.get(section) for section in ("certificates", "changed", AROUND)):
        return False
    written = hash_of_json(checkpoint.raw.get("quantization_config"))
    return record.get("quantization_config") != written


def _certifies(job: Mapping[str, Any]) -> bool:
    """Whether a recorded job certified what it wrote. All jobs of qlab do, except the conversion of
    a directory that another tool made: a conversion hands on the certificates that it finds."""
    while isinstance(job.get("converted_from"), dict):
        job = job["converted_from"]
    return "converted_from" not in job


# ------------------------------------------------------------------ which tensors are there
def _missing(both: Alike, sites: Collection[str], certificates: Certificates) -> list[str]:
    """What the reference, the certificates or the configuration name and the directory lacks."""
    lacking = _leaves(both.reference) - _leaves(both.model) - both.doubled
    uncovered = sorted(certificates.keys() - set(sites))
    return [
        *sorted(lacking),
        *(f"the certified {module}" for module in uncovered),
        *(name for extra in both.model.checkpoint.extras for name in extra.missing),
    ]


def _extra(
    both: Alike,
    extras: Collection[str],
    certificates: Certificates,
    written: Mapping[str, str],
) -> list[str]:
    """The directory's leaves that are neither the reference's nor made of one of its leaves, nor
    what the recipe wrote in the place of one that is tied there. written: see `_changed`."""
    originals = _leaves(both.reference)
    made_of = {
        f"{module}.weight": certificate.get("made_of") or f"{module}.weight"
        for module, certificate in certificates.items()
    }
    explained = {
        name for name, source in made_of.items() if both.names.get(source, source) in originals
    }
    model = both.model.checkpoint
    extra = _leaves(both.model) - originals - set(extras) - explained - both.doubled
    return sorted(
        name
        for name in extra
        if name not in written or written[name] != hash_of(dense(model.leaf(name)), written[name])
    )


# ------------------------------------------------------------------ unquantized tensors
def _changed(
    both: Alike, sites: Collection[str], written: Mapping[str, str]
) -> dict[str, str | None]:
    """Unquantized tensor that differs from the reference's -> what explains it, or None.

    sites: the quantized modules. written: tensor -> the hash of what the recipe wrote there.
    """
    model, reference = both.model.checkpoint, both.reference.checkpoint
    quantized = {f"{module}.weight" for module in sites}
    changed: dict[str, str | None] = {}
    for name in sorted(_leaves(both.model) & _leaves(both.reference) - quantized):
        leaf = model.leaf(name)
        if _differs(leaf, reference.leaf(name)):
            by_recipe = written.get(name) == hash_of(dense(leaf), written.get(name))
            changed[name] = "written by the recipe, as recorded" if by_recipe else None
    return changed


def _differs(leaf: Leaf, original: Leaf) -> bool:
    """Whether an unquantized tensor is another than the reference's.

    A float may be stored in a wider dtype that holds all of the reference's numbers. A reference
    that is quantized itself is dequantized, and rounded to the dtype that the tensor is stored in.
    """
    ours, theirs = dense(leaf), dense(original)
    both_float = ours.is_floating_point() and theirs.is_floating_point()
    if ours.shape != theirs.shape:
        return True
    if ours.dtype != theirs.dtype and not (both_float and ours.itemsize > 1):
        return True
    quantized = isinstance(original, QTensor)
    wide = ours.dtype if quantized else torch.promote_types(ours.dtype, theirs.dtype)
    ours, theirs = ours.to(wide), theirs.to(wide)
    if torch.equal(ours, theirs):
        return False
    unequal = ours != theirs
    # a NaN that was carried on is the reference's own
    return not bool(ours[unequal].isnan().all() and theirs[unequal].isnan().all())


# ------------------------------------------------------------------ quantized weights
def _sites(both: Alike, certificates: Certificates) -> dict[str, dict[str, Any]]:
    """Quantized module -> its row: spec, distances to the reference, and its fault or None."""
    model = both.model.checkpoint
    looks_transposed = model.codec is not None and model.codec.transposed
    transposed = both.reference.transposed() if looks_transposed else frozenset()
    sites: dict[str, dict[str, Any]] = {}
    for name in sorted(_leaves(both.model)):
        module = name.rpartition(".")[0]
        if not model.quantized.get(module) or name != f"{module}.weight":
            continue
        row = _site(both, module, certificates.get(module, {}), module in transposed)
        if certificates and module not in certificates and not row["fault"]:
            row["fault"] = "it has no certificate, as all weights of a directory have or none"
        sites[module] = row
    return sites


def _site(
    both: Alike, module: str, certificate: Mapping[str, Any], transposed: bool
) -> dict[str, Any]:
    model = both.model.checkpoint
    row: dict[str, Any] = {
        "spec": str(model.quantized[module]),
        "weight_error": None,
        "certified_error": certificate.get("weight_error"),
        "fault": None,
    }
    try:
        leaf = model.leaf(f"{module}.weight")
        assert isinstance(leaf, QTensor)
        row["fault"] = off_grid(leaf)
        sealed = promised(certificate)
        if certificate and fingerprint(leaf, sealed) != sealed and not row["fault"]:
            row["fault"] = "its codes, scales or zero points are not the certified ones"
        original = _original(both, module, certificate, transposed)
        if original is not None:
            if original.shape != leaf.shape:
                raise QlabError(
                    f"its shape is {tuple(leaf.shape)} and the reference's {tuple(original.shape)}"
                )
            row |= distances(leaf, original)
    except QlabError as error:
        row["fault"] = str(error).removeprefix(f"{module}: ")
    if not row["fault"]:
        row["fault"] = _broken_promise(row, certificate)
    return row


def _original(
    both: Alike, module: str, certificate: Mapping[str, Any], transposed: bool
) -> Leaf | None:
    """The reference's weight that a module's codes were made from, or None where there is none."""
    reference = both.reference.checkpoint
    source = certificate.get("made_of", f"{module}.weight")
    source = both.names.get(source, source)
    there = source in reference.stored or source.rpartition(".")[0] in reference.quantized
    if "made_of" not in certificate and not there:
        return None
    original = reference.leaf(source)
    return original.mT if transposed and isinstance(original, Tensor) else original


def _broken_promise(row: Mapping[str, Any], certificate: Mapping[str, Any]) -> str | None:
    """Which distance to the reference is not the certified one, or None."""
    for key, words in DISTANCES.items():
        distance, certified = row.get(key), certificate.get(key)
        if distance is None or certified is None:
            continue
        if not abs(distance - certified) <= SLACK * certified + 1e-7:  # NaN is no promise
            return (
                f"its {words} against the reference is {distance:.4e} and was certified as "
                f"{certified:.4e}; it was made from another model"
            )
    return None
