"""The pass that makes compiled graphs run the fused kernels.

Three rewrites before Inductor's own post-grad passes, on nodes alone, since the operators are
opaque to every other pass:

    mm(x, dequantize(w).T), addmm(b, x, dequantize(w).T)   ->  int4_mm(x, w) [+ b]
    bmm(x, dequantize(w).T for every batch)                ->  the same, of all batches' rows
    mm, bmm(dequantize(w), x)                              ->  the same, of x's columns
    int4_mm(x, w) of a known number of tokens on a CPU     ->  what cpu.kind chooses for them:
                                                               aten's int4 product, which Inductor
                                                               has a template for, or mm(x,
                                                               dequantize(w).T) where it is
                                                               multiplied in x's dtype
    mm(x [1, k], W.T), W dense, on a CPU                   ->  sum_k x * W
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from qlab.algebra.products import product_dtype
from qlab.lowering.weights import cpu
from qlab.lowering.weights.nibbles import plane_width

aten, prims = torch.ops.aten, torch.ops.prims
TRANSPOSES = (aten.permute.default, aten.t.default, aten.transpose.int, aten.numpy_T.default)
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
VIEWS = (*TRANSPOSES, *RESHAPES, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim)
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)
# what the pass depends on, beside the config cache
SOURCES = (
    "compiler/rewrite.py",
    "weights/cpu.py",
    "weights/nibbles.py",
    "weights/ops.py",
    "../algebra/products.py",
    "../process/processor.py",
)


class Rewrite(CustomGraphPass):
    """The pass. fused, chosen, streamed: how many nodes each rewrite replaced in the last graph."""

    def __init__(self) -> None:
        self.fused, self.chosen, self.streamed = 0, 0, 0

    def __call__(self, graph: Any) -> None:
        self.fused = fuse(graph)
        self.chosen = choose(graph)
        self.streamed = stream(graph)

    def uuid(self) -> bytes:
        """Changes with the pass, with the config cache, which it looks into while it runs, and with
        the CPU that it is asked about."""
        from qlab_kernels.cache import snapshot_hash

        machine = cpu.problem(1, torch.bfloat16, False, 64, 64, 64, False)
        digest = hashlib.sha256(f"{snapshot_hash()} {machine.cc} {machine.device}".encode())
        for name in SOURCES:
            digest.update((Path(__file__).parents[1] / name).read_bytes())
        return digest.digest()


def fuse(graph: Any) -> int:
    """Replace products with a dequantized weight; the number of them."""
    found = 0
    for node in [
        n for target in PRODUCTS for n in graph.find_nodes(op="call_function", target=target)
    ]:
        bias, x, w = node.args if node.target is aten.addmm.default else (None, *node.args)
        dequantized, columns = _dequantized(w, transposed=True), False
        if dequantized is None and bias is None:  # W @ x: what is multiplied stands in columns
            dequantized, columns, x, w = _dequantized(x, transposed=False), True, w, x
        if dequantized is None or node.kwargs:  # factors of addmm, which rounds once after them
            continue
        words, scales, zeros, n, k, group, count, layout = dequantized.args
        with graph.inserting_before(node):
            batch = [_size(graph, x, 0)] if node.target is aten.bmm.default else []
            x = _turned(graph, x) if columns else x
            m = _size(graph, x, -2) if batch else None
            rows = _call(graph, aten.reshape.default, (x, [-1, k])) if batch else x
            new = _call(
                graph,
                torch.ops.qlab.int4_mm.default,
                (rows, words, scales, zeros, None, n, group, count, layout),
            )
            if bias is not None:
                new = _call(graph, aten.add.Tensor, (new, bias))
            if batch:
                new = _call(graph, aten.reshape.default, (new, [*batch, m, n]))
            if columns:
                new = _contiguous(graph, _turned(graph, new))
        _replace(graph, node, new)
        while w is not None and not w.users:
            w, dead = None if w is dequantized else w.args[0], w
            graph.erase_node(dead)
        found += 1
    return found


def _dequantized(w: Any, transposed: bool) -> Any:
    """The dequantize node whose W [n, k] `w` is a view of, itself or as W.T [k, n], or one of them
    b times; else None.

    Which view that is, is asked of a tensor without data that has gone the same way.
    """
    way: list[Any] = []
    source = w
    while getattr(source, "target", None) in VIEWS:
        way, source = [source, *way], source.args[0]
    if getattr(source, "target", None) is not torch.ops.qlab.dequantize.default:
        return None
    n, k = source.args[3:5]
    probe = torch.empty(n, k, dtype=torch.float32, device="meta")
    for view in way:
        args = torch.utils._pytree.tree_map(
            lambda a: 2 if hasattr(a, "op") else a, view.args[1:]
        )  # a number known at run time
        try:
            probe = probe.view(*args) if view.target in RESHAPES else view.target(probe, *args)
        except RuntimeError:  # no view of these strides, but a copy
            return None
    *batch, first, second = zip(probe.shape, probe.stride())
    as_is = all(size == 1 or stride == 0 for size, stride in batch)
    wanted = [(k, 1), (n, k)] if transposed else [(n, k), (k, 1)]
    same = all(
        size == known and (size == 1 or stride == own)
        for (size, stride), (known, own) in zip((first, second), wanted)
    )
    return source if as_is and same else None


def _turned(graph: Any, x: Any) -> Any:
    return _call(graph, aten.permute.default, (x, [1, 0] if x.meta["val"].ndim == 2 else [0, 2, 1]))


def _size(graph: Any, x: Any, axis: int) -> Any:
    size = x.meta["val"].shape[axis]
    return size if isinstance(size, int) else _call(graph, aten.sym_size.int, (x, axis))


def _same_axes(w: Any) -> bool:
    if w.target is aten.permute.default:
        return [d % 2 for d in w.args[1]] != [1, 0]
    return w.target is aten.transpose.int and w.args[1] % 2 == w.args[2] % 2


def choose(graph: Any) -> int:
    """On a CPU, write out the products whose number of tokens is known when they are compiled; the
    number of them."""
    found = 0
    for node in graph.find_nodes(op="call_function", target=torch.ops.qlab.int4_mm.default):
        x, words, scales, zeros, dense, n, group, count, layout = node.args
        (m, k), (rows, half) = x.meta["val"].shape, words.meta["val"].shape[:2]
        if (
            words.meta["val"].device.type != "cpu"
            or not isinstance(m, int)
            or m == 0
            or x.meta["val"].stride(1) > 1
        ):
            continue  # what stands in columns is left to the operator
        cpu.check(layout)
        kind = cpu.kind(
            m, x.meta["val"].dtype, dense is not None, rows, 2 * half, group, zeros is not None
        )
        if kind == "dense" and product_dtype(x.meta["val"]) != x.meta["val"].dtype:
            continue  # and so are copies in another dtype, which freezing would keep
        with graph.inserting_before(node):
            if kind == "int4pack":
                new = _call(
                    graph,
                    aten._weight_int4pack_mm_for_cpu.default,
                    (_spread(graph, x, k, count), words, group, scales),
                )
                if rows != n:
                    new = _contiguous(graph, _call(graph, aten.slice.Tensor, (new, 1, 0, n)))
            else:
                W = dense or _call(
                    graph,
                    torch.ops.qlab.dequantize.default,
                    (words, scales, zeros, n, k, group, count, layout),
                )
                new = _call(
                    graph, aten.mm.default, (x, _call(graph, aten.permute.default, (W, [1, 0])))
                )
        _replace(graph, node, new)
        found += 1
    return found


def stream(graph: Any) -> int:
    """On a CPU, write a bfloat16 product of one token with a dense weight as a sum, which is read
    at the memory's speed.

    mm(x [1, k], W.T) = sum_k x * W in fp32. The library's product of one row takes twice the time,
    and an unquantized head is as large as all quantized weights of a small model.
    """
    found = 0
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        x, w = node.args
        value = x.meta["val"]
        if (
            getattr(w, "target", None) not in TRANSPOSES
            or _same_axes(w)
            or value.shape[0] != 1
            or value.dtype != torch.bfloat16
        ):
            continue
        W = w.args[0]
        if (
            value.device.type != "cpu"
            or W.op == "call_function"
            or not W.meta["val"].is_contiguous()
        ):
            continue
        with graph.inserting_before(node):
            # a view by strides is of memory: the compiler writes x there once, which it would else
            # compute anew for every row
            x = _call(
                graph,
                aten.as_strided.default,
                (_contiguous(graph, x), list(value.shape), [value.shape[1], 1]),
            )
            wide = [
                _call(graph, prims.convert_element_type.default, (t, torch.float32)) for t in (x, W)
            ]
            sums = _call(
                graph, aten.sum.dim_IntList, (_call(graph, aten.mul.Tensor, tuple(wide)), [1])
            )
            rounded = _call(graph, prims.convert_element_type.default, (sums, torch.bfloat16))
            new = _call(graph, aten.unsqueeze.default, (rounded, 0))
        _replace(graph, node, new)
        found += 1
    return found


def _spread(graph: Any, x: Any, k: int, count: int) -> Any:
    """nibbles.spread in a graph."""
    if plane_width(k) != k:
        x = _call(graph, aten.constant_pad_nd.default, (x, [0, plane_width(k) - k], 0.0))
    return _contiguous(graph, x) if count == 1 else _call(graph, aten.cat.default, ([x, x], 1))


def _contiguous(graph: Any, x: Any) -> Any:
    """What aten's kernel asks of its input, and what whoever compiled the graph was promised of the
    output."""
    if x.meta["val"].is_contiguous():
        return x
    return _call(graph, aten.clone.default, (x,), memory_format=torch.contiguous_format)


def _call(graph: Any, target: Any, args: tuple, **kwargs: Any) -> Any:
    """A new node with the value that later passes read off it."""
    node = graph.call_function(target, args, kwargs)
    fakes = torch.utils._pytree.tree_map(
        lambda a: a.meta["val"] if hasattr(a, "meta") and hasattr(a, "op") else a, args
    )
    tensors = [t for t in torch.utils._pytree.tree_leaves(fakes) if isinstance(t, torch.Tensor)]
    with tensors[0].fake_mode:  # type: ignore[attr-defined]
        node.meta["val"] = target(*fakes, **kwargs)
    return node


def _replace(graph: Any, old: Any, new: Any) -> None:
    new.meta = {**old.meta, **new.meta}
    old.replace_all_uses_with(new)
    graph.erase_node(old)
