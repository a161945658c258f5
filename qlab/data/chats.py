"""The text of a chat, by the chat template of a model.

A template is a program out of the model's files. It is let run a bounded number of steps, so that
one that never ends is refused.
"""

import sys
from collections.abc import Callable
from typing import Any

from qlab.errors import QlabError

STEPS = 2**21  # lines of a template that are run for one chat: tenths of a second
LONGEST = 2**25  # characters of a text
TEMPLATE = "<template>"  # the file name of code that Jinja makes of a text


def text_of_chat(maker: Any, messages: Any, **told: Any) -> str:
    """What a template makes of messages.

    Args:
        maker: a tokenizer or processor of transformers.
        messages: of the chat.
        told: what else the template is told.

    Raises:
        QlabError: a template that does not end, or whose text is too long.
        Exception: whatever the template raises.
    """
    before = sys.gettrace()
    sys.settrace(_counting())
    try:
        text = maker.apply_chat_template(messages, tokenize=False, **told)
    finally:
        sys.settrace(before)
    if len(text) > LONGEST:
        raise QlabError(
            f"the chat template writes {len(text)} characters, and at most {LONGEST} are read; "
            "repair it, or send less"
        )
    return str(text)


def _counting() -> Callable[..., Any]:
    """A trace function that counts the lines of templates."""
    left = STEPS

    def line(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise QlabError(
                f"the chat template has not ended after {STEPS} steps; repair it, or send less"
            )
        return line

    return lambda frame, event, argument: line if frame.f_code.co_filename == TEMPLATE else None
