"""What qlab adds to torch.compile: a value among the options. Nothing is installed by an import."""

from typing import Any

import torch


def inductor_options(**more: Any) -> dict[str, Any]:
    """Options for torch.compile (`options=`) and AOTInductor (`inductor_configs=`): qlab's pass,
    and whatever else is given.

    torch takes no `mode` beside options: CUDA graphs, its "reduce-overhead", are
    `**{"triton.cudagraphs": True}`. freezing=True and max_autotune=True on a CPU let Inductor's
    int4 template compete; packed weights are never folded into dense ones by it.
    """
    from torch._inductor.constant_folding import _dont_constant_fold, add_dont_constant_fold
    from torch._inductor.lowering import add_layout_constraint, constrain_to_fx_strides

    from qlab.lowering.compiler.rewrite import Rewrite

    for op in (torch.ops.qlab.dequantize.default, torch.ops.qlab.dense.default):
        if op not in _dont_constant_fold:
            add_dont_constant_fold(op)
    # Inductor may write a contiguous copy in the order of what it copies, and aten's kernel takes
    # none but rows
    add_layout_constraint(
        torch.ops.aten._weight_int4pack_mm_for_cpu.default, constrain_to_fx_strides
    )
    return {"post_grad_custom_pre_pass": Rewrite(), **more}
