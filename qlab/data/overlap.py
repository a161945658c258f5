"""Whether texts have passages in common, told from a sketch of one of them.

A sketch holds hashes of runs of 50 tokens, the length at which a common run is a copy (Lee et al.
2022, "Deduplicating training data makes language models better"): the smallest ones of all runs,
and at most 2048 of them (a bottom-k sketch, Broder 1997). Another text shares as many of the runs
whose hashes are as small as it shares of all its runs. No text can be read from it.
"""

import base64
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlab.data.calibration import Data

RUN = 50  # tokens
MOST = 2048  # hashes of a sketch
BYTES = 6  # of a hash
MULTIPLIER = 0x2545F4914F6CDD1D  # odd, so that no bit of a token is lost


def sketch(data: Data) -> dict[str, Any]:
    """The sketch of calibration data, as plain data of at most 17 kB."""
    hashes = [_hashes(batch["input_ids"]).reshape(-1) for batch in data.batches(1 << 16)]
    smallest = torch.cat([each[each >= 0] for each in hashes]).unique()[:MOST]
    packed = b"".join(int(value).to_bytes(BYTES, "little") for value in smallest)
    return {"run": RUN, "hashes": base64.b64encode(packed).decode()}


def shared_windows(ids: Tensor, recorded: Mapping[str, Any]) -> Tensor | None:
    """Which windows [n, l] were seen to share a run of tokens with the data of a sketch: bool [n].

    Only runs whose hashes are small enough to be in the sketch are compared, so that a window that
    shares few runs may be missed. None where the windows or the data are too short to hold a
    run, or the sketch is of runs of another length.
    """
    if recorded.get("run") != RUN or not recorded["hashes"] or ids.shape[1] < RUN:
        return None
    packed = base64.b64decode(recorded["hashes"])
    known = [int.from_bytes(packed[i : i + BYTES], "little") for i in range(0, len(packed), BYTES)]
    return torch.isin(_hashes(ids), torch.tensor(known, dtype=torch.int64)).any(1)


def _hashes(ids: Tensor) -> Tensor:
    """The hash of every run of tokens of windows [n, l], 48 bits each: [n, l - RUN + 1]; -1 for a
    run of one token alone, such as padding. Windows shorter than a run have none."""
    ids = ids.cpu().long()
    count = ids.shape[1] - RUN + 1
    if count < 1:
        return ids.new_empty(len(ids), 0)
    mixed = _mix(ids + 1)
    total = torch.zeros(len(ids), count, dtype=torch.int64)
    for j in range(RUN):  # products and sums wrap around at 64 bits
        total = total * MULTIPLIER + mixed[:, j : j + count]
    changes = torch.zeros_like(ids)
    changes[:, 1:] = (ids[:, 1:] != ids[:, :-1]).cumsum(1)
    constant = changes[:, RUN - 1 :] == changes[:, :count]
    return ((_mix(total) >> 16) & (1 << 8 * BYTES) - 1).masked_fill(constant, -1)


def _mix(x: Tensor) -> Tensor:
    """Numbers of which every bit depends on every bit of x (the finalizer of MurmurHash3)."""
    for multiplier in (-0xAE502812AA7333, -0x3B314601E57A13AD):
        x = (x ^ (x >> 33 & 0x7FFFFFFF)) * multiplier
    return x ^ (x >> 33 & 0x7FFFFFFF)
