"""A fused weight of experts, packed: every row is multiplied by its own expert's weight, however
the rows are spread."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowering_cases import CPU, GROUPS, activations, calm, check_product, random_leaf
from torch.utils import _pytree as pytree

from qlab.algebra.experts import rows_of
from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import Int, Tile
from qlab.errors import QlabError
from qlab.lowering import QExperts
from qlab.lowering.weights.int4 import expert

pytestmark = pytest.mark.processor

DTYPES = [torch.bfloat16, torch.float32]


def random_experts(experts, o, k, spec, seed=0):
    leaves = [random_leaf(o, k, spec, seed + e) for e in range(experts)]
    return pytree.tree_map(lambda *parts: None if parts[0] is None else torch.stack(parts), *leaves)


def ends_of(counts):
    return torch.tensor(counts).cumsum(0)


@calm
@given(
    st.lists(st.sampled_from([0, 0, 1, 3, 40]), min_size=1, max_size=4),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([None, *GROUPS]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
)
def test_each_row_meets_its_own_expert(counts, bits, symmetric, group, dtype, biased, dense_cache):
    k = 100 if group is None else group * 2
    leaf = random_experts(len(counts), 70, k, Int(bits, Tile(1, group), symmetric))
    module = QExperts("site", leaf, dtype, CPU, dense_cache)
    ends = ends_of(counts)
    x = activations(sum(counts), k, dtype)
    bias = activations(len(counts), 70, dtype, seed=7) if biased else None
    y = module(x, bias, ends)
    assert y.shape == (sum(counts), 70)
    for e, rows in enumerate(rows_of(ends)):
        check_product(y[rows], x[rows], expert(leaf, e), None if bias is None else bias[e])


@pytest.mark.parametrize("bits, symmetric", [(4, True), (4, False), (8, True)])
def test_torch_accepts_the_operator(bits, symmetric):
    module = QExperts(
        "site",
        random_experts(3, 70, 64, Int(bits, Tile(1, 32), symmetric)),
        torch.bfloat16,
        CPU,
        False,
    )
    for counts in ([0, 0, 0], [2, 0, 5]):
        x = activations(sum(counts), 64, torch.bfloat16)
        arguments = module.packed.for_grouped_mm(x, None, ends_of(counts))
        torch.library.opcheck(torch.ops.qlab.int4_grouped_mm.default, arguments)


def test_its_dense_weight_is_the_leaf():
    leaf = random_experts(2, 40, 64, Int(4, Tile(1, 32), False))
    stored = QTensor(leaf.codes, leaf.scales.bfloat16(), leaf.zeros, leaf.spec)
    module = QExperts("site", leaf, torch.bfloat16, CPU, dense_cache=True)
    assert torch.equal(module.dense, dense(stored, torch.float64).bfloat16()) and len(module) == 2


def test_words_of_another_machine_are_refused():
    leaf = random_experts(2, 64, 64, Int(4, Tile(1, 32)))
    module, other = (QExperts("site", leaf, torch.bfloat16, CPU, False) for _ in range(2))
    state = module.state_dict()
    other.load_state_dict(state)
    state["_extra_state"] = torch.tensor(list(b"mma2"), dtype=torch.uint8)
    with pytest.raises(QlabError, match="packed as mma2"):
        other.load_state_dict(state)
