"""Dispatch is a table: every capability has its row, every row a configuration, and everything else
a refusal that says what works."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab_kernels import (
    TARGETS,
    Config,
    KernelError,
    Problem,
    admit,
    candidates,
    heuristic,
    kernel_revision,
    legal,
    target,
)

KIB = 1024
TABLE = {  # path, layout, shared memory in KiB, bf16, dequantization sequence
    (7, 0): ("dequantize", "rows", 96, False, "none"),
    (7, 2): ("dequantize", "rows", 96, False, "none"),
    (7, 5): ("fma", "rows", 64, False, "none"),
    (8, 0): ("fused", "mma2", 163, True, "fma"),
    (8, 6): ("fused", "mma2", 99, True, "fma"),
    (8, 7): ("fused", "mma2", 163, True, "fma"),
    (8, 9): ("fused", "mma2", 99, True, "fma"),
    (9, 0): ("fused", "wgmma", 227, True, "sub"),
    (10, 0): ("fused", "mma2", 227, True, "sub"),
    (12, 0): ("fused", "mma2", 99, True, "sub"),
}
KINDS = {
    "dequantize": {"dequant"},
    "fma": {"fma", "dequant"},
    "fused": {"split_k", "gemm", "dequant"},
}
REGIMES = {
    "dequantize": ("dequant", "dequant", "dequant"),
    "fma": ("fma", "dequant", "dequant"),
    "fused": ("split_k", None, "dequant"),
}


def problem(cc, m=1, dtype="float16", group=128, zeros=False, n=4096, k=4096, op="int4_mm"):
    return Problem(op, cc, "a device", dtype, group, zeros, n, k, m)


@pytest.mark.parametrize("cc", TABLE)
def test_every_capability_has_its_row(cc):
    path, layout, smem, bf16, sequence = TABLE[cc]
    row = target(cc)
    assert (row.path, row.layout, row.smem, row.sequence) == (path, layout, smem * KIB, sequence)
    assert row.dtypes == ((torch.bfloat16, torch.float16) if bf16 else (torch.float16,))
    for m, kind in zip((1, 64, 4096), REGIMES[path], strict=True):
        assert heuristic(problem(cc, m)).kind == (kind or heuristic(problem(cc, m)).kind)
        assert {c.kind for c in candidates(problem(cc, m))} <= KINDS[path]


def test_the_table_has_no_other_rows():
    assert set(TARGETS) == set(TABLE)


@pytest.mark.parametrize("cc", [(6, 1), (5, 2), (9, 1), (10, 3), (11, 0), (12, 1), (13, 0), "sm90"])
def test_other_capabilities_are_refused_by_name(cc):
    with pytest.raises(
        KernelError,
        match=r"no kernels for compute capability .*: there are some for 7.0, .* 12.0; elsewhere",
    ):
        target(cc)


@pytest.mark.parametrize(
    "cc, dtype, able",
    [
        ((7, 0), torch.bfloat16, "float16"),
        ((7, 5), torch.bfloat16, "float16"),
        ((9, 0), torch.float32, "bfloat16 or float16"),
    ],
)
def test_other_dtypes_are_refused_with_what_works(cc, dtype, able):
    with pytest.raises(
        KernelError, match=f"{cc[0]}.{cc[1]} multiplies {able} activations .* cast the model to"
    ):
        admit(cc, dtype)


@pytest.mark.parametrize(
    "k, config, why",
    [
        (256, Config("gemm", 16, 64, 128), "k tile of 128 straddles groups of 64"),
        (300, Config("gemm", 8, 64, 64), "bm is a power of two in 16..256"),
        (300, Config("gemm", 16, 128, 64), "do not divide the padded weight 64x320"),
        (300, Config("gemm", 16, 64, 256), "do not divide the padded weight 64x320"),
        (300, Config("gemm", 16, 64, 64, split=2), "split 2 does not suit gemm"),
        (
            300,
            Config("split_k", 16, 64, 64, split=6),
            "split 6 does not suit split_k over 5 k tiles",
        ),
        (300, Config("gemm", 16, 64, 64, warps=8), "8 warps need bn >= 128"),
        (300, Config("fma", 1, 64, 64), "runs split_k, gemm, dequant, not fma"),
        (300, Config("int4pack"), "runs split_k, gemm, dequant, not int4pack"),
    ],
)
def test_illegal_configs_say_why(k, config, why):
    assert why in str(legal(problem((9, 0), group=64, n=40, k=k), config))


def test_shared_memory_is_what_the_device_has():
    tile = Config("gemm", 128, 256, 64, warps=8, stages=4, scale_on="weight")
    assert legal(problem((9, 0)), tile) is None
    assert "bytes of shared memory" in str(legal(problem((8, 9)), tile))


def test_grouped_product_needs_the_fused_path():
    assert heuristic(problem((9, 0), op="int4_grouped_mm", m=64)).kind == "gemm"
    with pytest.raises(KernelError, match="elsewhere multiply expert by expert"):
        heuristic(problem((7, 5), op="int4_grouped_mm"))


@settings(max_examples=200)
@given(
    cc=st.sampled_from(sorted(TABLE)),
    m=st.integers(0, 10_000),
    n=st.integers(1, 40_000),
    k=st.integers(1, 40_000),
    group=st.sampled_from([32, 64, 128, 256, 10**6]),
    zeros=st.booleans(),
    dtype=st.sampled_from(["float16", "bfloat16"]),
)
def test_every_problem_has_a_legal_config_or_a_refusal(cc, m, n, k, group, zeros, dtype):
    p = problem(cc, m, dtype, group, zeros, n, k)
    if dtype == "bfloat16" and not TABLE[cc][3]:
        with pytest.raises(KernelError):
            heuristic(p)
        return
    menu = candidates(p)
    assert all(legal(p, c) is None for c in menu) and len(set(menu)) == len(menu) <= 100
    assert heuristic(p) in menu
    assert p.bucket >= min(m, 4096)


def test_cpu_problems_share_the_config():
    p = Problem("int4_linear_cpu", "cpu-amx", "a cpu", "bfloat16", 128, True, 4096, 4096, 1)
    assert [heuristic(p).kind, candidates(p)] == ["int4pack", [Config("int4pack"), Config("dense")]]
    single = Problem("int4_linear_cpu", "cpu-amx", "a cpu", "float32", 128, True, 64, 64, 1)
    assert "bfloat16 activations, not float32" in str(legal(single, Config("int4pack")))


def test_importing_needs_no_triton_and_shadows_no_package():
    code = "import sys, qlab_kernels; sys.exit('triton' in sys.modules or 'qlab' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert not (Path(__file__).parents[2] / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("addition, differs", [("\nNEW = 1\n", True), ("\n\n# a comment\n", False)])
def test_revision_follows_the_syntax_of_the_sources(addition, differs, monkeypatch):
    kernel_revision.cache_clear()
    before, real = kernel_revision(), Path.read_text
    kernel_revision.cache_clear()

    def added(path, **how):
        return real(path, **how) + (addition if path.name == "tile.py" else "")

    monkeypatch.setattr(Path, "read_text", added)
    after = kernel_revision()
    kernel_revision.cache_clear()
    assert (before != after) is differs and len(before) == 12
