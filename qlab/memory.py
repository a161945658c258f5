"""How much memory a run will take, predicted from shapes alone."""

from collections.abc import Iterator, Mapping, Sequence

import psutil
import torch

from qlab.calibration import Data
from qlab.graph import Code, by_source
from qlab.model.skeleton import Skeleton
from qlab.sweep import BATCH_TOKENS, HELD, Inputs, in_order, runs_reference
from qlab.transform import Transform

# [k, k] matrices that a stage holds at once beside its statistics
SQUARES = {"gptq": 8, "awq_scale": 4, "aim_at_reference": 3}


def predict_memory(skeleton: Skeleton, codes: Mapping[str, Code], shapes: Mapping[str, torch.Size],
                   data: Data | None, recipe: Transform, inputs: Inputs, everywhere: bool,
                   experts_at_once: int | None = None) -> dict[str, int]:  # fmt: skip
    """Bytes at the widest moment of the run, by what holds them: entering the first block, copying what surrounds the
    blocks, or observing, solving and leaving the widest block."""
    process = {"process": psutil.Process().memory_info().rss}
    checkpoint, size = skeleton.checkpoint, skeleton.dtype.itemsize
    embedding = skeleton.model.get_input_embeddings().get_parameter("weight")
    outside = [shape.numel() * dtype.itemsize for shape, dtype in map(checkpoint.shape_and_dtype, skeleton.outside_names())]
    rounded = [shape for name, shape in shapes.items() if not name.startswith(tuple(f"{path}." for path in codes))]
    solver = 5 * 4 * max((shape.numel() for shape in rounded), default=0)
    moments = [process | {"embeddings and head": sum(outside), "solver": solver}]
    if data is not None:
        moments.append(process | {"embeddings": embedding.numel() * size,
                                  "carry": size * data.count * embedding.shape[-1]})  # fmt: skip
    for path, code in codes.items():
        weights = [shapes[f"{path}.{site.path}"] for site in code.sites]
        block = sum(p.numel() for p in skeleton.blocks[path].parameters()) * size * (2 if runs_reference([recipe], inputs) else 1)
        held = _block_moments(code, weights, size, data, recipe, inputs, everywhere, experts_at_once)
        moments += [process | {"block": block} | parts for parts in held]
    return max(moments, key=lambda held: sum(held.values()))


def _block_moments(code: Code, weights: Sequence[torch.Size], size: int, data: Data | None,
                   recipe: Transform, inputs: Inputs, everywhere: bool, experts_at_once: int | None
                   ) -> Iterator[dict[str, int]]:  # fmt: skip
    """What is held beside the process and the block's own leaves, at the widest moments of the block."""
    statistics, square, waiting, ordered = 0, 0, 0, in_order(code, recipe, inputs, everywhere)
    matrices = [torch.Size(shape[-2:]).numel() for shape in weights]  # experts are solved one after the other
    if data is not None:
        firsts = [code.sites.index(sites[0]) for sites in by_source(code.sites).values()]
        seen = [min(weights[i][0], experts_at_once or weights[i][0]) if code.sites[i].route else 1 for i in firsts]
        states = [4 * weights[i][-1] ** 2 * n for i, n in zip(firsts, seen)]
        ks = [weights[i][-1] for i in firsts]
        copies = [(weights[i][0] if everywhere else s.choices) if s.route else 1 for i, s in enumerate(code.sites)]  # of a token
        hidden, widest = weights[0][-1], max(max(shape[-2:]) * rows for shape, rows in zip(weights, copies))
        tokens = min(max(BATCH_TOKENS, data.longest), data.count)  # one window at least
        # an attention holds some seven tensors of the hidden size, a feed-forward layer three of the widest
        activations = tokens * (size * (2 * hidden + max(5 * hidden, 3 * widest)) + (4 * max(ks) if size < 4 else 0))
        if any("second_moment" in stage.needs for stage in recipe):
            square = 4 * max(ks) ** 2
            statistics = (max(states) if ordered else sum(states)) + 2 * (max(states) - square)  # one lifted, one combined
        streams = 2 if runs_reference([recipe], inputs) else 1
        statistics *= streams  # the drift is as large as a second moment
        if ordered:  # the hidden states and the input of the widest source, of every batch
            waiting = min(HELD, streams * data.count * size * (hidden + max(weights[i][-1] * copies[i] for i in firsts)))
        yield {"statistics": statistics + 2 * square, "activations": activations, "waiting": waiting}
        yield {"codes": sum(map(torch.Size.numel, weights)), "waiting": waiting, "activations": activations + 2 * 4 * max(matrices)}
    moved, sizes = 0, {site.path: shape.numel() for site, shape in zip(code.sites, weights)}
    together = [sum(sizes[site.path] for site in sites) for sites in by_source(code.sites).values()]  # moved in fp32, then rounded
    for stage in recipe:
        moved += 4 * (max(together) if ordered else sum(together)) if stage.reparametrizes else 0
        rounded = 0 if stage.spec is None else sum(map(torch.Size.numel, weights))
        solver = (4 if size == 4 else 5) * 4 * max(matrices) + SQUARES.get(stage.name, 1) * square
        yield {"moved weights": moved, "codes": rounded, "statistics": statistics, "waiting": waiting, "solver": solver}
