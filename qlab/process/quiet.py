"""Messages of other libraries that no reader can act on: they are not shown.

transformers imports torchao where it is installed. torchao then names each of its GPU libraries
that does not load here (two lines), and registers enumerations in a way that torch calls deprecated
(two more). torch logs every operation that fails on meta tensors with its traceback, and raises the
error too: qlab runs programs on other sizes to see whether they fail. lm-eval remarks that it is
given a model and not the name of one, and that requests hold several prompts.
"""

import logging

# logger -> the beginnings of its messages that are not shown
UNHELPFUL = {
    "torchao": ("Failed to load ",),
    "torch.utils._pytree": ("%s is an Enum subclass and is now natively supported",),
    "torch._subclasses.fake_tensor": ("failed while attempting to run meta for ",),
    "lm_eval.models.huggingface": ("`pretrained` model kwarg is not", "Passed an already-init"),
    "lm_eval.models.api_models": ("Batch size > 1 detected",),
}


def _helps(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(UNHELPFUL[record.name])


for logger in UNHELPFUL:
    logging.getLogger(logger).addFilter(_helps)
