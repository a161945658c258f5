"""What a model's parameters, buffers and modules are called in a checkpoint's files."""

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlab.files.checkpoint import Checkpoint
from qlab.model.pieces import Piece, pieces_of_experts
from qlab.model.spelling import spellings
from qlab.model.ties import apart, ties


class Names:
    """The names of one model in one checkpoint's files.

    checkpoint: the files. model: the model on the meta device. prefix: the path of its list of
    blocks. blocks: path -> block, in running order.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        prefix: str,
        blocks: Mapping[str, nn.Module],
    ):
        self.checkpoint, self.model = checkpoint, model
        self.prefix, self.blocks = prefix, blocks
        # a quantized weight also goes by the name it would have unquantized
        self._stored = {*checkpoint.files, *(f"{module}.weight" for module in checkpoint.quantized)}
        self._spelled = spellings(model, self._stored)
        self._loaded = frozenset(model.state_dict())
        self._model_names = {stored: name for name, stored in self._spelled.items()}
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._pieces: dict[str, tuple[Piece, ...]] = {}

    # ------------------------------------------------------------------ one tensor
    def file_name(self, name: str) -> str:
        """The model's name of a tensor as the files spell it."""
        return self._spelled.get(name, name)

    def is_spelled(self, name: str) -> bool:
        """Whether the files hold a tensor, or codes, under a parameter's own name."""
        return name in self._spelled

    def stored_buffer(self, name: str) -> str | None:
        """The tensor of the files that holds a buffer, where the model takes it from there and does
        not compute it."""
        stored = self.file_name(name)
        return stored if name in self._loaded and stored in self.checkpoint.files else None

    def stored_dtype(self, piece: Piece) -> torch.dtype:
        """What an unquantized tensor is written in: as it was stored, or the checkpoint's own dtype
        where it was quantized."""
        if piece.module in self.checkpoint.quantized:
            return self.checkpoint.dtype
        return self.checkpoint.shape_and_dtype(piece.name)[1]

    # ------------------------------------------------------------------ the tensors of a parameter
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

    def lacking(self, name: str) -> list[str]:
        """The tensors of a parameter that the files hold neither as they are nor as codes."""
        return [piece.name for piece in self.pieces(name) if piece.name not in self._stored]

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

    # ------------------------------------------------------------------ parameters that are one
    @cached_property
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

    @cached_property
    def _borrowed(self) -> Mapping[str, str]:
        """Parameter of a block -> that of another block which it is too, and for which the files
        may hold it once more."""
        inside = tuple(f"{path}." for path in self.blocks)
        return {
            name: keeper
            for name, keeper in self.tied.items()
            if name.startswith(inside) and keeper.startswith(inside)
        }

    @cached_property
    def _sharing(self) -> Mapping[str, list[str]]:
        """Parameter that is held for several blocks -> those of all of them, in order."""
        found: dict[str, list[str]] = {keeper: [] for keeper in self._borrowed.values()}
        for name, _ in self.model.named_parameters(remove_duplicate=False):
            keeper = self._borrowed.get(name, name)
            if keeper in found:
                found[keeper].append(name)
        return found

    def sharing(self, name: str) -> list[str]:
        """The parameters of all blocks that are one with this one, in order, itself among them."""
        return self._sharing.get(self._borrowed.get(name, name), [name])

    def shares(self, name: str) -> bool:
        """Whether a parameter of a block is another block's too, which both are rounded as one."""
        return name in self._borrowed

    def copies(self) -> set[Piece]:
        """The tensors under which files may hold a shared parameter once more; none is written."""
        return {piece for name in self._borrowed for piece in self._pieces_of(name)}

    # ------------------------------------------------------------------ modules
    def linears(self) -> list[str]:
        """Names of all linear modules, in the model's spelling."""
        return [name for name, m in self.model.named_modules() if isinstance(m, nn.Linear | Conv1D)]

    @cached_property
    def transposed(self) -> frozenset[str]:
        """The linears that hold their weight as [k, o] (gpt2's), in the model's spelling and in the
        files'; codes are [o, k] in all."""
        names = [name for name, m in self.model.named_modules() if isinstance(m, Conv1D)]
        return frozenset(spelled for name in names for spelled in (name, self.module_name(name)))

    def fused(self, site: str) -> bool:
        """Whether a site is a parameter that holds all experts, and goes by its name."""
        return site in self._parameters

    def modules(self, site: str) -> tuple[str, ...]:
        """What readers of the files call the module of a site: in the model's spelling and in the
        files', or every expert."""
        if self.fused(site):
            return tuple(piece.module for piece in self.expert_pieces(site))
        return site, self.module_name(site)

    def module_name(self, name: str) -> str:
        """The model's name of a module as the files spell it."""
        weight = f"{name}.weight"
        return self.file_name(self._borrowed.get(weight, weight)).rpartition(".")[0]

    def model_name(self, module: str) -> str:
        """The files' name of a module, which may be one that the model has not, as transformers
        would spell it."""
        return self._model_names.get(f"{module}.weight", f"{module}.weight").removesuffix(".weight")

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

    # ------------------------------------------------------------------ around the blocks
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
