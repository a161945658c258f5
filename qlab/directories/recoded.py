"""The leaves of a directory in another format, one by one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.graph import Op
from qlab.algebra.grid import encode as round_to_grid
from qlab.algebra.grid import minmax
from qlab.algebra.qtensor import Leaf, QTensor, dense
from qlab.algebra.spec import Spec
from qlab.codecs import CODECS
from qlab.directories.express import express
from qlab.driver.admissible import Admission
from qlab.driver.report import stored_bits
from qlab.driver.siblings import Siblings
from qlab.errors import QlabError
from qlab.files.certificate import certify, distances
from qlab.files.checkpoint import Checkpoint
from qlab.files.readback import MARKS, mark
from qlab.files.shardwise import Notes
from qlab.model.headers import refuse_another_weight
from qlab.process.shown import some
from qlab.process.surroundings import undisturbed


@dataclass(frozen=True, kw_only=True)
class Recoded:
    """The leaves of a directory in the new format.

    targets: module -> the spec that it gets. shapes: tensor -> its shape in the model.
    siblings: their global scales. rounds: whether weights are rounded anew that the format cannot
    hold as they are. record: the source's qlab.json.
    """

    source: Checkpoint
    admission: Admission
    targets: Mapping[str, Spec]
    shapes: Mapping[str, torch.Size]
    siblings: Siblings
    rounds: bool
    record: Mapping[str, Any]

    def read(self, name: str) -> Leaf:
        """One leaf, decoded where the files hold codes of it."""
        return self.source.leaf(name)

    @undisturbed
    @torch.no_grad()
    def rewritten(self, name: str, leaf: Leaf, notes: Notes) -> Mapping[str, Tensor]:
        """The tensors of one leaf. What would be lost goes into the notes instead."""
        module = name.rpartition(".")[0]
        if isinstance(leaf, Tensor):  # its format laid it out in a way of its own
            return {name: leaf}
        refuse_another_weight(self.source, name, leaf.shape, self.shapes)
        rounding = self.source.rounding(module)
        try:
            new = self._same_codes(module, leaf, rounding)
            tensors = self._encoded(module, new, rounding)
        except QlabError as error:
            if not self.rounds:
                notes.setdefault("lost", {})[module] = str(error)
                return {}
            new = self._rounded(module, leaf)
            tensors = self._encoded(module, new, rounding)
            self._note(module, new, notes, rounded_from=leaf)
        else:
            self._note(module, new, notes)
        return tensors

    def refuse_lost(self, notes: Notes) -> None:
        """Refuse what the notes say that the format would lose."""
        if "lost" in notes:
            raise lossy(self.admission.codec, notes["lost"])

    def _same_codes(self, module: str, leaf: QTensor, rounding: tuple[Op, ...]) -> QTensor:
        target = self.targets[module]
        reason = CODECS[self.admission.codec].refusal(target, rounding) if rounding else None
        if reason:
            raise QlabError(reason)
        return express(leaf, target, self.admission)

    def _rounded(self, module: str, leaf: QTensor) -> QTensor:
        target = self.targets[module]
        stored = replace(target, scale_dtype=self.admission.scale_dtypes(target)[0])
        outer = self.siblings.outer(module)
        return round_to_grid(minmax, dense(leaf, torch.float32), stored, outer=outer)

    def _encoded(
        self, module: str, leaf: QTensor, rounding: tuple[Op, ...]
    ) -> Mapping[str, Tensor]:
        encode = CODECS[self.admission.codec].encode
        return encode(module, leaf, rounding) if rounding else encode(module, leaf)

    def _note(
        self, module: str, new: QTensor, notes: Notes, rounded_from: QTensor | None = None
    ) -> None:
        """Report a weight: its row, and what is still certified of it."""
        row = {**self.record.get("sites", {}).get(module, {}), "shape": list(new.shape)}
        certificate = self.record.get("certificates", {}).get(module)
        if rounded_from is not None:
            row = {
                "shape": row["shape"],
                "requantized_from": str(rounded_from.spec),
                "requantization_error": distances(new, rounded_from)["weight_error"],
            }
        if rounded_from is not None and certificate:
            # The weight that the codes were made from is not here; its name is.
            named = {key: certificate[key] for key in ("made_of",) if key in certificate}
            certificate = certify(new, None) | named
        row |= {"spec": str(new.spec), "bits_per_weight": stored_bits(new, new.scales.dtype)}
        notes.setdefault("sites", {})[module] = row
        notes.setdefault(MARKS, {})[f"{module}.weight"] = mark(new)
        if certificate:
            notes.setdefault("certificates", {})[module] = certificate


def lossy(codec: str, lost: Mapping[str, str]) -> QlabError:
    """The error that lists modules by what they would lose."""
    by_reason: dict[str, list[str]] = {}
    for module, reason in lost.items():
        by_reason.setdefault(reason.removeprefix(f"{module}: "), []).append(module)
    parts = [f"{some(names)} ({reason})" for reason, names in by_reason.items()]
    return QlabError(
        f"{codec} cannot hold {'; '.join(parts)}; choose another codec, or a grid to round the "
        "weights to (--requantize)"
    )
