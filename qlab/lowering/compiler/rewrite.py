"""The pass that makes compiled graphs run the fused kernels.

Rewrites before Inductor's own post-grad passes, on nodes alone, since the operators are
opaque to every other pass:

    mm(x, dequantize(w).T), addmm(b, x, dequantize(w).T)   ->  int4_mm(x, w) [+ b]
    bmm(x, dequantize(w).T for every batch)                ->  the same, of all batches' rows
    mm, bmm(dequantize(w), x)                              ->  the same, of x's columns
    int4_mm(x, w) of a known number of tokens on a CPU     ->  what cpu.kind chooses for them:
                                                               aten's int4 product, which Inductor
                                                               has a template for, or mm(x,
                                                               dequantize(w).T) where it is
                                                               multiplied in x's dtype
    int8_mm(x, w) of few tokens, on a CPU                  ->  aten's int8 product
    mm(x [1, k], W.T), W dense, on a CPU                   ->  sum_k x * W
    int4_int8_mm(x, w)                                     ->  the same without a gradient
    int4_int8_mm(x, v), int4_int8_mm(x, w)                 ->  one operator, which rounds x once
    one_token(q, k[at], v[at])                             ->  the same, of k and v in place
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from qlab.algebra.products import product_dtype
from qlab.lowering.compiler.bytes import choose_bytes
from qlab.lowering.compiler.gradients import drop_gradients
from qlab.lowering.compiler.joined import join
from qlab.lowering.compiler.nodes import call, contiguous, replace
from qlab.lowering.compiler.slots import read_slots
from qlab.lowering.weights import cpu
from qlab.lowering.weights.nibbles import plane_width
from qlab.lowering.weights.packed import Packed, unflattened

aten, prims = torch.ops.aten, torch.ops.prims
TRANSPOSES = (aten.permute.default, aten.t.default, aten.transpose.int, aten.numpy_T.default)
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
VIEWS = (*TRANSPOSES, *RESHAPES, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim)
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)
# what the pass depends on, beside the config cache
SOURCES = (
    "compiler/gradients.py",
    "compiler/bytes.py",
    "compiler/joined.py",
    "compiler/nodes.py",
    "compiler/rewrite.py",
    "compiler/slots.py",
    "weights/cpu.py",
    "weights/int8.py",
    "weights/nibbles.py",
    "weights/ops.py",
    "weights/packed.py",
    "../algebra/products.py",
    "../process/processor.py",
)


class Rewrite(CustomGraphPass):
    """The pass. fused, chosen, streamed, in_place: how many nodes each rewrite replaced in the last
    graph. joined: how many operators stand for several products there."""

    def __init__(self) -> None:
        self.fused, self.chosen, self.streamed, self.in_place, self.joined = 0, 0, 0, 0, 0

    def __call__(self, graph: Any) -> None:
        self.fused = fuse(graph)
        self.chosen = choose(graph) + choose_bytes(graph)
        self.streamed = stream(graph)
        self.in_place = read_slots(graph)
        drop_gradients(graph)
        self.joined = join(graph)

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
    nodes = [
        node for target in PRODUCTS for node in graph.find_nodes(op="call_function", target=target)
    ]
    return sum(_fused(graph, node) for node in nodes)


def _fused(graph: Any, node: Any) -> bool:
    """Replace one product, if it is one with a dequantized weight; whether it is."""
    bias, x, w = node.args if node.target is aten.addmm.default else (None, *node.args)
    source, in_columns = _dequantized(w, transposed=True), False
    if source is None and bias is None:  # W @ x, which multiplies the columns of x
        source, in_columns, x, w = _dequantized(x, transposed=False), True, w, x
    if source is None or node.kwargs:  # addmm with factors rounds once, after them
        return False
    with graph.inserting_before(node):
        new = _multiplied(graph, _turned(graph, x) if in_columns else x, unflattened(*source.args))
        if bias is not None:
            new = call(graph, aten.add.Tensor, (new, bias))
        if in_columns:
            new = contiguous(graph, _turned(graph, new))
    replace(graph, node, new)
    _erase_unused(graph, w, source)
    return True


def _multiplied(graph: Any, x: Any, packed: Packed) -> Any:
    """int4_mm of x [m, k], or of all rows of x [b, m, k]."""
    int4_mm = torch.ops.qlab.int4_mm.default
    if x.meta["val"].ndim == 2:
        return call(graph, int4_mm, packed.for_mm(x, None))
    sizes = [_size(graph, x, axis) for axis in (0, 1)]
    rows = call(graph, aten.reshape.default, (x, [-1, packed.k]))
    new = call(graph, int4_mm, packed.for_mm(rows, None))
    return call(graph, aten.reshape.default, (new, [*sizes, packed.n]))


def _erase_unused(graph: Any, view: Any, source: Any) -> None:
    """Erase a view of `source`, the views between them and `source` itself, as far as nothing uses
    them."""
    while not view.users:
        inner = view.args[0]
        graph.erase_node(view)
        if view is source:
            return
        view = inner


def _dequantized(w: Any, transposed: bool) -> Any:
    """The dequantize node of which `w` is W [n, k] (or W.T [k, n], where `transposed`), or that
    many times; else None.

    A tensor without data goes through the same views, and its shape and strides tell which view of
    W results.
    """
    views: list[Any] = []
    source = w
    while getattr(source, "target", None) in VIEWS:
        views, source = [source, *views], source.args[0]
    if getattr(source, "target", None) is not torch.ops.qlab.dequantize.default:
        return None
    n, k = source.args[3:5]
    probe = torch.empty(n, k, dtype=torch.float32, device="meta")
    for view in views:
        # 2 stands for a number that is known at run time
        args = torch.utils._pytree.tree_map(lambda a: 2 if hasattr(a, "op") else a, view.args[1:])
        try:
            probe = probe.view(*args) if view.target in RESHAPES else view.target(probe, *args)
        except RuntimeError:  # the graph copies W there, since no view has these strides
            return None
    *batch, first, second = zip(probe.shape, probe.stride())
    is_repeated = all(size == 1 or stride == 0 for size, stride in batch)
    expected = [(k, 1), (n, k)] if transposed else [(n, k), (k, 1)]
    is_expected = all(
        size == known_size and (size == 1 or stride == known_stride)
        for (size, stride), (known_size, known_stride) in zip((first, second), expected)
    )
    return source if is_repeated and is_expected else None


def _turned(graph: Any, x: Any) -> Any:
    return call(graph, aten.permute.default, (x, [1, 0] if x.meta["val"].ndim == 2 else [0, 2, 1]))


def _size(graph: Any, x: Any, axis: int) -> Any:
    size = x.meta["val"].shape[axis]
    return size if isinstance(size, int) else call(graph, aten.sym_size.int, (x, axis))


def _same_axes(w: Any) -> bool:
    if w.target is aten.permute.default:
        return [d % 2 for d in w.args[1]] != [1, 0]
    return w.target is aten.transpose.int and w.args[1] % 2 == w.args[2] % 2


def choose(graph: Any) -> int:
    """On a CPU, write out the products whose number of tokens is known when they are compiled; the
    number of them."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=torch.ops.qlab.int4_mm.default):
        x, words, scales, zeros, dense, n, *form = node.args
        packed = unflattened(words, scales, zeros, n, x.meta["val"].shape[1], *form)
        kind = _kind(x, packed, dense)
        if kind is None:
            continue
        with graph.inserting_before(node):
            if kind == "int4pack":
                new = _int4pack(graph, x, packed)
            else:
                dequantize = torch.ops.qlab.dequantize.default
                W = dense or call(graph, dequantize, packed.for_dequantize())
                turned = call(graph, aten.permute.default, (W, [1, 0]))
                new = call(graph, aten.mm.default, (x, turned))
        replace(graph, node, new)
        count += 1
    return count


def _kind(x: Any, packed: Packed, dense: Any) -> cpu.Kind | None:
    """How the operator computes a product on a CPU, or None where the product is left to it."""
    words: Any = packed.words
    x, words = x.meta["val"], words.meta["val"]
    m, is_in_columns = x.shape[0], x.stride(1) > 1
    if words.device.type != "cpu" or not isinstance(m, int) or m == 0 or is_in_columns:
        return None
    cpu.check(packed.layout)
    rows, half = words.shape[:2]
    has_zeros = packed.zeros is not None
    kind = cpu.kind(m, x.dtype, dense is not None, rows, 2 * half, packed.group, has_zeros)
    if kind == "dense" and product_dtype(x) != x.dtype:
        return None  # freezing would keep a copy of W in the other dtype
    return kind


def _int4pack(graph: Any, x: Any, packed: Packed) -> Any:
    """aten's int4 product, without the rows that padding adds."""
    new = call(
        graph,
        aten._weight_int4pack_mm_for_cpu.default,
        (_spread(graph, x, packed), packed.words, packed.group, packed.scales),
    )
    if new.meta["val"].shape[1] == packed.n:
        return new
    return contiguous(graph, call(graph, aten.slice.Tensor, (new, 1, 0, packed.n)))


def stream(graph: Any) -> int:
    """On a CPU, write a bfloat16 product of one token with a dense weight as a sum, which is read
    at the memory's speed.

    mm(x [1, k], W.T) = sum_k x * W in fp32. The library's product of one row takes twice the time,
    and an unquantized head is as large as all quantized weights of a small model.
    """
    count = 0
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
            # as_strided needs a real buffer, so Inductor computes x once here instead of anew for
            # every row
            x = call(
                graph,
                aten.as_strided.default,
                (contiguous(graph, x), list(value.shape), [value.shape[1], 1]),
            )
            wide = [
                call(graph, prims.convert_element_type.default, (t, torch.float32)) for t in (x, W)
            ]
            sums = call(
                graph, aten.sum.dim_IntList, (call(graph, aten.mul.Tensor, tuple(wide)), [1])
            )
            rounded = call(graph, prims.convert_element_type.default, (sums, torch.bfloat16))
            new = call(graph, aten.unsqueeze.default, (rounded, 0))
        replace(graph, node, new)
        count += 1
    return count


def _spread(graph: Any, x: Any, packed: Packed) -> Any:
    """nibbles.spread in a graph."""
    padding = plane_width(packed.k) - packed.k
    if padding:
        x = call(graph, aten.constant_pad_nd.default, (x, [0, padding], 0.0))
    if packed.planes == 1:
        return contiguous(graph, x)
    return call(graph, aten.cat.default, ([x, x], 1))
