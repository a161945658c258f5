"""Models of images and text, and what they are called with."""

import json

import numpy as np
import pytest
import torch
from families import VISION, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForImageTextToText, LlavaProcessor, PreTrainedTokenizerFast

from qlab.driver.batches import push, record
from qlab.files.checkpoint import open_checkpoint
from qlab.model.loading import load_block, load_outside
from qlab.model.running import head
from qlab.model.skeleton import Skeleton

IMAGE = 127  # the token that stands for a patch
every_model = pytest.mark.parametrize("family", VISION)


def from_transformers(path):
    model, report = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert (
        not report["missing_keys"]
        and not report["unexpected_keys"]
        and not report["mismatched_keys"]
    )
    return model.eval()


def pictured(family, seed, patches=4):
    """Token ids with an image's patches in them, and the rest of what the model takes, made without
    a processor."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 120, (1, 12 + seed), generator=g)
    ids[0, 3 : 3 + patches] = IMAGE
    if family == "llava":
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28, generator=g)}
    ids[0, 2] = 125
    # Two by two patches become one token.
    pixels = torch.randn(4 * patches, 3 * 2 * 14 * 14, generator=g)
    kinds = ids.eq(IMAGE).int()
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": kinds,
    }


@torch.no_grad()
def with_image(path, batch):
    """qlab's own reading of a directory: logits of a sample that holds an image."""
    skeleton = Skeleton(open_checkpoint(path), torch.float32)
    load_outside(skeleton, with_head=True)
    (state,), (call,) = record(skeleton, [batch])
    for name in skeleton.blocks:
        (state,) = push(load_block(skeleton, name, call[name]), iter([(call[name], state)]))
    return head(skeleton, batch["input_ids"], *state)


def save_with_processor(directory):
    """A llava with a real processor, and a file of samples with real images beside it."""
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tiny("llava").save_pretrained(directory)
    words = {
        word: i
        for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"word{i}" for i in range(120))])
    } | {"<image>": IMAGE}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    pixels = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{{ '<image> ' if c['type'] == 'image' "
        "else c['text'] + ' ' }}{% endfor %}{% endfor %}"
    )
    LlavaProcessor(
        image_processor=pixels,
        tokenizer=fast,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(directory)
    draw = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(draw.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(
            directory / f"{i}.png"
        )
    lines = [
        {"text": "word1 word2 <image> word3 word4", "images": ["0.png"]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": "word5 word6"}],
                }
            ],
            "images": ["1.png"],
        },
        {"text": "word7 word8 word9"},
    ]
    (directory / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
