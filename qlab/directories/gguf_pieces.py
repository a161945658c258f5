"""A tokenizer of SentencePiece's kind as a GGUF file says it, the kind "llama" of the format: BPE
over characters with bytes behind it, and spaces as a letter.

An engine joins two neighbours whose join is the token of the highest score, from the left where
scores are equal. A merge of rank r joins the same pairs in the same order where the score of a
token is -r for the first merge that makes it, and

    every two tokens whose join is a token have a merge,
    no merge that makes another token stands between those that make one.

Both are checked on the whole vocabulary.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

SPACE = "\u2581"  # what stands for a space
Json = Mapping[str, Any]


def begins(steps: Sequence[Json], tokens: Collection[str]) -> bool | None:
    """Whether texts, and what follows a special token, begin with a space of their own; None where
    engines do not change spaces as these steps do.

    steps: the normalizers of a tokenizer's JSON, then what splits texts. tokens: its vocabulary.
    """
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    # a split at spaces finds none once they are letters
    acting = [s for s in steps if s["type"] != "Split" or s["pattern"] != {"String": " "}]
    if acting == [prepend, replace]:
        return True
    if acting == [replace]:
        return False
    return _of_metaspace(steps[0], tokens) if len(steps) == 1 else None


def _of_metaspace(step: Json, tokens: Collection[str]) -> bool | None:
    """`begins` of the step that does all of it. One that splits before every space is the same
    where no token has a space behind its first letter. One that puts a space before texts leaves
    out those that begin with one, and engines do not."""
    if step["type"] != "Metaspace" or step["replacement"] != SPACE:
        return None
    if step.get("split", True) and any(SPACE in token[1:] for token in tokens):
        return None
    return False if step.get("prepend_scheme", "always") == "never" else None


def scores(model: Json, whole: Collection[str]) -> list[float] | None:
    """The score of every id of a BPE model; None where no scores join the same pairs in the same
    order. whole: tokens that are taken out of a text before anything is joined."""
    vocabulary, merges = model["vocab"], [_pair(merge) for merge in model["merges"]]
    ranks: dict[str, int] = {}
    last: str | None = None
    for rank, (left, right) in enumerate(merges):
        token = left + right
        if token in ranks and token != last:
            return None
        ranks.setdefault(token, rank)
        last = token
    there = set(merges)
    for token in vocabulary.keys() - set(whole):
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        if any(a in vocabulary and b in vocabulary and (a, b) not in there for a, b in halves):
            return None
    by_id = {id: token for token, id in vocabulary.items()}
    lowest = len(merges)  # of letters and bytes, which no join makes
    return [float(-ranks.get(by_id.get(id, ""), lowest)) for id in range(max(by_id) + 1)]


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def is_byte(token: str) -> bool:
    """Whether a token stands for one byte."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
