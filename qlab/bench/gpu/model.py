"""The demo model in int4, for rates that do not depend on the values of weights: nothing is
downloaded for it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qlab.algebra.spec import parse_spec
from qlab.demo.build import demo_folder
from qlab.driver.quantize import quantize
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.rtn import rtn

SPEC = "int4-g64"
# of SmolLM2-135M, the demo model
SIZES: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


@contextmanager
def quantized_demo() -> Iterator[tuple[Path, str]]:
    """A folder with the demo model rounded to nearest, and what it is. Where the demo was not
    obtained before, a model of its sizes has random weights."""
    with tempfile.TemporaryDirectory(prefix="qlab-") as place:
        source = demo_folder("model")
        described = f"the demo model, {SPEC}"
        if not (source / "config.json").is_file():
            source = Path(place) / "random"
            _write_random(source)
            described = f"random weights of the demo model's sizes, {SPEC}"
        out = Path(place) / "quantized"
        quantize(open_checkpoint(source), rtn(parse_spec(SPEC)), None, out)
        yield out, described


def _write_random(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.bfloat16)
    model.save_pretrained(folder)
