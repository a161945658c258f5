"""Blocks as the first steps of a recipe made them, in a folder: what the steps behind go
on from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.graph import ModuleGraph
from qlab.algebra.transform import Transform
from qlab.driver.job import Job
from qlab.driver.ranks import Ranks
from qlab.driver.scan import begin, solved_blocks
from qlab.driver.segments import Solved, Solver
from qlab.driver.writing import same
from qlab.files.atomic import unwritable
from qlab.files.carry import Carry
from qlab.files.offload import scratch
from qlab.model.skeleton import Skeleton


def solved_in_order(
    skeleton: Skeleton,
    job: Job,
    experts_at_once: int | None = None,
    later: Transform = (),
    ranks: Ranks | None = None,
) -> Iterator[Solved]:
    """Every block before and after the steps of a job, in running order. One is in memory at a
    time; hidden states lie in a folder of their own (`Job.offload`). later: steps behind them,
    for whom targets are kept. ranks: those that solve them together (None: this process alone)."""
    solver = Solver(
        job=job.remaining, ranks=ranks or Ranks(), experts_at_once=experts_at_once, later=later
    )
    with scratch("states", job.offload) as folder:
        every = range(len(skeleton.blocks))
        keeper = Folder(Path(folder)) if solver.ranks.is_first else None
        scan = begin(skeleton, [solver], keeper, lambda carries: every)
        yield from solved_blocks(scan)


class Folder:
    """Hidden states between blocks in the files of a folder that nobody else writes to."""

    def __init__(self, path: Path):
        self.path = path

    def carry(
        self, stream: str, index: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
    ) -> Carry:
        """See `qlab.driver.scan.Keeper`."""
        name = f"{stream}-{index}"
        return Carry(self.path / name, shapes, dtype, name, _write)


def _write(path: Path, fill: Any) -> None:
    with unwritable(path):
        fill(path)


# what a block holds as tensors; its operations at run time stay in memory
HELD = ("params", "targets", "supports", "outers")


@dataclass(frozen=True)
class _Shell:
    """A block without its tensors. leaves: the tensors' places, and whatever else stands among
    them. unchanged: the leaves that no file holds and no step changed."""

    graph: ModuleGraph
    leaves: Sequence[Any]
    form: pytree.TreeSpec
    unchanged: frozenset[str]


class Kept:
    """Solved blocks in the files of a folder that lives as long as this does. recipe: the steps
    that made them. offload: as of a job."""

    def __init__(self, recipe: Transform, offload: str | Path | None = None) -> None:
        self.recipe = recipe
        self._folder = scratch("kept", offload)
        self._shells: dict[str, _Shell] = {}

    def put(self, skeleton: Skeleton, block: Solved) -> None:
        """Keep a block."""
        graph = block.after
        leaves, form = pytree.tree_flatten({name: dict(getattr(graph, name)) for name in HELD})
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        with unwritable(self._file(graph.path)):
            torch.save([t.detach().cpu().contiguous() for t in tensors], self._file(graph.path))
        in_files, before = skeleton.names.block_names(graph.path), block.before.params
        unchanged = {
            name
            for name, leaf in graph.params.items()
            if name not in in_files and same(leaf, before.get(name))
        }
        self._shells[graph.path] = _Shell(
            graph=replace(graph, params={}, targets={}, supports={}, outers={}),
            leaves=[None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves],
            form=form,
            unchanged=frozenset(unchanged),
        )

    def block(self, path: str, device: torch.device | str = "cpu") -> ModuleGraph:
        """A block as it was solved. Its tensors are read when they are used."""
        shell = self._shells[path]
        tensors = iter(torch.load(self._file(path), mmap=True, weights_only=True))
        leaves = [next(tensors).to(device) if leaf is None else leaf[0] for leaf in shell.leaves]
        return replace(shell.graph, **pytree.tree_unflatten(leaves, shell.form))

    def unchanged(self, graph: ModuleGraph) -> Mapping[str, Any]:
        """The leaves of a kept block that no file holds and no step changed."""
        return {name: graph.params[name] for name in self._shells[graph.path].unchanged}

    def _file(self, path: str) -> Path:
        return Path(self._folder.name) / path
