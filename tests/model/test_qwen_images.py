"""Qwen2-VL and Qwen2.5-VL on real images, through their own processor, which needs torchvision."""

import json

import numpy as np
import pytest
import torch
from families import tiny
from pictures import IMAGE, from_transformers, with_image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoProcessor, PreTrainedTokenizerFast

from qlab.algebra.spec import parse_spec
from qlab.data.images import image_samples
from qlab.driver.quantize import quantize
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.gptq import gptq

pytest.importorskip(
    "torchvision", reason="Qwen's processor, which also takes videos, needs torchvision"
)
pytest.importorskip("PIL", reason="images are read with Pillow")
INT4 = parse_spec("int4-g16")
PICTURE = "<|vision_start|> <|image_pad|> <|vision_end|>"
SPECIAL = {
    "<|vision_end|>": 124,
    "<|vision_start|>": 125,
    "<|video_pad|>": 126,
    "<|image_pad|>": IMAGE,
}
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{{ '" + PICTURE + " ' if c['type'] == 'image' else c['text'] + ' ' }}"
    "{% endfor %}{% endfor %}"
)


def add_processor(directory):
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    words = {
        word: i
        for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"word{i}" for i in range(120))])
    } | SPECIAL
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL),
    )
    sizes = {
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 28 * 28, "longest_edge": 84 * 84},
    }
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(**sizes), fast, Qwen2VLVideoProcessor(**sizes), TEMPLATE
    ).save_pretrained(directory)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def qwen(request, tmp_path_factory):
    """A model with its real processor, and a file of samples beside two real images of different
    sizes."""
    from PIL import Image

    directory = tmp_path_factory.mktemp(request.param)
    tiny(request.param).save_pretrained(directory)
    add_processor(directory)
    draw = np.random.default_rng(0)
    for name, shape in {"wide": (30, 60, 3), "square": (56, 56, 3)}.items():
        Image.fromarray(draw.integers(0, 255, shape, dtype=np.uint8)).save(
            directory / f"{name}.png"
        )
    message = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "word5 word6"}],
    }
    lines = [
        {"text": f"word1 {PICTURE} word2 {PICTURE} word3", "images": ["wide.png", "square.png"]},
        {"messages": [message], "images": ["wide.png"]},
        {"text": "word7 word8 word9"},
    ]
    (directory / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return directory


def test_every_image_becomes_as_many_tokens_as_its_size_says(qwen):
    data = image_samples(open_checkpoint(qwen), [qwen / "samples.jsonl"], samples=3)
    # 30 x 60 is rounded to 28 x 56, two squares of 28; 56 x 56 to four
    assert (data.images, data.image_tokens) == (3, 2 + 4 + 2)
    assert data.count == (3 + 2 * 2 + 6) + (2 + 2 + 2) + 3
    grids = [
        sample["image_grid_thw"].tolist() for sample in data.inputs if "image_grid_thw" in sample
    ]
    assert sorted(grids) == [[[1, 2, 4]], [[1, 2, 4], [1, 4, 4]]]


@torch.no_grad()
def test_a_model_calibrated_on_images_keeps_its_processor_and_loads_in_transformers(qwen, tmp_path):
    data = image_samples(open_checkpoint(qwen), [qwen / "samples.jsonl"], samples=3)
    result = quantize(open_checkpoint(qwen), gptq(INT4), data, tmp_path / "out")
    job = json.loads((result.path / "qlab.json").read_text())["job"]["data"]
    assert (job["images"], job["image_tokens"], result.plan.tokens) == (3, 8, data.count)
    assert (
        AutoProcessor.from_pretrained(result.path).to_dict()
        == AutoProcessor.from_pretrained(qwen).to_dict()
    )
    again = image_samples(open_checkpoint(result.path), [qwen / "samples.jsonl"], samples=3)
    assert again.describe()["inputs_sha256"] == data.describe()["inputs_sha256"]
    theirs = from_transformers(result.path)
    for sample in data.inputs:
        expected = theirs(**sample).logits
        assert (with_image(result.path, sample) - expected).norm() <= 1e-5 * expected.norm()


def test_images_without_placeholders_and_placeholders_without_images_are_refused_by_line(qwen):
    path = qwen / "wrong.jsonl"
    path.write_text(json.dumps({"text": f"word1 {PICTURE} {PICTURE}", "images": ["wide.png"]}))
    with pytest.raises(QlabError, match="line 1: the processor refuses this sample"):
        image_samples(open_checkpoint(qwen), [path], 1)
    path.write_text(json.dumps({"text": "word1", "images": ["wide.png"]}))
    with pytest.raises(QlabError, match="line 1: the processor refuses this sample"):
        image_samples(open_checkpoint(qwen), [path], 1)
