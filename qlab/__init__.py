"""qlab: quantization of language models as pure functional transforms over module graphs.

`HOMES` holds the public names. Each is loaded when it is first asked for, so that `qlab --help` and
headers wait for neither torch nor transformers. Editors and type checkers read `__init__.pyi`.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import qlab.process.quiet  # noqa: F401  before anything that it quietens is imported

# public name -> the module that holds it
HOMES = {
    "Block": "qlab.algebra.block",
    "Cell": "qlab.algebra.cell",
    "Feasible": "qlab.algebra.cell",
    "GRIDS": "qlab.methods.grid",
    "METHODS": "qlab.methods",
    "Int": "qlab.algebra.spec",
    "LowRank": "qlab.algebra.leaf",
    "Model": "qlab.driver.model",
    "PRUNERS": "qlab.methods",
    "QTensor": "qlab.algebra.qtensor",
    "QlabError": "qlab.errors",
    "RANGES": "qlab.methods.inputs",
    "RECOMMENDED": "qlab.methods",
    "Samples": "qlab.data.images",
    "Scheme": "qlab.methods.schemes",
    "Stat": "qlab.algebra.statistic",
    "Sum": "qlab.algebra.leaf",
    "Tile": "qlab.algebra.tile",
    "Tokens": "qlab.data.calibration",
    "Weight": "qlab.algebra.cell",
    "absorb": "qlab.algebra.absorb",
    "aim_at_reference": "qlab.methods.gptaq",
    "aim_held_out": "qlab.methods.qronos",
    "aim_in_stream": "qlab.methods.loaq",
    "allocate": "qlab.methods.allocate",
    "apply": "qlab.driver.apply",
    "at": "qlab.algebra.transform",
    "auto_round": "qlab.methods.auto_round",
    "auto_round_refine": "qlab.methods.auto_round",
    "attention_inputs": "qlab.methods.kv",
    "awq": "qlab.methods.awq",
    "awq_scale": "qlab.methods.awq",
    "bind": "qlab.algebra.bind",
    "centre_keys": "qlab.methods.centre_keys",
    "chain": "qlab.algebra.transform",
    "compare": "qlab.driver.quantize",
    "convert": "qlab.directories.convert",
    "dense": "qlab.algebra.leaf",
    "difference": "qlab.evaluation.comparison",
    "each_block": "qlab.algebra.block",
    "each_cell": "qlab.algebra.transform",
    "each_weight": "qlab.algebra.transform",
    "eora": "qlab.methods.eora",
    "evaluate": "qlab.evaluation.perplexity",
    "evaluate_tasks": "qlab.evaluation.tasks.evaluate",
    "fisher": "qlab.methods.sensitivity",
    "first_windows": "qlab.data.calibration",
    "from_ids": "qlab.data.calibration",
    "gauge": "qlab.algebra.gauge",
    "gptaq": "qlab.methods.gptaq",
    "gptq": "qlab.methods.gptq",
    "guidedquant": "qlab.methods.guidedquant",
    "image_samples": "qlab.data.images",
    "incoherence": "qlab.methods.rotate",
    "inductor_options": "qlab.lowering",
    "insert": "qlab.algebra.insert",
    "inspect": "qlab.directories.inspect",
    "keep": "qlab.algebra.transform",
    "kl_tune": "qlab.methods.kl_tune",
    "logits": "qlab.evaluation.logits",
    "kl_of_each": "qlab.methods.sensitivity",
    "kv_cache": "qlab.methods.kv",
    "kv_clipped": "qlab.methods.kv_clipped",
    "l2qer": "qlab.methods.lqer",
    "lower": "qlab.lowering",
    "lqer": "qlab.methods.lqer",
    "magnitude": "qlab.methods.magnitude",
    "method": "qlab.methods.names",
    "open": "qlab.demo.hub",
    "outside": "qlab.algebra.transform",
    "over_seeds": "qlab.evaluation.comparison",
    "parse_spec": "qlab.algebra.spec",
    "perplexity": "qlab.evaluation.perplexity",
    "pipeline": "qlab.generation.pipeline",
    "plan": "qlab.driver.plan",
    "rehearse": "qlab.driver.rehearsal",
    "qat": "qlab.methods.qat",
    "qat_end_to_end": "qlab.methods.qat_end_to_end",
    "quantize": "qlab.driver.quantize",
    "quantize_inputs": "qlab.methods.inputs",
    "quantize_files": "qlab.directories.model_free",
    "quarot": "qlab.methods.rotate",
    "reparametrize": "qlab.algebra.reparametrize",
    "results": "qlab.directories.results",
    "rotate_heads": "qlab.methods.rotate",
    "rotate_online": "qlab.methods.rotate",
    "rotate_residual": "qlab.methods.rotate_residual",
    "rotate_scores": "qlab.methods.rotate_scores",
    "rtn": "qlab.methods.rtn",
    "rules": "qlab.algebra.transform",
    "scheme": "qlab.methods.schemes",
    "schemes": "qlab.directories.schemes",
    "smoothquant": "qlab.methods.smoothquant",
    "sparsegpt": "qlab.methods.sparsegpt",
    "spinquant": "qlab.methods.spinquant",
    "solver": "qlab.methods.stages",
    "to_torchao": "qlab.lowering",
    "tokens": "qlab.data.calibration",
    "verify": "qlab.directories.verify",
    "wanda": "qlab.methods.wanda",
    "work": "qlab.cli.working",
    "write": "qlab.driver.write",
}
__all__ = sorted(HOMES)


def installed_version() -> str:
    """The version of qlab; a phrase instead where its source is used without an installation."""
    try:
        return version("qlab")
    except PackageNotFoundError:
        return "of a source tree that is not installed"


def __getattr__(name: str) -> Any:
    """A public name, loaded on first use; functions check their arguments (qlab.arguments)."""
    if name == "__version__":
        return installed_version()
    if name not in HOMES:
        raise AttributeError(f"module 'qlab' has no attribute {name!r}")
    behind_the_door = getattr(import_module(HOMES[name]), name)
    public = import_module("qlab.arguments.doors").door(name, behind_the_door)
    globals()[name] = public
    return public


def __dir__() -> list[str]:
    return [*globals(), *HOMES]
