"""What transformers is told of a directory's quantization: its config, where older writers put it,
and what options of from_pretrained may add to it."""

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.quantizers import auto
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlab.codecs import LEGACY_CONFIGS, reader
from qlab.errors import QlabError, warn
from qlab.files.directory import locate, read_json
from qlab.files.explained import KEY, refuse_unexplained, said_in

# transformers' options for where to look for a file
FINDING = frozenset(
    {"cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder"}
)
_get_config_dict = PretrainedConfig.get_config_dict.__func__  # type: ignore[attr-defined]
_supports = auto.AutoHfQuantizer.supports_quant_method
_merge_configs = auto.AutoHfQuantizer.merge_quantization_configs.__func__  # type: ignore[attr-defined]


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


def get_config_dict(
    cls: type[PretrainedConfig], path: Any, **kwargs: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model's config.json, in the place of transformers' own method.

    Where it has no quantization_config, one is made of what a part of it says, or of the file in
    which older writers put it: transformers would take the model for an unquantized one whose
    weights are all missing.
    """
    config, unused = _get_config_dict(cls, path, **kwargs)
    section = config.get(KEY)
    if section and not isinstance(section, dict):
        raise QlabError(
            f"{path} has a {KEY} that is no object but {section!r:.40}; download it again"
        )
    if not config or section or kwargs.get("gguf_file") or Path(path).is_file():
        return config, unused
    section = said_in(config, str(path)) or _older_section(path, kwargs)
    if section:
        return config | {KEY: section}, unused
    if any(Path(path).glob("*.safetensors")):
        # transformers would fill weights that are stored as codes at random
        refuse_unexplained(Path(path), locate(Path(path)), (), ())
    return config, unused


def _older_section(path: Any, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config that a file beside config.json stands for, or None where no older
    writer left one."""
    finding = {key: options[key] for key in FINDING & options.keys()}
    for name, read in LEGACY_CONFIGS.items():
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **finding)
        if file:
            return read(read_json(Path(file)))
    return None


def supports_quant_method(section: dict[str, Any]) -> bool:
    """Whether transformers has a quantizer for a directory.

    Refuses a method that neither qlab nor transformers reads: transformers would only warn, and
    fill at random what is stored as codes.
    """
    method = section.get("quant_method")
    # bitsandbytes, in an older spelling
    has_flag = section.get("load_in_4bit") or section.get("load_in_8bit")
    if method not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING and not has_flag:
        reader(section)
    return _supports(section)


def merge_quantization_configs(cls: type[auto.AutoHfQuantizer], ours: Any, asked: Any) -> Any:
    """A directory's own config, with what an option `quantization_config` of from_pretrained may
    add to it: dequantize.

    Refuses an option for another method. What it says about kernels, and about numbers that the
    directory fixes, has no effect and is named.
    """
    method = ours.get("quant_method") if isinstance(ours, dict) else ours.quant_method
    if asked is None or auto.AUTO_QUANTIZATION_CONFIG_MAPPING.get(method or "") is not QlabConfig:
        return _merge_configs(cls, ours, asked)
    options = asked if isinstance(asked, dict) else asked.to_dict()
    asked_method = getattr(options.get("quant_method"), "value", options.get("quant_method"))
    if asked_method != getattr(method, "value", method):
        raise QlabError(
            f"the directory is quantized by {method} and quantization_config asks for "
            f"{asked_method}; leave the option out, or load an unquantized model"
        )
    raw = copy.deepcopy(ours if isinstance(ours, dict) else ours.to_dict())
    loading: dict[str, Any] = {}
    if not isinstance(asked, dict):
        loading = getattr(asked, "get_loading_attributes", dict)()
    _warn_of_fixed(raw, _chosen(asked, options))
    _warn_of_kernels(loading)
    return QlabConfig(raw, bool((options | loading).get("dequantize")))


def _chosen(asked: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that differ from the defaults of their config's class."""
    parameters = inspect.signature(type(asked).__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    return {
        key: value
        for key, value in options.items()
        if key not in defaults or value != defaults[key]
    }


def _warn_of_fixed(raw: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    """Name the options that differ from what the directory says."""
    shared_keys = chosen.keys() & raw.keys() - {"quant_method"}
    differing_keys = sorted(key for key in shared_keys if chosen[key] != raw[key])
    if differing_keys:
        written = ", ".join(f"{key} {raw[key]!r}" for key in differing_keys)
        warn(
            f"the directory says {written}; quantization_config changes nothing of what is "
            "written there"
        )


def _warn_of_kernels(loading: Mapping[str, Any]) -> None:
    """Name the options that choose kernels of transformers."""
    names = [key for key, value in loading.items() if value and value != "auto"]
    kernels = sorted(key for key in names if key != "dequantize")
    if kernels:
        warn(
            f"{', '.join(kernels)} of quantization_config chooses other kernels than qlab's and "
            "has no effect"
        )
