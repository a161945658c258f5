"""What transformers knows of a directory's modules: which are linears, embeddings or experts, and
which tensors are one."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.files.directory import INDEX, unheld
from qlab.model.headers import refuse_missing, shape_of
from qlab.model.linears import HEAD, holds_experts, linears_of, matrices, other_matrices
from qlab.model.paper import on_paper
from qlab.model.skeleton import Skeleton
from qlab.model.ties import FLAG, untied


@dataclass(frozen=True)
class Modules:
    """A directory and its model, which is built when it is first needed, and once.

    checkpoint: the directory. built: its model on the meta device, where it was built before.
    """

    checkpoint: Checkpoint
    built: PreTrainedModel | None = None

    @cached_property
    def model(self) -> PreTrainedModel | None:
        """The model on the meta device; None where transformers does not know its architecture or
        cannot build it."""
        if self.built is not None or not self.checkpoint.known:
            return self.built
        try:
            return on_paper(self.checkpoint, self.checkpoint.dtype)
        except QlabError:
            return None

    @cached_property
    def skeleton(self) -> Skeleton | None:
        """The model with its names in the files; None where transformers does not know its
        architecture. Refuses one that cannot be built, or whose tensors have other shapes."""
        if not self.checkpoint.known:
            return None
        return Skeleton(self.checkpoint, self.checkpoint.dtype, model=self.model)

    def described_as(self, checkpoint: Checkpoint) -> "Modules":
        """The same model, whose files are described by another checkpoint."""
        return Modules(checkpoint, built=self.model)

    # ------------------------------------------------------------------ which modules there are
    def linears(self) -> dict[str, str]:
        """Name of a linear -> the module in the files that holds its weight.

        Of a model that transformers does not know: every module of the files with a weight [o, k]
        or with experts, embeddings among them, and the head.
        """
        if self.skeleton is None:
            return {name: name for name in sorted(matrices(self.checkpoint) | {HEAD})}
        return linears_of(self.skeleton)

    def other_matrices(self) -> set[str]:
        """Modules of the files whose weight has two axes and is no linear's: embeddings, routers.
        None is known where transformers does not know the architecture."""
        return set(self._other_matrices)

    def embeddings(self) -> set[str]:
        """Modules of the files that are embeddings, as far as transformers knows the
        architecture."""
        others = self._other_matrices.items()
        return {name for name, module in others if isinstance(module, nn.Embedding)}

    @cached_property
    def _other_matrices(self) -> dict[str, nn.Module]:
        if self.skeleton is None:
            return {}
        others = other_matrices(self.skeleton).items()
        return {self.skeleton.names.module_name(name): module for name, module in others}

    def shapes(self) -> dict[str, torch.Size]:
        """Tensor of the files -> its shape in the model, as far as transformers knows the
        architecture."""
        if self.skeleton is None:
            return {}
        names = self.skeleton.names
        return {
            piece.name: shape_of(piece, parameter)
            for name, parameter in names.model.named_parameters(remove_duplicate=False)
            for piece in names.pieces(name)
        }

    def transposed(self) -> frozenset[str]:
        """Modules of the files whose dense weight is stored as [k, o], as far as transformers knows
        the architecture."""
        return frozenset() if self.skeleton is None else self.skeleton.names.transposed

    # ------------------------------------------------------------------ what the files hold
    def refuse_unheld(self) -> None:
        """Refuse files that lack a tensor of their index. Where transformers knows the
        architecture, only a tensor that the model needs."""
        checkpoint = self.checkpoint
        lacking = unheld(checkpoint.path, checkpoint.stored)
        if not lacking:
            return
        if self.skeleton is not None:
            refuse_missing(self.skeleton.names)
            return
        name, file = next(iter(lacking.items()))
        raise QlabError(
            f"{checkpoint.path / INDEX} lists {name} in {file}, which does not hold it; download "
            "the model again, or take out what nobody needs"
        )

    def experts_apart(self, whole: Collection[str] = ()) -> "Modules":
        """The directory as if experts that its files hold fused [e, o, k] lay there one by one
        [o, k], by the names that engines expect.

        Every expert's part is a range of bytes of the same file. Experts stay fused whose parts
        transformers has no names for, and all of an architecture that it does not know.

        whole: tensors that stay fused as well.
        """
        checkpoint = self.checkpoint
        experts = {
            name for name, tensor in checkpoint.stored.items() if holds_experts(name, tensor)
        }
        fused = experts.difference(whole)
        if not fused or self.skeleton is None:
            return self
        names, stored = self.skeleton.names, dict(checkpoint.stored)
        for name, parameter in names.model.named_parameters():
            file_name = names.file_name(name)
            if file_name not in fused:
                continue
            tensor = checkpoint.stored[file_name]
            if tensor.shape != tuple(parameter.shape):
                continue
            pieces = names.expert_pieces(name)
            if pieces:
                del stored[file_name]
            for piece in pieces:
                stored[piece.name] = tensor.rows(piece.expert or 0, piece.start, piece.stop)
        return self.described_as(replace(checkpoint, stored=stored))

    def untied_where_apart(self, quantized: Collection[str]) -> Mapping[str, Any]:
        """The directory's config.json, which ties nothing that its files hold apart, or that they
        hold twice and of which one is quantized.

        Refuses files that lack a tensor of a model that transformers knows.

        quantized: modules of the files.
        """
        raw = self.checkpoint.raw
        if self.skeleton is None:
            return untied(raw) if raw.get(FLAG) and HEAD in quantized else raw
        names = self.skeleton.names
        refuse_missing(names)
        twice = [
            (name, other)
            for name, other in names.tied.items()
            if names.file_name(name) in self.checkpoint.stored and not names.shares(name)
        ]
        modules = {names.file_name(name).rpartition(".")[0] for pair in twice for name in pair}
        return untied(raw) if names.apart or modules & set(quantized) else raw
