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
from qlab.serving.tools import ToolText, calls_in

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
WRITTEN = {
    f"Let me see. <tool_call>{ONE}</tool_call>": ("Let me see. ", ["weather"]),
    f"<tool_call>\n{ONE}\n</tool_call>\n<tool_call>{TWO}</tool_call>": ("", ["weather", "time"]),
    f"[TOOL_CALLS][{ONE}, {TWO}]": ("", ["weather", "time"]),
    f"<|python_tag|>{TWO}": ("", ["time"]),
    f"<|python_tag|>{TWO}; {ONE}": ("", ["time", "weather"]),
    f"<|python_tag|>{TWO} and {ONE}": (f"<|python_tag|>{TWO} and {ONE}", []),
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
}


@settings(max_examples=20)
@given(cuts=st.lists(st.integers(0, 80), max_size=6))
@pytest.mark.parametrize("written", WRITTEN)
def test_calls_are_found_however_the_text_is_cut(written, cuts):
    text, names = WRITTEN[written]
    reply, places = ToolText(PARAMETERS), sorted({0, *cuts, len(written)})
    told = [reply.add(written[a:b]) for a, b in pairwise(places)]
    rest, calls = reply.end()
    assert "".join(told) + rest == text and [call.name for call in calls] == names
    assert all(isinstance(json.loads(call.arguments), dict) for call in calls)


def test_texts_stay_texts_where_the_tool_takes_them():
    (call,) = calls_in(f"<tool_call>{XML}</tool_call>", PARAMETERS)
    assert json.loads(call.arguments) == {"city": "12", "days": [3]}


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
        model="tiny", messages=said, temperature=0, max_tokens=100, **more
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


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_the_model_writes_is_a_call(client, server, monkeypatch, stream):
    call = '{"name": "weather", "arguments": {"n": 3}}'
    server.length = len("[weather][time]hi")
    writes(monkeypatch, server, f"Well. <tool_call>{call}</tool_call>")
    answer = chat(client, tools=TOOLS, stream=stream)
    if stream:
        pieces = [piece.choices[0] for piece in answer]
        text = "".join(piece.delta.content or "" for piece in pieces)
        calls, finish = pieces[-1].delta.tool_calls, pieces[-1].finish_reason
        assert calls[0].index == 0
    else:
        message, finish = answer.choices[0].message, answer.choices[0].finish_reason
        text, calls = message.content, message.tool_calls
    assert (text, finish, len(calls)) == ("Well. ", "tool_calls", 1)
    assert calls[0].function.name == "weather" and json.loads(calls[0].function.arguments)["n"] == 3


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
