"""Whether a model is evaluated on text that it was calibrated on."""

from typing import Any

from torch import Tensor

from qlab.data.overlap import RUN, shared_windows, sketch
from qlab.driver.apply import Quantized
from qlab.errors import QlabError, warn
from qlab.files.checkpoint import Checkpoint
from qlab.files.ownership import RECORD
from qlab.files.record import recorded


def calibration_overlap(model: Checkpoint | Quantized, ids: Tensor) -> float | None:
    """The share of windows [n, l] that were seen to have text in common with what a model was
    calibrated on; None where that is not known. Warns where there are any."""
    checkpoint = model.model if isinstance(model, Quantized) else model
    said = _calibration(model)
    if said is None:
        return None
    try:
        shared = shared_windows(ids, said)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise QlabError(
            f"{checkpoint.path / RECORD}, calibration is not what qlab writes there; remove the "
            "file, or quantize again"
        ) from error
    if shared is None:
        return None
    count = int(shared.sum())
    if count:
        what = "this recipe" if isinstance(model, Quantized) else str(model.path)
        warn(
            f"{count} of {len(ids)} windows ({count / len(ids):.0%}) have {RUN} tokens in a row in "
            f"common with the text that {what} was calibrated on, so its figures may be too good; "
            "evaluate on text that calibration did not see"
        )
    return count / len(ids)


def _calibration(model: Checkpoint | Quantized) -> Any:
    """The sketch of what a model was calibrated on, or None."""
    if isinstance(model, Quantized):
        return None if model.job.observed is None else sketch(model.job.observed)
    return recorded(model.path).get("calibration")
