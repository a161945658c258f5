"""Scripts in Triton's interpreter, each in a fork of one process that has imported everything."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interpreter() -> Iterator[Callable[..., None]]:
    """run(script, *arguments) -> nothing, and an error where the script ends with one. A script
    finds the arguments in sys.argv, and the environment of the test in its own."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout

    def run(script: str, *arguments: object) -> None:
        job = script, [str(each) for each in arguments], dict(os.environ)
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        said = json.loads(process.stdout.readline())
        assert not said, said

    try:
        yield run
    finally:
        process.stdin.close()
        process.wait()


def serve() -> None:
    """Read a job a line, and answer each with a line: what went wrong."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer
    import test_row_laws  # noqa: F401  with all that it imports
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        script, arguments, environment = json.loads(line)
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            sys.argv[1:] = arguments
            os.environ.update(environment)
            try:
                exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
                os._exit(0)
            except BaseException:
                os.write(theirs, traceback.format_exc()[-4000:].encode())
                os._exit(1)
        os.close(theirs)
        with os.fdopen(ours, "rb") as told:
            wrong = told.read().decode(errors="replace")
        _, status = os.waitpid(child, 0)
        print(json.dumps(wrong or (f"it ended with {status}" if status else "")), file=answers)
        answers.flush()


if __name__ == "__main__":
    serve()
