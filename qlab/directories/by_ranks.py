"""The files of a directory, of which each of several ranks makes some.

Rank 0 owns the output. The others make theirs in a folder of this run beside its notes, from which
rank 0 takes them over. So a rank that outlives rank 0 writes to nothing that is another run's by
then.
"""

import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from qlab.driver.owners import owners
from qlab.driver.ranks import Ranks, refuse_unseen
from qlab.errors import Unwritable
from qlab.files.hashed import HashedFiles
from qlab.files.parts import Parts
from qlab.files.segments import Segments
from qlab.files.work_folder import JOB, PARTS
from qlab.files.writer import Writer
from qlab.process.progress import progress


def made_together(
    make: Callable[[Segments, int], None],
    sizes: Sequence[int],
    source: HashedFiles,
    own_writer: Writer | None,
    ranks: Ranks,
) -> None:
    """Make what an output lacks, the largest files first.

    Args:
        make: Writes the file of that number.
        sizes: What is read for each file, in bytes, by which they are divided.
        source: What is read of the model, by this rank.
        own_writer: Of rank 0, which owns the output; None on others.
        ranks: Those that make it together, of which one may be the only one.
    """
    folder, lacking = ranks.first(lambda: _begun(own_writer, len(sizes)))
    refuse_unseen([folder.parent / JOB], ranks)
    owner = owners({index: sizes[index] for index in lacking}, ranks.world)
    parts = Parts(folder, len(sizes), source)
    mine = [index for index in lacking if owner[index] == ranks.rank]
    waiting = [index for index in lacking if owner[index] != ranks.rank]
    for index in progress(mine, "quantizing") if ranks.is_first else mine:
        make(own_writer or parts, index)
        if own_writer is not None:
            waiting = _taken(own_writer, parts, waiting)
    read = ranks.all_told(source.whole_files())
    if own_writer is not None:
        for index in _taken(own_writer, parts, waiting):
            raise Unwritable(
                f"{parts.shard(index)} is not what rank {owner[index]} wrote; check the folder "
                "that ranks share, and go on with --resume"
            )
        for of_rank in read:
            source.know(of_rank)
        shutil.rmtree(folder)


def _begun(own_writer: Writer | None, count: int) -> tuple[Path, list[int]]:
    """The folder of this run's parts, and the files that are lacking. What ranks of a run before
    left is removed."""
    assert own_writer is not None
    for left in own_writer.work.glob(PARTS):
        shutil.rmtree(left, ignore_errors=True)  # a rank that outlived its run may write there
    folder = own_writer.work / PARTS.replace("*", secrets.token_hex(8))
    folder.mkdir()
    return folder, [index for index in range(count) if not own_writer.has(index)]


def _taken(writer: Writer, parts: Parts, waiting: Sequence[int]) -> list[int]:
    """Take over the parts that are there. Returns those that are not, or not whole."""
    return [i for i in waiting if not (parts.is_written(i) and writer.take(i, parts))]
