"""The options that several commands take, each written once."""

import os
from pathlib import Path
from typing import Annotated

import typer

HELP_BY = {"help_option_names": ["-h", "--help"]}
# What the names below stand for is imported when a command runs; help lists them without waiting
# for torch.
METHODS = (
    "rtn",
    "rtn-weighted",
    "hqq",
    "awq",
    "gptq",
    "awq-gptq",
    "gptaq",
    "auto_round",
    "qat",
    "gptq-refined",
    "qronos-refined",
    "loaq-refined",
    "guidedquant",
    "imatrix",
    "autoawq",
    "llmcompressor-awq",
    "smoothquant",
    "quarot",
    "spinquant",
    "quip",
    "magnitude-2:4",
    "wanda-2:4",
    "sparsegpt-2:4",
    "auto_round_refine",
    "lqer",
    "l2qer",
    "eora",
    "kv",
)
CODECS = (
    "compressed-tensors",
    "gptq",
    "gptq_desc_act",
    "gptq_v2",
    "gptq_v2_desc_act",
    "awq",
    "gguf",
)
ONE_FILE = ("gguf",)  # of these, the formats that are one file
TARGETS = (
    "vllm",
    "lmdeploy",
    "lmdeploy-turbomind",
    "lmdeploy-pytorch",
    "transformers",
    "sglang",
)


def lower(name: str | None) -> str | None:
    """Names are meant without regard to case."""
    return name.lower() if name else name


Model = Annotated[str, typer.Argument(help="a model directory, or 'demo'")]
METHOD_HELP = f"{', '.join(METHODS)}; or steps and a rounding in a row, such as sparsegpt-4:8+gptq"
MethodName = Annotated[str, typer.Option("--method", callback=lower, help=METHOD_HELP)]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="instead of --method: FILE.py:NAME, a transform or a function of a spec in a file",
    ),
]
SpecName = Annotated[
    str,
    typer.Option(
        "--spec",
        callback=lower,
        help=(
            "int<bits>-g<group>, -channel or -tensor; fp8-tensor, fp8-channel, fp8-b128x128, "
            "mxfp4, mxfp6, mxfp8, nvfp4"
        ),
    ),
]
SchemeName = Annotated[
    str,
    typer.Option(
        "--scheme",
        help="instead of --spec: numbers of weights, inputs and cache by one name, such as W8A8, "
        "NVFP4 or W4A16-g64; `qlab schemes` lists them",
    ),
]
CacheName = Annotated[
    str,
    typer.Option(
        "--kv-cache",
        help="round cached keys and values: fp8, int8 or int4 with -tensor, -head or -token",
    ),
]
StaticName = Annotated[
    str,
    typer.Option(
        "--static",
        callback=lower,
        help="how stored scales of inputs and caches are measured: absmax, quantile, least_error",
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        "--bits",
        help="budget in bits per weight: of 2, 3, 4 and 8 bits in groups as of --spec, each weight "
        "gets those that the loss asks for",
    ),
]
Asymmetric = Annotated[bool, typer.Option("--asymmetric", help="with a zero point per scale")]
Calib = Annotated[
    list[Path] | None, typer.Option("--calib", help="text or jsonl files (default: the demo text)")
]
Images = Annotated[
    list[Path] | None,
    typer.Option("--images", help="instead of --calib: jsonl samples of text and images"),
]
AllExperts = Annotated[
    bool, typer.Option("--calibrate-all-experts", help="statistics of experts from every token")
]
Samples = Annotated[
    int,
    typer.Option(
        "--samples", min=1, help="calibration windows; time grows with --samples x --length"
    ),
]
Length = Annotated[int, typer.Option("--length", min=2, help="tokens per window")]
Seed = Annotated[int, typer.Option("--seed", help="chooses the calibration windows")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="calibration seeds, from --seed on")]
Device = Annotated[
    str, typer.Option("--device", callback=lower, help="where one block at a time is worked on")
]
Memory = Annotated[
    float | None,
    typer.Option(
        "--memory", help="budget in GiB, for experts in parts; a plan above it is refused"
    ),
]
Offload = Annotated[
    Path | None,
    typer.Option(
        "--offload",
        help="folder for states, statistics and blocks that are kept meanwhile; same results",
    ),
]
InputsName = Annotated[
    str,
    typer.Option("--inputs", callback=lower, help="calibrate on 'quantized' or 'reference' inputs"),
]
CodecName = Annotated[
    str, typer.Option("--codec", callback=lower, help=f"the format to write: {', '.join(CODECS)}")
]
TargetName = Annotated[
    str,
    typer.Option("--target", callback=lower, help=f"an engine to load it: {', '.join(TARGETS)}"),
]
Keep = Annotated[
    list[str] | None, typer.Option("--keep", help="GLOB of sites in blocks that stay as they are")
]
Outside = Annotated[
    list[str] | None,
    typer.Option("--outside", help="GLOB=SPEC: round linears around the blocks to nearest"),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="replace an output directory that qlab wrote and nobody changed"
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="continue a killed run of the same job, or start it")
]

KeepStatistics = Annotated[
    bool,
    typer.Option(
        "--keep-statistics",
        help="with --inputs reference: keep what is observed of the model in $QLAB_HOME, so that "
        "another method starts at its solver",
    ),
]
Statistics = Annotated[
    Path | None,
    typer.Option("--statistics", help="the folder of kept statistics (default: in $QLAB_HOME)"),
]


def _writable(path: Path | None) -> Path | None:
    """Before the work, not after it."""
    from qlab.files.place import report_place

    return None if path is None else report_place(path)


Json = Annotated[
    Path | None,
    typer.Option("--json", help="also write the result to this file", callback=_writable),
]


def listed(text: str, separator: str = ",") -> list[str]:
    """The names in an option."""
    return [name.strip() for name in text.split(separator)]


def resolved(model: str) -> Path:
    """The directory that a name stands for."""
    from qlab.demo.hub import demo_model, is_demo_name

    return demo_model() if is_demo_name(model) else Path(model)


def statistics_folder(named: Path | None) -> Path:
    """The folder of kept statistics: the one that is named, or that of `$QLAB_HOME`."""
    from qlab.demo.build import home

    return home() / "statistics" if named is None else Path(os.path.expanduser(named))
