"""What clients may send: every number is bounded, and no field is unknown."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from qlab.serving.tools import schema_of_calls

MOST_TOKENS = 2**20  # of a prompt, before anything is looked at


def _whole(value: Any) -> Any:
    """JSON's integers may be written 3.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
Token = Annotated[int, Field(ge=0, le=2**31), WHOLE]
Count = Annotated[int, Field(ge=0, le=2**20), WHOLE]
AtLeastOne = Annotated[int, Field(ge=1, le=2**20), WHOLE]
Replies = Annotated[int, Field(ge=1, le=16), WHOLE]
Seed = Annotated[int, Field(ge=0, le=2**62), WHOLE]
Likeliest = Annotated[int, Field(ge=0, le=20), WHOLE]
Ids = Annotated[list[Token], Field(min_length=1, max_length=MOST_TOKENS)]
Text = Annotated[str, Field(min_length=1, max_length=2**24)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]  # keys of JSON are texts
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class Strict(BaseModel):
    """A body without unknown fields, in which no text or truth value stands for a number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """What a stream ends with."""

    include_usage: bool = False


class Options(Strict):
    """What completions and chats have in common. The fields are OpenAI's, but for top_k, min_p,
    repetition_penalty, min_tokens and ignore_eos, which are vLLM's. `user` changes nothing."""

    model: str | None = Field(default=None, max_length=1000)
    max_tokens: AtLeastOne | None = None
    min_tokens: Count = 0
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: Count | None = None
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    n: Replies = 1
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: float = Field(default=1.0, gt=0.01, le=100, allow_inf_nan=False)
    logit_bias: dict[TokenName, Bias] = Field(
        default_factory=dict, max_length=1024, json_schema_extra={"additionalProperties": False}
    )
    ignore_eos: bool = False
    user: str | None = Field(default=None, max_length=1000)

    def sampling(self) -> dict[str, Any]:
        """The settings of a request to the pipeline; what was not sent is not among them."""
        names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed")
        given = {name: getattr(self, name) for name in names}
        settings = {name: value for name, value in given.items() if value is not None}
        settings |= {
            "min_tokens": self.min_tokens,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": {int(token): bias for token, bias in self.logit_bias.items()},
        }
        settings["stop"] = self.stop or ()
        return settings | ({"stop_ids": ()} if self.ignore_eos else {})


class Completion(Options):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=64)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=64)]
    )
    echo: bool = False
    logprobs: Likeliest | None = None

    @property
    def prompts(self) -> list[Any]:
        """One or several prompts as a list."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if several else [self.prompt]


class CalledFunction(Strict):
    """What a model called, as a client sends it back."""

    name: str = Field(max_length=100)
    arguments: str = Field(max_length=2**20)


class ToolCall(Strict):
    """A call that a model made."""

    id: str = Field(max_length=100)
    type: Literal["function"]
    function: CalledFunction


class TextPart(Strict):
    """A text in a content."""

    type: Literal["text"]
    text: str = Field(max_length=2**24)


class ImageUrl(Strict):
    """An image: a data url, of which `detail` changes nothing."""

    url: str = Field(max_length=2**25)
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Strict):
    """An image in a content."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(min_length=1, max_length=256)]


Content = Annotated[str, Field(max_length=2**24)] | Parts


class Said(Strict):
    """A message of a chat."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: str | None = Field(default=None, max_length=100)

    def plain(self) -> dict[str, Any]:
        """As chat templates read it."""
        return self.model_dump(exclude_none=True)


class Result(Strict):
    """What a tool that was called returned."""

    role: Literal["tool"]
    content: Content
    name: str | None = Field(default=None, max_length=100)
    tool_call_id: str | None = Field(default=None, max_length=100)

    def plain(self) -> dict[str, Any]:
        """As chat templates read it."""
        return self.model_dump(exclude_none=True)


class Replied(Strict):
    """An earlier reply of the model: a content, or calls of tools."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}}},
                {"required": ["tool_calls"], "properties": {"tool_calls": {"minItems": 1}}},
            ]
        }
    )
    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = Field(default=None, max_length=100)
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=128)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Replied":
        if self.content is None and not self.tool_calls:
            raise ValueError("a message of the assistant has a content or calls tools")
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates read it, with the arguments of calls as values."""
        message = self.model_dump(exclude_none=True)
        for call in message.get("tool_calls", ()):
            try:
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
            except ValueError:
                continue  # a template writes what the model wrote
        return message


Message = Annotated[Said | Result | Replied, Field(discriminator="role")]


class Function(Strict):
    """What a tool takes. `strict` changes nothing: a call that `tool_choice` asks for always is of
    these parameters, and another is the model's."""

    name: str = Field(min_length=1, max_length=100, pattern=r"^[\w.-]+$")
    description: str | None = Field(default=None, max_length=10_000)
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """The name of a tool."""

    name: str = Field(max_length=100)


class ToolChoice(Strict):
    """The tool that the model has to call."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(Strict):
    """What a reply has to be."""

    name: str = Field(default="", max_length=100)
    description: str | None = Field(default=None, max_length=10_000)
    strict: bool | None = None
    json_schema: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Strict):
    """OpenAI's response_format."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema")
        return self


class Chat(Options):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: AtLeastOne | None = None
    logprobs: bool = False
    top_logprobs: Likeliest | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _has_the_tool(self) -> "Chat":
        if self.tool_choice in ("none", "auto"):
            return self
        names = [tool.function.name for tool in self.tools or ()]
        chosen = None if isinstance(self.tool_choice, str) else self.tool_choice.function.name
        if not names or (chosen is not None and chosen not in names):
            raise ValueError("tool_choice asks for a tool that is not among tools")
        return self

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """The tools that this reply may call."""
        if self.tool_choice == "none":
            return []
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        if isinstance(self.tool_choice, str):
            return tools
        return [t for t in tools if t["function"]["name"] == self.tool_choice.function.name]

    def sampling(self) -> dict[str, Any]:
        """The same, with what the reply has to be."""
        settings = super().sampling()
        if self.max_completion_tokens is not None:
            settings["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            settings["logprobs"] = self.top_logprobs or 0
        if self.callable_tools:
            settings["tools"] = self.callable_tools
        if self.tool_choice not in ("none", "auto"):
            return settings | {"schema": schema_of_calls(self.callable_tools)}
        wanted = self.response_format
        if wanted is not None and wanted.type == "json_object":
            settings["schema"] = {"type": "object"}
        if wanted is not None and wanted.json_schema is not None:
            settings["schema"] = wanted.json_schema.json_schema
        return settings


class Tokenize(Strict):
    """POST /tokenize."""

    prompt: str = Field(max_length=2**24)


class Detokenize(Strict):
    """POST /detokenize."""

    tokens: Annotated[list[Token], Field(max_length=MOST_TOKENS)]
