"""Quantizing without a model: safetensors and a configuration in, the same out, a few tensors in
memory at a time, or a single large one.

For methods that need no data. Which tensors are linear weights is read off their names: by default
every [o, k] `.weight` but those of embeddings, heads, norms and routers, which engines expect
unquantized. Fused experts are cut into the tensors for which engines look, where transformers has
names for them.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.bind import Bind
from qlab.algebra.compiled import expect
from qlab.algebra.graph import lone_weight
from qlab.algebra.qtensor import Leaf, QTensor, dense
from qlab.algebra.spec import Spec
from qlab.algebra.stats import name_of
from qlab.algebra.transform import Transform
from qlab.codecs import CODECS, Codec, codec_of_directories
from qlab.directories.by_ranks import made_together
from qlab.directories.chosen import KEPT, chosen_weights
from qlab.driver.admissible import Admission, Refusals, tile_misfit
from qlab.driver.job import CODEC
from qlab.driver.pieces import put_together
from qlab.driver.ranks import Ranks, refuse_unlike, together
from qlab.driver.report import PeakMemory, describe, known_distances, site_rows
from qlab.driver.result import Written
from qlab.driver.siblings import Siblings
from qlab.driver.solve import solve_alone
from qlab.errors import QlabError
from qlab.files.certificate import distances, fingerprint
from qlab.files.checkpoint import Checkpoint, open_checkpoint
from qlab.files.hashed import HashedFiles
from qlab.files.parts import Parts
from qlab.files.place import place, refuse_early
from qlab.files.readback import MARKS, refuse_misencoded
from qlab.files.record import recorded, versions, written
from qlab.files.segments import Segments
from qlab.files.shardwise import Notes, leaves_by_file, rewrite_file, rewrite_files, sizes_by_file
from qlab.files.writer import Writer
from qlab.model.modules import Modules
from qlab.process.shown import size
from qlab.process.surroundings import undisturbed


@dataclass(frozen=True, repr=False, kw_only=True)
class Rewritten(Written):
    """A directory quantized without its model: the rows of its report, and what the run cost.

    seconds: of the whole run. peak_rss_bytes: the peak of the process's memory.
    """

    seconds: float
    peak_rss_bytes: int

    def summary(self) -> dict[str, str]:
        """The facts that are printed, which leave out the sites."""
        return {
            "directory": str(self.path),
            "weights": f"{len(self.sites)} quantized, {self.bits_per_weight:.3f} bits per weight",
            "cost": f"{self.seconds:.1f} s, peak {size(self.peak_rss_bytes)}",
        }

    def json(self) -> dict[str, Any]:
        """The result as plain data."""
        return {
            "path": str(self.path),
            "sites": dict(self.sites),
            "bits_per_weight": self.bits_per_weight,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
        }


@undisturbed
@torch.no_grad()
def quantize_files(
    model: Checkpoint | str | Path,
    recipe: Transform,
    out: str | Path,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = KEPT,
    codec: str = CODEC,
    target: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Rewritten:
    """Apply a recipe of data-free methods to the linear weights of a directory, also of
    architectures that transformers does not know. The ranks of an initialised process group make
    its files together.

    Weights that are stored as 8-bit floats are dequantized first, whether they are chosen or not.

    Args:
        model: A model directory, or what `open` returned for it.
        recipe: The stages, none of which observes activations.
        out: The directory to write.
        include: Globs over the names of modules in the files, or patterns "re:...". A weight is
            chosen where one of these matches and none of `exclude` does.
        exclude: Globs or patterns of the same kind. The default leaves out embeddings, heads, norms
            and routers.
        codec: The name of the format to write (`qlab.codecs.CODECS`).
        target: The name of the engine that is to load the directory (`qlab.codecs.engines`); None
            checks no engine's limits.
        overwrite: Whether to replace a directory of qlab's that is there.
        resume: Whether to continue a run that was interrupted.

    Returns:
        The directory with a row for each of its weights, and what the run cost.

    Raises:
        QlabError: A stage observes activations; a pattern matches no weight; a chosen weight
            belongs to no `nn.Linear` where transformers knows the architecture; the format cannot
            hold a weight, or the engine does not load it.

    Example:
        >>> import qlab
        >>> recipe = qlab.rtn(qlab.parse_spec("int8-g64"))
        >>> demo = qlab.open("demo")
        >>> made = qlab.quantize_files(demo, recipe, "demo-int8", include=["*.q_proj"])
        >>> list(made.sites)[0], made.bits_per_weight
        ('model.layers.0.self_attn.q_proj', 8.25)
    """
    started = time.perf_counter()
    with together("cpu") as ranks, PeakMemory() as peak:
        files = Files(
            model, recipe, out, include=include, exclude=exclude, codec=codec, target=target
        )
        if ranks.world > 1:
            asked = {"outputs": str(files.out), "engines": target, **files.identity}
            refuse_unlike(ranks, {"": {_SEEN.get(what, what): asked[what] for what in asked}})
        if ranks.is_first:
            refuse_early(files.out, overwrite, resume)
            with Writer(files.out, overwrite, resume) as writer:
                _write(files, writer, ranks)
        else:
            _write(files, None, ranks)
        sites = ranks.first(lambda: recorded(files.out)["sites"])
    return Rewritten(
        path=files.out,
        sites=sites,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak.bytes,
    )


# what identifies a run, as ranks that see another one are told
_SEEN = {"source": "models", "recipe": "recipes", "sites": "chosen weights", "codec": "formats"}


def _write(files: "Files", own_writer: Writer | None, ranks: Ranks) -> None:
    """Write what is lacking, by all ranks. own_writer: of rank 0; None on others."""
    if own_writer is not None:
        own_writer.begin(files.identity, files.count, files.model.path, source=files.source)
    if ranks.first(lambda: own_writer is not None and own_writer.finished):
        return
    with ExitStack() as stack:
        if own_writer is not None:
            stack.enter_context(own_writer.refusing())
        if ranks.world == 1 and own_writer is not None:
            leaves = files.leaves
            rewrite_files(files.model, own_writer, leaves, "quantizing", leaves.codec)
        else:
            made_together(files.make, sizes_by_file(files.model), files.source, own_writer, ranks)
    if own_writer is not None:
        files.end(own_writer)
    ranks.told(None)  # the others wait until all is in place


class Files:
    """The files of a directory under a recipe, each of which is rewritten by itself: `Pieces` of a
    run.

    Args:
        model: See `quantize_files`, as all others.
        recipe: The stages.
        out: The directory to write.
        include: Globs of the modules that are chosen.
        exclude: Globs of those that are not.
        codec: The format.
        target: The engine.
    """

    sha256: str | None = None  # no statistics are kept

    @undisturbed
    @torch.no_grad()
    def __init__(
        self,
        model: Checkpoint | str | Path,
        recipe: Transform,
        out: str | Path,
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = KEPT,
        codec: str = CODEC,
        target: str | None = None,
    ) -> None:
        opened = Modules(model if isinstance(model, Checkpoint) else open_checkpoint(model))
        opened.refuse_unheld()
        modules = opened.experts_apart()
        files = HashedFiles(modules.checkpoint.path, modules.checkpoint.stored)
        self.source = files
        source = self.model = replace(modules.checkpoint, reader=files.read)
        _refuse_recipe(recipe, codec)
        self.out = place(out, source.path, set(source.files.values()))
        specs = chosen_weights(modules, recipe, include, exclude)
        transposed = modules.transposed() & specs.keys()
        _check(source, specs, transposed, Admission(codec=codec, dtype=source.dtype, target=target))
        self.config = _config(modules, specs, CODECS[codec])
        self.identity = _job(source, recipe, specs, codec)
        self.count = len(leaves_by_file(source))
        expect(sum(_shape(source, module, False).numel() for module in specs))
        self.leaves = _Leaves(
            source=source,
            recipe=recipe,
            codec=CODECS[codec],
            siblings=Siblings(specs, lambda module: _dense_weight(source, module)),
            transposed=transposed,
        )

    @undisturbed
    @torch.no_grad()
    def make(self, parts: Segments, index: int) -> None:
        """See `qlab.driver.pieces.Pieces`."""
        rewrite_file(self.model, parts, index, self.leaves, self.leaves.codec)

    @undisturbed
    @torch.no_grad()
    def finish(self, parts: Parts, out: Path, overwrite: bool) -> list[int]:
        """See `qlab.driver.pieces.Pieces`."""
        return put_together(self, parts, self.out, overwrite, self.end)

    def end(self, writer: Writer) -> None:
        """Write what stands beside the files, and put the directory in place."""
        files = written(self.config, writer.hashed_job(), writer.notes())
        writer.finish(files, self.model.path)


def _job(
    source: Checkpoint, recipe: Transform, specs: Collection[str], codec: str
) -> dict[str, Any]:
    """What identifies a run. specs: the chosen modules."""
    return {
        "source": source.fingerprint(),
        "recipe": describe(recipe),
        "sites": sorted(specs),
        "codec": codec,
        "versions": versions(),
    }


def _refuse_recipe(recipe: Transform, codec: str) -> None:
    """Refuse an unknown format, and stages for which the model would have to run."""
    codec_of_directories(codec)
    needs = sorted({name_of(need) for stage in recipe for need in stage.needs})
    if needs:
        raise QlabError(
            f"the recipe observes {', '.join(needs)}, for which the model has to run; use a "
            "data-free method such as rtn"
        )
    measuring = [stage.name for stage in recipe if isinstance(stage, Bind)]
    if measuring:
        raise QlabError(
            f"the bind {measuring[0]!r} measures a model, for which the model has to run; quantize "
            "with the model, or leave it away"
        )
    online = [stage.name for stage in recipe if stage.view.operations]
    if online:
        raise QlabError(
            f"the stage {online[0]!r} puts operations on inputs, of which nobody knows anything "
            "without a model; quantize with the model, or leave it away"
        )


def _check(
    source: Checkpoint,
    specs: Mapping[str, Spec],
    transposed: Collection[str],
    admission: Admission,
) -> None:
    """Refuse weights that the format cannot hold or that the engine does not load."""
    refusals = Refusals()
    for module, spec in specs.items():
        shape = _shape(source, module, module in transposed)
        reason = tile_misfit(spec, shape) or admission.refusal(
            spec, shape, transposed=module in transposed, expert=".experts." in module
        )
        refusals.add(reason, module)
    refusals.raise_first()
    admission.refuse_several(specs, "weights")


def _shape(source: Checkpoint, module: str, transposed: bool) -> torch.Size:
    """[o, k] of a module's weight."""
    name = f"{module}.weight"
    # the tensors of a 2:4 weight have other names
    shape = source.stored[name].shape if name in source.stored else source.leaf(name).shape
    return torch.Size(shape[::-1] if transposed else shape)


def _config(modules: Modules, specs: Mapping[str, Spec], codec: Codec) -> dict[str, Any]:
    """The config.json of the quantized directory."""
    names = {**modules.linears(), **{module: module for module in specs}}
    quantization = codec.config({name: specs.get(module) for name, module in names.items()})
    return {**modules.untied_where_apart(specs), "quantization_config": quantization}


@dataclass(frozen=True, kw_only=True)
class _Leaves:
    """The leaves of a directory under a recipe.

    siblings: the chosen modules and their global scales. transposed: those of them whose weight is
    stored as [k, o].
    """

    source: Checkpoint
    recipe: Transform
    codec: Codec
    siblings: Siblings
    transposed: Collection[str]

    def read(self, name: str) -> tuple[Leaf, Tensor | None]:
        """A leaf, and the global scale that it is to have."""
        module = name.rpartition(".")[0]
        outer = self.siblings.outer(module) if self._is_chosen(name) else None
        return self.source.leaf(name), outer

    def _is_chosen(self, name: str) -> bool:
        module = name.rpartition(".")[0]
        return module in self.siblings and name == f"{module}.weight"

    @undisturbed
    @torch.no_grad()
    def rewritten(
        self, name: str, read: tuple[Leaf, Tensor | None], notes: Notes
    ) -> dict[str, Tensor]:
        """The tensors of one leaf: quantized where it is chosen, else dense."""
        (leaf, outer), module = read, name.rpartition(".")[0]
        weight = dense(leaf, self.source.dtype) if isinstance(leaf, QTensor) else leaf
        if not self._is_chosen(name):
            return {name: weight}
        transposed = module in self.transposed
        W_ok = weight.mT if transposed else weight
        solved = solve_alone(lone_weight(module, W_ok, self.source.dtype, outer=outer), self.recipe)
        quantized = solved.params["weight"]
        assert isinstance(quantized, QTensor)  # a stage rounds every chosen weight
        tensors = self.codec.encode(module, quantized)
        marks = refuse_misencoded(name, tensors, quantized, self.codec)
        rows = site_rows(solved)
        (site,) = solved.code.sites
        # of codes, the weight in the files is another than the one that was rounded
        known = known_distances(self.recipe, solved, site) if isinstance(leaf, Tensor) else None
        certificate: dict[str, Any] = known or distances(quantized, W_ok if transposed else leaf)
        certificate["hash"] = fingerprint(quantized)
        for section, of_leaf in (
            ("sites", rows),
            ("certificates", {module: certificate}),
            (MARKS, marks),
        ):
            notes.setdefault(section, {}).update(of_leaf)
        return tensors


def _dense_weight(source: Checkpoint, module: str) -> Tensor:
    return dense(source.leaf(f"{module}.weight"), torch.float32)
