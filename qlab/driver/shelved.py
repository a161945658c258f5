"""Statistics of the unquantized model that are kept in a folder, so that another recipe starts at
its solver."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.graph import ModuleGraph
from qlab.algebra.stats import Stats
from qlab.driver.batches import batch_tokens, in_batches
from qlab.driver.job import Job
from qlab.driver.observe import Division, Key, Observe
from qlab.driver.ranks import Ranks
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.files.directory import CONFIG
from qlab.files.record import versions
from qlab.files.statistics import Shelf
from qlab.files.tensors import bytes_of
from qlab.model.device import name_of
from qlab.model.skeleton import Skeleton

FORM = 1  # counts up when qlab computes other numbers for the same identity


class Known:
    """A model whose bytes are known by their hash.

    Args:
        model: The model, whose files are read for it.
        sha256: Their hash where somebody made it; None to make it.
        ranks: Those that know it together, of which rank 0 makes the hash (None: this process
            alone).
    """

    def __init__(
        self, model: Checkpoint, sha256: str | None = None, ranks: Ranks | None = None
    ) -> None:
        self.model, self._stamps = model, stamps(model)
        self.sha256 = (ranks or Ranks()).first(model.sha256) if sha256 is None else sha256
        self.refuse_changed()

    def refuse_changed(self) -> None:
        """Refuse a model that is another by now."""
        if stamps(self.model) != self._stamps:
            raise QlabError(
                f"{self.model.path} changed while it was read, and its statistics would be of two "
                "models; start again when nobody writes to it"
            )


def stamps(model: Checkpoint) -> dict[str, list[int]]:
    """The size and the time of the last change of each file of a model, by its name."""
    files = sorted({*model.files.values(), model.path / CONFIG})
    states = {file.name: file.stat() for file in files}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}


@dataclass(frozen=True, kw_only=True)
class Shelved:
    """The statistics of one pass over the unquantized model: taken from a shelf, or put there.

    shelf: the folder. known: the model. of: what decides the numbers of all of them. about: where
    they come from, for people. device: where the model is run.
    """

    shelf: Shelf
    known: Known
    of: Mapping[str, Any]
    about: Mapping[str, Any]
    device: torch.device

    def observing(self, graph: ModuleGraph, observe: Observe, division: Division) -> Observe:
        """`observe`, which is asked for what is not on the shelf. Only of the unquantized block is
        anything kept, and only statistics that have a name in qlab: another's may change."""

        def observe_shelved(now: ModuleGraph, keys: set[Key]) -> Stats:
            if now.params is not graph.params or now.inserts != graph.inserts:
                return observe(now, keys)
            identities = {
                key: {**self.of, "block": graph.path, "wire": key[0], "statistic": key[1]}
                for key in keys
                if isinstance(key[1], str)
            }
            # in one order: ranks do it together
            kept = sorted(identities, key=str)
            states = {
                key: division.taken(now, key, partial(self._get, identities[key])) for key in kept
            }
            stats = {key: state for key, state in states.items() if state is not None}
            unseen = keys - stats.keys()
            if not unseen:
                return stats
            seen = observe(now, unseen)
            self.known.refuse_changed()
            for key in kept:
                if key in unseen:
                    division.keep(seen[key], partial(self._put, identities[key]))
            return {**stats, **seen}

        return observe_shelved

    def _get(self, of: Mapping[str, Any], owns: Callable[[int], bool]) -> Any:
        state = self.shelf.get(of, owns)
        return pytree.tree_map_only(Tensor, lambda t: t.to(self.device), state)

    def _put(self, of: Mapping[str, Any], state: Any) -> None:
        self.shelf.put(of, state, self.about)


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """A folder in which statistics of a model are kept."""

    shelf: Shelf
    known: Known

    def of(self, jobs: Sequence[Job], skeleton: Skeleton, ranks: Ranks) -> Shelved | None:
        """The statistics that jobs share which differ in their recipes alone; None where they
        observe nothing. ranks: those that do the jobs, for whom rank 0 says what they are of."""
        first = jobs[0]
        data = next((job.observed for job in jobs if job.observed is not None), None)
        if data is None:
            return None
        batches = in_batches(data, batch_tokens([job.recipe for job in jobs]))
        of = {
            "form": FORM,
            "model": self.known.sha256,
            "data": _digest(batches),
            "inputs": first.inputs,
            "calibrate_all_experts": first.calibrate_all_experts,
            "dtype": str(skeleton.dtype),
            "device": name_of(skeleton.device),
            "versions": versions(),
        }
        about = {
            "model": str(first.model.path.resolve()),
            "data": data.describe(),
            "tokens": data.count,
        }
        return Shelved(
            shelf=self.shelf,
            known=self.known,
            of=ranks.told(of),
            about=ranks.told(about),
            device=skeleton.device,
        )


def refuse_unkept(jobs: Sequence[Job]) -> None:
    """Refuse jobs of which no statistic can be kept for others."""
    if jobs[0].inputs != "reference":
        raise QlabError(
            "statistics are kept of the unquantized model, and with inputs='quantized' they are of "
            "blocks behind those that a recipe rounded; choose inputs='reference' "
            "(--inputs reference)"
        )
    if all(job.observed is None for job in jobs):
        raise QlabError(
            "no statistics would be kept, since this recipe observes nothing; leave "
            "keep_statistics (--keep-statistics) out, or choose a method that is calibrated"
        )


def _digest(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """sha256 of all that the model is called with, batch by batch."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(bytes_of(tensor))
    return digest.hexdigest()
