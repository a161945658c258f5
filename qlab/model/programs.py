"""The traced programs of a model's blocks: one for all blocks of one structure, where their own
index does not matter."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qlab.algebra.graph import Code, runs_on, tensors_of
from qlab.algebra.tracing.kept import refuse_shared
from qlab.algebra.tracing.programs import program
from qlab.model.calls import Call
from qlab.model.recording import shapes_of

# what a config says of where it comes from
ORIGIN = frozenset({"_name_or_path", "quantization_config"})


class Programs:
    """The programs of a model's blocks; what was traced is kept.

    blocks: path -> module on the meta device, in running order.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]):
        self.blocks = blocks
        self._codes: dict[Any, Code] = {}
        self._traced_for: dict[Any, str] = {}  # structure whose blocks differ -> its first block
        self._known: dict[Any, Code] = {}
        self._first: dict[str, Code] = {}
        self.around: Code | None = None  # of what lies around the blocks (qlab.model.around)

    def code(self, path: str, call: Call) -> Code:
        """The traced program of a block for arguments of this form.

        A block is traced once for all blocks of one structure, and again for sizes that the program
        does not run on.
        """
        tensors = tensors_of(*call.inputs(call.entering))
        form = _form(call, tensors)
        if (path, form) not in self._known:
            self._known[path, form] = self._of_structure(path, call, form)
        code = self._known[path, form]
        if not runs_on(code, tensors):
            sized = path, form, tuple(t.shape for t in tensors)
            if sized not in self._known:
                self._known[sized] = self._program(path, call)
            code = self._known[sized]
        self._first.setdefault(path, code)
        refuse_shared(self.blocks, path, code.kept)
        return code

    def first(self, path: str, call: Call) -> Code:
        """The first program of a block that returns hidden states of this shape, for arguments of
        any form: it tells what else the block returns. A program may be for one shape alone."""
        first = self._first.get(path)
        tensors = tensors_of(*call.inputs(call.entering))
        if first is not None and tuple(call.entering[0].shape) in shapes_of(first, tensors):
            return first
        return self.code(path, call)

    def uses(self, name: str) -> bool:
        """Whether the program of a block uses a parameter that the block holds. The block has been
        traced."""
        path = next(path for path in self.blocks if name.startswith(f"{path}."))
        code, leaf = self._first[path], name.removeprefix(f"{path}.")
        return any(code.params.get(n.name) == leaf and n.users for n in code.graph.nodes)

    def _of_structure(self, path: str, call: Call, form: Any) -> Code:
        """The program that all blocks of one structure share.

        A block carries its own index, which may matter: the first and the last block of a structure
        are both traced, and where their programs differ every block is.
        """
        paths = list(self.blocks)
        key = form, _structure(self.blocks[path], paths.index(path))
        if key not in self._codes:
            code = self._codes[key] = self._program(path, call)
            twins = [
                p
                for i, p in enumerate(paths)
                if p != path and _structure(self.blocks[p], i) == key[1]
            ]
            if twins and self._program(twins[-1], call) is not code:
                self._traced_for[key] = path
        if self._traced_for.get(key, path) != path:
            return self._program(path, call)
        return self._codes[key]

    def _program(self, path: str, call: Call) -> Code:
        args, kwargs = call.inputs(call.entering)
        return program(self.blocks[path], args, kwargs, path, list(self.blocks).index(path), ORIGIN)


def _form(call: Call, tensors: Sequence[Tensor]) -> Any:
    """What a traced program depends on beside its block: the form of the arguments."""
    shapes = tuple((t.dtype, tuple(n == 1 for n in t.shape)) for t in tensors)
    others = tuple(repr(leaf) for leaf in call.leaves if not isinstance(leaf, Tensor))
    return shapes, others, call.form


def _structure(block: nn.Module, index: int) -> Any:
    """What a traced program depends on in a block: classes, shapes and plain attributes.

    An attribute that holds the block's own index is left out: see Programs._of_structure.
    """

    def plain(module: nn.Module) -> tuple:
        attributes = []
        for key, value in vars(module).items():
            value = getattr(value, "__qualname__", value)
            if key == "training" or not isinstance(value, bool | int | float | str):
                continue
            if value != index or not re.search("idx|index|layer", key):
                attributes.append((key, value))
        return tuple(sorted(attributes))

    def parameters(module: nn.Module) -> tuple:
        named = module.named_parameters(recurse=False)
        return tuple((key, tuple(p.shape), p.dtype) for key, p in named)

    return tuple(
        (name, type(module), parameters(module), plain(module))
        for name, module in block.named_modules()
    )
