"""Fused weights are cut into the tensors of files and joined again, bit for bit."""

from itertools import pairwise
from weakref import ref

import pytest
import torch
from families import tiny
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from qlab.algebra.experts import each_expert
from qlab.algebra.grid import encode, minmax
from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import parse_spec
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.model.headers import refuse_missing
from qlab.model.loading import load_original
from qlab.model.pieces import Piece, assemble, pieces_of_experts
from qlab.model.skeleton import Skeleton


@pytest.mark.parametrize("family", ["granitemoe", "olmo_hybrid"])
def test_weights_of_other_names_and_filters_in_parts_are_read_as_transformers_does(family, saved):
    skeleton = Skeleton(open_checkpoint(saved(family)), torch.float32)
    refuse_missing(skeleton.names)
    parameters = dict(tiny(family).named_parameters())
    assert all(torch.equal(load_original(skeleton, name), parameters[name]) for name in parameters)
    assert not {module for module in skeleton.names.expert_modules() if "conv" in module}


SPECS = ("int4-g16", "int3-g32-asym", "int8-channel", "fp8-b16x32", "mxfp4", "nvfp4")


def pieces(experts, cuts):
    """Every expert's rows between these cuts."""
    ranges = list(enumerate(pairwise(cuts)))
    return tuple(
        Piece(f"experts.{e}.p{i}.weight", e, a, b) for e in range(experts) for i, (a, b) in ranges
    )


def stacked(leaves):
    return pytree.tree_map(lambda *parts: None if parts[0] is None else torch.stack(parts), *leaves)


@given(
    experts=st.integers(1, 4),
    blocks=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    text=st.sampled_from((None, *SPECS)),
)
def test_joining_what_was_cut_gives_the_leaf_bit_for_bit(experts, blocks, text):
    cuts = [0, *torch.tensor(blocks).cumsum(0).mul(16).tolist()]
    W_eok = torch.randn(experts, cuts[-1], 64, generator=torch.Generator().manual_seed(cuts[-1]))
    leaf = W_eok if text is None else stacked([encode(minmax, W, parse_spec(text)) for W in W_eok])
    parts = pieces(experts, cuts)
    again = assemble(parts, [piece.of(leaf) for piece in parts])
    assert type(again) is type(leaf)
    ours, theirs = (
        (t if isinstance(t, torch.Tensor) else None for t in (again, leaf))
        if text is None
        else (again.codes, leaf.codes)
    )
    assert torch.equal(ours.float(), theirs.float())
    if isinstance(leaf, QTensor):
        assert again.spec == leaf.spec and torch.equal(again.scales.float(), leaf.scales.float())
        assert leaf.zeros is None or torch.equal(again.zeros, leaf.zeros)
        assert leaf.outer is None or torch.equal(again.outer, leaf.outer)


def test_dense_experts_are_read_one_by_one_each_into_its_place():
    W_eok, made = torch.randn(8, 32, 8), []
    cut = pieces(8, [0, 16, 32])

    def parts():
        for piece in cut:
            assert sum(part() is not None for part in made) <= 3  # of the last ones
            part = piece.of(W_eok).clone()
            made.append(ref(part))
            yield part

    assert torch.equal(assemble(cut, parts()), W_eok)
    assert len(made) == 16


def test_products_of_experts_are_placed_one_by_one_and_alike_with_gradients():
    W_eok, x_sk, ends = torch.randn(3, 4, 8), torch.randn(6, 8), torch.tensor([2, 2, 6])
    made = []

    def product(e, x_nk):
        assert all(y() is None for y in made)
        y_no = x_nk @ W_eok[e].T
        made.append(ref(y_no))
        return y_no

    with torch.no_grad():
        placed = each_expert(x_sk, ends, product)
    assert len(made) == 3
    W_eok.requires_grad_(True)
    joined = each_expert(x_sk, ends, lambda e, x_nk: x_nk @ W_eok[e].T)
    assert torch.equal(placed, joined) and joined.requires_grad
    assert torch.autograd.grad(joined.sum(), W_eok)[0][1].abs().max() == 0


def test_a_whole_leaf_is_its_one_piece():
    W = torch.randn(4, 6)
    assert assemble((Piece("a.weight"),), [W]) is W and Piece("a.weight").of(W) is W
    assert Piece("a.b.weight").module == "a.b"


def test_a_cut_through_a_block_of_rows_is_refused_by_name():
    leaf = stacked([encode(minmax, torch.randn(64, 64), parse_spec("fp8-b32x32"))])
    with pytest.raises(
        QlabError,
        match=r"experts\.0\.p0: rows 0 to 16 of the fused experts share fp8-b32x32 scales",
    ):
        pieces(1, [0, 16, 64])[0].of(leaf)


def test_projections_with_global_scales_of_their_own_are_refused_by_name():
    parts = [encode(minmax, torch.randn(16, 64) * size, parse_spec("nvfp4")) for size in (1, 7)]
    with pytest.raises(QlabError, match=r"experts\.0\.p1 has a global scale of its own"):
        assemble(pieces(1, [0, 16, 32]), parts)


def test_scales_per_tensor_join_as_scales_of_rows():
    parts = [encode(minmax, torch.randn(16, 64), parse_spec("int8-tensor")) for _ in range(2)]
    joined = assemble(pieces(1, [0, 16, 32]), parts)
    assert joined.spec == parse_spec("int8-channel")
    assert torch.equal(
        dense(joined, torch.float32)[0], torch.cat([dense(part, torch.float32) for part in parts])
    )


def test_transformers_own_saving_rules_say_what_engines_call_experts():
    model = tiny("mixtral")
    cut = pieces_of_experts(model, "model.layers.1.mlp.experts.gate_up_proj", ())
    module = "model.layers.1.block_sparse_moe.experts.{}.w{}.weight"
    expected = [
        Piece(module.format(e, w), e, start, start + 128)
        for e in range(4)
        for w, start in ((1, 0), (3, 128))
    ]
    assert list(cut) == expected
    bare = pieces_of_experts(
        model,
        "model.layers.1.mlp.experts.down_proj",
        [
            p.name.removeprefix("model.")
            for p in pieces_of_experts(model, "model.layers.1.mlp.experts.down_proj", ())
        ],
    )
    # The name as the files spell it.
    assert bare[3] == Piece("layers.1.block_sparse_moe.experts.3.w2.weight", 3, 0, 64)
