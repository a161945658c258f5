"""A tokenizer as a GGUF file says it: derived from the JSON of a fast tokenizer.

Byte-level BPE is the kind "gpt2" of the format. An engine splits a text into words by rules that it
knows by name; a name is told only where the tokenizer splits by the same rules. BPE over characters
is the kind "llama" (gguf_pieces.py).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf

from qlab.directories import gguf_pieces
from qlab.errors import QlabError

WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?"
REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
# How a text is split before bytes become letters, and whether a whole word that is a token is taken
# without its merges -> the name that llama.cpp has for that (llama-vocab.cpp).
GPT2, DIGITS = "GPT-2's", "digits, GPT-2's"
SPLITS: Mapping[tuple[str, bool], str] = {
    (GPT2, False): "gpt-2",
    (DIGITS, False): "smollm",
    (f"{WORDS}\\p{{L}}+|\\p{{N}}{{1,3}}{REST}", True): "llama-bpe",
    (f"{WORDS}\\p{{L}}+|\\p{{N}}{{1,3}}{REST}", False): "dbrx",
    (f"{WORDS}\\p{{L}}+|\\p{{N}}{REST}", False): "qwen2",
}
ELSE = "run it with qlab or another engine, whose tokenizer is the model's own"
SAMPLE = "A"  # a text whose tokens are told from those that are put around it
ROLES = ("bos", "eos", "unk", "sep", "pad")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """tokens, types: one of each id. joins: the keys that say how tokens are joined, and what is
    done to a text before. ids: role (bos, eos) -> id. adds: whether texts begin
    with the first and end with the last. template: of chats, one or several by name. json: the
    whole tokenizer."""

    tokens: list[str]
    types: list[int]
    joins: "Bytewise | Pieces"
    ids: Mapping[str, int]
    adds: Mapping[str, bool]
    template: str | list[dict[str, str]] | None
    json: str

    def write(self, writer: "gguf.GGUFWriter") -> None:
        """Add the keys to a file."""
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        self.joins.write(writer)
        for role, token in self.ids.items():
            getattr(writer, f"add_{role}_token_id")(token)
        for role, is_added in self.adds.items():
            getattr(writer, f"add_add_{role}_token")(is_added)
        if self.template:
            writer.add_chat_template(self.template)


@dataclass(frozen=True)
class Bytewise:
    """merges: pairs of tokens, the first ones first. split: the name of the rules by which texts
    are split."""

    merges: list[str]
    split: str

    def write(self, writer: "gguf.GGUFWriter") -> None:
        """Add the keys to a file."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.split)
        writer.add_token_merges(self.merges)


@dataclass(frozen=True)
class Pieces:
    """scores: one of each id; of two joins the one of the higher score comes first. begins: whether
    a text begins with a space of its own."""

    scores: list[float]
    begins: bool

    def write(self, writer: "gguf.GGUFWriter") -> None:
        """Add the keys to a file."""
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(self.scores)
        writer.add_add_space_prefix(self.begins)


def vocabulary(where: str, tokenizer: Any, size: int) -> Vocabulary:
    """The vocabulary of a model directory's tokenizer. where: the directory, for errors. size: rows
    of the embedding; ids without a token get names that no text has."""
    if not getattr(tokenizer, "is_fast", False):
        raise QlabError(f"{where} has no fast tokenizer (tokenizer.json), which GGUF is made from")
    text = tokenizer.backend_tokenizer.to_str()
    whole = json.loads(text)
    model = whole["model"]
    joins = _joins(where, whole, size)
    added = {token["id"]: token for token in whole["added_tokens"]}
    tokens = {id: token for token, id in model["vocab"].items()}
    tokens |= {id: token["content"] for id, token in added.items()}
    if max(tokens) >= size:
        raise QlabError(
            f"{where} has the token {tokens[max(tokens)]!r} with the id {max(tokens)}, and "
            f"{size} rows in its embedding; one of the two is of another model"
        )
    kinds = gguf.TokenType
    types: list[int] = [
        (kinds.CONTROL if added[id]["special"] else kinds.USER_DEFINED)
        if id in added
        else (_kind(tokens[id], joins) if id in tokens else kinds.UNUSED)
        for id in range(size)
    ]
    roles = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ROLES}
    ids = {role: id for role, id in roles.items() if id is not None}
    if isinstance(joins, Pieces) and "unk" in ids:
        types[ids["unk"]] = kinds.UNKNOWN
    return Vocabulary(
        tokens=[tokens.get(id, f"[PAD{id}]") for id in range(size)],
        types=types,
        joins=joins,
        ids=ids,
        adds=_adds(where, tokenizer, ids),
        template=_template(tokenizer.chat_template),
        json=text,
    )


def _kind(token: str, joins: Bytewise | Pieces) -> int:
    is_byte = isinstance(joins, Pieces) and gguf_pieces.is_byte(token)
    return gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL


def _joins(where: str, whole: Mapping[str, Any], size: int) -> Bytewise | Pieces:
    """How tokens are joined; refuses what engines do otherwise."""
    model, steps = whole["model"], _steps(whole["pre_tokenizer"], "pretokenizers")
    changes = _steps(whole["normalizer"], "normalizers")
    bytewise = any(step["type"] == "ByteLevel" for step in steps)
    endings = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] != "BPE" or endings or bytewise == bool(model.get("byte_fallback")):
        raise QlabError(
            f"the tokenizer of {where} is {model['type']} "
            f"{'over bytes' if bytewise else 'without bytes as letters'}, and qlab writes GGUF "
            "with byte-level BPE alone, or BPE over characters that falls back to bytes; "
            f"{ELSE}"
        )
    if not bytewise:
        added = [token["content"] for token in whole["added_tokens"]]
        return _pieces(where, model, added, changes + steps, size)
    # Engines leave out NFC, which changes no text that is composed already.
    others = [change["type"] for change in changes if change["type"] != "NFC"]
    if others:
        raise QlabError(
            f"the tokenizer of {where} changes texts by {others[0]}, which GGUF does not say; "
            f"{ELSE}"
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return Bytewise(merges, _split(where, whole["pre_tokenizer"], bool(model.get("ignore_merges"))))


def _pieces(
    where: str,
    model: Mapping[str, Any],
    added: list[str],
    steps: list[Mapping[str, Any]],
    size: int,
) -> Pieces:
    """The keys of BPE over characters. steps: all that is done to a text before it is joined."""
    begins = gguf_pieces.begins(steps, model["vocab"])
    if begins is None:
        said = json.dumps(steps, ensure_ascii=False)
        raise QlabError(
            f"the tokenizer of {where} changes spaces by {said[:300]}, and engines put one before "
            f"the text and behind every special token, or nowhere; {ELSE}"
        )
    scores = None if model.get("ignore_merges") else gguf_pieces.scores(model, added)
    if scores is None:
        raise QlabError(
            f"the tokenizer of {where} joins tokens in an order that no scores of tokens give, and "
            f"GGUF says scores; {ELSE}"
        )
    return Pieces([*scores, *[0.0] * (size - len(scores))], begins)


def _steps(part: Mapping[str, Any] | None, several: str) -> list[Mapping[str, Any]]:
    """The steps of a part of a tokenizer's JSON, which is one step, a sequence of them or null."""
    if part is None:
        return []
    return list(part[several]) if part["type"] == "Sequence" else [part]


def _split(where: str, part: Mapping[str, Any], whole_words: bool) -> str:
    """The name of the rules by which texts are split; refuses those that have none."""
    steps = _steps(part, "pretokenizers")
    *before, last = steps
    split: str | None = None
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        if last.get("use_regex", True):
            split = {(): GPT2, ("Digits",): DIGITS}.get(tuple(s["type"] for s in before))
            if split == DIGITS and not before[0].get("individual_digits"):
                split = None
        elif len(before) == 1 and before[0]["type"] == "Split":
            isolates = before[0]["behavior"] == "Isolated" and not before[0]["invert"]
            split = before[0]["pattern"].get("Regex") if isolates else None
    name = SPLITS.get((split or "", whole_words))
    if name is None:
        said = json.dumps(steps, ensure_ascii=False)
        raise QlabError(
            f"the tokenizer of {where} splits texts by {said[:200]}, for which qlab knows no name "
            f"in llama.cpp (it knows {', '.join(SPLITS.values())}); {ELSE}"
        )
    return name


def _adds(where: str, tokenizer: Any, ids: Mapping[str, int]) -> dict[str, bool]:
    """Which of bos and eos the tokenizer puts around a text; refuses other tokens."""
    plain = tokenizer(SAMPLE, add_special_tokens=False).input_ids
    whole = tokenizer(SAMPLE).input_ids
    places = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    around = (whole[: places[0]], whole[places[0] + len(plain) :]) if places else (whole, whole)
    adds = {}
    for role, tokens in zip(("bos", "eos"), around):
        adds[role] = bool(tokens)
        if tokens and tokens != [ids.get(role)]:
            raise QlabError(
                f"the tokenizer of {where} makes {whole} of {SAMPLE!r}, and GGUF has room for its "
                f"{role} token alone; {ELSE}"
            )
    return adds


def _template(template: str | Mapping[str, str] | None) -> str | list[dict[str, str]] | None:
    if isinstance(template, Mapping):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template
