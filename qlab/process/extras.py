"""Libraries that only parts of qlab need, each of which an extra of the package installs."""

from importlib import import_module
from types import ModuleType

from qlab.errors import QlabError


def needed(library: str, extra: str) -> ModuleType:
    """The module of a library that `extra` installs; refuses in a sentence where it is missing."""
    try:
        return import_module(library)
    except ImportError as error:
        raise QlabError(
            f"{library} is not installed; `pip install 'qlab[{extra}]'` brings it"
        ) from error
