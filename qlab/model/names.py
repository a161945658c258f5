"""What a model's parameters, buffers and modules are called in a checkpoint's files."""

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlab.files.checkpoint import Checkpoint
from qlab.model.pieces import Piece, pieces_of_experts, saved_name
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
        """The tensor of the files that holds a buffer; None where the model computes the buffer."""
        stored = self.file_name(name)
        return stored if name in self._loaded and stored in self.checkpoint.files else None

    def stored_dtype(self, piece: Piece) -> torch.dtype:
        """The dtype in which a tensor is written when it is not quantized: that of the files, or
        the checkpoint's own where the files hold codes."""
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
        """The tensors as which fused experts are written once they are quantized: one for each
        expert and projection, as engines expect them."""
        name = self._borrowed.get(name, name)
        return tuple(piece for piece in self._parts(name) if piece.expert is not None)

    def _parts(self, name: str) -> tuple[Piece, ...]:
        """The tensors into which transformers cuts a parameter of three axes when it saves it; ()
        if it saves it whole."""
        if name not in self._pieces:
            self._pieces[name] = pieces_of_experts(self.model, name, self._stored)
        return self._pieces[name]

    def saved(self) -> dict[str, tuple[str, torch.Size]]:
        """The tensors as which transformers saves the model -> the parameter that each is of, and
        its shape. Of fused experts every projection is one."""
        saved: dict[str, tuple[str, torch.Size]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter.ndim < 3:
                saved[saved_name(self.model, name)] = name, parameter.shape
            for piece in self.expert_pieces(name) if parameter.ndim == 3 else ():
                shape = torch.Size((piece.stop - piece.start, parameter.shape[-1]))
                saved[piece.name] = name, shape
        return saved

    def lacking(self, name: str) -> list[str]:
        """The tensors of a parameter that the files hold neither as they are nor as codes."""
        return [piece.name for piece in self.pieces(name) if piece.name not in self._stored]

    def block_names(self, path: str) -> dict[str, tuple[Piece, ...]]:
        """Leaf of a block -> the tensors of the files that hold it. Buffers that the model computes
        are left out."""
        block = self.blocks[path]
        names = {name: self.pieces(f"{path}.{name}") for name, _ in block.named_parameters()}
        for name, _ in block.named_buffers():
            stored = self.stored_buffer(f"{path}.{name}")
            if stored:
                names[name] = (Piece(stored),)
        return names

    # ------------------------------------------------------------------ parameters that are one
    @cached_property
    def tied(self) -> Mapping[str, str]:
        """Parameter -> the parameter that it is one with, and that the files hold: a head and the
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
        """Parameter of a block -> the parameter of another block that it is one with. The files may
        hold it under both names."""
        inside = tuple(f"{path}." for path in self.blocks)
        return {
            name: keeper
            for name, keeper in self.tied.items()
            if name.startswith(inside) and keeper.startswith(inside)
        }

    @cached_property
    def _sharing(self) -> Mapping[str, list[str]]:
        """Parameter under whose name the files hold it for several blocks -> the parameters of all
        of them, in order."""
        sharing: dict[str, list[str]] = {keeper: [] for keeper in self._borrowed.values()}
        for name, _ in self.model.named_parameters(remove_duplicate=False):
            keeper = self._borrowed.get(name, name)
            if keeper in sharing:
                sharing[keeper].append(name)
        return sharing

    def sharing(self, name: str) -> list[str]:
        """The parameters of all blocks that are one with this one, in order, itself among them."""
        return self._sharing.get(self._borrowed.get(name, name), [name])

    def shares(self, name: str) -> bool:
        """Whether a parameter of a block is one with another block's, so that both are rounded as
        one."""
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
        files'. Codes are [o, k] for them too."""
        names = [name for name, m in self.model.named_modules() if isinstance(m, Conv1D)]
        return frozenset([*names, *map(self.module_name, names)])

    def fused(self, site: str) -> bool:
        """Whether a site is a parameter that holds all experts. Such a site has the parameter's
        name."""
        return site in self._parameters

    def modules(self, site: str) -> tuple[str, ...]:
        """What readers of the files call the module of a site: in the model's spelling and in the
        files', or every expert."""
        if self.fused(site):
            return tuple(piece.module for piece in self.expert_pieces(site))
        return site, self.module_name(site)

    def module_name(self, name: str) -> str:
        """The files' name of a module, from the model's."""
        weight = f"{name}.weight"
        return self.file_name(self._borrowed.get(weight, weight)).rpartition(".")[0]

    def spellings_of(self, module: str) -> tuple[str, ...]:
        """What readers call a module that has no weight itself (an attention): in the model's
        spelling and in that of the files, which the weights within it show."""
        within = [name for name in self._spelled if name.startswith(f"{module}.")]
        called = [
            self._spelled[name].removesuffix(name.removeprefix(module))
            for name in within
            if self._spelled[name].endswith(name.removeprefix(module))
        ]
        return tuple(dict.fromkeys([module, *called]))

    def model_name(self, module: str) -> str:
        """The model's name of a module, from the files'. The model need not have the module:
        transformers' rules for its name decide."""
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
        """Module of the files -> the name of the site that its weight belongs to, which for an
        expert is that of all experts."""
        return {
            piece.module: name.removesuffix(".weight")
            for name in self._parameters
            for piece in self.pieces(name)
        }

    # ------------------------------------------------------------------ around the blocks
    def outside_leaves(self) -> list[str]:
        """The leaves of the files that belong to no block. The tensors of a quantized module are
        one leaf, under the name of its weight."""
        leaves: dict[str, None] = {}
        for name in self.outside_names():
            module = name.rpartition(".")[0]
            leaves[f"{module}.weight" if self._is_code(name) else name] = None
        return list(leaves)

    def _is_code(self, name: str) -> bool:
        """Whether a tensor of the files is a part of a quantized weight."""
        module, _, kind = name.rpartition(".")
        plain = kind == "bias" or name in self.checkpoint.beside
        return module in self.checkpoint.quantized and not plain

    def outside_names(self) -> list[str]:
        """The tensors of the files that belong to no block."""
        pieces = self.copies()
        for path in self.blocks:
            for pieces_of_leaf in self.block_names(path).values():
                pieces.update(pieces_of_leaf)
        names = {piece.name for piece in pieces}
        quantized = {piece.module for piece in pieces} & self.checkpoint.quantized.keys()
        return [
            name
            for name in self.checkpoint.files
            if name not in names
            and (name.rpartition(".")[0] not in quantized or name in self.checkpoint.beside)
        ]
