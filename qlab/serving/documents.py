"""The bodies that clients read, as types for the document at /openapi.json. They are written by
`replies.py`, without these types."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Body(BaseModel):
    """A body without other fields."""

    model_config = ConfigDict(extra="forbid")


class Error(Body):
    """What is wrong."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class ErrorBody(Body):
    """OpenAI's envelope of an error."""

    error: Error


class CachedTokens(Body):
    """Tokens of the prompts whose keys and values were there."""

    cached_tokens: int


class Usage(Body):
    """How many tokens were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Reply(Body):
    """What all replies have."""

    id: str
    created: int
    model: str
    usage: Usage


Finish = Literal["stop", "length", "abort"]


class CompletionLogprobs(Body):
    """Log-probabilities, a token at each place."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Body):
    """One reply to one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish


class CompletionReply(Reply):
    """A completion."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class TokenLogprob(Body):
    """A token and its log-probability. bytes: of its text in UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class DrawnLogprob(TokenLogprob):
    """A token of a reply, beside the likeliest ones."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Body):
    """Log-probabilities of a message."""

    content: list[DrawnLogprob]


class CalledTool(Body):
    """The tool, and its arguments as JSON."""

    name: str
    arguments: str


class CallOfTool(Body):
    """A call."""

    id: str
    type: Literal["function"]
    function: CalledTool


class ReplyMessage(Body):
    """What the model says. tool_calls: absent where it calls none."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[CallOfTool] = []


class ChatChoice(Body):
    """One reply."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish | Literal["tool_calls"]


class ChatReply(Reply):
    """A chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Model(BaseModel):
    """The model that is served, beside facts of it: how its weights are stored, and what they
    take."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(Body):
    """All models."""

    object: Literal["list"]
    data: list[Model]


class Tokens(Body):
    """Token ids of a text. max_model_len: how many a request may have."""

    tokens: list[int]
    count: int
    max_model_len: int


class Prompt(Body):
    """The text of token ids."""

    prompt: str


Documented = dict[int | str, dict[str, Any]]
FAILED: Documented = {
    "4XX": {"model": ErrorBody, "description": "what was asked cannot be answered"},
    "5XX": {"model": ErrorBody, "description": "the model failed, or the server is ending"},
}
SILENT: Documented = {503: {"description": "no"}}  # of a route that answers by its code alone


def of(body: type[BaseModel]) -> Documented:
    """Replies of a route that answers with a body."""
    return {200: {"model": body, "description": "the answer"}, **FAILED}


def streamed(body: type[BaseModel]) -> Documented:
    """The same, of a route whose answers may be events."""
    data = {"type": "string", "description": "a part of the answer as JSON; at last [DONE]"}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    answer = {"model": body, "description": "the answer, or events where `stream` is true"}
    return {200: {**answer, "content": {"text/event-stream": {"itemSchema": event}}}, **FAILED}
