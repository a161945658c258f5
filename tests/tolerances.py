"""How far a lowered product may be from `interpret`'s, per dtype: the one place that says so.

The reference is x @ dense(leaf).T in fp64, and errors are in units of |x| @ (|codes - zeros| *
|scales| + |zeros| * |scales|).T, the size of what was added up: each addend is rounded a few times
to the dtype (the weight, and on a CPU -zeros * scales beside it), sums are kept in fp32, and the
result is rounded once.
"""

import torch

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
PRODUCT = {torch.bfloat16: 2.0, torch.float16: 2.0, torch.float32: 32.0}  # of UNIT
# |logits - reference| / |reference| of a whole tiny model. Inputs that are rounded to 8 bits may
# land on the neighbouring code when they come in 16 bits, which in float16 is most of the error.
MODEL = {torch.bfloat16: 0.05, torch.float16: 0.05, torch.float32: 1e-4}
