"""The figures of devices that are not here, as options of `qlab plan`."""

import math
from typing import TYPE_CHECKING, Annotated

import typer

from qlab.errors import QlabError

if TYPE_CHECKING:
    from qlab.driver.expense import Devices

Flops = Annotated[
    float | None,
    typer.Option("--device-flops", help="operations a second in the model's dtype, as reached"),
]
Float32 = Annotated[
    float | None,
    typer.Option(
        "--device-solver",
        help="the same in float32, of statistics and solvers (default: an eighth of it)",
    ),
]
Read = Annotated[
    float | None, typer.Option("--device-read", help="bytes a second from the files, of each rank")
]
DeviceMemory = Annotated[
    float | None,
    typer.Option("--device-memory", help="bytes that each rank has; a plan above it is refused"),
]
Link = Annotated[
    float | None,
    typer.Option("--link", help="bytes a second that reach a rank"),
]
Call = Annotated[
    float | None,
    typer.Option("--device-call", help="seconds of one small operation (default: 5e-6)"),
]


def devices_of(
    *,
    flops: float | None,
    float32: float | None,
    read: float | None,
    link: float | None,
    call: float | None,
    ranks: int,
) -> "Devices | None":
    """The devices that the options describe; None where they name none."""
    from qlab.driver.expense import CALL, SHARE_OF_FLOAT32, Devices

    given = (flops, float32, read, link, call)
    if all(each is None for each in given):
        return None
    if flops is None or read is None:
        missing = "--device-flops" if flops is None else "--device-read"
        raise QlabError(
            f"hours need {missing}; give --device-flops and --device-read, such as 400e12 and 5e9"
        )
    if link is None and ranks > 1:
        raise QlabError(
            f"hours of {ranks} ranks need --link, the bytes a second between them, such as 50e9"
        )
    return Devices(
        flops=flops,
        float32=flops * SHARE_OF_FLOAT32 if float32 is None else float32,
        read=read,
        link=read if link is None else link,
        call=CALL if call is None else call,
    )


def least_memory(budget: int | None, device: float | None) -> int | None:
    """The smaller of two bounds in bytes: --memory's and the device's."""
    if device is None:
        return budget
    if not 0 < device < math.inf:
        raise QlabError(f"--device-memory {device} is no size; give it in bytes, such as 80e9")
    return int(device) if budget is None else min(budget, int(device))
