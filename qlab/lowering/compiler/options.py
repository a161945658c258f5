"""The options with which torch.compile uses qlab's kernels. Importing qlab installs nothing."""

from typing import Any

import torch


def inductor_options(**more: Any) -> dict[str, Any]:
    """Options for torch.compile (`options=`) and AOTInductor (`inductor_configs=`): qlab's compiler
    pass, and other options of Inductor beside it.

    torch takes no `mode` beside options: CUDA graphs, its "reduce-overhead", are
    `**{"triton.cudagraphs": True}`. With freezing=True and max_autotune=True on a CPU, Inductor's
    int4 template competes with aten's kernel. Packed weights are never folded into dense ones.

    Args:
        **more: other options of Inductor, by name.

    Returns:
        Option -> value, with the pass as `post_grad_custom_pre_pass`.

    Example:
        >>> import qlab
        >>> options = qlab.inductor_options(max_autotune=True)
        >>> sorted(options)
        ['max_autotune', 'post_grad_custom_pre_pass']
    """
    from torch._inductor.constant_folding import _dont_constant_fold, add_dont_constant_fold
    from torch._inductor.lowering import add_layout_constraint, constrain_to_fx_strides

    from qlab.lowering.compiler.rewrite import Rewrite

    for op in (torch.ops.qlab.dequantize.default, torch.ops.qlab.dense.default):
        if op not in _dont_constant_fold:
            add_dont_constant_fold(op)
    # Inductor may lay out a contiguous copy as the tensor that it copies, and aten's kernel takes
    # contiguous rows only.
    add_layout_constraint(
        torch.ops.aten._weight_int4pack_mm_for_cpu.default, constrain_to_fx_strides
    )
    return {"post_grad_custom_pre_pass": Rewrite(), **more}
