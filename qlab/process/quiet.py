"""What other libraries say while they are loaded, and nobody who reads it can act on: these
messages are not shown.

transformers imports torchao where it is installed, which then names every GPU library of its own
that does not load here (two lines), and registers enumerations in a way that torch calls deprecated
(two more). torch logs every operation that fails on tensors without numbers with its traceback, and
raises the error as well: a program that is asked whether it is for another size fails so.
"""

import logging

UNHELPFUL = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": "%s is an Enum subclass and is now natively supported",
    "torch._subclasses.fake_tensor": "failed while attempting to run meta for ",
}


def _helps(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(UNHELPFUL[record.name])


for logger in UNHELPFUL:
    logging.getLogger(logger).addFilter(_helps)
