"""The end of a run: the directory is opened as readers open it, and computes what was computed.

While a block is in memory, the first one of every program is run on a few random hidden states in
float32, and some numbers of the result are noted: a probe. Before the directory is put in place,
the same block is loaded from it and has to give these numbers, and so have the embedding, the final
norm and the head.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.graph import ModuleGraph
from qlab.algebra.interpret import outputs_of
from qlab.algebra.qtensor import Leaf, dense
from qlab.algebra.random import generator
from qlab.algebra.spec import InputSpec, Spec
from qlab.codecs import Codec
from qlab.codecs.around import Rows
from qlab.driver.around import refuse_misread
from qlab.errors import Outage, QlabError
from qlab.files.checkpoint import Checkpoint, open_checkpoint
from qlab.model.calls import Call, State, windows_axis
from qlab.model.headers import refuse_missing
from qlab.model.loading import drop_outside, load_block, load_outside, put
from qlab.model.running import head
from qlab.model.skeleton import Skeleton

SECTION = "probes"  # of the notes of a segment; the finished record does not have it
ROWS, DIRECTIONS = 16, 8  # a probe holds so many tokens, each seen from so many random directions
CLOSE = 1e-3  # relative; the same numbers in the same arithmetic, perhaps on other threads


def probe(graph: ModuleGraph, call: Call) -> list[list[float]]:
    """What a block computes of random hidden states, in float32: some rows of everything that
    leaves it, each multiplied with a few random directions."""
    state = _random(call.entering, graph)
    leaving = call.leaving(state, outputs_of(graph, *call.inputs(state), wide=True))
    return [row for tensor in leaving if tensor.is_floating_point() for row in _seen(tensor)]


def probe_outside(
    skeleton: Skeleton, leaves: Iterable[tuple[str, Leaf]], call: Call, tokens: Sequence[int]
) -> list[list[float]]:
    """What the model computes around its blocks, as `probe` notes it: the embedding of a few
    tokens, and the logits of one window of random hidden states.

    Args:
        skeleton: The model.
        leaves: Those that are no longer the model's, by their names in it.
        call: What its last block is called with.
        tokens: (windows, tokens in each), of which that was made.
    """
    load_outside(skeleton, with_head=True)
    for name, leaf in leaves:
        put(skeleton.model, name, dense(leaf, skeleton.dtype).to(skeleton.device))
    embedding = skeleton.model.get_input_embeddings()
    rows = torch.arange(ROWS, device=skeleton.device) % len(embedding.get_parameter("weight"))
    # a few tokens, as without data, are run as they are; of more, one window
    windows = tokens[0] if tokens[0] * tokens[1] <= ROWS else 1
    shape = list(call.entering[0].shape)
    shape[windows_axis(call.entering[0], tokens)] = windows
    drawn = torch.randn(shape, generator=generator(0, "probe"), dtype=torch.float32)
    hidden = drawn.to(skeleton.device, skeleton.dtype)
    logits = head(skeleton, torch.zeros(windows, tokens[1], dtype=torch.long), hidden)
    numbers = [*_seen(embedding(rows)), *_seen(logits)]
    drop_outside(skeleton)
    return numbers


def _seen(tensor: Tensor) -> list[list[float]]:
    """Some rows of a tensor, each multiplied with a few random directions."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    chosen = rows[:: max(1, len(rows) // ROWS)][:ROWS].float().cpu()
    shape = chosen.shape[1], DIRECTIONS
    directions = torch.randn(shape, generator=generator(0, "directions"), dtype=torch.float32)
    return (chosen.nan_to_num() @ directions).tolist()


def as_held(graph: ModuleGraph) -> ModuleGraph:
    """The block with every unquantized leaf rounded to the dtype in which the files hold it."""

    def rounded(name: str, leaf: Any) -> Any:
        is_number = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(graph.stored_dtype(name)) if is_number else leaf

    return replace(graph, params={name: rounded(name, leaf) for name, leaf in graph.params.items()})


def refuse_unreadable(
    folder: Path,
    *,
    skeleton: Skeleton,
    specs: Mapping[str, Spec | None],
    inputs: Mapping[str, InputSpec | None],
    around: Rows,
    codec: Codec,
    probes: Mapping[str, list[list[float]]],
    calls: Mapping[str, Call],
    tokens: Sequence[int],
    outside: list[list[float]],
) -> None:
    """Refuse a complete directory that its readers would not take for what was computed.

    Args:
        folder: The directory, not yet in its place.
        skeleton: The model that was quantized.
        specs: Module of the files -> the spec of its weight.
        inputs: Module of the files -> how its inputs are rounded.
        around: Module of the files -> what else happens there at run time.
        codec: The format.
        probes: Path of a block -> its probe, made in memory.
        calls: Path of a block -> what it is called with.
        tokens: (windows, tokens in each), of which that was made.
        outside: The probe of what lies around the blocks, made in memory.
    """
    try:
        written = open_checkpoint(folder)
        _refuse_other_grids(written, specs, inputs)
        refuse_misread(written, around, codec)
        reader = Skeleton(written, skeleton.dtype, skeleton.device, model=skeleton.model)
        refuse_missing(reader.names)
        reader.programs = skeleton.programs  # of the same blocks
        for path, expected in probes.items():
            change = _change(probe(load_block(reader, path, calls[path]), calls[path]), expected)
            if not change <= CLOSE:  # NaN is no agreement
                raise QlabError(
                    f"{path} computes other numbers, by {change:.1e} of them, than it did in memory"
                )
        last = calls[list(skeleton.blocks)[-1]]
        change = _change(probe_outside(reader, (), last, tokens), outside)
        if not change <= CLOSE:
            raise QlabError(
                f"the embedding, final norm and head give other numbers, by {change:.1e} of them, "
                "than they did in memory"
            )
    except Outage:
        raise
    except QlabError as error:
        raise QlabError(
            f"what was written does not read back as the quantized model and is not put in place: "
            f"{error}; report this, and choose another --codec until it is mended"
        ) from error


def _refuse_other_grids(
    written: Checkpoint,
    specs: Mapping[str, Spec | None],
    inputs: Mapping[str, InputSpec | None],
) -> None:
    """Refuse a configuration that gives a weight, or the inputs of one, another grid."""
    for what, there, expected in (
        ("weights", written.quantized, specs),
        ("inputs", written.inputs, inputs),
    ):
        grids = {module: str(grid) for module, grid in expected.items() if grid is not None}
        for module in sorted({*grids, *there} & _modules(written)):
            here = str(there[module]) if module in there else "unquantized"
            if here != grids.get(module, "unquantized"):
                raise QlabError(
                    f"its config.json makes the {what} of {module} {here}, and they are "
                    f"{grids.get(module, 'unquantized')}"
                )


def _modules(written: Checkpoint) -> set[str]:
    """The modules of the files, whose names a configuration may spell in several ways."""
    return {name.rpartition(".")[0] for name in written.stored}


def _random(entering: State, graph: ModuleGraph) -> State:
    """A state of random numbers in float32, on the device of the block."""
    leaves = pytree.tree_leaves(dict(graph.params))
    device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))
    drawn = generator(0, "probe")
    return tuple(
        torch.randn(t.shape, generator=drawn, dtype=torch.float32).to(device)
        if t.is_floating_point()
        else torch.zeros(t.shape, dtype=t.dtype, device=device)
        for t in entering
    )


def _change(numbers: list[list[float]], expected: list[list[float]]) -> float:
    """The largest change of a row, relative to its size."""
    if len(numbers) != len(expected):
        return float("inf")
    new, old = (torch.tensor(rows, dtype=torch.float32) for rows in (numbers, expected))
    return float(((new - old).norm(dim=-1) / old.norm(dim=-1).clamp_min(1e-30)).max())
