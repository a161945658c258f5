"""What tests ask of model directories: their bytes, their tensors, and tokens to calibrate on."""

import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from qlab.data.calibration import Tokens, from_ids
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint

WORDS = [f"word{i}" for i in range(125)]


def add_tokenizer(directory: Path) -> None:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(directory)


def prose(words: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model directory."""
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def random_tokens(path: Path, samples: int = 4, length: int = 32, seed: int = 0) -> Tokens:
    ids = torch.randint(3, 128, (samples, length), generator=torch.Generator().manual_seed(seed))
    return from_ids(open_checkpoint(path), ids)


def change(path: Path, **edits) -> None:
    """Edit tensors of the single-file model at `path`: name (dots as __) -> function of the tensor;
    None drops it."""
    whole = load_file(path / "model.safetensors")
    for name, edit in edits.items():
        old = whole.pop(name.replace("__", "."))
        if edit is not None:
            whole[name.replace("__", ".")] = edit(old)
    save_file(whole, path / "model.safetensors", metadata={"format": "pt"})


def rewrite(file, function):
    """Change a JSON file in place."""
    value = json.loads(file.read_text())
    function(value)
    file.write_text(json.dumps(value))


def refused(act, *words):
    """act() raises a QlabError of one sentence that holds all the words."""
    with pytest.raises(QlabError) as error:
        act()
    message = str(error.value)
    assert "\n" not in message and len(message) < 1000
    for word in words:
        assert word in message, message


def unpacked():
    """Options with which transformers makes dense weights of a GGUF file, as it always does before
    5.17."""
    packing = getattr(transformers, "GgufConfig", None)
    return {} if packing is None else {"quantization_config": packing(dequantize=True)}


def directory(model, folder, codes, config, extra=()):
    """A model directory with these tensors in the place of the modules' weights."""
    modules = {name.rpartition(".")[0] for name in codes}
    state = {
        n: t for n, t in model.state_dict().items() if n.removesuffix(".weight") not in modules
    }
    save_file(
        {**state, **codes, **dict(extra)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    (folder / "config.json").write_text(
        json.dumps(model.config.to_dict() | {"quantization_config": config})
    )
    return folder
