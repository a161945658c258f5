"""What goes on beside the caller comes to them with its result or its error, and a process ends
after it."""

import subprocess
import sys
import threading

import pytest

from qlab.process.later import Later

ENDING = """
import threading
from qlab.process.later import Later

def count():
    threading.main_thread().join()
    for number in range(10**6):
        pass
    print(number)

Later(count)
raise SystemExit(3)
"""


def test_the_result_is_waited_for():
    begun = threading.Event()
    later = Later(lambda number: begun.wait() and number + 1, 2)
    begun.set()
    assert later.result() == 3


def test_the_error_is_raised_at_each_who_waits():
    later = Later(int, "three")
    for _ in range(2):
        with pytest.raises(ValueError, match="three"):
            later.result()


def test_a_process_that_is_told_to_end_ends_after_what_goes_on():
    ended = subprocess.run(
        [sys.executable, "-c", ENDING], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (3, "999999\n")
