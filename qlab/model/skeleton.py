"""The Hugging Face model on the meta device: its blocks, what they are called with, and what
surrounds them.

Nothing here knows an architecture. A block's inputs are recorded by running the model's own forward
with the blocks replaced by recorders; the head is run the same way, with the last block replaying
the final hidden states.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

from qlab.algebra.graph import Code, ModuleGraph, runs_on, tensors_of
from qlab.algebra.qtensor import Leaf, QTensor, dense
from qlab.algebra.tracing.kept import refuse_shared
from qlab.algebra.tracing.programs import program
from qlab.errors import QlabError, first_line
from qlab.files.checkpoint import Checkpoint
from qlab.model.device import usable
from qlab.model.headers import refuse_another_model, refuse_untied
from qlab.model.online import at_input, at_output
from qlab.model.paper import find_blocks, on_paper, path_of
from qlab.model.pieces import Piece, assemble, pieces_of_experts
from qlab.model.recording import Call, Makers, Recorded, Recorder, Replaced, calls_of, to_like
from qlab.model.spelling import spellings
from qlab.model.ties import apart, ties
from qlab.process.surroundings import foreign

ORIGIN = frozenset(
    {"_name_or_path", "quantization_config"}
)  # what a config says of where it comes from


class Skeleton:
    """blocks: path -> meta module, in running order. Loads only what surrounds the blocks."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, usable(device)
        self.model = on_paper(checkpoint, dtype)
        self.prefix, self.blocks = find_blocks(self.model)
        # a quantized weight also goes by the name it would have unquantized
        self._stored = {*checkpoint.files, *(f"{module}.weight" for module in checkpoint.quantized)}
        self._spelled = spellings(self.model, self._stored)
        self._loaded = frozenset(self.model.state_dict())
        self._model_names = {stored: name for name, stored in self._spelled.items()}
        self._parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        self._codes: dict[Any, Code] = {}
        self._traced_for: dict[Any, str] = {}
        self._known: dict[Any, Code] = {}
        self._first: dict[str, Code] = {}
        refuse_another_model(self)

    def refuse_missing(self) -> None:
        """Refuse files that lack a tensor of the model."""
        for name, _ in self.model.named_parameters(remove_duplicate=False):
            if self._lacking(name) and (lacking := self._lacking(self.tied.get(name, name))):
                refuse_untied(self, name)
                self.checkpoint.shape_and_dtype(lacking[0])

    def _lacking(self, name: str) -> list[str]:
        """The tensors of a parameter that the files hold neither as they are nor as codes."""
        return [piece.name for piece in self.pieces(name) if piece.name not in self._stored]

    def check_length(self, tokens: int) -> None:
        """Refuse samples of more tokens than a model with tables of positions has: learned ones,
        which lie beside that of the vocabulary, or buffers of as many rows."""
        vocabulary = path_of(self.model, self.model.get_input_embeddings())
        beside = self.model.get_submodule(vocabulary.rpartition(".")[0]).named_children()
        learned = [
            n
            for n, m in beside
            if isinstance(m, nn.Embedding) and n != vocabulary.rpartition(".")[2]
        ]
        positions = getattr(
            self.checkpoint.config.get_text_config(), "max_position_embeddings", tokens
        )
        tables = learned or [
            name for name, buffer in self.model.named_buffers() if positions in buffer.shape
        ]
        if tables and tokens > positions:
            raise QlabError(
                f"windows of {tokens} tokens are longer than the {positions} positions of "
                f"{self.checkpoint.path}; choose a shorter length"
            )

    def block_names(self, path: str) -> dict[str, tuple[Piece, ...]]:
        """Leaf name inside the block -> the tensors that hold it in the checkpoint's files; of
        buffers, those that they hold."""
        names = {
            name: self.pieces(f"{path}.{name}") for name, _ in self.blocks[path].named_parameters()
        }
        buffers = {
            name: self.stored_buffer(f"{path}.{name}")
            for name, _ in self.blocks[path].named_buffers()
        }
        return names | {name: (Piece(stored),) for name, stored in buffers.items() if stored}

    def stored_buffer(self, name: str) -> str | None:
        """The tensor of the files that holds a buffer, where the model takes it from there and does
        not compute it."""
        stored = self.file_name(name)
        return stored if name in self._loaded and stored in self.checkpoint.files else None

    def file_name(self, name: str) -> str:
        """The model's name of a tensor as the files spell it."""
        return self._spelled.get(name, name)

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """The tensors of the files that hold a parameter: one, or one per expert and projection of
        fused experts."""
        return self._pieces_of(self._borrowed.get(name, name))

    def _pieces_of(self, name: str) -> tuple[Piece, ...]:
        whole = (Piece(self.file_name(name)),)
        if whole[0].name in self._stored or self.model.get_parameter(name).ndim < 3:
            return whole
        return self._parts(name) or whole

    def expert_pieces(self, name: str) -> tuple[Piece, ...]:
        """The tensors that engines expect for fused experts, as which they are written once they
        are quantized."""
        name = self._borrowed.get(name, name)
        return tuple(piece for piece in self._parts(name) if piece.expert is not None)

    def _parts(self, name: str) -> tuple[Piece, ...]:
        """The tensors into which transformers cuts a parameter of three axes when it saves it; ()
        if it saves it whole."""
        if name not in self._pieces:
            self._pieces[name] = pieces_of_experts(self.model, name, self._stored)
        return self._pieces[name]

    @functools.cached_property
    def _borrowed(self) -> Mapping[str, str]:
        """Parameter of a block -> that of another block which it is too, and for which the files
        may hold it once more."""
        inside = tuple(f"{path}." for path in self.blocks)
        return {
            name: keeper
            for name, keeper in self.tied.items()
            if name.startswith(inside) and keeper.startswith(inside)
        }

    @functools.cached_property
    def _sharing(self) -> Mapping[str, list[str]]:
        """Parameter that is held for several blocks -> those of all of them, in order."""
        found: dict[str, list[str]] = {keeper: [] for keeper in self._borrowed.values()}
        for name, _ in self.model.named_parameters(remove_duplicate=False):
            keeper = self._borrowed.get(name, name)
            if keeper in found:
                found[keeper].append(name)
        return found

    def copies(self) -> set[Piece]:
        """The tensors under which files may hold a shared parameter once more; none is written."""
        return {piece for name in self._borrowed for piece in self._pieces_of(name)}

    def shares(self, name: str) -> bool:
        """Whether a parameter of a block is another block's too, which both are rounded as one."""
        return name in self._borrowed

    def writes(self, name: str) -> bool:
        """Whether the tensors of a block's leaf are written with this block: of several that share
        them, with the first whose program uses them."""
        sharing = self._sharing.get(self._borrowed.get(name, name), [name])
        if len(sharing) == 1:
            return True
        return name == next(filter(self.uses, sharing), sharing[0])

    def uses(self, name: str) -> bool:
        """Whether the program of a block uses a parameter that the block holds; the program is
        there when the model was recorded."""
        path = next(path for path in self.blocks if name.startswith(f"{path}."))
        code, leaf = self._first[path], name.removeprefix(f"{path}.")
        return any(code.params.get(n.name) == leaf and n.users for n in code.graph.nodes)

    def stored_dtype(self, piece: Piece) -> torch.dtype:
        """What an unquantized tensor is written in: as it was stored, or the checkpoint's own dtype
        where it was quantized."""
        if piece.module in self.checkpoint.quantized:
            return self.checkpoint.dtype
        return self.checkpoint.shape_and_dtype(piece.name)[1]

    def fused(self, site: str) -> bool:
        """Whether a site is a parameter that holds all experts, and goes by its name."""
        return site in self._parameters

    def modules(self, site: str) -> tuple[str, ...]:
        """What readers of the files call the module of a site: in the model's spelling and in the
        files', or every expert."""
        if self.fused(site):
            return tuple(piece.module for piece in self.expert_pieces(site))
        return site, self.module_name(site)

    def held_dtype(self, name: str) -> torch.dtype:
        """The dtype in which the model computes with a parameter or a buffer: that of the run, or
        the one that it has in every run."""
        owner, _, key = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), key).dtype

    def leaf(self, name: str) -> Leaf:
        """The leaf of a parameter, put together from the files: codes, or dense in the dtype that
        the model holds it in."""
        pieces = self.pieces(name)
        return assemble(
            pieces, [self.checkpoint.leaf(piece.name, self.held_dtype(name)) for piece in pieces]
        )

    def original(self, name: str) -> Tensor:
        """The leaf of a parameter as if it had never been quantized: with the bits of the files
        where they hold it dense."""
        pieces = self.pieces(name)
        leaves = [self.checkpoint.leaf(piece.name) for piece in pieces]
        parts = [dense(leaf, self.dtype) if isinstance(leaf, QTensor) else leaf for leaf in leaves]
        wide = functools.reduce(torch.promote_types, [part.dtype for part in parts])
        whole = assemble(pieces, [part.to(wide) for part in parts])
        assert isinstance(whole, Tensor)
        return whole

    def graph(self, path: str, call: Call, decoded: bool = False) -> ModuleGraph:
        """The block as a value, with its leaves loaded from the files onto the skeleton's device.

        decoded: as if it had never been quantized, all leaves dense, with the bits of the files,
        and no input rounded at run time.
        """
        code = self.code(path, call)
        self._refuse_rounded_inputs(path, code)
        leaves: dict[str, Leaf] = {}
        dequantized: set[str] = set()  # written in the checkpoint's own dtype
        for name, pieces in self.block_names(path).items():
            dense_one = decoded or name in code.unread
            leaf = self.original(f"{path}.{name}") if dense_one else self.leaf(f"{path}.{name}")
            leaves[name] = pytree.tree_map_only(Tensor, lambda t: t.to(self.device), leaf)
            dequantized |= (
                {name}
                if any(piece.module in self.checkpoint.quantized for piece in pieces)
                else set()
            )
        for name, buffer in self.blocks[path].named_buffers():
            leaves.setdefault(name, buffer.to(self.device))
        own = {name: leaf.dtype for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
        stored = {name: dtype for name, dtype in own.items() if name not in dequantized}
        held = {name: self.held_dtype(f"{path}.{name}") for name in own}
        sites = () if decoded else code.sites
        online = {
            site.path: ops for site in sites if (ops := at_input(self, f"{path}.{site.path}"))
        }
        outputs = {
            site.path: ops for site in sites if (ops := at_output(self, f"{path}.{site.path}"))
        }
        return ModuleGraph(
            code,
            leaves,
            path,
            dtype=self.checkpoint.dtype,
            online=online,
            online_outputs=outputs,
            stored={
                name: dtype for name, dtype in stored.items() if dtype != self.checkpoint.dtype
            },
            held={name: dtype for name, dtype in held.items() if dtype != own[name]},
        )

    def _refuse_rounded_inputs(self, path: str, code: Code) -> None:
        """Refuse inputs and outputs that are rounded at run time where the program does not show
        them."""
        for leaf, why in code.unread.items():
            module = f"{path}.{leaf}".removesuffix(".weight")
            if at_input(self, module) or at_output(self, module):
                raise QlabError(
                    f"{module} has inputs or outputs that are rounded or rotated at run time, and "
                    f"{leaf} {why}; qlab cannot run it, only convert and inspect it"
                )

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

    # -------------------------------------------------------------- around the blocks
    def load_outside(self, with_head: bool) -> None:
        """Fill in the parameters that no block holds: embeddings, final norm and, on demand, the
        head."""
        head = self.model.get_output_embeddings()
        head_parameters = {id(p) for p in head.parameters()} if head is not None else set()
        inside = tuple(f"{path}." for path in self.blocks)
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            if (
                name.startswith(inside)
                or not parameter.is_meta
                or (id(parameter) in head_parameters and not with_head)
            ):
                continue
            file_name = self.file_name(name)
            if name not in self._spelled:  # left out of the files where it is another's
                file_name = self.file_name(self.tied.get(name, name))
            if at_input(self, module := name.rpartition(".")[0]) or at_output(self, module):
                raise QlabError(
                    f"{name} has inputs or outputs that are rounded or rotated at run time, which "
                    "qlab does inside blocks only"
                )
            value = self.checkpoint.leaf(file_name, parameter.dtype)
            _set(self.model, name, dense(value, parameter.dtype).to(self.device))
        self._load_buffers(inside)

    def _load_buffers(self, inside: tuple[str, ...]) -> None:
        """What the files hold of the buffers around the blocks, and every buffer on the skeleton's
        device."""
        for name, buffer in list(self.model.named_buffers(remove_duplicate=False)):
            owner, _, key = name.rpartition(".")
            stored = None if name.startswith(inside) else self.stored_buffer(name)
            value = self.checkpoint.tensor(stored).to(buffer.dtype) if stored else buffer
            if stored or not buffer.is_meta:
                self.model.get_submodule(owner)._buffers[key] = value.to(self.device)

    @functools.cached_property
    def tied(self) -> Mapping[str, str]:
        """Parameter that is another one's too -> that one, which the files hold: a head and the
        embedding."""

        def equal(name: str, other: str) -> bool:
            return self.checkpoint.equal(self.file_name(name), self.file_name(other))

        return ties(self.model, self._spelled.__contains__, equal)

    @property
    def apart(self) -> set[str]:
        """The parameters that config.json ties to others, and the files do not."""
        return apart(self.model, self.tied)

    def outside_leaves(self) -> list[str]:
        """The names of the leaves of the files that belong to no block: the tensors of a quantized
        module are one leaf."""
        leaves = [(n, n.rpartition(".")[0]) for n in self.outside_names()]
        coded = {
            n for n, m in leaves if m in self.checkpoint.quantized and n != f"{m}.bias"
        } - self.checkpoint.beside
        return list(dict.fromkeys(f"{m}.weight" if n in coded else n for n, m in leaves))

    def outside_names(self) -> list[str]:
        """The names of the files' tensors that belong to no block."""
        pieces = {
            p for path in self.blocks for held in self.block_names(path).values() for p in held
        }
        pieces |= self.copies()
        inside, quantized = (
            {p.name for p in pieces},
            {p.module for p in pieces} & self.checkpoint.quantized.keys(),
        )
        coded = {
            n for n in self.checkpoint.files if n.rpartition(".")[0] in quantized
        } - self.checkpoint.beside
        return [n for n in self.checkpoint.files if n not in inside | coded]

    def linears(self) -> list[str]:
        """Names of all linear modules, in the model's spelling."""
        return [name for name, m in self.model.named_modules() if isinstance(m, nn.Linear | Conv1D)]

    @functools.cached_property
    def transposed(self) -> frozenset[str]:
        """The linears that hold their weight as [k, o] (gpt2's), in the model's spelling and in the
        files'; codes are [o, k] in all."""
        names = [name for name, m in self.model.named_modules() if isinstance(m, Conv1D)]
        return frozenset(spelled for name in names for spelled in (name, self.module_name(name)))

    def expert_modules(self) -> list[str]:
        """What engines call the modules of all fused experts."""
        fused = [
            name
            for name, p in self.model.named_parameters()
            if p.ndim == 3 and name.startswith(f"{self.prefix}.")
        ]
        return [piece.module for name in fused for piece in self.expert_pieces(name)]

    def sites_of_modules(self) -> dict[str, str]:
        """Module of the files -> what the site of its weight is called: as the model spells it, or
        the experts that it is one of."""
        held = {name: self.pieces(name) for name in self._parameters}
        return {
            piece.module: name.removesuffix(".weight")
            for name, pieces in held.items()
            for piece in pieces
        }

    def module_name(self, name: str) -> str:
        """The model's name of a module as the files spell it."""
        weight = f"{name}.weight"
        return self.file_name(self._borrowed.get(weight, weight)).rpartition(".")[0]

    def model_name(self, module: str) -> str:
        """The files' name of a module, which may be one that the model has not, as transformers
        would spell it."""
        return self._model_names.get(f"{module}.weight", f"{module}.weight").removesuffix(".weight")

    def drop_outside(self) -> None:
        """Let go of what load_outside filled in."""
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            if not parameter.is_meta:
                _set(self.model, name, parameter.to("meta"))

    def record(
        self, tokens: Tensor, beside: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Call]]:
        """The hidden states that enter the first block, and what every block is called with beside
        them.

        beside: what else the model is called with (a mask, images). Refuses models that change
        hidden states between blocks.
        """
        makers = Makers()
        recorders = self._recorders(makers, self.code)
        recorders[-1].last = True
        embedding = self.model.get_input_embeddings().get_parameter("weight")
        others = {name: to_like(t, embedding) for name, t in (beside or {}).items()}
        with (
            foreign,
            Replaced(self.model, self.prefix, recorders),
            contextlib.suppress(Recorded),
            self._explained(),
            makers,
        ):
            self.model(input_ids=tokens.to(self.device), use_cache=False, **others)
        seen = [r.seen for r in recorders if r.seen is not None]
        if len(seen) < len(self.blocks):
            idle = sorted(r.path for r in recorders if r.seen is None)
            raise QlabError(
                f"{type(self.model).__name__} did not run blocks {idle}; qlab streams models that "
                "run each block once, in order"
            )
        for recorder, one in zip(recorders, seen):
            if not _same(one.hidden, seen[0].hidden):
                raise QlabError(
                    f"{type(self.model).__name__} changes hidden states before {recorder.path} "
                    "(as where images join at several depths); qlab streams models whose blocks "
                    "hand them on as they are"
                )
        return seen[0].hidden, dict(zip(self.blocks, calls_of(seen)))

    def _recorders(self, makers: Makers, program: Callable[[str, Call], Code]) -> list[Recorder]:
        """A stand-in for every block, each of which knows the one before."""
        recorders: list[Recorder] = []
        for index, (path, block) in enumerate(self.blocks.items()):
            recorders.append(Recorder(path, index, block, makers, functools.partial(program, path)))
            object.__setattr__(recorders[-1], "before", recorders[-2] if index else None)
        return recorders

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say of an error that a model raises around its blocks that they were stand-ins."""
        try:
            yield
        except (QlabError, Recorded):
            raise
        except Exception as error:  # whatever the model's own forward raises
            reason = first_line(error)
            raise QlabError(
                f"{type(self.model).__name__} cannot be run around its blocks, which are streamed "
                f"one by one ({reason}); it computes something of what they return before the "
                "last has run"
            ) from error

    def head(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The model's logits [b, l, vocabulary] when the last block returns these hidden states."""
        makers = Makers()
        recorders = self._recorders(makers, self._first_code)
        recorders[-1].replay = hidden
        with foreign, Replaced(self.model, self.prefix, recorders), makers:
            return self.model(input_ids=tokens.to(self.device), use_cache=False).logits

    def _first_code(self, path: str, call: Call) -> Code:
        """A program of a block for inputs of any form, to say what it returns."""
        return self._first[path] if path in self._first else self.code(path, call)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def _form(call: Call, tensors: Sequence[Tensor]) -> Any:
    """What the traced program depends on beside its block: the form of the inputs."""
    shapes = tuple((t.dtype, tuple(n == 1 for n in t.shape)) for t in tensors)
    others = tuple(repr(leaf) for leaf in call.leaves if not isinstance(leaf, Tensor))
    return shapes, others, call.form


def _structure(block: nn.Module, index: int) -> Any:
    """What the traced program depends on in a block: classes, shapes and plain attributes.

    An attribute that holds the block's own index is left out (see Skeleton.code).
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


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    model.get_submodule(owner)._parameters[key] = nn.Parameter(value, requires_grad=False)
