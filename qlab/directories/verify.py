"""Is a quantized directory what it claims to be? Every site against its grid, its certificate and
the model it came from."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor

from qlab.algebra.qtensor import QTensor, dense
from qlab.directories.covered import unlike_recipe
from qlab.errors import QlabError, printable
from qlab.files.certificate import distances, fingerprint, hash_of, hash_of_json, off_grid
from qlab.files.checkpoint import Checkpoint, open_checkpoint
from qlab.files.record import recorded
from qlab.files.shardwise import leaves_by_file
from qlab.model.alike import Alike, alike
from qlab.model.linears import refuse_unheld, transposed
from qlab.model.ties import FLAG
from qlab.process.shown import Shown, some
from qlab.process.surroundings import undisturbed

SLACK = 1e-4  # relative: how far a sum of squares in fp32 may differ between machines
DISTANCES = {"weight_error": "weight error", "largest_step": "largest error in steps"}
# relative: how far a float of a config.json may have come through the float32 of a GGUF file
ROUNDED = 1e-7
# Keys of config.json, at any depth, that change no number that the model computes: how weights are
# stored, which is checked by itself, who wrote the file with what, and where a generation begins,
# ends and keeps its past, which is generation_config.json's to say.
PROVENANCE = (
    "quantization_config",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "_attn_implementation_autoset",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
)


@dataclass(frozen=True, repr=False, kw_only=True)
class Verdict(Shown):
    """sites: module -> spec, weight error against the reference, what was certified of it, and its
    fault or None.

    missing, extra: tensors of the reference that the directory lacks, and the other way round.
    changed: unquantized tensors that differ from the reference, with what explains each or None.
    certified: whether the directory holds certificates; without them nothing explains a change, and
    none is a fault. extras: tensor that its configuration calls for beside weights
    -> what is wrong with it, or None. config: key of config.json, nested ones with dots -> the
    directory's value and the reference's, None where there is none, if what they compute differs.
    retold: whether its quantization_config is another than the certified one. lost: whether its
    qlab.json is of a job that certifies, and holds no certificates. unlike: weight -> what it is
    and the recipe of its qlab.json makes another of.
    """

    path: Path
    sites: Mapping[str, Mapping[str, Any]]
    missing: Sequence[str]
    extra: Sequence[str]
    changed: Mapping[str, str | None]
    certified: bool
    extras: Mapping[str, str | None]
    config: Mapping[str, tuple[Any, Any]]
    retold: bool
    lost: bool
    unlike: Mapping[str, str] = field(default_factory=dict)

    @property
    def faults(self) -> list[str]:
        """What is wrong, one sentence each; empty when the directory is what it claims to be."""
        found = [
            f"config.json has {_says(key, ours)} where the reference has {_says('', theirs)}"
            for key, (ours, theirs) in self.config.items()
        ]
        if self.retold:
            found.append(
                "the quantization_config of its config.json is not the one that was written with "
                "its codes, and readers may compute something else or nothing; restore it, or "
                "quantize or convert again"
            )
        if self.lost:
            found.append(
                "its qlab.json has lost its certificates; quantize or convert again, or remove "
                "that file"
            )
        found += [f"{name}: {row['fault']}" for name, row in self.sites.items() if row["fault"]]
        found += [
            f"{name}: {fault}"
            for name, fault in self.unlike.items()
            if not self.sites.get(name, {}).get("fault")
        ]
        found += [f"{name} {fault}" for name, fault in self.extras.items() if fault]
        found += [f"{name} is missing" for name in self.missing]
        found += [f"{name} is not in the reference" for name in self.extra]
        return found + [
            f"{name} differs from the reference and no certificate says why"
            for name, why in self.changed.items()
            if self.certified and why is None
        ]

    def summary(self) -> dict[str, str]:
        """The faults, and what was checked."""
        against = "grids, the reference's tensors" + (
            ", certificates" if self.certified else "; there are no certificates"
        )
        return {
            "directory": str(self.path),
            "faults": f"{len(self.faults)}: {some(self.faults)}" if self.faults else "none",
            "checked": f"{len(self.sites)} quantized weights; {against}",
        }

    def json(self) -> dict[str, Any]:
        """The verdict as plain data."""
        return {
            "path": str(self.path),
            "certified": self.certified,
            "faults": self.faults,
            "sites": dict(self.sites),
            "missing": list(self.missing),
            "extra": list(self.extra),
            "changed": dict(self.changed),
            "extras": dict(self.extras),
            "config": dict(self.config),
            "retold": self.retold,
            "lost": self.lost,
            "unlike": dict(self.unlike),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("site", "spec", "weight error", "certified", "verdict", title=str(self.path))
        table.columns[0].overflow = "fold"
        for name, row in self.sites.items():
            table.add_row(
                name,
                row["spec"],
                _figure(row["weight_error"]),
                _figure(row["certified_error"]),
                row["fault"] or "good",
            )
        yield table
        for name, why in self.changed.items():
            yield f"{name} differs from the reference: {why or 'nothing says why'}"
        yield from (
            Text.assemble(("fault", "bold"), f" {printable(fault)}") for fault in self.faults
        )
        against = (
            "its certificates"
            if self.certified
            else "no certificates: only grids and the reference were checked"
        )
        beside = f"{len(self.extras)} tensors of what happens at run time, " if self.extras else ""
        yield f"{len(self.sites)} quantized weights, {beside}{len(self.faults)} faults, {against}"


def _says(key: str, value: Any) -> str:
    """A key and its value, in few words."""
    if value is None:
        return f"no {key}" if key else "none"
    return f"{key} {json.dumps(value, default=str):.60}".strip()


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3e}"


@undisturbed
@torch.no_grad()
def verify(directory: Checkpoint | str | Path, against: Checkpoint | str | Path) -> Verdict:
    """Check a quantized directory against the model it was made from, one tensor at a time.

    Every site: the codes decode, lie on the grid that the configuration claims, hash to the
    certificate that was recorded when they were made, and are as far from the reference's weight as
    it says. Every tensor of the reference is there, and every unquantized one is the reference's
    own or the one that the recipe is recorded to have written. Its config.json says of the model
    what the reference's says.
    """
    model, reference = (
        m if isinstance(m, Checkpoint) else open_checkpoint(m) for m in (directory, against)
    )
    if not model.quantized:
        raise QlabError(
            f"{model.path} is not quantized, so there is nothing to verify; give a quantized "
            "directory"
        )
    for opened in (model, reference):
        refuse_unheld(opened)
    record = recorded(model.path)
    certificates, noted = record.get("certificates", {}), record.get("changed", {})
    both = alike(model, reference)
    model, reference = both.model, both.reference
    names, theirs = (
        {name for file in leaves_by_file(m) for name in file} for m in (model, reference)
    )
    turned = transposed(reference) if model.codec and model.codec.transposed else frozenset()
    sites: dict[str, dict[str, Any]] = {}
    changed: dict[str, str | None] = {}
    for name in sorted(names):
        module = name.rpartition(".")[0]
        if model.quantized.get(module) and name == f"{module}.weight":
            sites[module] = _site(
                model, both, module, certificates.get(module, {}), module in turned
            )
            if certificates and module not in certificates:
                sites[module]["fault"] = (
                    sites[module]["fault"]
                    or "it has no certificate, as all weights of a directory have or none"
                )
        elif name in theirs and _differs(model, reference, name):
            written = noted.get(name) == hash_of(dense(model.leaf(name)))
            changed[name] = "written by the recipe, as recorded" if written else None
    unheard = sorted(set(certificates) - set(sites))
    extras = {
        name: extra.fault(model.tensor(name)) for extra in model.extras for name in extra.tensors
    }
    missing = [
        *sorted(theirs - names - both.doubled),
        *(f"the certified {module}" for module in unheard),
        *(name for extra in model.extras for name in extra.missing),
    ]
    sources = {
        f"{module}.weight": row.get("made_of") or f"{module}.weight"
        for module, row in certificates.items()
    }
    made = {name for name, source in sources.items() if both.names.get(source, source) in theirs}
    config = _config_differences(model, reference, both.mistied)
    retold = bool(certificates) and record.get("quantization_config") != hash_of_json(
        model.raw.get("quantization_config")
    )
    lost = bool(record) and not certificates and _certifies(record.get("job", {}))
    extra = sorted(names - theirs - extras.keys() - made - both.doubled)
    unlike = unlike_recipe(model, record)
    return Verdict(
        path=model.path,
        sites=sites,
        missing=missing,
        extra=extra,
        changed=changed,
        certified=bool(certificates),
        extras=extras,
        config=config,
        retold=retold,
        lost=lost,
        unlike=unlike,
    )


def _certifies(job: Mapping[str, Any]) -> bool:
    """Whether a recorded job certified what it wrote, as all of qlab's do but the conversion of a
    directory that another tool made: a conversion carries the certificates on that it finds."""
    while isinstance(job.get("converted_from"), dict):
        job = job["converted_from"]
    return "converted_from" not in job


# ------------------------------------------------------------------ config.json
def _config_differences(
    model: Checkpoint, reference: Checkpoint, mistied: bool
) -> dict[str, tuple[Any, Any]]:
    """Key -> the directory's value and the reference's, where they differ. Whether a head is tied
    is all one where the directory's files agree with its config (not `mistied`): its tensors are
    compared.

    A key that one of the two files lacks may be a default, or what the other one says in newer
    words: there transformers' reading of both decides, where it knows the architecture.
    """
    ours, theirs = _settings(model.raw), _settings(reference.raw)
    found = {key: (ours[key], theirs[key]) for key in ours.keys() & theirs.keys()}
    if ours.keys() != theirs.keys():
        read, expected = _as_transformers_reads(model), _as_transformers_reads(reference)
        if read is None or expected is None:
            read, expected = ours, theirs
        found = {
            key: (read.get(key), expected.get(key)) for key in read.keys() | expected.keys()
        } | found
    says_nothing = set() if mistied else {key for key in found if key.rpartition(".")[2] == FLAG}
    return {
        key: pair
        for key, pair in sorted(found.items())
        if key not in says_nothing and not _same(*pair)
    }


def _settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What a configuration says of the model: dotted key -> value. A null says nothing."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= {} if key in PROVENANCE else _settings(value, f"{prefix}{key}.")
        elif key not in PROVENANCE and value is not None:
            found[f"{prefix}{key}"] = value
    return found


def _as_transformers_reads(model: Checkpoint) -> dict[str, Any] | None:
    """The same with its defaults, by its present names; None where it does not know the
    architecture or refuses the file."""
    try:
        return _settings(model.config.to_dict()) if model.known else None
    except QlabError:
        return None


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two values of a configuration are one; NaN is NaN."""
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if (
        isinstance(ours, float)
        and isinstance(theirs, float)
        and math.isclose(ours, theirs, rel_tol=ROUNDED)
    ):
        return True
    return ours == theirs or repr(ours) == repr(theirs)


# ------------------------------------------------------------------ tensors
def _site(
    model: Checkpoint, both: Alike, module: str, certificate: Mapping[str, Any], transposed: bool
) -> dict[str, Any]:
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
        if certificate and fingerprint(leaf) != certificate["sha256"]:
            row["fault"] = (
                row["fault"] or "its codes, scales or zero points are not the certified ones"
            )
        reference, source = both.reference, certificate.get("made_of", f"{module}.weight")
        source = both.names.get(source, source)
        if (
            "made_of" in certificate
            or source in reference.stored
            or source.rpartition(".")[0] in reference.quantized
        ):
            W = reference.leaf(source)
            W = W.mT if transposed and isinstance(W, Tensor) else W
            if W.shape != leaf.shape:
                raise QlabError(
                    f"its shape is {tuple(leaf.shape)} and the reference's {tuple(W.shape)}"
                )
            row |= distances(leaf, W)
    except QlabError as error:
        row["fault"] = str(error).removeprefix(f"{module}: ")
    for key, words in DISTANCES.items():
        found, promised = row.get(key), certificate.get(key)
        if row["fault"] or found is None or promised is None:
            continue
        if not abs(found - promised) <= SLACK * promised + 1e-7:  # NaN is no promise
            row["fault"] = (
                f"its {words} against the reference is {found:.4e} and was certified as "
                f"{promised:.4e}; it was made from another model"
            )
    return row


def _differs(model: Checkpoint, reference: Checkpoint, name: str) -> bool:
    """Whether an unquantized tensor is another than the reference's; a float that holds all of the
    other's numbers may be wider, and one that was dequantized is rounded to the dtype that it is
    stored in."""
    leaf = reference.leaf(name)
    ours, W = dense(model.leaf(name)), dense(leaf)
    cast = ours.dtype != W.dtype and not (
        ours.is_floating_point() and W.is_floating_point() and ours.itemsize > 1
    )
    if cast or ours.shape != W.shape:
        return True
    wide = ours.dtype if isinstance(leaf, QTensor) else torch.promote_types(ours.dtype, W.dtype)
    ours, W = ours.to(wide), W.to(wide)
    if torch.equal(ours, W):
        return False
    unequal = ours[ours != W], W[ours != W]
    return not all(
        part.isnan().all() for part in unequal
    )  # a damaged number that was carried on is the reference's own
