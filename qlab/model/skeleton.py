"""A checkpoint's model without its weights: its modules on the meta device, what the files call its
tensors, and the programs of its blocks.

Nothing here knows an architecture. qlab.model.loading reads leaves into it, qlab.model.running runs
it around its blocks.
"""

import torch
from transformers import PreTrainedModel

from qlab.files.checkpoint import Checkpoint
from qlab.model.device import usable
from qlab.model.headers import refuse_another_model
from qlab.model.names import Names
from qlab.model.paper import find_blocks, on_paper
from qlab.model.programs import Programs


class Skeleton:
    """A checkpoint's model without its weights.

    checkpoint: the files. dtype, device: what the model is run in, and where. model: its modules on
    the meta device. prefix: the path of its list of blocks. blocks: path -> module, in running
    order. names: what the files call its tensors. programs: its traced blocks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        model: PreTrainedModel | None = None,
    ):
        """model: the model on the meta device, where it was built before."""
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, usable(device)
        self.model = on_paper(checkpoint, dtype) if model is None else model
        self.prefix, self.blocks = find_blocks(self.model)
        self.names = Names(checkpoint, self.model, self.prefix, self.blocks)
        self.programs = Programs(self.blocks)
        refuse_another_model(self.names)

    def writes(self, name: str) -> bool:
        """Whether the tensors of a block's leaf are written with this block: of several that share
        them, with the first whose program uses them."""
        sharing = self.names.sharing(name)
        if len(sharing) == 1:
            return True
        return name == next(filter(self.programs.uses, sharing), sharing[0])
