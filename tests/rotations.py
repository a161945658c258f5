"""The transform_configs that tests use, and what a directory with one computes."""

import torch

import qlab
from qlab.evaluation.perplexity import read
from qlab.files.checkpoint import open_checkpoint
from qlab.model.running import head


def group(kind, *places, **more):
    """A group of (targets, location, inverse) places."""
    apply = [
        {"targets": [target], "location": at, "inverse": inverse, "ignore": ["lm_head"]}
        for target, at, inverse in places
    ]
    return {"type": kind, "apply": apply, **more}


def rotated(kind, target, **more):
    """x -> x @ M and W -> W @ M^-T at the same modules."""
    return group(kind, (target, "input", False), (target, "weight_input", True), **more)


def turned(kind, target, **more):
    """y -> y @ U and W -> U^-T @ W at the same modules."""
    return group(kind, (target, "weight_output", False), (target, "output", True), **more)


BOTH = [
    ("Linear", "weight_input", True),
    ("Linear", "weight_output", False),
    ("Linear", "input", False),
    ("Linear", "output", True),
]
HEADS = {
    "R3": group(
        "hadamard",
        ("re:.*self_attn$", "q_attn", False),
        ("re:.*self_attn$", "k_cache", False),
        head_dim=16,
    )
}
CASES = {
    "down": {"R4": rotated("hadamard", "re:.*down_proj$")},
    "inverse": {
        "R4": group(
            "random-hadamard",
            ("re:.*down_proj$", "input", True),
            ("re:.*down_proj$", "weight_input", False),
        )
    },
    "every linear": {"v": rotated("random-hadamard", "Linear", precision="torch.float64")},
    "in one matrix": {"v": rotated("hadamard", "Linear", precision="torch.float64")},
    "random": {"v": rotated("random-hadamard", "Linear", head_dim=16, randomize=True)},
    "shuffled": {"v": rotated("hadamard", "re:.*(gate|up)_proj$", head_dim=32, randomize=True)},
    "matrices": {
        "a": rotated("random-matrix", "re:.*o_proj$", precision="torch.float64"),
        "b": group(
            "random-matrix",
            ("re:.*down_proj$", "input", True),
            ("re:.*down_proj$", "weight_input", False),
            precision="torch.float64",
        ),
    },
    "both ways": {
        "a": group(
            "random-matrix",
            ("re:.*o_proj$", "input", False),
            ("re:.*o_proj$", "weight_input", True),
            ("re:.*q_proj$", "input", True),
            ("re:.*q_proj$", "weight_input", False),
            precision="torch.float64",
        )
    },
    "outputs": {"u": turned("hadamard", "Linear")},
    "outputs by random signs": {
        "u": turned("random-hadamard", "re:.*(q|k|v)_proj$", head_dim=8, randomize=True)
    },
    "inputs and outputs": {
        "v": rotated("random-hadamard", "Linear"),
        "u": turned("random-hadamard", "Linear"),
    },  # as QuIP writes
    "one matrix on both sides": {"w": group("hadamard", *BOTH)},
    "matrices at outputs": {
        "u": turned("random-matrix", "re:.*down_proj$", precision="torch.float64")
    },
    "heads": HEADS,
    "fused alone": {
        "R2": group(
            "hadamard",
            ("re:.*v_proj$", "weight_output", False),
            ("re:.*o_proj$", "weight_input", True),
            head_dim=16,
        )
    },
    "all": HEADS | {"R4": rotated("hadamard", "re:.*down_proj$", head_dim=64)},
    "changed": {
        "R4": group("random-hadamard", ("re:.*down_proj$", "input", False))
    },  # not undone in the weights
}


def logits(folder):
    model, ids = open_checkpoint(folder), torch.arange(3, 35).reshape(2, 16)
    reading = read(model, qlab.from_ids(model, ids))
    return head(reading.skeleton, ids, reading.hidden)


def assert_close(computed, expected, limit=1e-5):
    assert (computed - expected).norm() < limit * expected.norm()
