"""Keys of GGUF files: none passes unseen, and what a file leaves out means what engines take it
for."""

from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlab.codecs.gguf_keys import NEUTRAL, NO_LOGIT, READ, ROTARY, said
from qlab.errors import QlabError

FILE = Path("m.gguf")
NEEDED = {
    "a.block_count": 2,
    "a.context_length": 64,
    "a.embedding_length": 64,
    "a.attention.head_count": 4,
}
NAMED = [
    value
    for group in vars(gguf.Keys).values()
    if isinstance(group, type)
    for value in vars(group).values()
    if isinstance(value, str) and value.startswith("{arch}.")
]
KEYS = st.sampled_from([key.removeprefix("{arch}.") for key in NAMED]) | st.text(
    "abcxyz_.09", min_size=1
)


@given(key=KEYS, value=st.sampled_from([0.37, 7, "odd", [1, 2], True]))
def test_a_key_is_read_or_changes_no_logit_or_is_refused_by_name(key, value):
    try:
        read_from_file = said(FILE, "a", NEEDED | {f"a.{key}": value})
    except QlabError as error:
        assert f"a.{key} " in str(error) and str(FILE) in str(error)
    else:
        read = any(
            name == f"a.{key}" and said_value == value
            for name, _, said_value in read_from_file.values
        )
        assert read or key in ROTARY | NO_LOGIT or value in NEUTRAL.get(key, ())


def test_what_a_file_leaves_out_is_what_engines_take_for_granted():
    defaults = {name: value for _, name, value in said(FILE, "a", NEEDED).values}
    assert (
        defaults["num_key_value_heads"] == 4
        and defaults["head_dim"] == 16
        and defaults["rope_theta"] == 10000.0
    )
    assert defaults["sliding_window"] == 0 and not said(FILE, "a", NEEDED).rotary
    assert (
        said(FILE, "a", NEEDED | {"b.attention.scale": 0.1, "general.name": "a"}).values
        == said(FILE, "a", NEEDED).values
    )


@pytest.mark.parametrize(
    "keys, rotary",
    [
        ({"factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"factor": 0.0}, {}),
        ({"type": "none", "factor": 2.0}, {}),
        (
            {"type": "yarn", "factor": 2.0, "yarn_beta_fast": 16.0},
            {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 16.0,
                "beta_slow": 1.0,
            },
        ),
    ],
)
def test_rotary_scaling_in_the_words_of_a_config(keys, rotary):
    assert (
        said(
            FILE, "a", NEEDED | {f"a.rope.scaling.{key}": value for key, value in keys.items()}
        ).rotary
        == rotary
    )


def test_the_tables_overlap_nowhere():
    tables = [READ.keys(), NEUTRAL.keys(), NO_LOGIT, ROTARY]
    assert len(set().union(*tables)) == sum(map(len, tables))
