"""Damage for decoders: one tensor of a module gone, added, of another dtype or shape, or with a
NaN; and odd values for configs."""

import torch
from hypothesis import strategies as st

DTYPES = [
    torch.float16,
    torch.float32,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float8_e4m3fn,
]


@st.composite
def damaged(draw, tensors):
    """The tensors with one of them damaged."""
    name = draw(st.sampled_from(sorted(tensors)))
    tensor, rest = tensors[name], {key: t for key, t in tensors.items() if key != name}
    kind = draw(
        st.sampled_from(
            ["gone", "extra", "dtype", "shape", *(["nan"] if tensor.is_floating_point() else [])]
        )
    )
    if kind == "nan":
        last = torch.arange(tensor.numel()).reshape(tensor.shape) == tensor.numel() - 1
        return {**rest, name: tensor.float().masked_fill(last, torch.nan).to(tensor.dtype)}
    if kind == "gone":
        return rest
    if kind == "extra":
        return {
            **tensors,
            f"{name.rpartition('.')[0]}.{draw(st.sampled_from(['weight', 'lora_A', 'weight_scale', 'x']))}": tensor,  # noqa: E501
        }
    if kind == "dtype":
        dtype = draw(st.sampled_from([d for d in DTYPES if d != tensor.dtype]))
        return {**rest, name: tensor.float().to(dtype)}
    sizes = st.lists(st.sampled_from([0, 1, 2, 3, 8, 32, 64, 96]), min_size=0, max_size=3)
    # Readers take an axis of one or leave it out.
    without_ones = [n for n in tensor.shape if n != 1]
    shape = draw(sizes.filter(lambda shape: [n for n in shape if n != 1] != without_ones))
    return {**rest, name: torch.zeros(shape, dtype=tensor.dtype)}


ODD = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        4,
        5,
        64,
        2**40,
        -7,
        0.5,
        "",
        "4",
        "gptq",
        "(",
        [],
        [[]],
        ["m"],
        {},
        {"a": 1},
        {"(": {}},
        {"-:.*": {}},
        {"m.*": {"bits": "4"}},
        {"m.*": None},
        {"+:m": {"group_size": 0}},
    ]
)


@st.composite
def odd_configs(draw, config):
    """The config with some values replaced by odd ones, and some keys gone."""
    keys = draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3, unique=True))
    changed = {key: draw(ODD) for key in keys}
    gone = draw(st.sets(st.sampled_from(sorted(config)), max_size=2))
    return {key: value for key, value in {**config, **changed}.items() if key not in gone}
