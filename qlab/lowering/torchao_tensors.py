"""A quantized directory in torchao's own tensors, where torchao has one that holds the codes:
another backend, and an oracle for the tests.

torchao is imported on use: it is no dependency of qlab. Both of its int4 layouts mean
(u - 8) * s + z' with u in 0..15, in bfloat16. `torchao_bytes` has its int8 and fp8 tensors.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.lowering import torchao_bytes
from qlab.lowering.around.rotated import is_rotated
from qlab.lowering.assembling import loaded, set_module
from qlab.lowering.devices import device_named
from qlab.lowering.model import opened, put_together
from qlab.lowering.solved import Place
from qlab.lowering.weights import cuda
from qlab.lowering.weights.kernels import INT4
from qlab.lowering.weights.modules import QLinear, QuantizedWeight
from qlab.lowering.weights.nibbles import GROUPS, plane_width
from qlab.lowering.weights.packed import Packed
from qlab.model.skeleton import Skeleton
from qlab.process.surroundings import undisturbed

TILE_K, TILE_N = 1024, 8  # what torchao pads a tiled weight to


@undisturbed
def to_torchao(
    model: Checkpoint | str | os.PathLike[str], device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A quantized directory as a Hugging Face model in bfloat16 with torchao's weights in ordinary
    linears; the codes are those of the directory.

    Weights of up to 4 bits are Int4OpaqueTensor on a CPU (aten's int4 product for any number of
    tokens) and Int4TilePackedTo4dTensor on a GPU (tinygemm). Those of 5 to 8 bits are Int8Tensor,
    and 8-bit floats are Float8Tensor: alone, or beside inputs that each product rounds anew.

    Args:
        model: a quantized directory, or an open one.
        device: 'cpu', 'cuda' or 'cuda:N', where the model is placed.

    Returns:
        The model in evaluation mode.

    Raises:
        QlabError: torchao is missing, a weight of fused experts, a grid, groups or rounded inputs
            that torchao's tensors do not hold, rows that need padding.

    Example:
        >>> import qlab
        >>> model = qlab.to_torchao("demo-int4")
        >>> type(model.model.layers[0].mlp.up_proj.weight).__name__
        'Int4OpaqueTensor'
    """
    try:
        import torchao  # noqa: F401
    except ImportError as error:
        raise QlabError(
            "torchao is not installed; `pip install torchao`, or use qlab.lower"
        ) from error
    # what is slow in qlab's modules is not in torchao's, so nothing is said of it
    place = Place(torch.bfloat16, device_named(device), dense_cache=False)
    lowered = put_together(model, place)
    skeleton = Skeleton(opened(model), place.dtype, place.device)
    for name, module in list(lowered.named_modules()):
        if not isinstance(module, QuantizedWeight):
            continue
        in_bytes = torchao_bytes.holds(module.spec)
        if not isinstance(module, QLinear) and (in_bytes or module.kernel is INT4):
            raise QlabError(
                f"{name}: torchao's int4 tensors are weights of linears, and these are fused "
                "experts; use qlab.lower"
            )
        if isinstance(module, QLinear) and in_bytes:
            leaf, inputs = loaded(skeleton, name)
            tensor = torchao_bytes.tensor(name, leaf, inputs, is_rotated(module)).to(device)
        elif isinstance(module, QLinear) and module.kernel is INT4:
            tensor = _int4(name, module)
        else:
            raise QlabError(
                f"{name}: torchao's int4 tensors do not hold {module.spec}; use qlab.lower"
            )
        set_module(lowered, name, _linear(module, tensor))
    return lowered


def _linear(module: QLinear, tensor: Any) -> nn.Linear:
    """An ordinary linear with a tensor of torchao's as its weight."""
    has_bias = module.bias is not None
    linear = nn.Linear(module.in_features, module.out_features, has_bias, device="meta")
    linear.weight = nn.Parameter(tensor, requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias, requires_grad=False)
    return linear


def _int4(name: str, module: QLinear) -> Any:
    """The weight of a module as one of torchao's int4 tensors."""
    packed = module.packed
    if packed.perm is not None or module.inputs is not None or is_rotated(module):
        raise QlabError(
            f"{name}: torchao's int4 tensors take inputs as they come, in the order of the "
            "channels and neither rotated nor rounded; use qlab.lower"
        )
    if plane_width(module.in_features) != module.in_features or packed.group not in GROUPS:
        raise QlabError(
            f"{name}: torchao's int4 tensors hold no groups of {packed.group} over "
            f"{module.in_features} channels; use qlab.lower, or quantize with groups of 32, 64, "
            "128 or 256"
        )
    return _opaque(packed) if packed.words.device.type == "cpu" else _tiled(packed)


def _opaque(packed: Packed) -> Any:
    """The packed words as they are: torchao uses the same operator, and drops padded rows of its
    output."""
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    shape = torch.Size((packed.n, packed.k))
    return Int4OpaqueTensor(packed.words, packed.scales, [1, packed.group], shape)


def _tiled(packed: Packed) -> Any:
    """Unpacked from the kernels' layout, and packed again in tinygemm's."""
    from torchao.quantization import Int4TilePackedTo4dTensor

    from qlab_kernels import unpack

    n, k, group = packed.n, packed.k, packed.group
    codes, scales, zeros = unpack(cuda.launched(packed))
    offsets = torch.zeros_like(scales) if zeros is None else -zeros * scales
    pad_n, pad_k = -n % TILE_N, -k % TILE_K
    u = F.pad((codes + 8).to(torch.uint8), (0, pad_k, 0, pad_n), value=8)
    bytes_nk = (u[:, ::2] << 4 | u[:, 1::2]).contiguous()
    words = torch.ops.aten._convert_weight_to_int4pack(bytes_nk, 8)
    pairs = F.pad(torch.stack([scales, offsets], -1), (0, 0, 0, pad_k // group, 0, pad_n))
    return Int4TilePackedTo4dTensor(
        words, pairs.transpose(0, 1).contiguous(), [1, group], torch.Size((n, k))
    )
