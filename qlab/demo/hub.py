"""Names people type -> local files: 'demo' is a model and a text, everything else is a path."""

from collections.abc import Sequence
from pathlib import Path

from qlab.demo.build import demo_folder, demo_model, demo_text
from qlab.files.checkpoint import Checkpoint, open_checkpoint
from qlab.process.surroundings import undisturbed

DEMO = "demo"


def is_demo_name(name: str | Path) -> bool:
    """Whether a name means the demo model: in any case, unless a folder is called so that is not
    'demo' to the letter."""
    text = str(name)
    return text == DEMO or (text.lower() == DEMO and not Path(text).exists())


@undisturbed
def open(name: str | Path) -> Checkpoint:
    """A model directory, or the demo model (obtained on first use). Refuses one whose architecture
    transformers does not know; `open_checkpoint` takes that too."""
    model = open_checkpoint(demo_model() if is_demo_name(name) else name)
    assert (
        model.config is not None
    )  # read once here, so that a config it cannot read is refused before any work
    return model


def is_demo(model: Checkpoint) -> bool:
    """Whether a model is the demo's, which its text is the default for."""
    return model.path.resolve() == demo_folder("model").resolve()


def calibration_texts(paths: Sequence[str | Path] | None) -> list[Path]:
    """The texts to calibrate on; without any, the demo's calibration articles."""
    return [Path(p) for p in paths] if paths else [demo_text("calibration")]


def evaluation_texts(paths: Sequence[str | Path] | None) -> list[Path]:
    """The texts to evaluate on; without any, the demo's held-out articles."""
    return [Path(p) for p in paths] if paths else [demo_text("heldout")]
