"""Calls of tools in what a model writes.

    <tool_call>{"name": ..., "arguments": {...}}</tool_call>       Hermes, Qwen
    <tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>  Qwen, of code
    [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]            Mistral
    [TOOL_CALLS]NAME[ARGS]{...}                                     Mistral, later
    <|python_tag|>{"name": ..., "parameters": {...}}; ...           Llama
    {"name": ..., "parameters": {...}}                              Llama, as the whole reply
    <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>...    DeepSeek, in one more pair

A call begins where its tool is known and its arguments open. From there on its arguments are told
as they are written. What looks like a call and does not come to that is text, as is all in front of
calls and behind them, but for white space behind one.
"""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any

from qlab.serving.reading import NoCall, Reader, Reading

HERMES, MISTRAL, LLAMA = "<tool_call>", "[TOOL_CALLS]", "<|python_tag|>"
CALLS, NO_CALLS, CALL, NO_CALL, SEP = (
    f"<\uff5ctool▁{name}\uff5c>"
    for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
)  # of DeepSeek
FENCE = "```"  # around DeepSeek's earlier arguments
ARGUMENTS = ("arguments", "parameters")
ENDS = ("\n</parameter>", "</parameter>")
FIELDS = ("name", *ARGUMENTS, "id", "type")  # of a call that is an object
Tools = Mapping[str, Mapping[str, Any]]  # name -> the JSON schema of its arguments


@dataclass(kw_only=True, eq=False)
class Call:
    """One call: its place among those of a reply, the tool's name, and its arguments as JSON, as
    far as they are written."""

    index: int
    name: str
    arguments: str = ""
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    @property
    def is_whole(self) -> bool:
        """Whether the arguments are an object of JSON."""
        try:
            return isinstance(_loaded(self.arguments), dict)
        except NoCall:
            return False

    def json(self) -> dict[str, Any]:
        """OpenAI's form."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class ToolText:
    """A reply that grows: text and calls, told as OpenAI's deltas.

    Args:
        tools: that may be called.
        is_single: whether calls behind the first one are left out.
    """

    def __init__(self, tools: Tools, is_single: bool = False):
        self.tools, self.is_single = tools, is_single
        self._source, self._calls = Reading(), list[Call]()
        # (the call or None for text, whether it begins here) with a text
        self._pieces: list[tuple[tuple[Call | None, bool], str]] = []
        self._behind = 0  # what was told of calls
        self._reader = self._read()

    @property
    def calls(self) -> list[Call]:
        """The calls so far."""
        return self._calls[:1] if self.is_single else self._calls

    def add(self, text: str) -> list[dict[str, Any]]:
        """What is certain now, as deltas of text or of one call. The first one of a call has its
        id, type and name, and the others have parts of its arguments."""
        self._source.text += text
        next(self._reader, None)
        parts, self._pieces = groupby(self._pieces, key=itemgetter(0)), []
        return [
            _delta(call, is_first, "".join(text for _, text in part))
            for (call, is_first), part in parts
        ]

    def end(self) -> list[dict[str, Any]]:
        """The rest, when no text follows."""
        self._source.is_ended = True
        return self.add("")

    # -------------------------------------------------------------- telling
    def _tell(self, text: str) -> None:
        self._pieces += [((None, False), text)] if text else []

    def _begin(self, name: str) -> None:
        self._calls.append(Call(index=len(self._calls), name=name))
        self._tell_call("", is_first=True)

    def _argue(self, part: str) -> None:
        self._calls[-1].arguments += part
        self._tell_call(part, is_first=False)

    def _tell_call(self, part: str, is_first: bool) -> None:
        if not self.is_single or self._calls[-1].index == 0:
            self._pieces.append(((self._calls[-1], is_first), part))
        self._behind = self._source.at

    # -------------------------------------------------------------- reading
    def _read(self) -> Reader[None]:
        """The whole reply, which may be a call from its first character on."""
        formats = {
            HERMES: self._hermes,
            MISTRAL: self._mistral,
            LLAMA: self._objects,
            CALLS: self._deepseek,
        }
        yield from self._tried("", self._objects)
        while opening := (yield from self._source.until([*formats], self._tell)):
            yield from self._tried(opening, formats[opening])

    def _tried(self, opening: str, read: Callable[[], Reader[None]]) -> Reader[None]:
        """Calls behind an opening, which is text where there are none. What follows the last call
        and is none is read again, as text."""
        source, before = self._source, len(self._calls)
        begin = source.at
        try:
            yield from read()
        except ValueError:  # NoCall, or of a text that is no JSON
            is_text = len(self._calls) == before
            source.at = begin if is_text else self._behind
            self._tell(opening if is_text else "")
        if len(self._calls) > before:
            yield from source.blanks()

    def _closes(self, *words: str) -> Reader[bool]:
        """Whether one of these words comes next, which then belongs to the call."""
        is_there = yield from self._source.has(*words)
        self._behind = self._source.at
        return is_there

    def _hermes(self) -> Reader[None]:
        yield from self._source.blanks()
        is_xml = (yield from self._source.peek()) == "<"
        yield from self._xml() if is_xml else self._objects()
        yield from self._closes("</tool_call>")

    def _mistral(self) -> Reader[None]:
        source = self._source
        yield from source.blanks()
        if (yield from source.peek()) in ("[", "{"):
            yield from self._objects()
            return
        name = yield from source.word(*self.tools)
        number: list[str] = []
        if (yield from source.has("[CALL_ID]")):
            yield from source.until(["[ARGS]"], number.append)
        elif not (yield from source.has("[ARGS]")):
            raise NoCall
        yield from self._arguments(name)

    def _deepseek(self) -> Reader[None]:
        source, is_next = self._source, True
        yield from source.blanks()
        yield from source.word(CALL)
        while is_next:
            yield from source.blanks()
            name = yield from source.word(f"function{SEP}", *self.tools)
            if name not in self.tools:
                name = yield from source.word(*self.tools)
            if not (yield from source.has(SEP, f"{FENCE}json")):
                raise NoCall
            yield from self._arguments(name)
            yield from self._closes(FENCE)
            yield from self._closes(NO_CALL)
            is_next = yield from source.has(CALL)
        yield from source.has(NO_CALLS)

    def _objects(self) -> Reader[None]:
        """{"name": ..., "arguments": ...}, alone, in a list, or with semicolons between them."""
        is_list = yield from self._source.has("[")
        yield from self._object()
        while (yield from self._source.has("," if is_list else ";")):
            yield from self._object()
        if is_list:
            yield from self._closes("]")

    def _object(self) -> Reader[None]:
        """Arguments are told as they grow where the name stands in front of them, and else at the
        end of the object."""
        yield from self._source.blanks()
        yield from self._source.word("{")
        held: dict[str, str] = {}
        is_next = True
        while is_next:
            key = yield from self._key()
            is_open = key in ARGUMENTS and (yield from self._source.peek()) == "{"
            if is_open and "name" in held:
                yield from self._arguments(self._known(held["name"]))
                yield from self._fields_behind()
                return
            held[key] = yield from self._value()
            if key == "name":
                self._known(held[key])
            is_next = yield from self._is_next()
        given = held.get("arguments", held.get("parameters", "{}"))
        said = _loaded(given) if given.startswith('"') else given
        if "name" not in held or not isinstance(_loaded(said), dict):
            raise NoCall
        said.encode()  # halves of characters have no bytes
        self._begin(self._known(held["name"]))
        self._argue(said)

    def _fields_behind(self) -> Reader[None]:
        """The fields behind arguments, up to the end of their object. Where there is no end, they
        are read again."""
        begin = self._source.at
        try:
            while (yield from self._is_next()):
                yield from self._key()
                yield from self._value()
        except ValueError:
            self._source.at = begin
        self._behind = self._source.at

    def _is_next(self) -> Reader[bool]:
        """Whether an object goes on, or else ends."""
        yield from self._source.blanks()
        return (yield from self._source.word(",", "}")) == ","

    def _key(self) -> Reader[str]:
        """The name of a field, up to its value."""
        yield from self._source.blanks()
        key = _loaded((yield from self._value()))
        if key not in FIELDS:
            raise NoCall
        yield from self._source.blanks()
        yield from self._source.word(":")
        yield from self._source.blanks()
        return str(key)

    def _value(self) -> Reader[str]:
        """A text, list or object, whole."""
        parts: list[str] = []
        if not (yield from self._source.value(parts.append)):
            raise NoCall
        return "".join(parts)

    def _known(self, name: str) -> str:
        """The tool of a name, which is written as JSON."""
        told = _loaded(name)
        if not isinstance(told, str) or told not in self.tools:
            raise NoCall
        return told

    def _arguments(self, name: str) -> Reader[None]:
        """A call whose arguments come next, as an object."""
        yield from self._source.blanks()
        if (yield from self._source.peek()) != "{":
            raise NoCall
        self._begin(name)
        yield from self._source.value(self._argue)

    # -------------------------------------------------------------- Qwen's tags
    def _xml(self) -> Reader[None]:
        source = self._source
        yield from source.word("<function=")
        is_next = True
        while is_next:
            name = yield from source.word(*self.tools)
            yield from source.word(">")
            self._begin(name)
            yield from self._parameters(self.tools[name].get("properties") or {})
            is_next = yield from source.has("<function=")

    def _parameters(self, known: Mapping[str, Any]) -> Reader[None]:
        """The parameters of a function up to its end, told as an object of JSON."""
        source, before = self._source, "{"
        while True:
            yield from source.blanks()
            if (yield from source.word("<parameter=", "</function>")) == "</function>":
                break
            key: list[str] = []
            if not (yield from source.until([">"], key.append)):
                raise NoCall
            if (yield from source.peek()) == "\n":
                source.at += 1
            name = "".join(key)
            self._argue(f"{before}{json.dumps(name, ensure_ascii=False)}: ")
            schema = known.get(name)
            is_text = isinstance(schema, Mapping) and schema.get("type") == "string"
            yield from self._text() if is_text else self._typed()
            before = ", "
        self._argue("{}" if before == "{" else "}")

    def _text(self) -> Reader[None]:
        """A parameter that is a text."""
        self._argue('"')
        if not (yield from self._source.until(ENDS, lambda text: self._argue(_inside(text)))):
            raise NoCall
        self._argue('"')

    def _typed(self) -> Reader[None]:
        """A parameter that is the JSON that it is written as, or else a text."""
        parts: list[str] = []
        end = yield from self._source.until(ENDS, parts.append)
        text = "".join(parts)
        try:
            _loaded(text)
        except NoCall:
            text = f'"{_inside(text)}"'
        self._argue(text if end else "".join(parts))
        if not end:
            raise NoCall


def _delta(call: Call | None, is_first: bool, text: str) -> dict[str, Any]:
    """OpenAI's delta."""
    if call is None:
        return {"content": text}
    said: dict[str, Any] = {"index": call.index}
    if is_first:
        said |= {"id": call.id, "type": "function"}
    name = {"name": call.name} if is_first else {}
    return {"tool_calls": [{**said, "function": {**name, "arguments": text}}]}


def _inside(text: str) -> str:
    """A part of a text of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NoCall(text) from error


def schema_of_calls(tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The JSON schema of a call of one of these tools, for a reply that has to be one."""
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["function"]["name"]},
                    "arguments": tool["function"].get("parameters") or {"type": "object"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in tools
        ]
    }
