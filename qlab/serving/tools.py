"""Calls of tools in what a model writes.

    <tool_call>{"name": ..., "arguments": {...}}</tool_call>       Hermes, Qwen
    <tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>  Qwen, of code
    [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]            Mistral
    [TOOL_CALLS]NAME[ARGS]{...}                                     Mistral, later
    <|python_tag|>{"name": ..., "parameters": {...}}; ...           Llama
    {"name": ..., "parameters": {...}}                              Llama, as the whole reply
    <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>...    DeepSeek, in one more pair

Text in front of the first call is the message. What looks like a call and is none stays text.
"""

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HERMES, MISTRAL, LLAMA = "<tool_call>", "[TOOL_CALLS]", "<|python_tag|>"
CALLS, NO_CALLS, CALL, NO_CALL, SEP = (
    f"<\uff5ctool▁{name}\uff5c>"
    for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
)  # of DeepSeek
OPENINGS = (HERMES, MISTRAL, LLAMA, CALLS)
IN_HERMES = re.compile(r"\s*<tool_call>(.*?)(?:</tool_call>\s*|$)", re.DOTALL)
IN_XML = re.compile(r"\s*<function=([^>]*)>(.*?)</function>\s*", re.DOTALL)
IN_FUNCTION = re.compile(r"\s*<parameter=([^>]*)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)
IN_MISTRAL = re.compile(r"([^\[]*)(?:\[CALL_ID\][^\[]*)?\[ARGS\](.*)", re.DOTALL)
IN_DEEPSEEK = re.compile(
    rf"{CALL}(?:function{SEP})?(.*?)(?:{SEP}|\n```json\n)(.*?)(?:\n```)?{NO_CALL}\s*", re.DOTALL
)
Tools = Mapping[str, Mapping[str, Any]]  # name -> the JSON schema of its arguments


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call: the tool's name, and its arguments as JSON."""

    name: str
    arguments: str

    def json(self, index: int | None = None) -> dict[str, Any]:
        """OpenAI's form. index: of the call in a stream."""
        function = {"name": self.name, "arguments": self.arguments}
        place = {} if index is None else {"index": index}
        return {
            **place,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": function,
        }


class ToolText:
    """A reply that grows: its text, up to what may be a call, and the calls at its end.

    Args:
        tools: that may be called.
    """

    def __init__(self, tools: Tools):
        self.tools = tools
        self._held, self._is_call, self._is_begun = "", False, False

    def add(self, text: str) -> str:
        """The text that is surely part of the message."""
        self._held += text
        if self._is_call:
            return ""
        begin = self._held.lstrip()
        if not self._is_begun and (not begin or begin[0] == "{"):
            self._is_call = bool(begin)
            return ""
        self._is_begun = True
        places = [place for place in map(self._held.find, OPENINGS) if place >= 0]
        self._is_call = bool(places)
        cut = min(places) if places else len(self._held) - self._possible_opening()
        told, self._held = self._held[:cut], self._held[cut:]
        return told

    def end(self) -> tuple[str, list[Call]]:
        """The rest of the text, and the calls."""
        calls = calls_in(self._held, self.tools)
        return ("" if calls else self._held), calls

    def _possible_opening(self) -> int:
        """How many characters at the end may begin a call."""
        for count in range(min(max(map(len, OPENINGS)), len(self._held)), 0, -1):
            if any(opening.startswith(self._held[-count:]) for opening in OPENINGS):
                return count
        return 0


def calls_in(text: str, tools: Tools) -> list[Call]:
    """The calls that a text is made of; none where it is anything else, or calls another tool."""
    try:
        values = [*_values(text.strip(), tools)]
    except ValueError:
        return []
    calls = [_call(value, tools) for value in values]
    known = [call for call in calls if call is not None]
    return known if len(known) == len(calls) else []


def _values(text: str, tools: Tools) -> Iterator[Any]:
    """The calls of a text as {"name": ..., "arguments": ...}. ValueError for what is none."""
    if text.startswith(HERMES):
        for (part,) in _all(IN_HERMES, text):
            yield from _xml(part, tools) if IN_XML.match(part) else [json.loads(part)]
    elif text.startswith(MISTRAL) and IN_MISTRAL.match(text.removeprefix(MISTRAL)):
        for part in text.split(MISTRAL)[1:]:
            ((name, arguments),) = _all(IN_MISTRAL, part)
            yield {"name": name.strip(), "arguments": json.loads(arguments)}
    elif text.startswith(CALLS):
        inside = text.removeprefix(CALLS).removesuffix(NO_CALLS)
        for name, arguments in _all(IN_DEEPSEEK, inside):
            yield {"name": name.strip(), "arguments": json.loads(arguments)}
    elif text:
        yield from _one_after_another(text.removeprefix(MISTRAL).removeprefix(LLAMA))


def _all(pattern: re.Pattern[str], text: str) -> Iterator[tuple[str, ...]]:
    """The groups of matches that a text consists of."""
    end = 0
    while end < len(text):
        match = pattern.match(text, end)
        if match is None or match.end() == end:
            raise ValueError(text[end:])
        yield match.groups()
        end = match.end()


def _one_after_another(text: str) -> Iterator[Any]:
    """JSON values with semicolons between them; those of a list one by one."""
    while text := text.strip():
        value, end = json.JSONDecoder().raw_decode(text)
        yield from value if isinstance(value, list) else [value]
        text = text[end:].strip()
        if text and not text.startswith(";"):
            raise ValueError(text)
        text = text.removeprefix(";")


def _xml(text: str, tools: Tools) -> Iterator[Any]:
    for name, inside in _all(IN_XML, text):
        known = tools.get(name, {}).get("properties", {})
        given = {key: value for key, value in _all(IN_FUNCTION, inside)}
        yield {
            "name": name,
            "arguments": {key: _typed(value, known.get(key, {})) for key, value in given.items()},
        }


def _typed(text: str, schema: Any) -> Any:
    """A text as the JSON that it is, unless a text is asked for."""
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _call(value: Any, tools: Tools) -> Call | None:
    if not isinstance(value, dict) or value.get("name") not in tools:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    said = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Call(name=value["name"], arguments=said)


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
