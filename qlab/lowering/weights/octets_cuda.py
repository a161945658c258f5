"""Products of 8-bit codes with 8-bit codes on a GPU: qlab_kernels does the work, in the
configuration that its cache holds for the shape."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.spec import Float, Int, Spec
from qlab.lowering.weights import floats, integers
from qlab.lowering.weights.exact import spec_of
from qlab.lowering.weights.integers import Codes

Part = Tensor | None
Int8 = tuple[Tensor, Tensor, Part, Part]  # words, scales, zeros, sums
Fp8 = tuple[Tensor, Tensor, int]  # words, scales, n without padding
FP8 = (8, 9)  # whose tensor cores multiply 8-bit floats


def has_triton() -> bool:
    """Whether Triton can be imported."""
    return find_spec("triton") is not None


@torch.compiler.assume_constant_result
def fused(device: torch.device, first: tuple[int, int] = (8, 0)) -> bool:
    """Whether the device has one kernel for the whole product, which reads the ends of experts'
    rows there: a GPU that qlab_kernels knows, from capability `first` on, with Triton."""
    if device.type != "cuda" or not has_triton():
        return False
    from qlab_kernels.capability import TARGETS

    capability = torch.cuda.get_device_capability(device)
    return capability >= first and capability in TARGETS


def rounded(x_mk: Tensor, perm: Part, scales: Part, zeros: Part, spec: str) -> Codes:
    """x in codes, as `integers.rounded` gives them on a CPU, by one kernel where there is one for
    the spec."""
    grid = spec_of(spec)
    if not (_in_one_kernel(grid, x_mk.shape[1], scales) and fused(x_mk.device)):
        return integers.rounded(x_mk, perm, scales, zeros, spec)
    if isinstance(grid, Int):
        from qlab_kernels.round_int8 import round_int8

        codes = Codes(*round_int8(x_mk, grid.bits, grid.symmetric, scales, zeros))
    else:
        from qlab_kernels.round_fp8 import round_fp8

        codes = Codes(*round_fp8(x_mk, grid.tile.cols, scales), None)
    return codes if perm is None else codes._replace(p=codes.p[:, perm])


def _in_one_kernel(grid: Spec, k: int, scales: Part) -> bool:
    """Whether scales are those of tokens, of whole groups of 8-bit floats, or one that is fixed."""
    if grid.scale_dtype not in (None, torch.float32):
        return False
    rows, cols = grid.tile.rows, grid.tile.cols
    if isinstance(grid, Float) and (grid.bits != 8 or grid.outer):
        return False
    if scales is not None:
        return (rows, cols) == (None, None)
    return rows == 1 and (cols is None or (isinstance(grid, Float) and k % cols == 0))


def int8_mm(codes: Codes, weight: Int8, bias: Part, dtype: torch.dtype) -> Tensor:
    """y [m, n] = x @ W.T + b of words [c, n, g], scales, zeros and sums [c, n], rounded once. All
    configurations give the same bits."""
    config = None
    if fused(codes.p.device):
        config = _looked_up(int8_problem("int8_int8_mm", codes, weight, dtype))
    return int8_by(config, codes, weight, bias, dtype)


def int8_by(config: Any, codes: Codes, weight: Int8, bias: Part, dtype: torch.dtype) -> Tensor:
    """The same in a configuration; None is the library's product."""
    if config is None or config.kind == "library":
        y = integers.product(codes, *weight)
        return (y if bias is None else y.add_(bias.float())).to(dtype)
    from qlab_kernels.int8_int8 import Int8Rows, Int8Weight, int8_int8

    return int8_int8(Int8Rows(*codes), Int8Weight(*weight), bias, dtype, config)


def int8_grouped_mm(codes: Codes, weight: Int8, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """y [s, n]: rows ends[e-1]:ends[e] of x @ W_e.T, by one kernel that reads `ends` on the
    device."""
    config = _looked_up(int8_problem("int8_int8_grouped_mm", codes, weight, dtype))
    return int8_grouped_by(config, codes, weight, ends, dtype)


def int8_grouped_by(
    config: Any, codes: Codes, weight: Int8, ends: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same in a configuration."""
    from qlab_kernels.int8_int8 import Int8Rows, Int8Weight, int8_int8_grouped

    rows, offsets = Int8Rows(*codes), ends.to(torch.int32)
    return int8_int8_grouped(rows, Int8Weight(*weight), offsets, dtype, config)


def int8_problem(op: str, codes: Codes, weight: Int8, dtype: torch.dtype) -> Any:
    """The product's key in the config cache."""
    groups, n, group = weight[0].shape[-3:]
    experts = len(weight[0]) if weight[0].ndim == 4 else 1
    return problem(op, codes.p, (n, groups * group), group, weight[2] is not None, dtype, experts)


def fp8_mm(codes: Codes, weight: Fp8, bias: Part, dtype: torch.dtype) -> Tensor:
    """y [m, n] = x @ W.T + b of words e4m3 [n', k'] under scales of rows or of blocks, rounded
    once."""
    config = None
    if fused(codes.p.device, FP8):
        config = _looked_up(fp8_problem("fp8_fp8_mm", codes, weight, dtype))
    return fp8_by(config, codes, weight, bias, dtype)


def fp8_by(config: Any, codes: Codes, weight: Fp8, bias: Part, dtype: torch.dtype) -> Tensor:
    """The same in a configuration; None is the library's product."""
    words, scales, n = weight
    if config is None or config.kind == "library":
        y = floats.product(codes, words, scales)[:, :n]
        return (y if bias is None else y + bias.float()).to(dtype).contiguous()
    from qlab_kernels.fp8_fp8 import Fp8Rows, Fp8Weight, fp8_fp8

    return fp8_fp8(Fp8Rows(codes.p, codes.scales), Fp8Weight(*weight), bias, dtype, config)


def fp8_grouped_mm(codes: Codes, weight: Fp8, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """y [s, n]: rows ends[e-1]:ends[e] of x @ W_e.T, by one kernel that reads `ends` on the
    device."""
    config = _looked_up(fp8_problem("fp8_fp8_grouped_mm", codes, weight, dtype))
    return fp8_grouped_by(config, codes, weight, ends, dtype)


def fp8_grouped_by(
    config: Any, codes: Codes, weight: Fp8, ends: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same in a configuration."""
    from qlab_kernels.fp8_fp8 import Fp8Rows, Fp8Weight, fp8_fp8_grouped

    rows, offsets = Fp8Rows(codes.p, codes.scales), ends.to(torch.int32)
    return fp8_fp8_grouped(rows, Fp8Weight(*weight), offsets, dtype, config)


def fp8_problem(op: str, codes: Codes, weight: Fp8, dtype: torch.dtype) -> Any:
    """The product's key in the config cache: blocks are a group of 128, rows all channels."""
    (words, scales, n), k = weight, codes.p.shape[1]
    group = floats.BLOCK if scales.ndim == words.ndim else k
    experts = len(words) if words.ndim == 3 else 1
    return problem(op, codes.p, (n, k), group, False, dtype, experts)


def _looked_up(key: Any) -> Any:
    """The configuration that the cache holds for a problem."""
    from qlab_kernels import cache

    return cache.lookup(key).config


def problem(
    op: str,
    p: Tensor,
    shape: tuple[int, int],
    group: int,
    zeros: bool,
    dtype: torch.dtype,
    experts: int,
) -> Any:
    """The key of a product of codes p [m, k] with a weight [n, k], in the config cache."""
    from qlab_kernels import Problem

    return Problem(
        op=op,
        cc=torch.cuda.get_device_capability(p.device),
        device=torch.cuda.get_device_name(p.device),
        dtype=str(dtype).removeprefix("torch."),
        group=group,
        zeros=zeros,
        n=shape[0],
        k=shape[1],
        m=len(p),
        experts=experts,
    )
