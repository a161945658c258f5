"""What other libraries say while they are loaded, and nobody who reads it can act on: these messages are not shown.

transformers imports torchao where it is installed, which then names every GPU library of its own that does not load here (two lines),
and registers enumerations in a way that torch calls deprecated (two more).
"""

import logging

UNHELPFUL = {"torchao": "Failed to load ", "torch.utils._pytree": "%s is an Enum subclass and is now natively supported"}


def _helps(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(UNHELPFUL[record.name])


for logger in UNHELPFUL:
    logging.getLogger(logger).addFilter(_helps)
