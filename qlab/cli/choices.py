"""What `qlab plan` and `qlab quantize` both take, and the job that it stands for."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qlab.cli.options import (
    AllExperts,
    Asymmetric,
    Bits,
    CacheName,
    Calib,
    CodecName,
    Device,
    Images,
    InputsName,
    Keep,
    Length,
    Memory,
    Offload,
    Outside,
    RecipeName,
    Samples,
    SchemeName,
    Seed,
    SpecName,
    StaticName,
    TargetName,
)
from qlab.cli.recipes import is_file, recipe_of_file
from qlab.cli.schemes import chosen_scheme, refuse_unfilled
from qlab.errors import QlabError
from qlab.process.progress import say

if TYPE_CHECKING:
    from qlab.algebra.spec import Spec
    from qlab.algebra.transform import Transform
    from qlab.data.calibration import Data
    from qlab.driver.job import Job
    from qlab.files.checkpoint import Checkpoint
    from qlab.methods.schemes import Scheme

    Maker = Callable[[Spec], Transform]  # of the recipe of a spec


WIDTHS = (2, 3, 4, 8)  # in bits, among which a budget is spent
TYPED = "COMMANDLINE"  # the source of a parameter that was typed, as typer calls it


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The options that both commands have, in the order in which help lists them. typed: the names
    of those that the command line has, and which are no defaults."""

    recipe: RecipeName = None
    spec: SpecName = "int4-g64"
    asymmetric: Asymmetric = False
    bits: Bits = None
    scheme: SchemeName = ""
    kv_cache: CacheName = ""
    static: StaticName = "absmax"
    calib: Calib = None
    images: Images = None
    samples: Samples = 128
    length: Length = 2048
    seed: Seed = 0
    inputs: InputsName = "quantized"
    calibrate_all_experts: AllExperts = False
    device: Device = "cpu"
    memory: Memory = None
    offload: Offload = None
    keep: Keep = None
    outside: Outside = None
    codec: CodecName = ""
    target: TargetName = ""
    typed: frozenset[str] = field(default=frozenset(), metadata={"option": False})

    def __post_init__(self) -> None:
        """Refuse what can be refused before anything is read."""
        from qlab.driver.observe import inputs_named

        inputs_named(self.inputs)
        in_bytes(self.memory)


def with_choices(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every field of `Choices`, in place of its parameter `choices`.

    typer makes the options of a command out of its signature, so the signature is what changes.
    """
    options = [
        Parameter(each.name, Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
        for each in fields(Choices)
        if each.metadata.get("option", True)
    ]
    parameters = [Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for parameter in signature(command).parameters.values():
        if parameter.name == "choices":
            parameters += options
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))

    @wraps(command)
    def with_options(context: typer.Context, **values: Any) -> None:
        chosen = {option.name: values.pop(option.name) for option in options}
        command(**values, choices=Choices(**chosen, typed=typed_in(context)))

    with_options.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return with_options


def typed_in(context: typer.Context) -> frozenset[str]:
    """The parameters that the command line has."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return frozenset(name for name, source in sources.items() if source and source.name == TYPED)


def job_of(
    model: str, method: str, choices: Choices, usual: str = "gptq", planning: bool = False
) -> "Job":
    """The job that a command's words stand for. usual: the method where none is named. planning:
    whether a configuration without weights will do."""
    import qlab
    from qlab.driver.job import Job
    from qlab.driver.observe import inputs_named

    scheme = scheme_of(choices)
    if scheme:
        named = method if "method" in choices.typed else ""
        refuse_unfilled(scheme, named, choices.recipe)
    maker = maker_of(method, choices, usual)
    opened = qlab.open(model) if has_weights(model) or not planning else _on_paper(model)
    codec = codec_of(choices, maker)
    recipe = recipe_for(opened, maker, choices, codec)
    return Job(
        model=opened,
        recipe=recipe,
        data=_data(opened, recipe, choices),
        inputs=inputs_named(choices.inputs),
        calibrate_all_experts=choices.calibrate_all_experts,
        device=choices.device,
        memory=in_bytes(choices.memory),
        codec=codec,
        target=choices.target or None,
        offload=choices.offload,
    )


def has_weights(model: str) -> bool:
    """Whether a name stands for more than a configuration."""
    from qlab.demo.hub import is_demo_name
    from qlab.model.config_alone import is_alone

    return is_demo_name(model) or not is_alone(Path(model).expanduser())


def _on_paper(model: str) -> "Checkpoint":
    from qlab.model.config_alone import open_config

    return open_config(Path(model).expanduser())


def in_bytes(memory: float | None) -> int | None:
    """A budget in GiB as bytes."""
    if memory is None:
        return None
    if not 0 < memory * 2**30 < math.inf:
        raise QlabError(f"--memory {memory} is no budget; give it in GiB, such as 4")
    return int(memory * 2**30)


def scheme_of(choices: Choices) -> "Scheme | None":
    """What --scheme and --kv-cache name together; None where neither is given."""
    return chosen_scheme(
        choices.scheme, choices.kv_cache, choices.static, choices.spec, choices.typed
    )


def spec_of(choices: Choices) -> "Spec":
    """The spec of weights that is named, with zero points or without, or that of the scheme."""
    from qlab.algebra.spec import parse_spec

    scheme = scheme_of(choices)
    if scheme and scheme.weights:
        return scheme.weights
    return parse_spec(choices.spec, symmetric=not choices.asymmetric)


def maker_of(method: str, choices: Choices, usual: str) -> "Maker":
    """What makes the recipe of a spec: the method, or the recipe of a file."""
    if not choices.recipe:
        return method_named(method or usual)
    if "method" in choices.typed:
        raise QlabError(
            f"--method {method} and --recipe {choices.recipe} are both recipes; give one of them"
        )
    recipe = recipe_of_file(choices.recipe)
    unused = [name for name in ("spec", "asymmetric", "bits", "scheme") if name in choices.typed]
    if unused and not recipe.takes_spec:
        raise QlabError(
            f"--{unused[0]} would not be used, since {recipe.path}:{recipe.name} is a transform "
            "with specs of its own; leave it out, or name a function of a spec"
        )
    return recipe.transform


def codec_of(choices: Choices, maker: "Maker") -> str:
    """The codec that is named, else the safest for the engine that is named, else the usual one."""
    from qlab.codecs.engines import safest_codec
    from qlab.driver.job import CODEC

    spec, scheme = spec_of(choices), scheme_of(choices)
    if choices.codec:
        return choices.codec
    if not choices.target or (scheme and (scheme.inputs or scheme.cache)):
        return CODEC  # the format that holds what happens at run time
    rounded = [stage.spec for stage in maker(spec) if stage.spec]
    return safest_codec(choices.target, rounded[0] if rounded else spec)


def recipe_for(model: "Checkpoint", maker: "Maker", choices: Choices, codec: str) -> "Transform":
    """The recipe for the sites in blocks, without those that are kept, and a rounding to nearest
    for what is named outside the blocks; scales in a dtype that the codec stores."""
    from qlab.algebra.transform import chain, keep, rules
    from qlab.codecs import storable

    spec, scheme = storable(spec_of(choices), codec, model.dtype), scheme_of(choices)
    if scheme:
        stored = replace(scheme, weights=scheme.weights and spec)
        recipe = chain(stored.filled(maker), stored.on_inputs(choices.static))
    elif choices.bits is None:
        recipe = maker(spec)
    else:
        recipe = _within(choices.bits, maker, spec, codec, model)
    if choices.keep and recipe:
        recipe = rules({**{pattern: keep() for pattern in choices.keep}, "*": recipe})
    if scheme:
        recipe = chain(recipe, scheme.on_cache(choices.static))  # which holds for all attentions
    for rule in choices.outside or ():
        recipe = chain(recipe, _outside(rule, codec, model))
    return recipe


def _within(
    bits: float, maker: "Maker", spec: "Spec", codec: str, model: "Checkpoint"
) -> "Transform":
    """The recipe at the widths that the format holds, of which each weight gets one, within a
    budget of bits per weight."""
    from qlab.algebra.spec import Int, with_scale_dtype
    from qlab.codecs import codec_named
    from qlab.methods.allocate import allocate

    if not isinstance(spec, Int):
        raise QlabError(
            f"--bits {bits:g} chooses among widths of integers, and --spec is {spec}; name "
            "integers such as int4-g64"
        )
    specs = [replace(spec, bits=width) for width in WIDTHS]
    refusal = codec_named(codec).refusal
    held = [each for each in specs if not refusal(with_scale_dtype(each, model.dtype))]
    return allocate([maker(each) for each in held], bits)


def _outside(rule: str, codec: str, model: "Checkpoint") -> "Transform":
    """The transform of one GLOB=SPEC."""
    from qlab.algebra.spec import parse_spec
    from qlab.algebra.transform import at, outside
    from qlab.codecs import storable
    from qlab.methods.rtn import rtn

    pattern, equals, spec = rule.rpartition("=")
    if not equals:
        raise QlabError(
            f"--outside {rule!r} names no spec; write GLOB=SPEC, such as '*visual*=int8-channel'"
        )
    return at(pattern, outside(rtn(storable(parse_spec(spec), codec, model.dtype))))


def method_named(name: str) -> "Maker":
    """The method of that name: spec -> transform."""
    from qlab.methods import names

    return names.method_named(name)


def recipe_of(
    method: str,
    spec: str,
    asymmetric: bool,
    scheme: "Scheme | None" = None,
    static: str = "absmax",
) -> "Transform":
    """The transform that a method's name, or FILE.py:NAME, and a spec's name or a scheme stand
    for."""
    from qlab.algebra.spec import parse_spec

    maker = recipe_of_file(method).transform if is_file(method) else method_named(method)
    if scheme:
        return scheme.recipe(maker, static)
    return maker(parse_spec(spec, symmetric=not asymmetric))


def _data(model: "Checkpoint", recipe: "Transform", choices: Choices) -> "Data | None":
    """The samples that the recipe is calibrated on; None where it observes nothing."""
    from qlab.algebra.bind import uses_data
    from qlab.data.calibration import tokens, unread_windows
    from qlab.data.images import image_samples
    from qlab.demo.hub import calibration_texts, is_demo

    calib, images = choices.calib, choices.images
    if calib and images:
        raise QlabError(
            "--calib takes text and --images samples that may have both; give one of them"
        )
    if not uses_data(recipe):
        refuse_unused(calib, images, "this method observes nothing")
        return None
    if images:
        return image_samples(model, images, choices.samples, choices.length, choices.seed)
    if not model.has_weights:
        refuse_unused(
            calib, images, "a configuration alone has no tokenizer", "and plan by --samples"
        )
        return unread_windows(choices.samples, choices.length)
    if not calib and not is_demo(model):
        say(
            f"calibrating {model.path} on the demo's text, articles of English Wikipedia; --calib "
            "takes text like that which the model will see"
        )
    texts = calibration_texts(calib)
    return tokens(model, texts, choices.samples, choices.length, choices.seed)


def refuse_unused(
    calib: Sequence[Path] | None,
    images: Sequence[Path] | None,
    why: str,
    instead: str = "or choose a method that is calibrated, such as gptq",
) -> None:
    """Refuse a text that changes nothing: whoever gives one takes it for one that does."""
    if calib or images:
        option = "--calib" if calib else "--images"
        raise QlabError(f"{option} would not be used, since {why}; leave it out, {instead}")
