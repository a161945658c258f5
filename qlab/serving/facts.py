"""What clients and the page are told of the model that is served."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from qlab.generation.pipeline import Pipeline
from qlab.lowering.resident import resident_bytes
from qlab.lowering.weights.modules import QuantizedWeight


def facts_of(pipe: Pipeline, activations: str) -> dict[str, Any]:
    """The scheme of the weights, their bits as they are held, the kernels that multiply them, and
    memory.

    Args:
        pipe: what is served.
        activations: the dtype of the activations, or what kernels round them to.
    """
    engine = pipe.engine
    weights = [m for m in engine.model.modules() if isinstance(m, QuantizedWeight)]
    dense = str(engine.model.dtype).removeprefix("torch.")
    told: dict[str, Any] = {"scheme": dense, "kernels": "torch"}
    if weights:
        told["scheme"] = _counted(str(weight.spec) for weight in weights)
        told["kernels"] = _counted(weight.kernel.name for weight in weights)
        told["bits_per_weight"] = round(_bits(weights), 2)
    return told | {
        "activations": activations,
        "weights_mib": round(sum(resident_bytes(engine.model).values()) / 2**20, 1),
        "cache_mib": round(engine.pool.nbytes() / 2**20, 1),
        "max_model_len": engine.longest,
        "images": pipe.images is not None,
    }


def _bits(weights: Iterable[QuantizedWeight]) -> float:
    """Bits of a quantized weight in memory, with its scales and zero points."""
    held, count = 0, 0
    for weight in weights:
        held += 8 * sum(t.nbytes for t in weight.buffers_of_weight() if t is not None)
        count += weight.out_features * weight.in_features * (weight.experts or [1])[0]
    return held / count


def _counted(names: Iterable[str]) -> str:
    """Names with their numbers, the most frequent one first."""
    found = Counter(names).most_common()
    return found[0][0] if len(found) == 1 else ", ".join(f"{count} {name}" for name, count in found)
