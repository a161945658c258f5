"""Work that goes on in a thread beside the caller, and what comes of it."""

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Later(Generic[T]):
    """What fn(*args) returns, computed in a thread of its own: of use where that lets go of the
    interpreter, as hashing, reading and arithmetic do.

    A process ends after it, also one that is interrupted: torch aborts a process whose interpreter
    ends under one of its operations.
    """

    def __init__(self, fn: Callable[..., T], *args: Any) -> None:
        self._value: T
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(fn, args))
        self._thread.start()

    def _run(self, fn: Callable[..., T], args: tuple[Any, ...]) -> None:
        try:
            self._value = fn(*args)
        except BaseException as error:  # the one who waits gets it
            self._error = error

    def result(self) -> T:
        """Wait for it. Raises what fn raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value
