"""A quantized model directory as an ordinary Hugging Face model that runs fast."""

import os

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import QTensor, dense
from qlab.errors import QlabError, warn
from qlab.files.checkpoint import Checkpoint, open_checkpoint
from qlab.lowering.around.attention import use_grouped_attention
from qlab.lowering.around.inputs import RoundedInput
from qlab.lowering.around.rotated import attach, rotations
from qlab.lowering.weights.coded import CodedExperts, CodedLinear, CodedWeight
from qlab.lowering.weights.linear import LinearOfCodes, QExperts, QLinear, QuantizedWeight
from qlab.lowering.weights.nibbles import refusal
from qlab.model.loading import load_leaf, load_outside
from qlab.model.online import at_input
from qlab.model.paper import dtype_in
from qlab.model.pieces import Piece
from qlab.model.skeleton import Skeleton
from qlab.process.surroundings import undisturbed

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@undisturbed
def lower(
    model: Checkpoint | str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    dense_cache: bool = False,
) -> PreTrainedModel:
    """The Hugging Face model of a quantized directory, with a QLinear in the place of every
    quantized linear, and a QExperts in that of every fused weight of experts. Where no int4 kernel
    takes the codes (floats, groups of 16, blocks) it is a CodedLinear or CodedExperts, which hold
    them as bit streams and dequantize for every call; `repr` shows which.

    Codes are packed for `device` while they are loaded, one tensor at a time; the directory stays
    as it is. Everything else (embeddings, even with codes, norms, an unquantized head) is in
    `dtype`, that of the activations too. What the directory rotates or rounds at run time is
    rotated or rounded. `generate()` works, and so does `torch.compile`, with
    `options=inductor_options()` for the fused kernels; the model can be exported.
    dense_cache: keep a dense copy of each weight for products of many tokens; `resident_bytes` says
    what that costs.

    Errors: a directory that is not quantized, a device or dtype without kernels, a tensor that the
    model needs and the files lack. Warns of what is slower than it could be: weights without a
    kernel, or a dtype of activations without one.
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    checkpoint.warn_unapplied()
    where = device_named(device)
    if dtype not in DTYPES:
        raise QlabError(
            f"no kernel takes {dtype} activations; lower to {', '.join(str(d) for d in DTYPES)}"
        )
    if not checkpoint.quantized:
        raise QlabError(
            f"{checkpoint.path} is not quantized, so there is nothing to lower; load it with "
            "transformers"
        )
    skeleton = Skeleton(checkpoint, dtype, where)
    turned = rotations(skeleton)
    packed: dict[tuple[Piece, ...], nn.Module] = {}
    for name, pieces in quantized_weights(skeleton).items():
        held = (*pieces, *_bias(skeleton, name))  # which several blocks may share
        if held not in packed:
            packed[held] = pack(skeleton, name, dtype, where, dense_cache)
        set_module(skeleton.model, name, packed[held])
    for slow in () if dense_cache else slownesses(skeleton.model, dtype, where):
        warn(f"{slow}; dense_cache=True dequantizes once")
    with torch.no_grad():
        load_outside(skeleton, with_head=True)
        _load_blocks(skeleton)
    attach(skeleton.model, turned, where)
    _tie(skeleton)
    if (checkpoint.path / "generation_config.json").is_file():
        skeleton.model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    if where.type == "cpu":
        use_grouped_attention(skeleton.model)
    skeleton.model.save_pretrained = _refuse_saving  # type: ignore[method-assign]
    return skeleton.model.eval()


def _refuse_saving(*_: object, **__: object) -> None:
    raise QlabError(
        "a lowered model holds weights packed for one device, which no reader takes; copy its "
        "directory, or open that with transformers after `import qlab.hf`, whose save_pretrained "
        "writes what was read"
    )


def slownesses(model: nn.Module, dtype: torch.dtype, device: torch.device) -> list[str]:
    """What keeps quantized weights of a lowered model from a kernel, a line for all of a kind, with
    what would help."""
    modules = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    coded = [module.spec for module in modules if isinstance(module, CodedWeight)]
    found = []
    if device.type == "cpu" and dtype != torch.bfloat16 and len(coded) < len(modules):
        found.append(
            f"no int4 kernel on a CPU takes {dtype} activations: every product dequantizes its "
            "weight and is dense. Use torch.bfloat16"
        )
    if coded:
        found.append(
            f"no kernel takes the codes of {len(coded)} weights "
            f"({', '.join(sorted(set(coded)))}): every product dequantizes them and is dense. "
            "Kernels read integers in groups of 32, 64, 128, 256 or whole rows"
        )
    return found


def device_named(device: torch.device | str) -> torch.device:
    """A device that has kernels; refuses others by name."""
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise QlabError(f"{device!r} is no device; lower to 'cpu' or 'cuda'") from error
    if where.type not in ("cpu", "cuda"):
        raise QlabError(f"there are no int4 kernels for {where.type}; lower to 'cpu' or 'cuda'")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count() > 0:
        raise QlabError(
            f"there is no {where} here; torch finds {torch.cuda.device_count()} of them, counted "
            "from 0"
        )
    if where.type == "cuda" and not torch.cuda.is_available():
        raise QlabError(
            "torch finds no CUDA device here; lower to 'cpu', or install a CUDA build of torch "
            "on a machine with a GPU"
        )
    return where


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


def _bias(skeleton: Skeleton, name: str) -> tuple[Piece, ...]:
    bias = f"{name}.bias"
    return skeleton.names.pieces(bias) if bias in dict(skeleton.model.named_parameters()) else ()


def decoded_weights(skeleton: Skeleton) -> dict[str, str]:
    """Every other parameter whose codes the directory holds, such as an embedding's, and the module
    that has them: it is dense in the lowered model."""
    packed = {f"{name}.weight" for name in skeleton.names.linears()}
    held = {
        name: skeleton.names.pieces(name)[0]
        for name, p in skeleton.model.named_parameters()
        if p.ndim < 3 and name not in packed
    }
    return {
        name: piece.module
        for name, piece in held.items()
        if piece.module in skeleton.checkpoint.quantized and piece.name == f"{piece.module}.weight"
    }


def pack(
    skeleton: Skeleton,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    dense_cache: bool = False,
) -> nn.Module:
    """What stands in for a quantized weight of the model: its codes packed for the device's kernel,
    or as they are where it has none; an ordinary linear where the format's layout is no grid of
    qlab's, so that the weight has no codes."""
    fused = name in dict(skeleton.model.named_parameters())
    weight = name if fused else f"{name}.weight"
    leaf, parameter = load_leaf(skeleton, weight), skeleton.model.get_parameter(weight)
    if sorted(leaf.shape) != sorted(parameter.shape):
        raise QlabError(
            f"{skeleton.names.pieces(weight)[0].module} holds a weight {tuple(leaf.shape)} and the "
            f"model wants {tuple(parameter.shape)}; its config.json belongs to another model"
        )
    inputs = next((op for op in at_input(skeleton, name) if isinstance(op, QuantizeInput)), None)
    coded = isinstance(leaf, QTensor) and refusal(leaf.spec, leaf.shape) is not None
    if fused:
        if not isinstance(leaf, QTensor):
            raise QlabError(
                f"{name} has experts without codes of a grid, which no lowered module holds; "
                "evaluate the directory with qlab"
            )
        return (CodedExperts if coded else QExperts)(name, leaf, dtype, device, dense_cache, inputs)
    linear = skeleton.model.get_submodule(name)
    bias = None if linear.bias is None else dense(load_leaf(skeleton, f"{name}.bias"))
    if isinstance(leaf, QTensor):
        return (CodedLinear if coded else QLinear)(
            name, leaf, bias, dtype, device, dense_cache, inputs
        )
    return _plain(leaf, bias, dtype_in(skeleton.model, weight), device)


def _plain(
    W_nk: Tensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device
) -> nn.Linear:
    linear = nn.Linear(W_nk.shape[1], W_nk.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(W_nk.to(device, dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)
    return linear


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, or of a parameter."""
    owner, key = _owner(model, name), name.rpartition(".")[2]
    owner._parameters.pop(key, None)
    setattr(owner, key, module)


def make_dense(model: nn.Module) -> None:
    """Put a dense weight in the place of every quantized one, in the dtype of the activations, and
    none of its codes."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, QuantizedWeight):
            continue
        weight = module.dequantized().contiguous()
        if isinstance(module, LinearOfCodes):
            set_module(model, name, _plain(weight, module.bias, weight.dtype, weight.device))
        else:  # fused experts, which some models hold transposed
            owner, key = _owner(model, name), name.rpartition(".")[2]
            delattr(owner, key)
            weight = weight.mT.contiguous() if owner.is_transposed else weight
            setattr(owner, key, nn.Parameter(weight, requires_grad=False))


def _load_blocks(skeleton: Skeleton) -> None:
    """The parameters of the blocks that stayed on meta, and the buffers that the files hold."""
    for name, parameter in list(skeleton.model.named_parameters(remove_duplicate=False)):
        if parameter.is_meta:
            leaf = dense(load_leaf(skeleton, name), parameter.dtype)
            value = nn.Parameter(leaf.to(skeleton.device), requires_grad=False)
            _owner(skeleton.model, name)._parameters[name.rpartition(".")[2]] = value
    for name, buffer in list(skeleton.model.named_buffers()):
        if isinstance(_owner(skeleton.model, name), QuantizedWeight | RoundedInput):
            # a file may have a tensor of the same name, such as `scales`, and it is not this one
            continue
        if stored := skeleton.names.stored_buffer(name):
            _owner(skeleton.model, name)._buffers[name.rpartition(".")[2]] = (
                skeleton.checkpoint.tensor(stored).to(buffer)
            )


def _tie(skeleton: Skeleton) -> None:
    """One parameter for all names that it has; what config.json ties and the files hold apart stays
    so, whoever ties again."""
    model, held = skeleton.model, dict(skeleton.model.named_parameters())
    for name, other in skeleton.names.tied.items():
        if name in held and other in held:
            _owner(model, name)._parameters[name.rpartition(".")[2]] = held[other]
    if skeleton.names.apart:
        model.all_tied_weights_keys = dict(skeleton.names.tied)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def resident_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's tensors by what they are: quantized weights, dense copies, embeddings (a
    tied head with them), the rest."""
    seen: set[int] = set()
    total = {"packed": 0, "dense copies": 0, "embeddings": 0, "other": 0}

    def add(kind: str, *tensors: torch.Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None and tensor.untyped_storage().data_ptr() not in seen:
                seen.add(tensor.untyped_storage().data_ptr())
                total[kind] += tensor.untyped_storage().nbytes()

    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            add("packed", *module.held())
            add("dense copies", module.dense)
        elif isinstance(module, nn.Embedding):
            add("embeddings", module.weight)
    add("other", *model.parameters(), *model.buffers())
    return total
