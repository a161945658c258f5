"""The Hugging Face door: after `import qlab.hf`, `from_pretrained` gives the lowered model of a
quantized directory.

Importing this module is the explicit act. From then on, and until the process ends, every
quant_method that qlab reads is qlab's in transformers, also those that transformers has a reader of
its own for, and so are directories of older writers that say it in a file beside config.json. The
directory's codes go straight into lowered modules; everything else is loaded by transformers as
always, with its `dtype` and `device_map`.
"""

import copy
import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlab.algebra.graph import refuse_overflow
from qlab.algebra.qtensor import dense
from qlab.codecs import LEGACY_CONFIGS, READERS, reader
from qlab.errors import QlabError, warn
from qlab.files.checkpoint import Checkpoint, open_checkpoint
from qlab.files.directory import locate, read_json
from qlab.files.explained import KEY, refuse_unexplained, said_in
from qlab.lowering.around.attention import use_grouped_attention
from qlab.lowering.around.inputs import RoundedInput
from qlab.lowering.around.rotated import attach, is_rotated, rotations
from qlab.lowering.model import (
    DTYPES,
    decoded_weights,
    device_named,
    make_dense,
    pack,
    quantized_weights,
    set_module,
    slownesses,
)
from qlab.model.loading import load_leaf
from qlab.model.paper import dtype_in, run_experts_here
from qlab.model.skeleton import Skeleton


class QlabConfig(QuantizationConfigMixin):
    """A directory's quantization_config, kept word for word: what is saved is what was read.

    dequantize: whether from_pretrained was asked for an ordinary dense model, which holds no codes
    any more.
    """

    def __init__(self, raw: dict[str, Any], dequantize: bool = False):
        self.raw, self.quant_method, self.dequantize = raw, raw["quant_method"], dequantize

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The config; transformers' own options have no place in it."""
        config = cls(copy.deepcopy(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.raw)


class Awaiting(nn.Module):
    """Stands where a packed linear will be, without parameters that transformers could look for or
    fill at random.

    weight, bias: what modules that initialize those of their children (gpt2's, CLIP's) find, marked
    as done.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = self.bias = torch.empty(0, dtype=torch.float32)
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]


class QlabQuantizer(HfQuantizer):
    """Takes quantized linears out of a model before its weights are loaded, and puts packed ones in
    afterwards."""

    is_trainable = (
        True  # adapters on top: gradients flow through codes, which have none of their own
    )
    is_compileable = True

    def __new__(cls, config: QuantizationConfigMixin | None = None, **kwargs: Any) -> Any:
        """transformers' own quantizer where it is asked to quantize a model while it loads, which
        is none of qlab's business.

        config: None only where a copy or a pickle is made whole.
        """
        if config is None or kwargs.get("pre_quantized", True):
            return super().__new__(cls)
        method = config.quant_method
        own = (
            OWN[method][0].from_dict(config.to_dict()) if isinstance(config, QlabConfig) else config
        )
        return OWN[method][1](own, **kwargs)

    def is_serializable(self) -> bool:
        return True

    def update_device_map(self, device_map: Any) -> Any:
        """One device for the whole model; 'auto' is the GPU where there is one."""
        if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            return {"": "cuda" if torch.cuda.is_available() else "cpu"}
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map or "cpu"}
        if len(places) > 1:
            raise QlabError(
                f"device_map names {', '.join(sorted(map(str, places)))}; qlab puts a model on "
                "one device"
            )
        place = places.pop()
        return {"": device_named(f"cuda:{place}" if isinstance(place, int) else place)}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The activations' dtype, which is refused where no kernel takes it."""
        if dtype not in DTYPES:
            raise QlabError(
                f"no kernel takes {dtype} activations; load with dtype "
                f"{', '.join(str(d) for d in DTYPES)}"
            )
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(  # type: ignore[override]
        self,
        model: PreTrainedModel,
        device_map: Any,
        checkpoint_files: list[str] | None,
        **kwargs: Any,
    ) -> None:
        checkpoint = _checkpoint_of(checkpoint_files)
        self.device, self.skeleton = torch.device(device_map[""]), Skeleton(checkpoint, self.dtype)
        if type(self.skeleton.model) is not type(model):
            raise QlabError(
                f"{checkpoint.path} holds a {type(self.skeleton.model).__name__} and not a "
                f"{type(model).__name__}; load it with the auto class of its own architecture"
            )
        checkpoint.warn_unapplied()
        _refuse_another(checkpoint.path, self.skeleton.model, model)
        _refuse_experts_implementation(model)
        self.packed = quantized_weights(self.skeleton)
        self.decoded = decoded_weights(self.skeleton)
        self._refuse_missing(model)
        ours: set[str] = set()
        for name, pieces in self.packed.items():
            parts = {piece.module: checkpoint.parts(piece.module) for piece in pieces}
            ours |= {re.escape(part) for own in parts.values() for part in own}
            place = _at(model, name)
            if isinstance(place, nn.Module):
                ours |= {
                    re.escape(f"{name}.{part.rpartition('.')[2]}")
                    for own in parts.values()
                    for part in own
                }
                k, o = place.get_parameter("weight").shape[
                    :: 1 if name in self.skeleton.names.transposed else -1
                ]
                set_module(model, name, Awaiting(k, o))
            else:
                # experts go by numbers under their owner, whatever the files call that, or as if
                # codes were weights of theirs
                ours |= {
                    re.escape(name.rpartition(".")[0]) + r"\.0\..+",
                    re.escape(name) + "(_.+)?",
                }
                set_module(model, name, Awaiting(*place.shape[:0:-1]))
        ours |= {re.escape(name) for extra in checkpoint.extras for name in extra.tensors}
        ours |= {
            re.escape(part) for module in checkpoint.quantized for part in checkpoint.parts(module)
        }  # also of layers not built
        for coded in self.packed:  # codes are no other parameter's too
            model.all_tied_weights_keys.pop(f"{coded}.weight", None)
        families = {re.sub(r"\d+", r"\\d+", pattern) for pattern in ours}
        unexpected = {f"^{family}$" for family in families}
        model._keys_to_ignore_on_load_unexpected = _joined(
            model._keys_to_ignore_on_load_unexpected, unexpected
        )
        model._keys_to_ignore_on_load_missing = _joined(
            model._keys_to_ignore_on_load_missing, map(re.escape, self.decoded)
        )

    def _refuse_missing(self, model: PreTrainedModel) -> None:
        """transformers fills what a directory lacks at random and says so in a table; here it is an
        error."""
        checkpoint, packed = (
            self.skeleton.checkpoint,
            {*self.packed, *(f"{name}.weight" for name in self.packed), *self.decoded},
        )
        codes = {f"{name}.weight" for name in self.packed}
        tied = {name for name, other in self.skeleton.names.tied.items() if other not in codes}
        for name, _ in self.skeleton.model.named_parameters():
            lacking = [
                piece.name
                for piece in self.skeleton.names.pieces(name)
                if piece.name not in checkpoint.stored
            ]
            if lacking and name not in packed | tied:
                raise QlabError(
                    f"{checkpoint.path} has no tensor {lacking[0]}, which {type(model).__name__} "
                    "needs; the download may be incomplete, or the tensors have names that only "
                    "a key_mapping explains, which qlab does not apply to codes"
                )

    def _refuse_overflow(self, model: PreTrainedModel) -> None:
        """transformers lets a number that the dtype asked for does not hold become Inf; here it is
        an error."""
        checkpoint = self.skeleton.checkpoint
        for name, parameter in model.named_parameters():
            stored = self.skeleton.names.file_name(name)
            if stored in checkpoint.stored and parameter.isinf().any():
                refuse_overflow(
                    f"{checkpoint.path}: {name}", checkpoint.tensor(stored), parameter.dtype
                )

    @torch.no_grad()
    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        self._refuse_overflow(model)
        for name in self.packed:
            set_module(model, name, pack(self.skeleton, name, self.dtype, self.device))
        for name in self.decoded:  # in place, since a tied head has the same
            model.get_parameter(name).copy_(dense(load_leaf(self.skeleton, name), self.dtype))
        self._cast_renamed(model)
        attach(model, rotations(self.skeleton), self.device)
        checkpoint = self.skeleton.checkpoint
        self.source, self.held = checkpoint.path, self._held()
        self.beside = [name for extra in checkpoint.extras for name in extra.tensors]
        del (
            self.skeleton,
            self.packed,
        )  # the model is whole, and is copied and pickled with this quantizer
        if getattr(self.quantization_config, "dequantize", False):
            return self._dequantize(model)
        for slow in slownesses(model, self.dtype, self.device):
            warn(slow)
        # transformers has rules of its own for moving models of the methods that it knows
        model.quantization_method = "qlab"  # type: ignore[assignment]
        run_experts_here(model)
        if self.device.type == "cpu":
            use_grouped_attention(model)
        return model

    def _cast_renamed(self, model: PreTrainedModel) -> None:
        """What transformers loaded under another name than the files', and therefore in the files'
        dtype, in the one asked for."""
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtype_in(self.skeleton.model, name))

    def _held(self) -> dict[str, dict[str, str]]:
        """Quantized weight -> the names that its tensors have in what is saved, and those that they
        have in the files."""
        held: dict[str, dict[str, str]] = {}
        for name, pieces in self.packed.items():
            parts = [
                part for piece in pieces for part in self.skeleton.checkpoint.parts(piece.module)
            ]
            fused = pieces[0].expert is not None
            held[name] = {
                part if fused else f"{name}.{part.rpartition('.')[2]}": part for part in parts
            }
        for name, module in self.decoded.items():
            owner = name.rpartition(".")[0]
            held[owner] = {
                f"{owner}.{part.rpartition('.')[2]}": part
                for part in self.skeleton.checkpoint.parts(module)
            }
        return held

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """An ordinary model of dense weights; refused where it would not compute what the codes
        do."""
        for name, module in model.named_modules():
            if is_rotated(module) or isinstance(module, RoundedInput):
                raise QlabError(
                    f"{self.source}: {name} rotates or rounds at run time, which no dense weight "
                    "does; load the model without dequantize"
                )
        make_dense(model)
        return model if dtype is None else model.to(dtype=dtype)  # type: ignore[call-arg]

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The codes as the directory holds them, which must still be there, and everything else as
        the model holds it."""
        checkpoint = open_checkpoint(self.source)
        state: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if self.held.keys().isdisjoint(
                (name, name.rpartition(".")[0])
            ):  # a linear, and what rounds its input
                own = (
                    module.named_parameters(name, recurse=False),
                    module.named_buffers(name, recurse=False),
                )
                kept = {
                    f"{name}.{key}" if name else key for key in module._non_persistent_buffers_set
                }
                state |= {
                    key: tensor for tensors in own for key, tensor in tensors if key not in kept
                }
        decoded = [model.get_parameter(name) for name in self.decoded]
        state = {
            name: tensor
            for name, tensor in state.items()
            if not any(tensor is own for own in decoded)
        }  # a tied head's as well
        for names in self.held.values():
            state |= {name: checkpoint.tensor(part) for name, part in names.items()}
        return state | {name: checkpoint.tensor(name) for name in self.beside}, {}


def _joined(known: set[str] | list[str] | None, more: Iterable[str]) -> set[str] | list[str]:
    """What a model ignores and more, as what transformers adds its own patterns to: a set, or in
    older releases a list."""
    together = {*(known or ()), *more}
    return together if isinstance(known, set) else sorted(together)


def _checkpoint_of(files: Sequence[str] | None) -> Checkpoint:
    """The directory that from_pretrained reads; refuses other weights than those that it would
    hold."""
    if not files:
        raise QlabError(
            "from_pretrained was given no files (state_dict, or a config alone), and qlab takes "
            "codes from files; give a model directory"
        )
    checkpoint = open_checkpoint(Path(files[0]).parent)
    if others := {Path(file).name for file in files} - {
        file.name for file in checkpoint.files.values()
    }:
        raise QlabError(
            f"from_pretrained chose {sorted(others)[0]} (by variant or use_safetensors) and qlab "
            f"reads the codes of {checkpoint.path} from "
            f"{next(iter(checkpoint.files.values())).name}; leave out the option"
        )
    return checkpoint


def _refuse_experts_implementation(model: PreTrainedModel) -> None:
    """Refuse the option where it would be without effect: quantized experts have one forward."""
    asked = getattr(model.config, "_experts_implementation", None)
    if asked in ("eager", "batched_mm") and asked != model.get_correct_experts_implementation(None):
        raise QlabError(
            f"quantized experts have an implementation of their own, and {asked!r} was asked for; "
            "leave out experts_implementation"
        )


def _refuse_another(path: Path, ours: nn.Module, theirs: nn.Module) -> None:
    """Refuse a model that options of from_pretrained have made another one than the directory's."""
    held, wanted = (
        {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        for model in (ours, theirs)
    )
    if other := sorted(
        name for name in held.keys() | wanted.keys() if held.get(name) != wanted.get(name)
    ):
        found = f"of shape {held[other[0]]}" if other[0] in held else "not"
        raise QlabError(
            f"{path} is of another model than from_pretrained was asked for: {other[0]} is "
            f"{found} in it; leave out what changes the config, or change the directory's "
            "config.json"
        )


def _at(model: nn.Module, name: str) -> Any:
    """The submodule or the parameter of this name."""
    owner, _, key = name.rpartition(".")
    return getattr(model.get_submodule(owner), key)


# transformers' options for where to look for a file
FINDING = frozenset(
    {"cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder"}
)
_get_config_dict = PretrainedConfig.get_config_dict.__func__  # type: ignore[attr-defined]


def get_config_dict(
    cls: type[PretrainedConfig], path: Any, **kwargs: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model's config.json. Where it has no quantization_config, one is made of what a part of it
    says, or of the file in which older writers put it: to transformers such a model would be an
    unquantized one whose weights are all missing."""
    options = {key: kwargs[key] for key in FINDING & kwargs.keys()}
    found, unused = _get_config_dict(cls, path, **kwargs)
    said = found.get(KEY)
    if said and not isinstance(said, dict):
        raise QlabError(f"{path} has a {KEY} that is no object but {said!r:.40}; download it again")
    if found and not found.get(KEY) and not kwargs.get("gguf_file") and not Path(path).is_file():
        if said := said_in(found, str(path)):
            return found | {KEY: said}, unused
        for name, read in LEGACY_CONFIGS.items():
            if file := cached_file(
                path, name, _raise_exceptions_for_missing_entries=False, **options
            ):
                return found | {KEY: read(read_json(Path(file)))}, unused
        if any(
            Path(path).glob("*.safetensors")
        ):  # where weights are codes, transformers would fill them in at random
            refuse_unexplained(Path(path), locate(Path(path)), (), ())
    return found, unused


_supports = auto.AutoHfQuantizer.supports_quant_method


def supports_quant_method(said: dict[str, Any]) -> bool:
    """Whether transformers has a quantizer for a directory. Refuses a method that neither qlab nor
    transformers reads, of which transformers would warn, and fill in at random what is stored as
    codes."""
    method = said.get("quant_method")
    flagged = said.get("load_in_4bit") or said.get(
        "load_in_8bit"
    )  # bitsandbytes, in an older spelling
    if method not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING and not flagged:
        reader(said)
    return _supports(said)


_merge_configs = auto.AutoHfQuantizer.merge_quantization_configs.__func__  # type: ignore[attr-defined]


def merge_quantization_configs(cls: type[auto.AutoHfQuantizer], ours: Any, asked: Any) -> Any:
    """A directory's own config, with what an option `quantization_config` of from_pretrained may
    add to it: dequantize.

    Refuses one of another method. What it says about kernels, and about numbers that the directory
    fixes, has no effect and is named.
    """
    method = ours.get("quant_method") if isinstance(ours, dict) else ours.quant_method
    if asked is None or auto.AUTO_QUANTIZATION_CONFIG_MAPPING.get(method or "") is not QlabConfig:
        return _merge_configs(cls, ours, asked)
    said = asked if isinstance(asked, dict) else asked.to_dict()
    theirs = getattr(said.get("quant_method"), "value", said.get("quant_method"))
    if theirs != getattr(method, "value", method):
        raise QlabError(
            f"the directory is quantized by {method} and quantization_config asks for {theirs}; "
            "leave the option out, or load an unquantized model"
        )
    raw = copy.deepcopy(ours if isinstance(ours, dict) else ours.to_dict())
    loading: dict[str, Any] = (
        {} if isinstance(asked, dict) else getattr(asked, "get_loading_attributes", dict)()
    )
    dequantize = bool((said | loading).get("dequantize"))
    defaults = {
        name: given.default
        for name, given in inspect.signature(type(asked).__init__).parameters.items()
    }
    chosen = {
        key: value for key, value in said.items() if key not in defaults or value != defaults[key]
    }
    if others := sorted(
        key for key in chosen.keys() & raw.keys() - {"quant_method"} if chosen[key] != raw[key]
    ):
        written = ", ".join(f"{key} {raw[key]!r}" for key in others)
        warn(
            f"the directory says {written}; quantization_config changes nothing of what is "
            "written there"
        )
    if kernels := sorted(
        key for key, value in loading.items() if key != "dequantize" and value and value != "auto"
    ):
        warn(
            f"{', '.join(kernels)} of quantization_config chooses other kernels than qlab's and "
            "has no effect"
        )
    return QlabConfig(raw, dequantize)


# quant_method -> transformers' own config and quantizer
OWN: dict[str, tuple[Any, Any]] = {
    method: (auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method], auto.AUTO_QUANTIZER_MAPPING[method])
    for method in READERS
    if method in auto.AUTO_QUANTIZER_MAPPING
}


def register() -> None:
    """Make every quant_method that qlab reads qlab's, also where a file beside config.json names
    it."""
    PretrainedConfig.get_config_dict = classmethod(get_config_dict)  # type: ignore[method-assign,assignment]
    auto.AutoHfQuantizer.merge_quantization_configs = classmethod(merge_quantization_configs)  # type: ignore[method-assign,assignment]
    auto.AutoHfQuantizer.supports_quant_method = staticmethod(supports_quant_method)  # type: ignore[method-assign]
    for method in READERS:
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = QlabConfig
        auto.AUTO_QUANTIZER_MAPPING[method] = QlabQuantizer


register()
