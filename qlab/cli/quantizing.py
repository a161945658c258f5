"""plan, quantize and eval."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from qlab.cli.options import (
    AllExperts,
    Asymmetric,
    Calib,
    CodecName,
    Device,
    Images,
    InputsName,
    Json,
    Keep,
    Length,
    Memory,
    MethodName,
    Model,
    Outside,
    Overwrite,
    Resume,
    Samples,
    Seed,
    SpecName,
    TargetName,
    resolved,
)
from qlab.cli.output import console, output_place, report
from qlab.errors import QlabError
from qlab.process.progress import say


def recipe_of(method: str, spec: str, asymmetric: bool) -> Any:
    """The transform that a method's name and a spec's name stand for."""
    from qlab.algebra.spec import parse_spec

    return method_named(method)(parse_spec(spec, symmetric=not asymmetric))


def method_named(name: str) -> Any:
    """The method of that name: spec -> transform."""
    from qlab.methods import METHODS

    if name not in METHODS:
        raise QlabError(f"method {name!r} is unknown; known are {', '.join(METHODS)}")
    return METHODS[name]


def chosen(
    model: Any,
    method: str,
    spec: str,
    asymmetric: bool,
    codec: str,
    target: str,
    outside: list[str] | None = None,
    kept: list[str] | None = None,
) -> tuple[Any, str]:
    """The recipe and the codec: the one named, else the safest for the target; scales in a dtype
    that the codec stores.

    outside: GLOB=SPEC for linears around the blocks. kept: GLOBs of sites in blocks that stay as
    they are.
    """
    from qlab.algebra.spec import parse_spec
    from qlab.algebra.transform import at, chain, keep, rules
    from qlab.algebra.transform import outside as around_blocks
    from qlab.codecs import storable
    from qlab.codecs.engines import safest_codec
    from qlab.driver.job import CODEC
    from qlab.methods.rtn import rtn

    grid = parse_spec(spec, symmetric=not asymmetric)
    named = codec or (safest_codec(target, grid) if target else CODEC)
    recipe = method_named(method)(storable(grid, named, model.dtype))
    if kept:
        recipe = rules({**{pattern: keep() for pattern in kept}, "*": recipe})
    for rule in outside or ():
        pattern, equals, text = rule.rpartition("=")
        if not equals:
            raise QlabError(
                f"--outside {rule!r} names no spec; write GLOB=SPEC, such as "
                "'*visual*=int8-channel'"
            )
        recipe = chain(
            recipe, at(pattern, around_blocks(rtn(storable(parse_spec(text), named, model.dtype))))
        )
    return recipe, named


def _data(
    model: Any,
    recipe: Any,
    calib: list[Path] | None,
    images: list[Path] | None,
    samples: int,
    length: int,
    seed: int,
) -> Any:
    from qlab.data.calibration import tokens
    from qlab.data.images import image_samples
    from qlab.demo.hub import calibration_texts, is_demo

    if calib and images:
        raise QlabError(
            "--calib takes text and --images samples that may have both; give one of them"
        )
    if not any(stage.needs for stage in recipe):
        refuse_unused(calib, images, "this method observes nothing")
        return None
    if images:
        return image_samples(model, images, samples, length, seed)
    if not calib and not is_demo(model):
        say(
            f"calibrating {model.path} on the demo's text, articles of English Wikipedia; --calib "
            "takes text like that which the model will see"
        )
    return tokens(model, calibration_texts(calib), samples, length, seed)


def refuse_unused(calib: list[Path] | None, images: list[Path] | None, why: str) -> None:
    """A text that changes nothing is taken for one that does."""
    if calib or images:
        option = "--calib" if calib else "--images"
        raise QlabError(
            f"{option} would not be used, since {why}; leave it out, or choose a method that is "
            "calibrated, such as gptq"
        )


def _refuse_of_models(given: Mapping[str, Any]) -> None:
    if said := [option for option, value in given.items() if value]:
        raise QlabError(
            f"{said[0]} would change nothing, since --model-free runs no model; leave it out, or "
            "leave out --model-free"
        )


def plan(
    model: Model,
    method: MethodName = "gptq",
    spec: SpecName = "int4-g64",
    asymmetric: Asymmetric = False,
    calib: Calib = None,
    images: Images = None,
    samples: Samples = 128,
    length: Length = 2048,
    seed: Seed = 0,
    inputs: InputsName = "quantized",
    calibrate_all_experts: AllExperts = False,
    device: Device = "cpu",
    memory: Memory = None,
    keep: Keep = None,
    outside: Outside = None,
    codec: CodecName = "",
    target: TargetName = "",
    json_file: Json = None,
) -> None:
    """What a method would do to a model: stages, passes, peak memory, bits per weight. Runs and
    writes nothing."""
    import qlab
    from qlab.driver.observe import inputs_named

    mode, budget = inputs_named(inputs), _budget(memory)
    opened = qlab.open(model)
    recipe, named = chosen(opened, method, spec, asymmetric, codec, target, outside, keep)
    data = _data(opened, recipe, calib, images, samples, length, seed)
    made = qlab.plan(
        opened,
        recipe,
        data,
        inputs=mode,
        device=device,
        memory=budget,
        calibrate_all_experts=calibrate_all_experts,
        codec=named,
        target=target or None,
    )
    console().print(made)
    made.check(budget)
    console().print(f"written by the codec {named}")
    report({**made.json(), "codec": named}, json_file)


def _budget(memory: float | None) -> int | None:
    """GiB as bytes."""
    if memory is None:
        return None
    if not 0 < memory * 2**30 < math.inf:
        raise QlabError(f"--memory {memory} is no budget; give it in GiB, such as 4")
    return int(memory * 2**30)


def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="the directory to write")],
    method: MethodName = "",
    spec: SpecName = "int4-g64",
    asymmetric: Asymmetric = False,
    calib: Calib = None,
    images: Images = None,
    samples: Samples = 128,
    length: Length = 2048,
    seed: Seed = 0,
    inputs: InputsName = "quantized",
    calibrate_all_experts: AllExperts = False,
    device: Device = "cpu",
    memory: Memory = None,
    keep: Keep = None,
    outside: Outside = None,
    codec: CodecName = "",
    target: TargetName = "",
    overwrite: Overwrite = False,
    resume: Resume = False,
    model_free: Annotated[
        bool,
        typer.Option("--model-free", help="from files alone, by data-free methods (default: rtn)"),
    ] = False,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", help="with --model-free: globs of modules to quantize"),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", help="with --model-free: globs of modules to leave"),
    ] = None,
    json_file: Json = None,
) -> None:
    """Quantize a model directory into one that other engines load."""
    import qlab
    from qlab.driver.observe import inputs_named

    mode, budget = inputs_named(inputs), _budget(memory)
    if model_free and keep:
        raise QlabError(
            "--keep chooses among the sites of blocks, which need the model; --model-free takes "
            "--include and --exclude"
        )
    if model_free and outside:
        raise QlabError(
            "--outside asks the model what lies around its blocks; --model-free takes --include "
            "and --exclude"
        )
    output_place(out, model, [*(calib or ()), *(images or ())], overwrite, resume, json_file)
    if model_free:
        refuse_unused(calib, images, "--model-free runs no model")
        _refuse_of_models(
            {
                "--memory": memory,
                "--calibrate-all-experts": calibrate_all_experts,
                "--inputs reference": mode == "reference",
                f"--device {device}": device != "cpu",
            }
        )
        _quantize_files(
            model,
            out,
            method,
            spec,
            asymmetric,
            codec,
            target,
            include,
            exclude,
            overwrite,
            resume,
            json_file,
        )
        return
    if include or exclude:
        raise QlabError(
            "--include and --exclude go with --model-free; leave sites as they are by --keep, or "
            "choose them in Python by qlab.rules and qlab.at"
        )
    opened = qlab.open(model)
    recipe, named = chosen(opened, method or "gptq", spec, asymmetric, codec, target, outside, keep)
    data = _data(opened, recipe, calib, images, samples, length, seed)
    result = qlab.quantize(
        opened,
        recipe,
        data,
        out,
        inputs=mode,
        device=device,
        memory=budget,
        overwrite=overwrite,
        resume=resume,
        calibrate_all_experts=calibrate_all_experts,
        codec=named,
        target=target or None,
    )
    console().print(result.plan)
    cost = (
        f"{result.bytes / 1e6:.1f} MB, {result.seconds:.1f} s, peak "
        f"{result.peak_rss_bytes / 2**20:.0f} MiB"
    )
    console().print(
        f"{result.path}: {named}, {result.bits_per_weight:.3f} bits per weight, {cost}, {inputs} "
        "inputs",
        soft_wrap=True,
    )
    for name, few in result.experts_with_few_tokens.items():
        console().print(
            f"{name}: experts {', '.join(map(str, few))} saw fewer tokens than input channels",
            soft_wrap=True,
        )
    report(result.json(), json_file)


def _quantize_files(
    model: str,
    out: Path,
    method: str,
    spec: str,
    asymmetric: bool,
    codec: str,
    target: str,
    include: list[str] | None,
    exclude: list[str] | None,
    overwrite: bool,
    resume: bool,
    json_file: Path | None,
) -> None:
    from qlab.directories.model_free import KEPT, quantize_files
    from qlab.files.checkpoint import open_checkpoint

    opened = open_checkpoint(resolved(model))
    recipe, named = chosen(opened, method or "rtn", spec, asymmetric, codec, target)
    result = quantize_files(
        opened,
        recipe,
        out,
        include=include or ("*",),
        exclude=(*KEPT, *(exclude or ())),
        codec=named,
        target=target or None,
        overwrite=overwrite,
        resume=resume,
    )
    cost = f"{result.seconds:.1f} s, peak {result.peak_rss_bytes / 2**20:.0f} MiB"
    console().print(
        f"{result.path}: {named}, {len(result.sites)} weights, {result.bits_per_weight:.3f} bits "
        f"per weight, {cost}",
        soft_wrap=True,
    )
    report(result.json(), json_file)


def evaluate(
    model: Model,
    against: Annotated[
        str | None,
        typer.Option("--against", help="the reference model; without it, perplexity alone"),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="text or jsonl files (default: held-out demo)"),
    ] = None,
    length: Length = 512,
    windows: Annotated[int | None, typer.Option(min=2, help="default: all full windows")] = None,
    device: Device = "cpu",
    json_file: Json = None,
) -> None:
    """Perplexity over full windows of --length tokens; with a reference also KL divergence and
    top-1 agreement."""
    import qlab
    from qlab.demo.hub import evaluation_texts, is_demo

    opened = qlab.open(model)
    reference = None if against is None else qlab.open(against)
    tokenized = reference or opened
    if not text and not is_demo(tokenized):
        say(
            "evaluating on the demo's held-out text, articles of English Wikipedia; --text takes "
            "your own"
        )
    data = qlab.first_windows(tokenized, evaluation_texts(text), length, windows)
    if len(data.ids) < 2:
        raise QlabError(
            f"the text gives one window of {length} tokens, and an interval needs two; give more "
            "text or less --length"
        )
    if windows and len(data.ids) < windows:
        say(
            f"the text gives {len(data.ids)} windows of {length} tokens, and {windows} were asked "
            "for"
        )
    if reference is None:
        alone = qlab.perplexity(opened, data, device)
        table = Table(
            "", "value", "95 % interval", title=f"{model}: {alone.windows} windows of {length}"
        )
        table.add_row("perplexity", f"{alone.perplexity:.4f}", _range(alone.perplexity_ci))
        console().print(table)
        console().print(
            "no reference was given; --against MODEL adds the KL divergence and the agreement "
            "with it",
            soft_wrap=True,
        )
        report(
            {"model": model, "against": None, "data": data.describe(), **alone.json()}, json_file
        )
        return
    result = qlab.evaluate(opened, reference, data, device)
    table = Table(
        "",
        "value",
        "95 % interval",
        title=f"{model} against {against}: {result.windows} windows of {length}",
    )
    table.add_row("perplexity", f"{result.perplexity:.4f}", _range(result.perplexity_ci))
    table.add_row("reference perplexity", f"{result.reference_perplexity:.4f}", "")
    table.add_row(
        "perplexity / reference",
        f"{result.perplexity / result.reference_perplexity:.4f}",
        _range(result.ratio_ci),
    )
    table.add_row("KL divergence (nats)", f"{result.kl:.5f}", _range(result.kl_ci))
    table.add_row("top-1 agreement", f"{result.top1_agreement:.4f}", _range(result.top1_ci))
    console().print(table)
    report(
        {"model": model, "against": against, "data": data.describe(), **result.json()}, json_file
    )


def _range(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.4f} to {interval[1]:.4f}"
