"""How a model that answers is opened: what run, chat and serve have in common."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qlab.files.checkpoint import Checkpoint

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
        help="a spec such as int8-channel, to which an unquantized head is rounded, which is "
        "faster and not quite the model; none",
    ),
]
NONE = "none"
FAST = {"activations": "int8", "head": "int8-channel"}


def roundings(
    model: "Checkpoint", device: str, activations: str, head: str
) -> dict[str, str | None]:
    """How a model is rounded beyond its directory, as arguments of `qlab.pipeline`. What is not
    said of a quantized model on a CPU is what is fast there."""
    is_fast = model.quantized and device == "cpu" and activations in ("", FAST["activations"])
    unsaid = FAST if is_fast else {"activations": NONE, "head": NONE}
    said = {"activations": activations, "head": head}
    chosen = {name: value or unsaid[name] for name, value in said.items()}
    return {name: None if value == NONE else value for name, value in chosen.items()}
