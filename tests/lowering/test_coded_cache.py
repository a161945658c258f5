"""A cache of codes gives back, bit for bit, what QuantizeInput makes of each token; attention over
it is attention over those numbers."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lowering_cases import calm
from model_folders import refused

from qlab.algebra.online import QuantizeInput
from qlab.lowering.around import coded_cache as module
from qlab.lowering.around.coded_cache import coded_cache
from qlab.methods.kv import parse_cache_spec

SPECS = [
    "int8-token",
    "int4-token",
    "int4-token-asym",
    "int8-token-asym",
    "int4-token-head",
    "int3-g8",
    "fp8-token",
    "fp8-tensor",
    "int8-head",
    "int4-tensor",
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rounding(text, x):
    """As a directory has it for keys or values like x [b, h, n, d]."""
    h, d = x.shape[1], x.shape[3]
    cache_spec = parse_cache_spec(text)
    spec = cache_spec.of_heads(h, h * d)
    if not cache_spec.static:
        return QuantizeInput(spec)
    largest = x.float().abs().amax((0, 2, 3) if cache_spec.per_head else (0, 1, 2, 3))
    return QuantizeInput(spec, (largest / spec.reach).reshape(1, -1))


def as_read(op, x):
    """What an attention reads of x [b, h, n, d], as `attended.OfHeads` computes it."""
    b, h, n, d = x.shape
    return op(x.transpose(1, 2).reshape(b * n, h * d)).view(b, n, h, d).transpose(1, 2)


def tokens(seed, dtype, b=2, h=2, n=7, d=16):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(b, h, n, d, generator=rng)
    x[:, :, 1] = 0
    x[:, :, 2, 0] *= 50
    return x.to(dtype)


@calm
@given(
    st.sampled_from(SPECS),
    st.sampled_from(SPECS),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 7), max_size=3),
    st.integers(0, 99),
)
def test_a_cache_gives_back_what_each_token_becomes(keys, values, dtype, cuts, seed):
    k, v = tokens(seed, dtype), tokens(seed + 1, dtype, d=24)
    ops = rounding(keys, k), rounding(values, v)
    bounds = [0, *sorted(cuts), 7]
    cache = coded_cache(*ops, k[:, :, :0], v[:, :, :0])
    assert cache.length == 0
    for first, last in pairwise(bounds):
        cache = cache.appended(k[:, :, first:last], v[:, :, first:last])
    assert cache.length == 7
    for part, op, x in ((cache.keys, ops[0], k), (cache.values, ops[1], v)):
        assert part.read().dtype == dtype
        assert torch.equal(part.read(), as_read(op, x))
        assert torch.equal(part.read(2, 5), as_read(op, x)[:, :, 2:5])


def test_codes_take_the_bytes_that_their_bits_say():
    k = tokens(0, torch.bfloat16, n=64, d=64)
    for text, bits in (("int8-token-head", 8.5), ("int4-token-head", 4.5), ("fp8-tensor", 8)):
        cache = coded_cache(rounding(text, k), rounding(text, k), k, k)
        assert cache.nbytes() == pytest.approx(2 * k.numel() * bits / 8, rel=1e-3)


@calm
@given(
    st.sampled_from(SPECS),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([None, 2.0]),
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from([2, 1024]),
)
def test_attention_over_codes_is_that_over_their_numbers(text, window, cap, started, t, block):
    k, v = tokens(1, torch.float32), tokens(2, torch.float32, d=24)
    q = torch.randn(2, 4, t, 16, generator=torch.Generator().manual_seed(3))
    cache = coded_cache(rounding(text, k), rounding(text, v), k, v)
    starts = torch.tensor([0, 3]) if started else None
    kept, module.BLOCK = module.BLOCK, block
    try:
        y = cache.attend(q, scale=0.3, cap=cap, window=window, starts=starts)
    finally:
        module.BLOCK = kept
    n, own = torch.arange(7), torch.arange(7 - t, 7)[:, None]
    seen = (n <= own) & (n > own - (window or 8))
    seen = seen[None] & (n >= (torch.zeros(2) if starts is None else starts)[:, None, None])
    s = q @ cache.keys.read().repeat_interleave(2, 1).mT * 0.3
    s = s if cap is None else cap * torch.tanh(s / cap)
    p = s.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    torch.testing.assert_close(y, p @ cache.values.read().repeat_interleave(2, 1))


def test_the_default_scale_is_that_of_torch():
    k, q = tokens(1, torch.float32), torch.randn(2, 4, 1, 16)
    cache = coded_cache(rounding("int8-token", k), rounding("int8-token", k), k, k)
    k, v = (part.read().repeat_interleave(2, 1) for part in (cache.keys, cache.values))
    torch.testing.assert_close(cache.attend(q), F.scaled_dot_product_attention(q, k, v))


def test_what_does_not_fit_is_refused_by_name():
    k = tokens(0, torch.float32)
    op = rounding("int8-token", k)
    cache = coded_cache(op, op, k, k)
    refused(lambda: cache.appended(k[:1], k[:1]), "(2, 2)", "16", "(1, 2, 7, 16)")
    refused(lambda: cache.appended(k.bfloat16(), k), "torch.float32", "torch.bfloat16")
    refused(lambda: coded_cache(op, op, k, k[:, :, :3]), "(2, 2, 7, 16)", "positions")
    wide = QuantizeInput(parse_cache_spec("int4-g32").spec)
    refused(lambda: coded_cache(wide, op, k, k), "groups of 32", "16 channels")
    mx = QuantizeInput(parse_cache_spec("mxfp4").spec)
    refused(lambda: coded_cache(mx, op, k, k), "mxfp4", "neither integers")


INTERPRETED = """
import torch
import test_coded_cache as t
from qlab.lowering.around import coded_cache as module
from qlab.lowering.around.coded_cache import coded_cache
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_name = lambda device=None: "NVIDIA H200"
configured = module._configured
class Elsewhere:
    '''A query that says it lies on a GPU.'''
    def __init__(self, q): self.q, self.device = q, torch.device("cuda")
    def __getattr__(self, name): return getattr(self.q, name)
used = []
def here(q, keys):
    used.append(configured(Elsewhere(q), keys))
    return used[-1]
for number, text in enumerate(t.SPECS):
    dtype = (torch.float16, torch.bfloat16)[number % 2]
    k, v = t.tokens(1, dtype, n=70), t.tokens(2, dtype, n=70)
    q = torch.randn(2, 4, 1, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    cache = coded_cache(t.rounding(text, k), t.rounding(text, v), k, v)
    more = {"window": 50, "starts": torch.tensor([0, 30])}
    module._configured = lambda q, keys: None
    expected = cache.attend(q, **more)
    module._configured = here
    y = cache.attend(q, **more)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected.float(), rtol=3e-2, atol=3e-2)
assert len(used) == len(t.SPECS) and all(c.kind == "split_k" for c in used)
"""


def test_a_gpu_reads_codes_by_the_kernel(interpreted):
    interpreted(INTERPRETED)
