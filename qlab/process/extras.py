"""Libraries that only some of qlab's work needs, each brought by one of its extras."""

from importlib import import_module
from types import ModuleType

from qlab.errors import QlabError


def needed(library: str, extra: str) -> ModuleType:
    """A library that the rest of qlab does without; one sentence where it is not installed."""
    try:
        return import_module(library)
    except ImportError as error:
        raise QlabError(
            f"{library} is not installed; `pip install 'qlab[{extra}]'` brings it"
        ) from error
