"""Models of images and text: the decoder is quantized, on text or on what real images become, and
the rest is left alone."""

import importlib.util
import json

import pytest
import torch
from families import tiny
from logits import IDS, qlab_logits
from model_folders import bits_equal, random_tokens, tensors
from pictures import every_model, from_transformers, pictured

from qlab.algebra.spec import parse_spec
from qlab.cli import main
from qlab.data.images import Samples, image_samples
from qlab.driver.batches import push, record
from qlab.driver.quantize import quantize
from qlab.errors import QlabError
from qlab.evaluation.perplexity import evaluate
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.awq import awq
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn
from qlab.model.loading import load_block, load_outside
from qlab.model.recording import Recorder
from qlab.model.running import head, record_blocks
from qlab.model.skeleton import Skeleton

INT4 = parse_spec("int4-g16")


@torch.no_grad()
@every_model
def test_the_decoder_is_quantized_on_text_and_the_tower_is_left_alone(family, saved, tmp_path):
    source = saved(family)
    (source / "preprocessor_config.json").write_text("{}")
    before = qlab_logits(source)
    assert torch.allclose(before, tiny(family)(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    result = quantize(open_checkpoint(source), awq(INT4), random_tokens(source), tmp_path / "out")
    after = qlab_logits(result.path)
    theirs = from_transformers(result.path)(input_ids=IDS).logits
    assert (after - theirs).norm() <= 1e-5 * theirs.norm() and (
        after - before
    ).norm() > 1e-3 * before.norm()
    old, new = tensors(source), tensors(result.path)
    tower = {name for name in old if "vis" in name or "projector" in name}
    assert tower and all(bits_equal(old[name], new[name]) for name in tower)
    assert all("language_model.layers" in name for name in result.sites) and len(result.sites) == 14
    assert any("vis" in name for name in result.plan.unquantized)
    assert (result.path / "preprocessor_config.json").read_text() == "{}"


@every_model
def test_perplexity_and_divergence_are_measured_on_text(family, saved, tmp_path):
    source = saved(family)
    result = quantize(open_checkpoint(source), rtn(INT4), None, tmp_path / "out")
    reading = evaluate(open_checkpoint(result.path), open_checkpoint(source), random_tokens(source))
    assert reading.kl > 0 and reading.perplexity > 1


@torch.no_grad()
@every_model
def test_blocks_see_what_images_become_and_compute_what_the_model_does(family, saved):
    skeleton, model = Skeleton(open_checkpoint(saved(family)), torch.float32), tiny(family)
    load_outside(skeleton, with_head=True)
    batches = [pictured(family, seed) for seed in range(2)]
    entering, calls = record(skeleton, batches)
    for batch, state, call in zip(batches, entering, calls):
        for path in skeleton.blocks:
            (state,) = push(load_block(skeleton, path, call[path]), iter([(call[path], state)]))
        ours, theirs = head(skeleton, batch["input_ids"], *state), model(**batch).logits
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        without = model(input_ids=batch["input_ids"]).logits
        assert (theirs - without).norm() > 1e-3 * theirs.norm()  # the image matters


@every_model
def test_calibration_on_images_differs_from_calibration_without(family, saved, tmp_path):
    source, written = saved(family), {}
    for name in ("with", "without"):
        inputs = [pictured(family, seed) for seed in range(3)]
        inputs = inputs if name == "with" else [{"input_ids": i["input_ids"]} for i in inputs]
        data = Samples(inputs=tuple(inputs), texts=(), sha256="", seed=0, images=3, image_tokens=12)
        result = quantize(open_checkpoint(source), gptq(INT4), data, tmp_path / name)
        assert result.plan.tokens == sum(i["input_ids"].numel() for i in inputs)
        written[name] = tensors(result.path)
    site = next(n for n in written["with"] if n.endswith("layers.0.mlp.up_proj.weight_packed"))
    assert not bits_equal(written["with"][site], written["without"][site])


def test_real_images_go_through_the_processor_and_are_counted(llava, tmp_path):
    model = open_checkpoint(llava)
    data = image_samples(model, [llava / "samples.jsonl"], samples=2, seed=1)
    assert (
        data.images == sum("pixel_values" in s for s in data.inputs)
        and data.image_tokens == 4 * data.images
    )
    everything = image_samples(model, [llava / "samples.jsonl"], samples=3)
    assert (everything.images, everything.image_tokens, everything.count) == (2, 8, 8 + 6 + 3)
    result = quantize(model, gptq(INT4), data, tmp_path / "out")
    job = json.loads((result.path / "qlab.json").read_text())["job"]["data"]
    assert job["image_tokens"] == data.image_tokens and job["texts"] == ["samples.jsonl"]
    assert {"processor_config.json", "tokenizer.json"} <= {f.name for f in result.path.iterdir()}


def test_samples_of_text_and_samples_of_images_calibrate_together(llava, tmp_path):
    data = image_samples(open_checkpoint(llava), [llava / "samples.jsonl"], samples=3)
    assert (
        quantize(open_checkpoint(llava), gptq(INT4), data, tmp_path / "out").plan.tokens
        == data.count
    )


def test_qwens_processor_needs_torchvision_and_says_so(saved):
    if importlib.util.find_spec("torchvision"):
        pytest.skip("torchvision is installed")
    source = saved("qwen2_vl")
    (source / "preprocessor_config.json").write_text(
        '{"image_processor_type": "Qwen2VLImageProcessor"}'
    )
    with pytest.raises(QlabError, match="has no processor that transformers can make here"):
        image_samples(open_checkpoint(source), ["unread.jsonl"], 1)


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "line 1: not a JSON object"),
        ('{"images": []}', "not a JSON object"),
        ('{"text": "a", "images": "0.png"}', "as a list of paths"),
        (
            '{"text": "<image> word1", "images": ["absent.png"]}',
            r"line 1: the image .*absent\.png cannot be read",
        ),
        ('{"text": "<image> word1", "images": ["samples.jsonl"]}', "cannot be read"),
        (
            '{"text": "<image> <image> word1", "images": ["0.png"]}',
            "line 1: the processor refuses this sample",
        ),
        (
            '{"text": "word1 word2 word3 word4 word5 word6"}',
            "has 6 tokens, more than the 5 of a sample",
        ),
    ],
)
def test_samples_that_cannot_be_used_are_refused_by_line(line, words, llava):
    path = llava / "wrong.jsonl"
    path.write_text(line)
    with pytest.raises(QlabError, match=words):
        image_samples(open_checkpoint(llava), [path], 1, length=5)


def test_more_samples_than_lines_are_refused(llava):
    with pytest.raises(QlabError, match="holds 3 samples and 9 were asked for"):
        image_samples(open_checkpoint(llava), [llava / "samples.jsonl"], 9)


def test_a_command_calibrates_on_images(llava, tmp_path, command):
    samples = llava / "samples.jsonl"
    code, out, err = command(
        main,
        "quantize",
        llava,
        "--out",
        tmp_path / "out",
        "--method",
        "gptq",
        "--spec",
        "int4-g16",
        "--images",
        samples,
        "--samples",
        3,
    )
    assert code == 0 and "17 tokens" in out, err
    code, _, err = command(
        main,
        "plan",
        llava,
        "--method",
        "gptq",
        "--spec",
        "int4-g16",
        "--images",
        samples,
        "--calib",
        samples,
    )
    assert code == 2 and "give one of them" in err


def test_models_that_change_hidden_states_between_blocks_are_refused(saved):
    skeleton = Skeleton(open_checkpoint(saved("llava")), torch.float32)
    load_outside(skeleton, with_head=False)
    forward = Recorder.forward
    second = "model.language_model.layers.1"

    def joined(self, *args, **kwargs):  # another image joins before the second block
        late = self.block is skeleton.blocks[second]
        return forward(
            self, *(a + 1 if late and i == 0 else a for i, a in enumerate(args)), **kwargs
        )

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Recorder, "forward", joined)
        with pytest.raises(QlabError, match=f"changes hidden states before {second}"):
            record_blocks(skeleton, IDS)


@torch.no_grad()
@every_model
def test_a_head_that_is_the_embedding_is_read_from_it(family, saved):
    source = saved(family, tie_word_embeddings=True)
    assert not any("lm_head" in name for name in tensors(source))
    theirs = from_transformers(source)(input_ids=IDS).logits
    assert torch.allclose(qlab_logits(source), theirs, rtol=1e-4, atol=1e-4)
