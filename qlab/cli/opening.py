"""How a model that answers is opened: what run, chat and serve have in common."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlab.cli.options import lower
from qlab.process.progress import say

if TYPE_CHECKING:
    from qlab.files.checkpoint import Checkpoint
    from qlab.generation.pipeline import Pipeline

Dtype = Annotated[
    str, typer.Option("--dtype", help="of the activations: bfloat16, float16 or float32")
]
Activations = Annotated[
    str,
    typer.Option(
        "--activations",
        help="int8 lets kernels round the activations of quantized models, which is faster and not "
        "quite the model; none",
    ),
]
Head = Annotated[
    str,
    typer.Option(
        "--head",
        help="a spec such as int8-g32, to which an unquantized head is rounded, which is "
        "faster and not quite the model; none",
    ),
]
Compile = Annotated[
    str,
    typer.Option(
        "--compile",
        help="what is compiled while requests run as they are: block (seconds for each of 1, 2, 4, "
        "... rows), model (minutes for each, and faster) or none; what was compiled is kept",
    ),
]
KvCache = Annotated[
    str,
    typer.Option(
        "--kv-cache",
        callback=lower,
        help="how keys and values are cached: int8, fp8, int4, k8v4, a KV_... of `qlab schemes`, "
        "or a cache spec such as int8-head (default: as the directory says)",
    ),
]
NONE = "none"
INT8 = "int8"


def pipeline_of(
    model: "Checkpoint",
    rounded: dict[str, str | None],
    device: str,
    dtype: str,
    compile: str,
    kv_cache: str,
    **engine: Any,
) -> "Pipeline":
    """The pipeline of a command. rounded: as `roundings` gives it. engine: what requests share."""
    import qlab

    more: dict[str, Any] = {"dtype": dtype, "compile": compile, **rounded, **engine}
    return qlab.pipeline(model, device=device, kv_cache=kv_cache or None, **more)


def opened(model: str) -> "Checkpoint":
    """The directory of a command. The processes that a launcher such as torchrun started are ranks
    that open it together, and stay so until they end."""
    import qlab
    from qlab.process.ranks import agreed, join

    return agreed(lambda: qlab.open(model)) if join() else qlab.open(model)


def roundings(
    model: "Checkpoint", device: str, activations: str, head: str
) -> dict[str, str | None]:
    """How a model is rounded beyond its directory, as arguments of `qlab.pipeline`. What is not
    said of a quantized model on a CPU is what is fast there."""
    is_fast = model.quantized and device == "cpu" and activations in ("", INT8)
    unsaid = {"activations": NONE, "head": NONE}
    if is_fast:
        unsaid = {"activations": INT8, "head": _head(model)}
    said = {"activations": activations, "head": head}
    chosen = {name: value or unsaid[name] for name, value in said.items()}
    return {name: None if value == NONE else value for name, value in chosen.items()}


def _head(model: "Checkpoint") -> str:
    """The spec with the least loss that its kernel takes."""
    is_even = model.config.get_text_config().hidden_size % 32 == 0
    return f"{INT8}-g32" if is_even else f"{INT8}-channel"


def say_cost(pipe: "Pipeline") -> None:
    """Tell what the rounding of a cache costs, if it is rounded."""
    cost = pipe.cache_cost() if pipe.answers else None
    if cost is not None:
        say(f"qlab: {cost}")
