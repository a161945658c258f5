"""Calls of tools in what a model writes.

    <tool_call>{"name": ..., "arguments": {...}}</tool_call>      Hermes, Qwen
    [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]           Mistral
    <|python_tag|>{"name": ..., "parameters": {...}}               Llama
    {"name": ..., "parameters": {...}}                             Llama, as the whole reply

Text in front of the first call is the message. What looks like a call and is none stays text.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

OPENINGS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
CLOSING = "</tool_call>"


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
        names: of the tools that may be called.
    """

    def __init__(self, names: Sequence[str]):
        self.names = frozenset(names)
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
        calls = calls_in(self._held, self.names)
        return ("" if calls else self._held), calls

    def _possible_opening(self) -> int:
        """How many characters at the end may begin a call."""
        for count in range(min(max(map(len, OPENINGS)), len(self._held)), 0, -1):
            if any(opening.startswith(self._held[-count:]) for opening in OPENINGS):
                return count
        return 0


def calls_in(text: str, names: frozenset[str]) -> list[Call]:
    """The calls that a text is made of; none where it is anything else, or calls another tool."""
    calls: list[Call] = []
    for part in _parts(text.strip()):
        try:
            value = json.loads(part)
        except ValueError:
            return []
        for item in value if isinstance(value, list) else [value]:
            call = _call(item, names)
            if call is None:
                return []
            calls.append(call)
    return calls


def _parts(text: str) -> list[str]:
    """The JSON in a text of calls."""
    if text.startswith(OPENINGS[0]):
        parts = text.split(OPENINGS[0])[1:]
        return [part.partition(CLOSING)[0] for part in parts]
    for opening in OPENINGS[1:]:
        text = text.removeprefix(opening)
    return [text] if text else []


def _call(value: Any, names: frozenset[str]) -> Call | None:
    if not isinstance(value, dict) or value.get("name") not in names:
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
