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

ORIGIN = frozenset(
    {"_name_or_path", "quantization_config"}
)  # what a config says of where it comes from


class Programs:
    """blocks: path -> meta module, in running order. What was traced once is kept."""

    def __init__(self, blocks: Mapping[str, nn.Module]):
        self.blocks = blocks
        self._codes: dict[Any, Code] = {}
        self._traced_for: dict[Any, str] = {}
        self._known: dict[Any, Code] = {}
        self._first: dict[str, Code] = {}

    def code(self, path: str, call: Call) -> Code:
        """The traced program of a block for inputs of this form; traced once for all blocks of one
        structure, and again for sizes that a program is not for."""
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
        """A program of a block for inputs of any form, to say what it returns."""
        return self._first[path] if path in self._first else self.code(path, call)

    def uses(self, name: str) -> bool:
        """Whether the program of a block uses a parameter that the block holds; the program is
        there when the model was recorded."""
        path = next(path for path in self.blocks if name.startswith(f"{path}."))
        code, leaf = self._first[path], name.removeprefix(f"{path}.")
        return any(code.params.get(n.name) == leaf and n.users for n in code.graph.nodes)

    def _of_structure(self, path: str, call: Call, form: Any) -> Code:
        """The program that all blocks of one structure share.

        Blocks carry their own index. Whether it matters is not assumed: the first and the last
        block of a structure are both traced, and where their programs differ every block is.
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
    """What the traced program depends on beside its block: the form of the inputs."""
    shapes = tuple((t.dtype, tuple(n == 1 for n in t.shape)) for t in tensors)
    others = tuple(repr(leaf) for leaf in call.leaves if not isinstance(leaf, Tensor))
    return shapes, others, call.form


def _structure(block: nn.Module, index: int) -> Any:
    """What the traced program depends on in a block: classes, shapes and plain attributes.

    An attribute that holds the block's own index is left out (see Programs.code).
    """

    def plain(module: nn.Module) -> tuple:
        values = {
            k: getattr(v, "__qualname__", v) for k, v in vars(module).items() if k != "training"
        }
        kept = {k: v for k, v in values.items() if isinstance(v, bool | int | float | str)}
        return tuple(
            sorted(
                (k, v)
                for k, v in kept.items()
                if not (v == index and re.search("idx|index|layer", k))
            )
        )

    return tuple(
        (
            name,
            type(m),
            tuple((k, tuple(p.shape), p.dtype) for k, p in m.named_parameters(recurse=False)),
            plain(m),
        )
        for name, m in block.named_modules()
    )
