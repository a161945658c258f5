"""Messages of other libraries that no reader can act on: they are not shown.

transformers imports torchao where it is installed. torchao then names each of its GPU libraries
that does not load here (two lines), and registers enumerations in a way that torch calls deprecated
(two more). torch logs every operation that fails on meta tensors with its traceback, and raises the
error too: qlab runs programs on other sizes to see whether they fail.
"""

import logging

# logger -> the beginning of its messages that are not shown
UNHELPFUL = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": "%s is an Enum subclass and is now natively supported",
    "torch._subclasses.fake_tensor": "failed while attempting to run meta for ",
}


def _helps(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(UNHELPFUL[record.name])


for logger in UNHELPFUL:
    logging.getLogger(logger).addFilter(_helps)
