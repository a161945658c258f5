"""Methods that are quantized into folders of a bench, each with a name of its own."""

import gc
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import qlab
from qlab.algebra.transform import Transform
from qlab.data.calibration import Tokens
from qlab.driver.result import Result
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.process.progress import say


def folder_of(method: str) -> str:
    """The name of a method's folder: the method's own where that is one, without the way to its
    file."""
    return re.sub(r"[^\w.+-]", "-", method.rpartition("/")[2])


def folders(methods: Iterable[str]) -> list[str]:
    """The folders of several methods; refuses two that have the same one."""
    by_folder: dict[str, str] = {}
    for method in methods:
        other = by_folder.setdefault(folder_of(method), method)
        if other != method:
            raise QlabError(
                f"the methods {other!r} and {method!r} have one folder, {folder_of(method)}; give "
                "them in two runs, or rename one of the files"
            )
    return list(by_folder)


def quantized(
    model: Checkpoint, recipes: Mapping[str, Transform], data: Tokens | None, out: Path, inputs: str
) -> dict[str, Result]:
    """Each method written into its folder in `out`."""
    results = {}
    if inputs == "reference" and recipes:
        named = {folder_of(method): recipe for method, recipe in recipes.items()}
        written = qlab.compare(model, named, data, out, inputs="reference", overwrite=True)
        results = {method: written[folder_of(method)] for method in recipes}
    for method in recipes:
        if method not in results:
            gc.collect()
            results[method] = qlab.quantize(
                model, recipes[method], data, out / folder_of(method), overwrite=True
            )
        cost = results[method]
        say(
            f"{method}: quantized in {cost.seconds:.1f} s, peak {cost.peak_rss_bytes / 2**20:.0f} "
            "MiB"
        )
    return results
