"""qlab: quantization of language models as pure functional transforms over module graphs.

The imports below are the public names. Each runs when its name is first asked for, so that `qlab --help` and headers wait
for neither torch nor transformers.
"""

import ast
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import qlab.quiet  # noqa: F401  before anything that it quietens is imported

if TYPE_CHECKING:
    from qlab.absorb import absorb
    from qlab.calibration import Tokens, first_windows, from_ids, tokens
    from qlab.convert import convert
    from qlab.errors import QlabError
    from qlab.evaluate import evaluate, perplexity
    from qlab.grid import GRIDS
    from qlab.hub import open_model as open
    from qlab.images import Samples, image_samples
    from qlab.inspection import inspect
    from qlab.lower import inductor_options, lower, to_torchao
    from qlab.methods import METHODS
    from qlab.methods.awq import awq, awq_scale
    from qlab.methods.gptaq import aim_at_reference, gptaq
    from qlab.methods.gptq import gptq
    from qlab.methods.rtn import rtn
    from qlab.model_free import quantize_files
    from qlab.plan import plan
    from qlab.quantize import compare, quantize
    from qlab.results import results
    from qlab.spec import Int, Tile, parse_spec
    from qlab.transform import at, chain, each_weight, keep, outside, reparametrize, rules
    from qlab.verify import verify

__all__ = [
    "GRIDS", "METHODS", "Int", "QlabError", "Samples", "Tile", "Tokens", "absorb", "aim_at_reference", "at", "awq", "awq_scale",
    "chain", "compare", "convert", "each_weight", "evaluate", "first_windows", "from_ids", "gptaq", "gptq", "image_samples",
    "inductor_options", "inspect", "keep", "lower", "open", "outside", "parse_spec", "perplexity", "plan", "quantize", "quantize_files",
    "reparametrize", "results", "rtn", "rules", "to_torchao", "tokens", "verify",
]  # fmt: skip


def _homes() -> dict[str, tuple[str, str]]:
    """Public name -> the module that holds it and its name there, read off the imports above."""
    statements = ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
    found = [(node.module or "", alias) for node in statements if isinstance(node, ast.ImportFrom) for alias in node.names]
    return {alias.asname or alias.name: (module, alias.name) for module, alias in found if module.startswith("qlab.")}


def installed_version() -> str:
    """The version of qlab, or what is to be said where its source is used without an installation."""
    try:
        return version("qlab")
    except PackageNotFoundError:
        return "of a source tree that is not installed"


class _Package(ModuleType):
    """A public name goes before the submodule of the same name (`plan`, `quantize`), whichever is imported first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in __all__ or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return installed_version()
        if name not in __all__:
            raise AttributeError(f"module 'qlab' has no attribute {name!r}")
        module, theirs = _homes()[name]
        held = getattr(import_module(module), theirs)
        setattr(self, name, import_module("qlab.doors").door(name, held))
        return vars(self)[name]


sys.modules[__name__].__class__ = _Package
