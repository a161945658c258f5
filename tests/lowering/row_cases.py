"""The rows of the table of kernels that run on a CPU, with weights that they take."""

from dataclasses import dataclass, replace

import torch
from lowering_cases import CPU
from test_coded import leaf_of
from torch.utils import _pytree as pytree

from qlab.algebra.online import QuantizeInput
from qlab.algebra.spec import parse_spec
from qlab.lowering import QExperts, QLinear
from qlab.lowering.weights.integers import is_exact
from qlab.lowering.weights.kernels import kernel_named
from qlab.lowering.weights.setting import Setting


def pruned(leaf):
    """A weight of integers with two zeros in every four neighbours."""
    kept = torch.arange(leaf.shape[-1]) % 4 < 2
    return replace(leaf, codes=leaf.codes * kept)


@dataclass(frozen=True)
class Case:
    """A row, a spec of a weight, and what rounds x: a spec, or one with a fixed scale.

    o, k: the shape of a weight. few: output channels of an expert. dtypes: those of activations
    that the row takes. orders: whether channels may be in an order of their own.
    """

    row: str
    spec: str
    inputs: str | None = None
    static: float | None = None
    activations: str | None = None
    o: int = 70
    k: int = 96
    few: int = 24
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    orders: bool = True

    def __str__(self):
        inputs = f" x {self.inputs or self.activations}" if self.inputs or self.activations else ""
        return f"{self.row}: {self.spec}{inputs}{' static' if self.static else ''}"

    @property
    def rounding(self):
        """What rounds x in front of the product or in it, or None."""
        if self.inputs is None:
            return None
        spec = parse_spec(self.inputs)
        if self.static is None:
            return QuantizeInput(spec)
        zeros = None if spec.symmetric else torch.tensor([[3]], dtype=torch.int8)
        return QuantizeInput(spec, torch.tensor([[self.static]]), zeros)

    def setting(self, dtype=torch.bfloat16, device=CPU):
        how = {"inputs": self.rounding, "activations": self.activations}
        return Setting(dtype=dtype, device=device, **how)

    def leaf(self, seed=0, shuffled=False, o=None):
        leaf = leaf_of(parse_spec(self.spec), o or self.o, self.k, seed)
        if self.row == "sparse24":
            leaf = pruned(leaf)
        generator = torch.Generator().manual_seed(seed)
        perm = torch.randperm(self.k, generator=generator)
        return replace(leaf, perm=perm) if shuffled and self.orders else leaf

    def experts(self, count, shuffled=False):
        leaves = [self.leaf(seed, o=self.few) for seed in range(count)]
        stacked = pytree.tree_map(
            lambda *parts: None if parts[0] is None else torch.stack(parts), *leaves
        )
        perm = self.leaf(shuffled=shuffled).perm
        return replace(stacked, perm=perm)

    def linear(self, leaf, bias=None, dtype=torch.bfloat16, dense_cache=False, device=CPU):
        return QLinear("site", leaf, bias, dtype, device, dense_cache, **self._how())

    def grouped(self, leaf, dtype=torch.bfloat16, dense_cache=False, device=CPU):
        return QExperts("site", leaf, dtype, device, dense_cache, **self._how())

    def _how(self):
        return {
            "inputs": self.rounding,
            "kernel": kernel_named(self.row),
            "activations": self.activations,
        }


BF16 = (torch.bfloat16,)
HALVES = (torch.bfloat16, torch.float16)
FLOATS = {"row": "fp8_fp8", "orders": False}
BLOCKS = Case(spec="fp8-b128x128", inputs="fp8-g128", o=256, k=256, few=128, **FLOATS)
# Each is put under every law of test_row_laws.py.
LAW_ROWS = [
    Case("int8", "int8-channel", dtypes=BF16),
    Case("int8", "int8-tensor", dtypes=BF16),
    Case("int8", "int6-channel-asym", inputs="fp8-channel", dtypes=BF16),
    Case("int8_int8", "int8-channel", inputs="int8-channel"),
    Case("int8_int8", "int8-channel-asym", inputs="int8-channel-asym"),
    Case("int8_int8", "int7-tensor", inputs="int8-tensor", static=0.03),
    Case("int8_int8", "int8-channel-asym", inputs="int8-tensor-asym", static=0.03),
    Case("int8_int8", "int5-b2x48-asym", inputs="int6-tensor-asym"),
    Case("int8_int8", "int8-channel-asym", activations="int8"),
    Case("sparse24", "int8-channel", inputs="int8-channel"),
    Case("sparse24", "int8-tensor", inputs="int8-tensor-asym", static=0.03),
    Case(spec="fp8-channel", inputs="fp8-channel", **FLOATS),
    Case(spec="fp8-tensor", inputs="fp8-tensor", static=0.01, **FLOATS),
    BLOCKS,
    Case("int4", "int4-channel-asym"),
    Case("int4", "int8-g32", inputs="int8-channel"),
    Case("fp8", "fp8-channel", dtypes=BF16),
    Case("fp8", "fp8-b16x32", inputs="fp8-g32", dtypes=BF16),
    Case("fp8", "mxfp8", dtypes=BF16),
    Case("fused_floats", "nvfp4", inputs="nvfp4", dtypes=HALVES),
    Case("fused_floats", "mxfp4", dtypes=HALVES),
    Case("fused_floats", "mxfp8", inputs="mxfp8", dtypes=HALVES),
    Case("fused_floats", "fp8-b64x64", k=192, dtypes=HALVES),
    Case("fused_floats", "fp8-channel", dtypes=HALVES),
    Case("codes", "int4-g8-asym", inputs="int8-channel"),
]


def multiplies_floats():
    """Whether torch multiplies 8-bit floats on this CPU. Where the processor has instructions for
    it that the environment forbids, it fails."""
    p = torch.zeros((32, 32), dtype=torch.float8_e4m3fn)
    one = torch.ones((), dtype=torch.float32)
    try:
        torch._scaled_mm(p, p.mT, one, one, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


# Rows whose products this CPU does not compute. Processors without VNNI add products of integers in
# 16 bits, and the table passes over these rows.
LEFT_OUT = set() if is_exact() else {"int8_int8", "sparse24"}
LEFT_OUT |= set() if multiplies_floats() else {FLOATS["row"]}
LAW_ROWS = [case for case in LAW_ROWS if case.row not in LEFT_OUT]
