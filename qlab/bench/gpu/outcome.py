"""What became of a call: {"result"} or {"error"}, and {"seconds"}."""

from typing import Any

Outcome = dict[str, Any]

# what errors say after which a process cannot use its device any more
BROKEN = ("CUDA error", "Triton Error [CUDA]", "AcceleratorError")


def failure(outcome: Outcome) -> str | None:
    """What went wrong with a call, also where it has results of before."""
    result = outcome.get("result")
    inside = result.get("error") if isinstance(result, dict) else None
    error: str | None = outcome.get("error") or inside
    return error


def breaks_device(outcome: Outcome) -> bool:
    """Whether the process of the call has lost its device, wherever the outcome says so."""
    said = str(outcome)
    return any(word in said for word in BROKEN)
