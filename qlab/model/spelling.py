"""Which parameter of a model each tensor of its files is loaded into, by transformers' rules."""

from collections.abc import Hashable, Iterable, Mapping

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def spellings(model: PreTrainedModel, stored: Iterable[str]) -> Mapping[str, str]:
    """The model's name of every tensor -> its stored name, which transformers may rename when it
    loads them."""
    renamings = [
        rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)
    ]
    known = model.state_dict()
    return {
        rename_source_key(name, renamings, [], model.base_model_prefix, known)[0]: name
        for name in sorted(stored)
    }


def identities(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, Hashable]:
    """Stored name -> what transformers loads it into: a parameter's name, or a part of a parameter
    that it joins from several."""
    identity_of: dict[str, Hashable] = {}
    for name, (place, pattern) in _places(model, stored).items():
        numbers = tuple(part for part in name.split(".") if part.isdigit())
        identity_of[name] = place if pattern is None or place == name else (place, pattern, numbers)
    return identity_of


def is_converted(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers makes something else of a stored tensor when it loads it: flattens,
    joins, cuts or transposes it."""
    return _places(model, [name])[name][1] is not None


def _places(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """Stored name -> the parameter that it goes into, and the rule by which transformers converts
    it on the way, if there is one."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    places: dict[str, tuple[str, str | None]] = {}
    for name in sorted(stored):
        places[name] = rename_source_key(name, renamings, converters, prefix, known)
        if places[name][0] not in known and name in known:  # a rule for names of other files
            places[name] = rename_source_key(name, [], [], prefix, known)
    return places
