"""What tests ask of model directories: their bytes, their tensors, and tokens to calibrate on."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qlab.calibration import Tokens, from_ids
from qlab.checkpoint import open_checkpoint


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model directory."""
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def random_tokens(path: Path, samples: int = 4, length: int = 32, seed: int = 0) -> Tokens:
    ids = torch.randint(3, 128, (samples, length), generator=torch.Generator().manual_seed(seed))
    return from_ids(open_checkpoint(path), ids)


def change(path: Path, **edits) -> None:
    """Edit tensors of the single-file model at `path`: name (dots as __) -> function of the tensor; None drops it."""
    whole = load_file(path / "model.safetensors")
    for name, edit in edits.items():
        old = whole.pop(name.replace("__", "."))
        if edit is not None:
            whole[name.replace("__", ".")] = edit(old)
    save_file(whole, path / "model.safetensors", metadata={"format": "pt"})
