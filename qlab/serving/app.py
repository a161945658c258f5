"""The routes: OpenAI's completions, chats and models, and what operators ask."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from qlab.errors import QlabError, printable
from qlab.generation.images import has_images
from qlab.generation.request import ERROR, STOP
from qlab.serving.documents import (
    SILENT,
    ChatReply,
    CompletionReply,
    Models,
    Prompt,
    Tokens,
    of,
    streamed,
)
from qlab.serving.limits import DOCUMENTATION, Limits
from qlab.serving.metrics import Metrics
from qlab.serving.replies import (
    DONE,
    chat_logprobs,
    completion_logprobs,
    error_body,
    event,
    usage,
)
from qlab.serving.schemas import Chat, Completion, Detokenize, Options, Tokenize
from qlab.serving.tools import ToolText
from qlab.serving.worker import Answer, Busy, Piece, Worker

COMPLETION_TOKENS = 16  # of a completion that says none, as OpenAI has it
LOOK = 0.25  # seconds between looks whether a client is still there
RETRY = "1"  # seconds


@dataclass(frozen=True, kw_only=True)
class Settings:
    """name: of the model, as clients see it. facts: what the page and /v1/models say of it. keys:
    that open the server. timeout: seconds of a request, or None."""

    name: str
    facts: dict[str, Any]
    keys: Sequence[str] = ()
    timeout: float | None = None


class Server:
    """The application over a worker.

    Args:
        worker: what replies.
        settings: of the server.
    """

    def __init__(self, worker: Worker, settings: Settings):
        self.worker, self.settings, self.is_draining = worker, settings, False
        self.metrics = Metrics(worker)
        worker.stepped = self.metrics.step
        self.started = int(time.time())

    @property
    def tokenizer(self) -> Any:
        """Of the model."""
        return self.worker.pipe.tokenizer

    # -------------------------------------------------------------- asking
    def ask(self, body: Options, prompts: Sequence[Any], more: dict[str, Any]) -> list[Answer]:
        """The replies that a body asks for, n for each prompt. Those asked before one that is
        refused are cancelled."""
        if self.is_draining or not self.worker.is_alive:
            raise HTTPException(503, "the server is ending")
        if body.model is not None and body.model != self.settings.name:
            raise HTTPException(
                404, f"there is no model {printable(body.model)!r}; there is {self.settings.name!r}"
            )
        answers: list[Answer] = []
        try:
            for prompt in prompts:
                for i in range(body.n):
                    seed = {} if body.seed is None else {"seed": body.seed + i}
                    settings = {**body.sampling(), **more, **seed}
                    answers.append(self.worker.ask(prompt, **settings))
        except QlabError:
            cancel(answers)
            raise
        return answers

    async def whole(self, request: Request, answers: Sequence[Answer]) -> list[list[Piece]]:
        """All pieces of all replies. A client that leaves, or that waits too long, ends them."""
        reading = asyncio.gather(*[_read(answer) for answer in answers])
        try:
            end = time.monotonic() + (self.settings.timeout or 1e9)
            while not reading.done():
                await asyncio.wait([reading], timeout=LOOK)
                if await request.is_disconnected():
                    raise HTTPException(499, "the client has left")
                if time.monotonic() > end and not reading.done():
                    raise HTTPException(408, f"no reply in {self.settings.timeout} s")
            pieces = await reading
        finally:
            cancel(answers)
            reading.cancel()
        errors = [all_of[-1].error for all_of in pieces if all_of[-1].finish == ERROR]
        if errors:
            raise HTTPException(500, errors[0] or "the model failed")
        return pieces

    async def stream(
        self, answers: Sequence[Answer], body: Options, head: dict[str, Any], choices: Any
    ) -> AsyncIterator[str]:
        """Events of all replies as they come. choices: (which reply, a piece) -> its choices, an
        event each."""
        # bounded, so that what waits for a slow reader waits where it is counted
        queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue(maxsize=len(answers))

        async def read(index: int, answer: Answer) -> None:
            async for piece in answer.pieces():
                await queue.put((index, piece))

        readers = [asyncio.create_task(read(i, answer)) for i, answer in enumerate(answers)]
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        empty = {"usage": None} if wants_usage else {}
        left = len(answers)
        try:
            async with asyncio.timeout(self.settings.timeout):
                while left:
                    index, piece = await queue.get()
                    left -= piece.finish is not None
                    if piece.finish == ERROR:
                        yield event(error_body(piece.error or "the model failed", "server_error"))
                        return
                    for choice in choices(index, piece):
                        told = {"index": index, **choice}
                        yield event({**head, "choices": [told], **empty})
            if wants_usage:
                yield event(
                    {**head, "choices": [], "usage": usage(len(answers) // body.n, answers)}
                )
            yield DONE
        except TimeoutError:
            said = f"no whole reply in {self.settings.timeout} s"
            yield event(error_body(said, "server_error"))
        finally:
            for reader in readers:
                reader.cancel()

    # -------------------------------------------------------------- routes
    async def completions(self, body: Completion, request: Request) -> Response:
        """OpenAI's completions, from texts or token ids."""
        more: dict[str, Any] = {} if body.max_tokens else {"max_tokens": COMPLETION_TOKENS}
        if body.logprobs is not None:
            more |= {"logprobs": body.logprobs}
            more |= {"prompt_logprobs": body.logprobs} if body.echo else {}
        answers = self.ask(body, body.prompts, more)
        head = self._head("cmpl", "text_completion")
        told = [Told(self.tokenizer, answer, body) for answer in answers]
        if body.stream:

            def choices_of(index: int, piece: Piece) -> list[dict[str, Any]]:
                return [told[index].completion(piece)]

            return Events(self.stream(answers, body, head, choices_of), answers)
        pieces = await self.whole(request, answers)
        choices = [
            {"index": i, **told[i].completion(_together(all_of))} for i, all_of in enumerate(pieces)
        ]
        counted = usage(len(body.prompts), answers)
        return JSONResponse({**head, "choices": choices, "usage": counted})

    async def chat(self, body: Chat, request: Request) -> Response:
        """OpenAI's chats, by the model's chat template."""
        prompt: Any = [message.plain() for message in body.messages]
        if has_images(prompt):  # they take the time of many tokens to be read
            pipe = self.worker.pipe
            prompt = await asyncio.to_thread(pipe.encoded, prompt, body.callable_tools)
        answers = self.ask(body, [prompt], {})
        told = [Told(self.tokenizer, answer, body) for answer in answers]
        if body.stream:
            head = self._head("chatcmpl", "chat.completion.chunk")

            def choices_of(index: int, piece: Piece) -> list[dict[str, Any]]:
                return told[index].deltas(piece)

            return Events(self.stream(answers, body, head, choices_of), answers)
        pieces = await self.whole(request, answers)
        choices = [
            {"index": i, **told[i].message(_together(all_of))} for i, all_of in enumerate(pieces)
        ]
        head = self._head("chatcmpl", "chat.completion")
        return JSONResponse({**head, "choices": choices, "usage": usage(1, answers)})

    def models(self) -> dict[str, Any]:
        """The one model."""
        model = {"id": self.settings.name, "object": "model", "created": self.started}
        return {"object": "list", "data": [{**model, "owned_by": "qlab", **self.settings.facts}]}

    def tokenize(self, body: Tokenize) -> dict[str, Any]:
        """The token ids of a text."""
        ids = self.worker.pipe.ids(body.prompt)
        return {"tokens": ids, "count": len(ids), "max_model_len": self.worker.pipe.engine.longest}

    def detokenize(self, body: Detokenize) -> dict[str, Any]:
        """The text of token ids."""
        vocabulary = self.worker.pipe.engine.vocabulary
        wrong = [token for token in body.tokens if token >= vocabulary]
        if wrong:
            raise HTTPException(400, f"token {wrong[0]} is not in the vocabulary of {vocabulary}")
        return {"prompt": self.tokenizer.decode(body.tokens)}

    def health(self) -> Response:
        """200 while requests are computed."""
        return Response(status_code=200 if self.worker.is_alive else 503)

    def ready(self) -> Response:
        """200 while requests are taken."""
        return Response(status_code=200 if self.worker.is_alive and not self.is_draining else 503)

    def _head(self, kind: str, name: str) -> dict[str, Any]:
        return {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "object": name,
            "created": int(time.time()),
            "model": self.settings.name,
        }


class Events(StreamingResponse):
    """Events of replies, which end with it: a client may have left before the first one is made.

    Args:
        stream: of events.
        answers: the replies.
    """

    media_type = "text/event-stream"

    def __init__(self, stream: AsyncIterator[str], answers: Sequence[Answer]):
        super().__init__(stream)
        self.answers = answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            cancel(self.answers)


class Told:
    """What a client was told of one reply so far."""

    def __init__(self, tokenizer: Any, answer: Answer, body: Options):
        self.tokenizer, self.answer, self.body, self.at = tokenizer, answer, body, 0
        self.is_begun = False
        self.tools: ToolText | None = None
        if isinstance(body, Chat) and body.callable_tools:
            functions = [tool["function"] for tool in body.callable_tools]
            known = {f["name"]: f.get("parameters") or {} for f in functions}
            self.tools = ToolText(known, is_single=not body.parallel_tool_calls)

    def completion(self, piece: Piece) -> dict[str, Any]:
        """A choice of a completion."""
        assert isinstance(self.body, Completion)
        request, text = self.answer.asked.request, piece.text
        drawn: list[Any] = list(piece.drawn)
        if self.body.echo and not self.is_begun:
            text = self.tokenizer.decode(request.prompt, skip_special_tokens=True) + text
            drawn = [request.prompt[0], *request.prompt_drawn, *drawn]
        self.is_begun = True
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = completion_logprobs(self.tokenizer, drawn, self.at)
        self.at += len(text)
        return {"text": text, "logprobs": logprobs, "finish_reason": piece.finish}

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        """Choices of chunks of a chat: one for each thing that is told, and at least one at the
        end, or where log-probabilities are told."""
        told = self._told(piece)
        assert isinstance(self.body, Chat)
        if not told and (piece.finish or (self.body.logprobs and piece.drawn)):
            told = [{}]
        if told and not self.is_begun:
            told[0] = {"role": "assistant", "content": None, **told[0]}
            self.is_begun = True
        between: dict[str, Any] = {"logprobs": None, "finish_reason": None}
        choices = [{"delta": delta, **between} for delta in told]
        return [*choices[:-1], {**choices[-1], **self._behind(piece)}] if choices else []

    def message(self, piece: Piece) -> dict[str, Any]:
        """A choice of a whole chat."""
        text = "".join(delta.get("content", "") for delta in self._told(piece))
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self.tools is not None and self.tools.calls:
            called = [call.json() for call in self.tools.calls]
            message |= {"content": text or None, "tool_calls": called}
        return {"message": message, **self._behind(piece)}

    def _told(self, piece: Piece) -> list[dict[str, Any]]:
        """What a piece adds, as deltas."""
        if self.tools is None:
            return [{"content": piece.text}]
        told = self.tools.add(piece.text)
        return told if piece.finish is None else [*told, *self.tools.end()]

    def _behind(self, piece: Piece) -> dict[str, Any]:
        assert isinstance(self.body, Chat)
        told = chat_logprobs(self.tokenizer, piece.drawn) if self.body.logprobs else None
        calls = self.tools.calls if self.tools is not None else []
        is_call = piece.finish == STOP and calls and all(call.is_whole for call in calls)
        return {"logprobs": told, "finish_reason": "tool_calls" if is_call else piece.finish}


def application(server: Server) -> FastAPI:
    """The application, which starts and stops the worker."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.worker.start()
        yield
        await asyncio.to_thread(server.worker.stop)

    app = FastAPIOffline(
        title="qlab", lifespan=lifespan, redoc_url=None, static_url=f"{DOCUMENTATION}files"
    )
    app.state.server = server
    app.add_middleware(Limits, keys=server.settings.keys)
    chats, completions = streamed(ChatReply), streamed(CompletionReply)
    app.post("/v1/completions", responses=completions)(server.completions)
    app.post("/v1/chat/completions", responses=chats)(server.chat)
    app.get("/v1/models", responses=of(Models))(server.models)
    app.post("/tokenize", responses=of(Tokens))(server.tokenize)
    app.post("/detokenize", responses=of(Prompt))(server.detokenize)
    app.get("/health", response_class=Response, responses=SILENT)(server.health)
    app.get("/ready", response_class=Response, responses=SILENT)(server.ready)
    app.get("/metrics", response_class=PlainTextResponse)(server.metrics.text)
    app.get("/", response_class=HTMLResponse, include_in_schema=False)(_page)
    app.exception_handler(RequestValidationError)(_misformed)
    app.exception_handler(QlabError)(_refused)
    app.exception_handler(HTTPException)(_failed)
    return app


def cancel(answers: Sequence[Answer]) -> None:
    """Stop computing what has not ended."""
    for answer in answers:
        answer.cancel()


async def _read(answer: Answer) -> list[Piece]:
    return [piece async for piece in answer.pieces()]


def _together(pieces: Sequence[Piece]) -> Piece:
    """Several pieces as one."""
    drawn = [drawn for piece in pieces for drawn in piece.drawn]
    text = "".join(piece.text for piece in pieces)
    written = sum(piece.written for piece in pieces)
    return Piece(
        text=text, drawn=tuple(drawn), written=written, finish=pieces[-1].finish, error=None
    )


async def _page() -> str:
    return (Path(__file__).parent / "page.html").read_text(encoding="utf-8")


async def _misformed(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    said = [f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors()[:4]]
    return JSONResponse(error_body(printable("; ".join(said)), "invalid_request_error"), 400)


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, Busy):
        body = error_body(str(error), "rate_limit_error", "queue_full")
        return JSONResponse(body, 429, {"Retry-After": RETRY})
    code = "context_length_exceeded" if "at most" in str(error) else None
    return JSONResponse(error_body(str(error), "invalid_request_error", code), 400)


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return JSONResponse(error_body(str(error.detail), kind), error.status_code)
