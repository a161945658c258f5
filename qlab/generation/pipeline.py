"""Texts, token ids and chats in, replies out: an engine with a tokenizer around it."""

import inspect
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from qlab.algebra.spec import Spec
from qlab.data.calibration import tokenizer_of
from qlab.data.chats import text_of_chat
from qlab.data.tokenizing import encode
from qlab.errors import QlabError, first_line, warn
from qlab.files.checkpoint import Checkpoint, open_checkpoint
from qlab.generation.bounds import longest
from qlab.generation.cache_cost import CacheCost, cache_cost, calibration_ids
from qlab.generation.cache_schemes import cache_scheme, put_cache
from qlab.generation.compiled import refuse_unknown
from qlab.generation.engine import Engine
from qlab.generation.grammar import KINDS, Grammars, Word, asked_for
from qlab.generation.images import Encoded, ImageReader, as_text, has_images, in_parts
from qlab.generation.loaded import defaults_of, loaded
from qlab.generation.parallel import Group, joined, run_together
from qlab.generation.request import STOP, Request
from qlab.generation.sampling import Drawn, Sampling
from qlab.generation.text import GrowingText
from qlab.lowering.weights.setting import Activations
from qlab.process.progress import progress
from qlab.process.surroundings import undisturbed

Chat = Sequence[dict[str, Any]]
Prompt = str | Sequence[int] | Chat
FEW = 8  # prompts that are answered without a display of how many are done
SETTINGS = frozenset(field.name for field in fields(Sampling))


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model wrote behind a prompt.

    text: without special tokens, up to the first stop string. tokens: all new ids. finish: "stop"
    at a stop string, a token that ends a text or the end of a grammar's word, "length" after
    max_tokens. is_whole: whether it is a word of the grammar that was asked for, or None.
    prompt_tokens,
    cached_tokens: how many tokens the prompt has, and how many of them were in the cache. drawn,
    prompt_drawn: the log-probabilities that were asked for, of new tokens and of the prompt's but
    for its first.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    is_whole: bool | None
    prompt_tokens: int
    cached_tokens: int
    drawn: tuple[Drawn, ...]
    prompt_drawn: tuple[Drawn, ...]


class Asked:
    """A request to a pipeline, with the text that grows out of it."""

    def __init__(
        self,
        pipeline: "Pipeline",
        prompt: Encoded,
        sampling: Sampling,
        text: GrowingText,
        word: Word | None,
    ):
        # `submit` may be overtaken by the thread that steps, which tells tokens
        self.text, self.pieces, self._stop_ids = text, list[str](), sampling.stop_ids
        self.request: Request = pipeline.engine.submit(
            prompt.ids, sampling, self._told, word, prompt.inputs
        )

    def _told(self, drawn: Drawn) -> bool:
        if drawn.token not in self._stop_ids:
            self.pieces.append(self.text.add(drawn.token))
        return self.text.is_ended

    def taken(self) -> str:
        """The text since the last call; all that is left where the request has ended."""
        if self.request.finish is not None:
            self.pieces.append(self.text.end())
        text, self.pieces = "".join(self.pieces), []
        return text

    @property
    def told_tokens(self) -> int:
        """How many of the new tokens the text that was taken is made of."""
        if self.request.finish is not None and not self.text.is_ended:
            return len(self.request.drawn)
        return self.text.told_tokens

    def reply(self) -> Reply:
        """The whole answer of a request that has ended. Raises what it failed of."""
        request = self.request
        if request.error is not None:
            error = request.error
            raise QlabError(
                f"the model failed on a prompt of {len(request.prompt)} tokens: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
        return Reply(
            text=self.taken(),
            tokens=tuple(request.new),
            finish=request.finish or STOP,
            is_whole=None if request.word is None else request.word.is_whole,
            prompt_tokens=len(request.prompt),
            cached_tokens=request.cached,
            drawn=tuple(request.drawn),
            prompt_drawn=tuple(request.prompt_drawn),
        )


class Pipeline:
    """A model with its tokenizer, that answers prompts (`qlab.pipeline`).

    Args:
        model: in evaluation mode.
        tokenizer: of transformers.
        defaults: what is not asked for.
        images: reads chats with images; None where the model takes none.
        engine: how requests share the model: arguments of
            `qlab.generation.engine.Engine`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        defaults: Sampling,
        images: ImageReader | None = None,
        **engine: Any,
    ):
        self.tokenizer, self.defaults, self.images = tokenizer, defaults, images
        self.engine = Engine(model, **engine)
        self._grammars: Grammars | None = None
        self.group: Group | None = None  # the ranks that run the model together, if there are some
        self.cost: CacheCost | None = None  # of the rounding of their cache

    @property
    def answers(self) -> bool:
        """Whether this process is the one that answers: the only one, or rank 0 of several."""
        return self.group is None or self.group.rank == 0

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model and of its cache, and let other ranks end."""
        engine = vars(self).pop("engine", None)
        if engine is not None:
            engine.close()
        if self.group is not None:
            self.group.close()

    def stats(self) -> dict[str, Any]:
        """Pages of the cache, those that no request reads, and what is compiled
        (`qlab.generation.compiled.Compiled.stats`)."""
        pages, compiled = self.engine.pages, self.engine.compiled.stats()
        return {"pages": pages.count, "pages_free": pages.available, **compiled}

    def cache_cost(self) -> CacheCost | None:
        """What the rounding of the cache costs, in bytes and in KL divergence, measured in a second
        or two while nobody waits for a reply, and of several ranks at their start; None where it
        holds numbers as they are."""
        return cache_cost(self.engine, self.tokenizer) if self.group is None else self.cost

    def __call__(self, prompts: Any, *, stop: str | Sequence[str] = (), **settings: Any) -> Any:
        """The reply to a prompt, or the list of replies to several, in their order.

        Args:
            prompts: a text, a list of token ids, a chat (a list of {"role": ..., "content": ...}),
                or a list of these. A content is a text, or a list of parts: {"type": "text",
                "text": ...}, and where the model takes images {"type": "image", "path": ...} or
                OpenAI's "image_url" with a data url.
            stop: a reply ends in front of the first of these strings.
            settings: fields of `qlab.generation.sampling.Sampling`, such as temperature=0.7 or
                max_tokens=100, without which a reply has as many tokens as fit, at most 256; and
                what the reply has to be: a JSON schema, regex="..." or choice=["...", ...].

        Returns None on the ranks that do not answer.
        """
        if not self.answers:
            return None
        if _is_one(prompts):
            asked = self.ask(prompts, stop=stop, **settings)
            return self.wait_for(asked)
        several = [self.ask(prompt, stop=stop, **settings) for prompt in prompts]
        shown = progress(several, "replies") if len(several) > FEW else iter(several)
        return [self.wait_for(asked) for asked in shown]

    def stream(
        self, prompt: Prompt, *, stop: str | Sequence[str] = (), **settings: Any
    ) -> Generator[str, None, None]:
        """The text of the reply to one prompt, in pieces as they become certain. A stream that is
        closed ends its request."""
        asked = self.ask(prompt, stop=stop, **settings)
        try:
            while asked.request.finish is None:
                self.engine.step()
                yield from filter(None, [asked.taken()])
            yield from filter(None, [asked.reply().text])
        finally:
            if asked.request.finish is None:
                asked.request.cancel()
                self.engine.step()

    def ids(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt."""
        return self.encoded(prompt).ids

    def encoded(self, prompt: Prompt, tools: Sequence[dict[str, Any]] = ()) -> Encoded:
        """A prompt as the model takes it. May be called from any thread."""
        if isinstance(prompt, str):
            return Encoded(ids=[*encode(self.tokenizer, prompt)["input_ids"]])
        if prompt and isinstance(prompt[0], dict):
            return self._encoded_chat(prompt, tools)
        if not all(isinstance(i, int) for i in prompt):
            raise QlabError(
                f"a prompt is {type(prompt[0]).__name__}s; give a text, token ids, or messages "
                '{"role": ..., "content": ...}'
            )
        return Encoded(ids=[int(i) for i in prompt])  # type: ignore[arg-type]

    def _encoded_chat(self, messages: Any, tools: Sequence[dict[str, Any]]) -> Encoded:
        told = {"tools": list(tools) or None, "add_generation_prompt": True}
        try:
            if has_images(messages):
                if self.images is None:
                    raise QlabError("the model takes no images; send text alone")
                return self.images.encoded(messages, **told)
            if not self.tokenizer.chat_template:
                raise QlabError(
                    "the model's tokenizer has no chat template; give the prompt as one text"
                )
            chat = as_text(messages) if self.images is None else in_parts(messages)
            text = text_of_chat(self.tokenizer, chat, **told)
        except QlabError:
            raise
        except Exception as error:  # whatever the template says of messages it does not know
            raise QlabError(
                f"the chat template refuses the messages ({first_line(error):.100}); give each a "
                'known "role" and a "content"'
            ) from error
        ids = encode(self.tokenizer, text, add_special_tokens=False)["input_ids"]
        return Encoded(ids=[*ids])

    def ask(
        self,
        prompt: Prompt | Encoded,
        *,
        stop: str | Sequence[str] = (),
        tools: Sequence[dict[str, Any]] = (),
        **settings: Any,
    ) -> Asked:
        """Ask, and wait for nothing. tools: functions that a chat template tells of; with them the
        text has the special tokens that mark calls."""
        unknown = sorted({*settings} - SETTINGS - {*KINDS})
        if unknown:
            raise QlabError(
                f"there is no setting {unknown[0]!r} of a reply; there are "
                f"{', '.join(sorted({*SETTINGS, *KINDS}))}"
            )
        known = prompt if isinstance(prompt, Encoded) else self.encoded(prompt, tools)
        given = {name: value for name, value in settings.items() if name in SETTINGS}
        fits = max(1, min(self.defaults.max_tokens, self.engine.longest - len(known.ids)))
        sampling = replace(self.defaults, **{"max_tokens": fits, **given})
        stops = (stop,) if isinstance(stop, str) else stop
        if not isinstance(stops, Sequence) or not all(isinstance(text, str) for text in stops):
            raise QlabError(f"stop is {stop!r:.100}; give a text, or several")
        text = GrowingText(self.tokenizer, stops, skip_special=not tools)
        return Asked(self, known, sampling, text, self._word(settings))

    def _word(self, settings: dict[str, Any]) -> Word | None:
        """What a reply has to be, of the grammar that was asked for."""
        asked = asked_for(settings)
        if asked is None:
            return None
        if self._grammars is None:
            ends = self.defaults.stop_ids
            self._grammars = Grammars(self.tokenizer, self.engine.vocabulary, ends)
        return self._grammars.word(*asked)

    def wait_for(self, asked: Asked) -> Reply:
        """The reply to what was asked; others go on meanwhile."""
        while asked.request.finish is None:
            self.engine.step()
        return asked.reply()


def _is_one(prompts: Any) -> bool:
    """Whether this is one prompt, and no list of prompts."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | dict))


@undisturbed
def pipeline(
    model: Checkpoint | str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    activations: Activations | None = None,
    head: Spec | None = None,
    kv_cache: str | None = None,
    rows: int = 16,
    max_length: int | None = None,
    compile: Literal["none", "block", "model"] = "none",
) -> Pipeline:
    """A model that answers texts, token ids and chats, many at a time.

    Requests share steps (continuous batching), and those whose prompts begin alike share keys and
    values. In float32, greedy replies are those of `generate()`, whatever is asked beside them.

    Where torch.distributed is initialised for several ranks, all of them call this, each holds its
    part of the model, and rank 0 answers. On the other ranks the call lasts until rank 0 closes its
    pipeline, and what it returns replies None.

    Args:
        model: a directory, quantized or not, or an open one.
        device: 'cpu', 'cuda' or 'cuda:N'.
        dtype: of the activations.
        activations: as `qlab.lower` takes it; of quantized directories alone.
        head: as `qlab.lower` takes it; of dense directories too.
        kv_cache: how keys and values are cached: "int8", "fp8", "int4", "k8v4", the name of a cache
            scheme of `qlab.schemes()`, or a cache spec such as "int8-head"; None as the directory
            says, and as numbers of the activations' dtype where it says nothing. Means and scales
            that have to be measured are measured on a passage that comes with qlab.
        rows: how many requests run at a time.
        max_length: tokens of a request, prompt and reply; None takes what the model takes, at most
            4096.
        compile: what of a step is compiled while requests run as they are: "none", "block"
            (one block for all of a structure, and the head; seconds of a processor for each of 1,
            2, 4, ... rows and for prompts) or "model" (the whole step; minutes for each).

    Returns:
        A pipeline, to be called with prompts and to be used in a `with` statement.

    Raises:
        QlabError: a directory that cannot be read or has no tokenizer, an unknown compile, more
            tokens than the model has positions, a cache scheme for a model that caches something
            else, more ranks than its heads and groups can be divided over.

    Example:
        >>> import qlab
        >>> with qlab.pipeline("demo-int4") as pipe:
        ...     reply = pipe("Once upon a time", temperature=0, max_tokens=4)
        >>> reply.finish, len(reply.tokens), reply.prompt_tokens
        ('length', 4, 4)
    """
    refuse_unknown(compile)
    scheme = cache_scheme(kv_cache) if kv_cache else None
    group = joined(device)
    if group is not None and compile != "none":
        warn(f"steps of {group.world} ranks run as they are; compile='none' says so")

    def opened() -> Any:
        checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
        tokenizer = tokenizer_of(checkpoint)
        ready = loaded(checkpoint, device, dtype, activations, head, group, scheme is not None)
        if scheme:
            most = longest(ready, max_length)
            put_cache(ready, checkpoint, scheme, calibration_ids(tokenizer, most))
        defaults = defaults_of(ready.generation_config, tokenizer)
        takes_images = "pixel_values" in inspect.signature(ready.forward).parameters
        images = ImageReader(checkpoint) if takes_images else None
        engine: dict[str, Any] = {"rows": rows, "max_length": max_length}
        engine["compile"] = compile if group is None else "none"
        return partial(Pipeline, ready, tokenizer, defaults, images, **engine)

    return opened()() if group is None else run_together(group, group.agreed(opened))
