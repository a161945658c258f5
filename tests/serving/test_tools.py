"""Calls of tools: found in what models write, however it is cut; and asked for through OpenAI's
client."""

import json
import string
from itertools import pairwise
from types import SimpleNamespace

import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import idle, served
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import qlab
from qlab.serving.tools import ToolText

NAMES = ["weather", "time"]
PARAMETERS = {"weather": {"properties": {"city": {"type": "string"}}}, "time": {}}
ONE = '{"name": "weather", "arguments": {"city": "Köln"}}'
TWO = '{"name": "time", "parameters": {}}'
CITY = '{"city": "Köln"}'
XML = (
    "<function=weather>\n<parameter=city>\n12\n</parameter>\n"
    "<parameter=days>\n[3]\n</parameter>\n</function>"
)
DEEP = (
    "<|tool▁calls▁begin|><|tool▁call▁begin|>time<|tool▁sep|>{}<|tool▁call▁end|>"
    f"<|tool▁call▁begin|>function<|tool▁sep|>weather\n```json\n{CITY}\n```<|tool▁call▁end|>"
).replace("|", "\uff5c")
XML_CALL = f"<tool_call>{XML}</tool_call>"
WRITTEN = {
    f"Let me see. <tool_call>{ONE}</tool_call>": ("Let me see. ", ["weather"]),
    f"<tool_call>\n{ONE}\n</tool_call>\n<tool_call>{TWO}</tool_call>": ("", ["weather", "time"]),
    f"[TOOL_CALLS][{ONE}, {TWO}]": ("", ["weather", "time"]),
    f"<|python_tag|>{TWO}": ("", ["time"]),
    f"<|python_tag|>{TWO}; {ONE}": ("", ["time", "weather"]),
    f"<|python_tag|>{TWO} and {ONE}": (f"and {ONE}", ["time"]),
    f"[TOOL_CALLS]weather[ARGS]{CITY}[TOOL_CALLS]time[CALL_ID]abc[ARGS]{{}}": (
        "",
        ["weather", "time"],
    ),
    f"Well.<tool_call>\n{XML}\n</tool_call>": ("Well.", ["weather"]),
    f"{DEEP}<\uff5ctool▁calls▁end\uff5c>": ("", ["time", "weather"]),
    DEEP: ("", ["time", "weather"]),
    f" {TWO}": ("", ["time"]),
    "no call at all": ("no call at all", []),
    'a {"name": "weather"}': ('a {"name": "weather"}', []),
    '{"name": "other", "arguments": {}}': ('{"name": "other", "arguments": {}}', []),
    "<tool_call>{broken</tool_call>": ("<tool_call>{broken</tool_call>", []),
    "a < b, <tool": ("a < b, <tool", []),
    "": ("", []),
    '[{"name": "time"}]': ("", ["time"]),
    '{"arguments": {}, "name": "time", "id": "1"} ': ("", ["time"]),
    '<tool_call>{"name": "weather", "arguments": "{\\"city\\": 1}"}</tool_call>': ("", ["weather"]),
    f"<tool_call> <tool_call>{TWO}</tool_call> there": ("<tool_call> there", ["time"]),
    f"[TOOL_CALLS][{TWO}, {{}}]": (", {}]", ["time"]),
    '{"name": "a person", "age": 3}': ('{"name": "a person", "age": 3}', []),
    '{"name": ["time"], "arguments": {}}': ('{"name": ["time"], "arguments": {}}', []),
    '{"name": "time", "arguments": "\\ud800"}': ('{"name": "time", "arguments": "\\ud800"}', []),
    f"{DEEP[:24]}no": (f"{DEEP[:24]}no", []),
}
# what is told once a call has begun is not taken back
BROKEN = {
    '<tool_call>{"name": "time", "arguments": {}</tool_call>x': ("x", ["time"]),
    '<tool_call>{"name": "time", "arguments": {"a": b}}</tool_call>': ("", ["time"]),
    '{"name": "time", "arguments": {"a': ("", ["time"]),
    "<tool_call><function=time><parameter=a>1</parameter> no": ("no", ["time"]),
    "<tool_call><function=weather><parameter=city>Kö": ("", ["weather"]),
}


def joined(deltas):
    """What a client makes of deltas: the text, and the calls."""
    text, calls = "", []
    for delta in deltas:
        text += delta.get("content") or ""
        for told in delta.get("tool_calls") or ():
            function = told["function"]
            if "id" in told:
                assert told["index"] == len(calls) and function["arguments"] == ""
                calls.append({"id": told["id"], "name": function["name"], "arguments": ""})
            assert told["index"] == len(calls) - 1 and len(delta) == 1
            calls[-1]["arguments"] += function["arguments"]
    return text, calls


def without_ids(calls):
    return [(call["name"], call["arguments"]) for call in calls]


def parted(reply, parts):
    return joined([delta for part in parts for delta in reply.add(part)] + reply.end())


@settings(max_examples=20)
@given(cuts=st.lists(st.integers(0, 200), max_size=8))
@pytest.mark.parametrize("written", [*WRITTEN, *BROKEN])
def test_calls_are_told_alike_however_the_text_is_cut(written, cuts):
    text, names = {**WRITTEN, **BROKEN}[written]
    cut = [written[a:b] for a, b in pairwise(sorted({0, *cuts, len(written)}))]
    for parts in (cut, [*written]):
        told, calls = parted(ToolText(PARAMETERS), parts)
        assert told == text and [call["name"] for call in calls] == names
        whole = parted(ToolText(PARAMETERS), [written])
        assert without_ids(calls) == without_ids(whole[1])
        if written in WRITTEN:
            assert all(isinstance(json.loads(call["arguments"]), dict) for call in calls)


MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "[ARGS]", "<function=")
PIECES = [*'{}[]<>;, \n"x', *MARKS, ONE, TWO, XML, DEEP, CITY, "</parameter>", "weather", "<to"]


@settings(max_examples=300, deadline=None)
@given(written=st.lists(st.sampled_from(PIECES), max_size=8).map("".join), draw=st.data())
def test_any_text_is_told_alike_however_it_is_cut(written, draw):
    cuts = draw.draw(st.sets(st.integers(0, len(written)), max_size=8))
    reply = ToolText(PARAMETERS)
    told, calls = parted(
        reply, [written[a:b] for a, b in pairwise(sorted({0, *cuts, len(written)}))]
    )
    whole, expected = parted(ToolText(PARAMETERS), [written])
    assert told == whole and without_ids(calls) == without_ids(expected)
    assert [call["arguments"] for call in calls] == [call.arguments for call in reply.calls]
    if not calls:
        assert told == written


@pytest.mark.parametrize("written", WRITTEN)
def test_a_reply_that_is_cut_short_loses_nothing(written):
    for end in range(len(written)):
        reply = ToolText(PARAMETERS)
        text, calls = parted(reply, [*written[:end]])
        assert calls or text == written[:end]
        assert all(call.is_whole for call in reply.calls[:-1])


def test_arguments_are_told_while_they_are_written():
    deep = DEEP.replace("{}", CITY)
    for written in (f"<tool_call>{ONE}", f"[TOOL_CALLS]weather[ARGS]{CITY}", deep, XML_CALL):
        reply, seen = ToolText(PARAMETERS), []
        for i, letter in enumerate(written):
            seen += [(i, delta) for delta in reply.add(letter)]
        end = written.index("}" if "=" not in written else "</parameter>")
        before = [delta for i, delta in seen if i < end]
        ids = [d["tool_calls"][0].get("id") for d in before]
        assert ids[0] and not any(ids[1:]) and len(ids) >= 3


def test_texts_stay_texts_where_the_tool_takes_them():
    _, (call,) = parted(ToolText(PARAMETERS), [XML_CALL])
    assert json.loads(call["arguments"]) == {"city": "12", "days": [3]}


LETTERS = ["<pad>", "<s>", "</s>", *string.printable[:95]]
TEMPLATE = (
    "{% for t in tools or [] %}[{{ t['function']['name'] }}]{% endfor %}"
    "{% for m in messages %}{{ m['content'] or m['tool_calls'][0]['function']['arguments'] }}"
    "{% endfor %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
                "required": ["n"],
                "additionalProperties": False,
            },
        },
    }
    for name in NAMES
]


@pytest.fixture(scope="module")
def server(saved, tmp_path_factory):
    """A tiny llama whose tokens are letters."""
    out = tmp_path_factory.mktemp("letters") / "out"
    qlab.quantize(saved("llama", max_position_embeddings=256), qlab.rtn("int8-channel"), None, out)
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(out)
    with served(out) as server:
        yield server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        yield client
    assert idle(server)


def chat(client, **more):
    said = more.pop("messages", [{"role": "user", "content": "hi"}])
    return client.chat.completions.create(
        model="tiny", messages=said, temperature=0, **{"max_tokens": 100, **more}
    )


def writes(monkeypatch, server, text):
    """Let the model write a text, whatever it is asked."""
    model = server.worker.pipe.engine.model
    script = [LETTERS.index(letter) for letter in text] + [2]

    def forward(ids, position_ids, **_):
        begin = position_ids[0, -1].item() + 1 - server.length
        logits = torch.zeros(1, 1, model.config.vocab_size)
        logits[0, 0, script[min(max(begin, 0), len(script) - 1)]] = 1
        return SimpleNamespace(logits=logits)

    monkeypatch.setattr(model, "forward", forward)


@pytest.mark.parametrize("most", [100, 48])
def test_calls_that_the_model_writes_come_whole_and_as_they_are_written(
    client, server, monkeypatch, most
):
    call = '{"name": "weather", "arguments": {"n": 3}}'
    server.length = len("[weather][time]hi")
    calls = [("weather", '{"n": 3}')]
    for written, text, expected, finish in (
        (f"Well. <tool_call>{call}</tool_call>", "Well. ", calls, "tool_calls"),
        (f"[TOOL_CALLS][{call}, {call}]", None, calls * 2, "tool_calls"),
        (call, None, calls, "tool_calls"),
        ("a <tool_call>{no}</tool_call>", "a <tool_call>{no}</tool_call>", [], "stop"),
    ):
        writes(monkeypatch, server, written)
        whole = chat(client, tools=TOOLS, max_tokens=most).choices[0]
        made = [(c.function.name, c.function.arguments) for c in whole.message.tool_calls or ()]
        if len(written) < most:
            assert (whole.message.content, made, whole.finish_reason) == (text, expected, finish)
        else:
            assert whole.finish_reason == "length"
        pieces = [p.choices[0] for p in chat(client, tools=TOOLS, max_tokens=most, stream=True)]
        told = [piece.delta.model_dump(exclude_none=True) for piece in pieces]
        assert [delta.pop("role", None) for delta in told] == [
            "assistant",
            *[None] * (len(told) - 1),
        ]
        joined_text, joined_calls = joined([delta for delta in told if delta])
        assert (joined_text or None, without_ids(joined_calls)) == (whole.message.content, made)
        assert [p.finish_reason for p in pieces if p.finish_reason] == [whole.finish_reason]
        parts = [delta for delta in told if "tool_calls" in delta]
        assert len(parts) == sum(1 + len(arguments) for _, arguments in made)  # a letter each


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_the_text_up_to_a_stop_string(
    client, server, monkeypatch, stream
):
    server.length = len("hi")
    writes(monkeypatch, server, "ab-cd--ef")
    for stop, expected in {"--": "ab-cd", "ab-": "", "zz": "ab-cd--ef</s>"}.items():
        answer = chat(client, stop=stop, logprobs=True, stream=stream)
        choices = [p.choices[0] for p in answer] if stream else answer.choices
        said = [choice.delta if stream else choice.message for choice in choices]
        tokens = [token.token for choice in choices for token in choice.logprobs.content]
        assert "".join(tokens) == expected
        assert "".join(part.content for part in said) == expected.removesuffix("</s>")


def test_a_call_that_is_asked_for_is_made_and_its_result_is_read(client):
    for choice in ("required", {"type": "function", "function": {"name": "time"}}):
        answer = chat(client, tools=TOOLS, tool_choice=choice, logit_bias={13: 3.0}).choices[0]
        (call,) = answer.message.tool_calls
        assert answer.finish_reason == "tool_calls" and call.function.name in NAMES
        assert choice == "required" or call.function.name == "time"
        assert 0 <= json.loads(call.function.arguments)["n"] <= 9
    said = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "12"},
    ]
    assert chat(client, messages=said, tools=TOOLS).choices[0].finish_reason


def test_tools_that_do_not_fit_are_refused(client):
    for more in (
        {"tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"messages": [{"role": "user", "content": None}]},
    ):
        with pytest.raises(openai.BadRequestError):
            chat(client, **more)


def test_one_call_at_most_is_made_where_no_more_are_wanted(client, server, monkeypatch):
    call = '{"name": "time", "arguments": {"n": 1}}'
    server.length = len("[weather][time]hi")
    writes(monkeypatch, server, f"[TOOL_CALLS][{call}, {call}]")
    both, one = (
        chat(client, tools=TOOLS, parallel_tool_calls=wanted).choices[0].message.tool_calls
        for wanted in (True, False)
    )
    assert (len(both), len(one)) == (2, 1)
    pieces = chat(client, tools=TOOLS, parallel_tool_calls=False, stream=True)
    deltas = [piece.choices[0].delta.tool_calls or () for piece in pieces]
    assert {call.index for of_piece in deltas for call in of_piece} == {0}
