"""The Hugging Face door: after `import qlab.hf`, `from_pretrained` gives the lowered model of a
quantized directory.

Importing this module is the explicit act. From then on, and until the process ends, every
quant_method that qlab reads is qlab's in transformers, also those that transformers has a reader of
its own for, and so are directories of older writers that say it in a file beside config.json. The
directory's codes go straight into lowered modules; everything else is loaded by transformers as
always, with its `dtype` and `device_map`.
"""

import re
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlab.algebra.qtensor import dense
from qlab.codecs import READERS
from qlab.errors import QlabError
from qlab.hf.config import (
    QlabConfig,
    get_config_dict,
    merge_quantization_configs,
    supports_quant_method,
)
from qlab.hf.loading import joined, make_room
from qlab.hf.refusals import (
    checkpoint_of,
    refuse_another_class,
    refuse_experts_implementation,
    refuse_infinite,
    refuse_missing,
    refuse_other_shapes,
)
from qlab.hf.saving import names_of_codes, state_with_codes
from qlab.lowering.around.attended import attend, attended_in, warn_unread
from qlab.lowering.around.inputs import RoundedInput
from qlab.lowering.around.rotated import attach, is_rotated, rotations
from qlab.lowering.assembling import (
    decoded_weights,
    finish,
    make_dense,
    put_weights,
    quantized_weights,
    warn_slow,
)
from qlab.lowering.devices import DTYPES, device_named
from qlab.model.loading import load_leaf
from qlab.model.paper import dtype_in, run_experts_here
from qlab.model.skeleton import Skeleton

# quant_method -> transformers' own config and quantizer
OWN: dict[str, tuple[Any, Any]] = {
    method: (auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method], auto.AUTO_QUANTIZER_MAPPING[method])
    for method in READERS
    if method in auto.AUTO_QUANTIZER_MAPPING
}


class QlabQuantizer(HfQuantizer):
    """Takes quantized linears out of a model before its weights are loaded, and puts packed ones in
    afterwards."""

    is_trainable = True  # by adapters: gradients flow through codes, which have none of their own
    is_compileable = True

    def __new__(cls, config: QuantizationConfigMixin | None = None, **kwargs: Any) -> Any:
        """transformers' own quantizer where a model is to be quantized while it loads, which qlab
        leaves to transformers.

        config: None only where a copy or a pickle is restored.
        """
        if config is None or kwargs.get("pre_quantized", True):
            return super().__new__(cls)
        config_class, quantizer_class = OWN[config.quant_method]
        if isinstance(config, QlabConfig):
            return quantizer_class(config_class.from_dict(config.to_dict()), **kwargs)
        return quantizer_class(config, **kwargs)

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
        checkpoint = checkpoint_of(checkpoint_files)
        self.device, self.skeleton = torch.device(device_map[""]), Skeleton(checkpoint, self.dtype)
        refuse_another_class(self.skeleton, model)
        checkpoint.warn_unapplied()
        refuse_other_shapes(self.skeleton, model)
        refuse_experts_implementation(model)
        self.packed = quantized_weights(self.skeleton)
        self.decoded = decoded_weights(self.skeleton)
        refuse_missing(self.skeleton, model, self.packed, self.decoded)
        make_room(model, self.skeleton, self.packed)
        model._keys_to_ignore_on_load_missing = joined(
            model._keys_to_ignore_on_load_missing, map(re.escape, self.decoded)
        )

    @torch.no_grad()
    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        refuse_infinite(self.skeleton, model)
        put_weights(model, self.skeleton, self.packed, self.dtype, self.device)
        for name in self.decoded:  # in place, since a tied head has the same tensor
            model.get_parameter(name).copy_(dense(load_leaf(self.skeleton, name), self.dtype))
        self._cast_renamed(model)
        attach(model, rotations(self.skeleton), self.device)
        attended = attended_in(self.skeleton)
        checkpoint = self.skeleton.checkpoint
        self.source = checkpoint.path
        self.names = names_of_codes(self.skeleton, self.packed, self.decoded)
        self.beside = [name for extra in checkpoint.extras for name in extra.tensors]
        # the model is copied and pickled with this quantizer, and needs neither any more
        del self.skeleton, self.packed
        if getattr(self.quantization_config, "dequantize", False):
            warn_unread(checkpoint, attended)
            return self._dequantize(model)
        warn_slow(model, self.dtype, self.device)
        # transformers has rules of its own for moving models of the methods that it knows
        model.quantization_method = "qlab"  # type: ignore[assignment]
        run_experts_here(model)
        finish(model, self.device)
        attend(model, attended, self.device)
        return model

    def _cast_renamed(self, model: PreTrainedModel) -> None:
        """Cast to the dtype asked for what transformers loaded under another name than the files',
        and therefore in the files' dtype."""
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtype_in(self.skeleton.model, name))

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
        state = state_with_codes(model, self.source, self.names, self.decoded, self.beside)
        return state, {}


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
