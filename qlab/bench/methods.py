"""Methods side by side: one model, spec, calibration sample and held-out text, the unquantized
model beside them."""

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

import qlab
from qlab.algebra.bind import uses_data
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import Transform
from qlab.bench.folder import RECORD, owned, refuse_foreign
from qlab.bench.methods_table import change
from qlab.bench.methods_table import table as table
from qlab.bench.plots import draw
from qlab.bench.seeds import add_seeds, of_seed, seeds_of_unwritten, seeds_of_written
from qlab.bench.unwritten import measured, unwritten
from qlab.bench.written import folders, quantized
from qlab.cli.choices import recipe_of
from qlab.cli.recipes import is_file
from qlab.data.calibration import Tokens
from qlab.demo.build import home
from qlab.demo.hub import calibration_texts, evaluation_texts, is_demo
from qlab.driver.observe import Inputs, inputs_named
from qlab.driver.report import PeakMemory, describe
from qlab.driver.result import Result
from qlab.errors import QlabError
from qlab.evaluation.perplexity import Evaluation, Reading, read
from qlab.files.atomic import write_json
from qlab.files.checkpoint import Checkpoint
from qlab.files.ownership import sealed
from qlab.files.record import versions
from qlab.methods.schemes import Scheme
from qlab.process.progress import say

Paths = Sequence[str | Path] | None


def compare_methods(
    name: str,
    methods: Sequence[str],
    spec: str = "int4-g64",
    *,
    asymmetric: bool = False,
    calib: Paths = None,
    text: Paths = None,
    samples: int = 32,
    length: int = 512,
    seed: int = 0,
    seeds: int = 1,
    windows: int = 16,
    inputs: str = "quantized",
    out: Path | None = None,
    scheme: Scheme | None = None,
    static: str = "absmax",
) -> dict[str, Any]:
    """Quantize the model `name` by every method into out/<method> and evaluate each result against
    the unquantized model.

    Returns, and writes to out/bench.json, one row per method with what it costs (bits, bytes,
    seconds, peak memory of quantizing) and what it loses (perplexity, KL divergence, agreement,
    error after every block), beside the `reference` and everything the figures depend on. Draws
    out/methods.png and out/layers.png. With inputs="reference" all methods share one pass, so their
    seconds and peak memory are those of the pass.

    With several `seeds` every method that observes anything is also calibrated with the seeds
    behind `seed`, into out/<method>-seed<n>; its row has the figures of each under "seeds".

    scheme: what the methods fill, in the place of the spec; its stored scales are measured as
    `static` says.
    """
    recipes = _recipes(methods, spec, asymmetric, scheme, static)
    mode = inputs_named(inputs)
    spec = scheme.name if scheme else str(parse_spec(spec, symmetric=not asymmetric))
    model = qlab.open(name)
    job: dict[str, Any] = {
        "model": str(model.path.resolve()),
        "methods": list(methods),
        "spec": spec,
        "calibration": _resolved(calib),
        "evaluation": _resolved(text),
        "samples": samples,
        "length": length,
        "seed": seed,
        "windows": windows,
        "inputs": inputs,
    }
    if seeds > 1:
        job["seeds"] = seeds
    if scheme and scheme.static:
        job["static"] = static
    of_files = {name: describe(recipe) for name, recipe in recipes.items() if is_file(name)}
    if of_files:
        job["recipes"] = of_files  # with the hashes of the files
    chosen = Path(out or home() / "bench" / _folder_name(name, job)).expanduser()
    out = Path(os.path.realpath(chosen))
    texts = [Path(path) for path in (*(calib or ()), *(text or ()))]
    observing = [name for name in recipes if uses_data(recipes[name])]
    others = range(seed + 1, seed + seeds) if observing else ()
    written = [*recipes, *(of_seed(name, other) for name in observing for other in others)]
    refuse_foreign(out, folders(written), job, model.path, texts)
    observes = bool(calib or observing)
    if not (text and (calib or not observes)):
        _say_whose_text(model)
    data = qlab.tokens(model, calibration_texts(calib), samples, length, seed) if observes else None
    held_out = _held_out(model, text, length, windows)
    calibrating = ""
    if data:
        calibrating = f"calibrating on {data.count:,} tokens ({samples} windows of {length}), "
    say(f"{calibrating}evaluating on {held_out.count:,} tokens")
    left = unwritten(model, recipes, data, mode)
    with owned(out, job):
        # before the reference is read, which would add to the memory of quantizing
        held = {name: recipe for name, recipe in recipes.items() if name not in left}
        results = quantized(model, held, data, out, inputs)
        reference, rows, reading = _evaluate(model, results, held_out, spec)
        against = reading, held_out
        beside = {name: recipes[name] for name in left}
        rows += _measure(model, beside, data, mode, against, spec)
        rows.sort(key=lambda row: methods.index(row["method"]))
        drawn = [qlab.tokens(model, calibration_texts(calib), samples, length, n) for n in others]
        again = {name: held[name] for name in observing if name in held}
        others_beside = {name: beside[name] for name in observing if name in beside}
        more = chain(
            seeds_of_written(model, again, drawn, out, inputs, against),
            seeds_of_unwritten(model, others_beside, drawn, mode, against),
        )
        add_seeds(rows, seed, more)
        record = _record(name, job, reference, rows, data, held_out, out)
        write_json(out / RECORD, record)
        draw(record, out)
    return record


def _say_whose_text(model: Checkpoint) -> None:
    """Say that a model other than the demo is measured on the demo's text."""
    if not is_demo(model):
        say(
            f"{model.path} is measured on the demo's text, articles of English Wikipedia; --calib "
            "and --text take texts of its own"
        )


def _held_out(model: Checkpoint, text: Paths, length: int, windows: int) -> Tokens:
    """The windows to evaluate on; refuses text that has fewer."""
    held_out = qlab.first_windows(model, evaluation_texts(text), length, windows)
    if len(held_out.ids) < windows:
        raise QlabError(
            f"{' and '.join(held_out.texts)} gives {len(held_out.ids)} windows of {length} tokens "
            f"and {windows} were asked for; give more text, fewer windows or a shorter length"
        )
    return held_out


def _record(
    name: str,
    job: Mapping[str, Any],
    reference: dict,
    rows: list[dict],
    data: Tokens | None,
    held_out: Tokens,
    out: Path,
) -> dict[str, Any]:
    """The content of bench.json."""
    return sealed(
        {
            "model": name,
            "job": job,
            "reference": reference,
            "rows": rows,
            "seed": job["seed"],
            "inputs": job["inputs"],
            "data": {"calibration": data and data.describe(), "evaluation": held_out.describe()},
            "versions": versions(),
            "device": {"type": "cpu", "threads": torch.get_num_threads()},
            "out": str(out),
        }
    )


def _recipes(
    methods: Sequence[str], spec: str, asymmetric: bool, scheme: Scheme | None, static: str
) -> dict[str, Transform]:
    for method in methods:
        if methods.count(method) > 1:
            raise QlabError(
                f"method {method!r} is given {methods.count(method)} times; give each one once"
            )
    return {method: recipe_of(method, spec, asymmetric, scheme, static) for method in methods}


def _folder_name(name: str, job: Mapping[str, Any]) -> str:
    """A folder name that no other bench has; the hash tells models with the same name apart."""
    slug = re.sub(r"[^\w.-]", "_", Path(name).expanduser().resolve().name)
    key = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:8]
    return f"{slug}-{key}-{job['spec']}"


def _resolved(paths: Paths) -> list[str] | None:
    return [str(Path(path).resolve()) for path in paths] if paths else None


def _evaluate(
    model: Checkpoint, results: Mapping[str, Result], held_out: Tokens, spec: str
) -> tuple[dict, list[dict], Reading]:
    started = time.perf_counter()
    with PeakMemory() as peak:
        reference = read(model, held_out)
        evaluation = qlab.evaluate(reference, reference, held_out)
    say(f"reference: perplexity {evaluation.perplexity:.3f}")
    size = sum(file.stat().st_size for file in set(model.files.values()))
    unquantized = _row(
        "reference",
        None,
        evaluation,
        started,
        bits_per_weight=8.0 * model.dtype.itemsize,
        bytes=size,
        seconds=0.0,
        peak_rss_bytes=peak.bytes,
        inputs=None,
        losses={},
    )
    rows = []
    for method, result in results.items():
        started = time.perf_counter()
        evaluation = qlab.evaluate(qlab.open(result.path), reference, held_out)
        losses = {site: row["loss"] for site, row in result.sites.items() if "loss" in row}
        rows.append(
            _row(
                method,
                spec,
                evaluation,
                started,
                bits_per_weight=result.bits_per_weight,
                bytes=result.bytes,
                seconds=result.seconds,
                peak_rss_bytes=result.peak_rss_bytes,
                inputs=result.inputs,
                losses=losses,
            )
        )
        say(f"{method}: perplexity {evaluation.perplexity:.3f} ({change(rows[-1]['ratio'])} %)")
    return unquantized, rows, reference


def _measure(
    model: Checkpoint,
    recipes: Mapping[str, Transform],
    data: Tokens | None,
    inputs: Inputs,
    against: tuple[Reading, Tokens],
    spec: str,
) -> list[dict]:
    """The rows of methods that are not written."""
    rows = []
    for method, recipe in recipes.items():
        started = time.perf_counter()
        evaluation, cost = measured(model, recipe, data, inputs, against)
        rows.append(_row(method, spec, evaluation, started, **cost))
        say(f"{method}: perplexity {evaluation.perplexity:.3f} ({change(rows[-1]['ratio'])} %)")
    return rows


def _row(
    method: str, spec: str | None, evaluation: Evaluation, started: float, **cost: Any
) -> dict[str, Any]:
    """The figures of one model. Of a quantized one, `seconds` and `peak_rss_bytes` are those of
    quantizing it; of the reference, they are 0 and those of reading it."""
    return {
        "method": method,
        "spec": spec,
        **evaluation.json(),
        "ratio": evaluation.perplexity / evaluation.reference_perplexity,
        "seeds": [],
        **cost,
        "evaluation_seconds": time.perf_counter() - started,
    }
