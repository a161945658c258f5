"""How much memory a run will take, predicted from shapes alone."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil
import torch

from qlab.algebra.graph import Code, aten, by_source, open_symbols
from qlab.algebra.transform import Transform
from qlab.data.calibration import Data
from qlab.driver.batches import BATCH_TOKENS
from qlab.driver.lossless import claims
from qlab.driver.observe import Inputs, runs_reference
from qlab.driver.solve import HELD, in_order
from qlab.model.skeleton import Skeleton


def predict_memory(
    skeleton: Skeleton,
    codes: Mapping[str, Code],
    shapes: Mapping[str, torch.Size],
    data: Data | None,
    recipe: Transform,
    inputs: Inputs,
    calibrate_all_experts: bool,
    experts_at_once: int | None = None,
) -> dict[str, int]:
    """Bytes at the widest moment of the run, by what holds them: entering the first block, copying
    what surrounds the blocks, or observing, solving and leaving the widest block."""
    process = {"process": psutil.Process().memory_info().rss}
    checkpoint, size = skeleton.checkpoint, skeleton.dtype.itemsize
    embedding = skeleton.model.get_input_embeddings().get_parameter("weight")
    outside = [
        shape.numel() * dtype.itemsize
        for shape, dtype in map(checkpoint.shape_and_dtype, skeleton.outside_names())
    ]
    rounded = [
        shape
        for name, shape in shapes.items()
        if not name.startswith(tuple(f"{path}." for path in codes))
    ]
    solver = 5 * 4 * max((shape.numel() for shape in rounded), default=0)
    moments = [process | {"embeddings and head": sum(outside), "solver": solver}]
    if data is not None:
        moments.append(
            process
            | {
                "embeddings": embedding.numel() * size,
                "carry": size * data.count * embedding.shape[-1],
            }
        )
    for path, code in codes.items():
        if not code.sites:  # nothing is observed or solved, as where all of a block stays as it is
            continue
        weights = [shapes[f"{path}.{site.path}"] for site in code.sites]
        block = _block_bytes(skeleton, path) * (2 if runs_reference([recipe], inputs) else 1)
        held = _block_moments(
            code, weights, size, data, recipe, inputs, calibrate_all_experts, experts_at_once
        )
        moments += [process | {"block": block} | parts for parts in held]
    return max(moments, key=lambda held: sum(held.values()))


def _block_bytes(skeleton: Skeleton, path: str) -> int:
    """Its leaves lie as the files hold them; what is narrower than the activations is widened where
    it is used."""
    widths = {
        name: max(
            skeleton.dtype.itemsize, *(skeleton.stored_dtype(piece).itemsize for piece in pieces)
        )
        for name, pieces in skeleton.block_names(path).items()
    }
    return sum(p.numel() * widths[name] for name, p in skeleton.blocks[path].named_parameters())


def score_bytes(code: Code, length: int, rows: int) -> int:
    """The most bytes of values that hold a number for every pair of tokens (attention written out,
    as with softcapping or alibi) at once, for `rows` windows of `length`: a walk through the
    program, where each lives until its last use."""
    inputs = [
        n.meta["val"]
        for n in code.graph.nodes
        if n.op == "placeholder" and n.name not in code.params
    ]
    hidden = next(t for t in inputs if t.ndim == 3 and t.is_floating_point())
    sizes = {
        symbol: size
        for open_, size in zip(map(open_symbols, hidden.shape), (rows, length))
        for symbol in open_
    }
    along = open_symbols(hidden.shape[1])

    def number(d: Any) -> int:
        known = open_symbols(d) and open_symbols(d) <= sizes.keys()
        return (
            int(d.node.expr.subs(sizes))
            if known
            else int(d.node.hint)
            if open_symbols(d)
            else int(d)
        )

    def pairs(t: Any) -> int:
        """Bytes of such a value, else 0."""
        both = (
            isinstance(t, torch.Tensor) and sum(bool(along & open_symbols(d)) for d in t.shape) > 1
        )
        return math.prod(map(number, t.shape)) * t.dtype.itemsize if both else 0

    owner: dict[Any, Any] = {}  # node -> the node whose memory its value is a view of
    last: dict[Any, int] = {}
    nodes = [n for n in code.graph.nodes if n.op == "call_function"]
    for i, n in enumerate(nodes):
        owner[n] = owner.get(n.args[0], n.args[0]) if _is_view(n) else n
        last |= {owner.get(a, a): i for a in n.all_input_nodes}
    held, most, alive = 0, 0, dict[Any, int]()
    for i, n in enumerate(nodes):
        if owner[n] is n and (size := pairs(n.meta.get("val"))):
            alive[n] = size
            held += size
            widened = (
                n.target is aten.softmax.int and n.args[0].meta["val"].dtype != n.meta["val"].dtype
            )
            most = max(
                most, held + (size if widened else 0)
            )  # the kernel makes a copy in the wider dtype first
        held -= sum(
            alive.pop(done) for done in [a for a in alive if last.get(a, i) <= i and a is not n]
        )
    return most


def _is_view(n: Any) -> bool:
    """Of its first argument; nothing is dropped out of a model that is quantized."""
    schema = getattr(n.target, "_schema", None)
    values = [a.meta["val"] if hasattr(a, "meta") else a for a in n.args[:1]] + [n.meta.get("val")]
    aliases = schema is not None and any(r.alias_info is not None for r in schema.returns[:1])
    same = (
        aliases
        and all(isinstance(t, torch.Tensor) for t in values)
        and values[0].dtype == values[1].dtype
    )
    return bool(same) or n.target is aten.dropout.default


def _block_moments(
    code: Code,
    weights: Sequence[torch.Size],
    size: int,
    data: Data | None,
    recipe: Transform,
    inputs: Inputs,
    calibrate_all_experts: bool,
    experts_at_once: int | None,
) -> Iterator[dict[str, int]]:
    """What is held beside the process and the block's own leaves, at the widest moments of the
    block."""
    statistics, square, waiting, ordered = (
        0,
        0,
        0,
        in_order(code, recipe, inputs, calibrate_all_experts),
    )
    matrices = [
        torch.Size(shape[-2:]).numel() for shape in weights
    ]  # experts are solved one after the other
    if data is not None:
        firsts = [code.sites.index(sites[0]) for sites in by_source(code.sites).values()]
        seen = [
            min(weights[i][0], experts_at_once or weights[i][0]) if code.sites[i].route else 1
            for i in firsts
        ]
        states = [4 * weights[i][-1] ** 2 * n for i, n in zip(firsts, seen)]
        ks = [weights[i][-1] for i in firsts]
        copies = [
            (weights[i][0] if calibrate_all_experts else s.choices) if s.route else 1
            for i, s in enumerate(code.sites)
        ]  # of a token
        hidden, widest = (
            weights[0][-1],
            max(max(shape[-2:]) * rows for shape, rows in zip(weights, copies)),
        )
        tokens = min(max(BATCH_TOKENS, data.longest), data.count)  # one window at least
        # an attention holds some seven tensors of the hidden size, a feed-forward layer three of
        # the widest
        activations = tokens * (
            size * (2 * hidden + max(5 * hidden, 3 * widest)) + (4 * max(ks) if size < 4 else 0)
        )
        scores = score_bytes(code, data.longest, max(1, tokens // data.longest))
        activations += scores
        if any("second_moment" in stage.needs for stage in recipe):
            square = 4 * max(ks) ** 2
            statistics = (max(states) if ordered else sum(states)) + 2 * (
                max(states) - square
            )  # one lifted, one combined
        streams = 2 if runs_reference([recipe], inputs) else 1
        statistics *= streams  # the drift is as large as a second moment
        if ordered:  # the hidden states and the input of the widest source, of every batch
            waiting = min(
                HELD,
                streams
                * data.count
                * size
                * (hidden + max(weights[i][-1] * copies[i] for i in firsts)),
            )
        yield {
            "statistics": statistics + 2 * square,
            "activations": activations,
            "waiting": waiting,
        }
        yield {
            "codes": sum(map(torch.Size.numel, weights)),
            "waiting": waiting,
            "activations": activations + 2 * 4 * max(matrices),
        }
        if size < 4 and any(map(claims, recipe)):  # a batch in float32 checks them
            wide = tokens * 4 * (2 * hidden + max(5 * hidden, 3 * widest)) + scores * 4 // size
            yield {"statistics": statistics, "activations": wide, "waiting": waiting}
    moved, sizes = 0, {site.path: shape.numel() for site, shape in zip(code.sites, weights)}
    together = [
        sum(sizes[site.path] for site in sites) for sites in by_source(code.sites).values()
    ]  # moved in fp32, then rounded
    for stage in recipe:
        moved += 4 * (max(together) if ordered else sum(together)) if stage.reparametrizes else 0
        rounded = 0 if stage.spec is None else sum(map(torch.Size.numel, weights))
        solver = 5 * 4 * max(matrices) + stage.workspace * square
        yield {
            "moved weights": moved,
            "codes": rounded,
            "statistics": statistics,
            "waiting": waiting,
            "solver": solver,
        }
