"""Names that people type -> local files: 'demo' is a model and a text, every other name a path."""

from collections.abc import Sequence
from pathlib import Path

from qlab.demo.build import demo_folder, demo_model, demo_text
from qlab.files.checkpoint import Checkpoint, open_checkpoint
from qlab.process.surroundings import undisturbed

DEMO = "demo"


def is_demo_name(name: str | Path) -> bool:
    """Whether a name means the demo model: 'demo', or the same in other case unless there is a
    folder of that name."""
    text = str(name)
    return text == DEMO or (text.lower() == DEMO and not Path(text).exists())


@undisturbed
def open(name: str | Path) -> Checkpoint:
    """The model in a directory, to quantize, evaluate or tokenize for.

    Only headers are read here: the names, shapes and dtypes of tensors, and the config.

    Args:
        name: a model directory in any format that qlab reads, or 'demo' for the demo model, which
            is obtained on first use.

    Returns:
        The model: its directory is `path`, its config `config`.

    Raises:
        QlabError: a directory that is missing, incomplete or damaged, or a model whose architecture
            transformers does not know (`qlab.inspect`, `qlab.convert` and `qlab.quantize_files`
            take such directories).

    Example:
        >>> import qlab
        >>> model = qlab.open("demo")
        >>> model.config.model_type
        'llama'
        >>> qlab.open("demo-int4").config.model_type
        'llama'
    """
    model = open_checkpoint(demo_model() if is_demo_name(name) else name)
    assert model.config is not None  # reads the config, which may be refused, before any work
    return model


def is_demo(model: Checkpoint) -> bool:
    """Whether a model is the demo model, for which the demo text is the default."""
    return model.path.resolve() == demo_folder("model").resolve()


def calibration_texts(paths: Sequence[str | Path] | None) -> list[Path]:
    """The texts to calibrate on; without paths, the calibration articles of the demo."""
    return [Path(path) for path in paths] if paths else [demo_text("calibration")]


def evaluation_texts(paths: Sequence[str | Path] | None) -> list[Path]:
    """The texts to evaluate on; without paths, the held-out articles of the demo."""
    return [Path(path) for path in paths] if paths else [demo_text("heldout")]
