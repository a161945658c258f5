"""Putting lowered weights into a model, for both doors: `qlab.lower`, which builds the model, and
`qlab.hf`, where transformers does."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import QTensor, dense
from qlab.errors import QlabError, warn
from qlab.lowering.around.attention import use_grouped_attention
from qlab.lowering.share import Share
from qlab.lowering.weights.kernels import KERNELS
from qlab.lowering.weights.modules import QExperts, QLinear, QuantizedWeight
from qlab.lowering.weights.setting import Activations
from qlab.model.loading import load_leaf
from qlab.model.online import at_input
from qlab.model.paper import dtype_in
from qlab.model.pieces import Piece
from qlab.model.skeleton import Skeleton


def quantized_weights(skeleton: Skeleton) -> dict[str, tuple[Piece, ...]]:
    """Every linear, and every fused weight of experts by its parameter's name, whose codes the
    directory holds, with the tensors of the files. Codes of layers that transformers does not build
    are left out, as it leaves their weights out."""
    weights = {name: f"{name}.weight" for name in skeleton.names.linears()}
    weights |= {name: name for name, p in skeleton.model.named_parameters() if p.ndim == 3}
    pieces = {name: skeleton.names.pieces(weight) for name, weight in weights.items()}
    return {
        name: parts
        for name, parts in pieces.items()
        if any(part.module in skeleton.checkpoint.quantized for part in parts)
    }


def decoded_weights(skeleton: Skeleton) -> dict[str, str]:
    """Every other parameter whose codes the directory holds, such as an embedding's, and the module
    that has them: it is dense in the lowered model."""
    packed = {f"{name}.weight" for name in skeleton.names.linears()}
    first_pieces = {
        name: skeleton.names.pieces(name)[0]
        for name, p in skeleton.model.named_parameters()
        if p.ndim < 3 and name not in packed
    }
    return {
        name: piece.module
        for name, piece in first_pieces.items()
        if piece.module in skeleton.checkpoint.quantized and piece.name == f"{piece.module}.weight"
    }


def put_weights(
    model: nn.Module,
    skeleton: Skeleton,
    weights: Mapping[str, tuple[Piece, ...]],
    dtype: torch.dtype,
    device: torch.device,
    dense_cache: bool = False,
    *,
    activations: Activations | None = None,
    share: Share | None = None,
) -> None:
    """Put a packed module in the place of every one of `weights` (`quantized_weights`), loaded one
    at a time. Blocks that share a weight share the module. share: the part of each that is held."""
    packed: dict[tuple[Piece, ...], nn.Module] = {}
    for name, pieces in weights.items():
        tensors = (*pieces, *_bias(skeleton, name))
        if tensors not in packed:
            packed[tensors] = pack(skeleton, name, dtype, device, dense_cache, activations, share)
        set_module(model, name, packed[tensors])


def _bias(skeleton: Skeleton, name: str) -> tuple[Piece, ...]:
    bias = f"{name}.bias"
    return skeleton.names.pieces(bias) if bias in dict(skeleton.model.named_parameters()) else ()


def loaded(skeleton: Skeleton, name: str) -> tuple[Any, QuantizeInput | None]:
    """The leaf of a weight of `quantized_weights`, and how the directory rounds its inputs."""
    is_fused = name in dict(skeleton.model.named_parameters())
    inputs = next((op for op in at_input(skeleton, name) if isinstance(op, QuantizeInput)), None)
    return load_leaf(skeleton, name if is_fused else f"{name}.weight"), inputs


def pack(
    skeleton: Skeleton,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    dense_cache: bool,
    activations: Activations | None = None,
    share: Share | None = None,
) -> nn.Module:
    """What stands in for a quantized weight of the model: a module of the first kernel that takes
    it, or an ordinary linear where the format's layout is no grid of qlab's, so that the weight has
    no codes."""
    is_fused = name in dict(skeleton.model.named_parameters())
    weight = name if is_fused else f"{name}.weight"
    (leaf, inputs), parameter = loaded(skeleton, name), skeleton.model.get_parameter(weight)
    rounding: Any = {"inputs": inputs, "activations": activations}
    if sorted(leaf.shape) != sorted(parameter.shape):
        raise QlabError(
            f"{skeleton.names.pieces(weight)[0].module} holds a weight {tuple(leaf.shape)} and the "
            f"model wants {tuple(parameter.shape)}; its config.json belongs to another model"
        )
    leaf, order = (leaf, None) if share is None else share.of_weight(name, leaf)
    if is_fused:
        if not isinstance(leaf, QTensor):
            raise QlabError(
                f"{name} has experts without codes of a grid, which no lowered module holds; "
                "evaluate the directory with qlab"
            )
        return QExperts(name, leaf, dtype, device, dense_cache, **rounding)
    linear = skeleton.model.get_submodule(name)
    bias = None if linear.bias is None else dense(load_leaf(skeleton, f"{name}.bias"))
    bias = bias if share is None or bias is None else share.of_bias(name, bias)
    if isinstance(leaf, QTensor):
        packed = QLinear(name, leaf, bias, dtype, device, dense_cache, **rounding)
        if order is not None:  # of the channels of its input (`connect`)
            packed.register_buffer("order", order.to(device), persistent=False)
        return packed
    return plain(leaf, bias, dtype_in(skeleton.model, weight), device)


def plain(W_nk: Tensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    """An ordinary linear of these tensors."""
    linear = nn.Linear(W_nk.shape[1], W_nk.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(W_nk.to(device, dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)
    return linear


def finish(model: PreTrainedModel, device: torch.device) -> None:
    """What a lowered model needs beside its weights: on a CPU, the attention of single tokens."""
    if device.type == "cpu":
        use_grouped_attention(model)


def warn_slow(
    model: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    cure: str = "",
    *,
    activations: Activations | None = None,
) -> None:
    """Warn of what keeps quantized weights of a lowered model from being fast, in a line for all
    that one kernel holds, with the reasons of the kernels that do not take them. cure: what else
    would help. activations: what the user asked for; a line where it changes nothing."""
    modules = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    for kernel in KERNELS:
        of_kernel = [module for module in modules if module.kernel is kernel]
        specs = [str(module.spec) for module in of_kernel]
        slowness = kernel.slowness(specs, dtype, device) if specs else None
        reasons = "; ".join(passed_over(of_kernel))
        if slowness:
            warn(f"{slowness}. {reasons}{cure}" if reasons else slowness + cure)
        elif reasons:
            warn(f"weights are multiplied by '{kernel.name}', a slower kernel: {reasons}")
    left = [module for module in modules if module.rounding is None and not module.passed]
    if activations is not None and left:
        specs = sorted({str(module.spec) for module in left})
        warn(
            f"activations={activations!r} changes nothing at {len(left)} weights "
            f"({', '.join(specs)}): no kernel here rounds their activations"
        )


def passed_over(modules: Sequence[QuantizedWeight]) -> list[str]:
    """The kernels that do not take weights that they are meant for: for how many, and why."""
    counts = Counter(passed for module in modules for passed in module.passed)
    return [
        f"'{passed.row}' does not take {count} of them, because {passed.reason}"
        for passed, count in counts.items()
    ]


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, or of a parameter."""
    owner, key = owner_of(model, name), name.rpartition(".")[2]
    owner._parameters.pop(key, None)
    setattr(owner, key, module)


def make_dense(model: nn.Module) -> None:
    """Put a dense weight in the place of every quantized one, in the dtype of the activations, and
    none of its codes."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, QuantizedWeight):
            continue
        weight = module.dequantized().contiguous()
        if isinstance(module, QLinear):
            set_module(model, name, plain(weight, module.bias, weight.dtype, weight.device))
        else:  # fused experts, which some models hold transposed
            owner, key = owner_of(model, name), name.rpartition(".")[2]
            delattr(owner, key)
            weight = weight.mT.contiguous() if owner.is_transposed else weight
            setattr(owner, key, nn.Parameter(weight, requires_grad=False))


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """The module that has a parameter, a buffer or a module of this name."""
    return model.get_submodule(name.rpartition(".")[0])
