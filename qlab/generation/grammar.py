"""Replies that are words of a grammar: an object of a JSON schema, a text of a regular expression,
or one of several texts.

Tokens that no word goes on with are left out of the draw (Dong et al. 2024, XGrammar). An object
has no white space but what separates its parts: a model that cannot decide would write nothing
else.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from qlab.errors import QlabError, first_line
from qlab.process.extras import needed

KINDS = ("schema", "regex", "choice")
KEPT = 2**27  # bytes of grammars that are kept for the next request


class Grammars:
    """The grammars over the tokens of a model.

    Args:
        tokenizer: of transformers.
        vocabulary: how many logits the model gives.
        stop_ids: tokens that may follow a word.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, stop_ids: Sequence[int]):
        self._library: Any = needed("xgrammar", "grammar")
        self._vocabulary, self._stop_ids = vocabulary, list(stop_ids)
        info = self._library.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocabulary, stop_token_ids=self._stop_ids or None
        )
        self._compiler = self._library.GrammarCompiler(info, max_threads=1, cache_limit_bytes=KEPT)

    def word(self, kind: str, said: Any) -> "Word":
        """A word of the grammar, to be written. Refuses a schema, an expression or texts that make
        none."""
        try:
            compiled = self._compiled(kind, said)
        except Exception as error:  # the library raises errors of its own, and those of its parts
            raise QlabError(
                f"the {kind} makes no grammar ({first_line(error):.100}); repair it"
            ) from error
        matcher = self._library.GrammarMatcher(compiled, terminate_without_stop_token=True)
        return Word(self._library, matcher, self._vocabulary)

    def _compiled(self, kind: str, said: Any) -> Any:
        if kind == "schema":
            text = said if isinstance(said, str) else json.dumps(said)
            return self._compiler.compile_json_schema(text, any_whitespace=False)
        if kind == "regex":
            re.compile(said)
            return self._compiler.compile_regex(said)
        return self._compiler.compile_grammar(_alternatives(said))


class Word:
    """A word that is being written."""

    def __init__(self, library: Any, matcher: Any, vocabulary: int):
        self._library, self._matcher = library, matcher
        self._bits = library.allocate_token_bitmask(1, vocabulary)

    def leave_out(self, logits_v: Tensor) -> None:
        """Make the logits -inf of every token that no word goes on with."""
        self._matcher.fill_next_token_bitmask(self._bits)
        self._library.apply_token_bitmask_inplace(logits_v[None], self._bits.to(logits_v.device))

    def accept(self, token: int) -> bool:
        """Go on with a token; whether the word ends with it."""
        self._matcher.accept_token(token)
        return self.is_whole

    @property
    def is_whole(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_terminated())


def asked_for(settings: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The kind of grammar and what was said of it, of at most one."""
    given = [kind for kind in KINDS if settings.get(kind) is not None]
    if len(given) > 1:
        raise QlabError(f"{' and '.join(given)} were given; give one of {', '.join(KINDS)}")
    return (given[0], settings[given[0]]) if given else None


def _alternatives(texts: Sequence[str]) -> str:
    """A grammar of these texts, in the notation of GBNF."""
    if isinstance(texts, str) or not texts or not all(isinstance(t, str) and t for t in texts):
        raise ValueError("give a list of texts that are not empty")
    return "root ::= " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
