"""Requests that share steps: prompts in parts, one at a time, and then a token of every running
request at once.

    step:  receive -> plan -> pages -> parts of prompts -> rows -> draw -> tell

A step that fails, fails alone: a prompt its request, and of rows the one that fails when they are
run one at a time.
"""

import inspect
import itertools
import queue
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from qlab.errors import QlabError, first_line
from qlab.generation.attention import use_row_masks
from qlab.generation.bounds import SHARE, free_bytes, longest
from qlab.generation.cache import (
    Pool,
    Rows,
    States,
    apart,
    cache_argument,
    has_states,
    layers_of,
    probed,
    shapes_of,
    side_by_side,
)
from qlab.generation.compiled import Bucket, Compiled
from qlab.generation.drawing import draw, prepare
from qlab.generation.grammar import Word
from qlab.generation.images import Placed, placed
from qlab.generation.pages import Pages
from qlab.generation.parts import logits_of
from qlab.generation.passes import Pass, pass_over
from qlab.generation.request import ABORT, ERROR, Request
from qlab.generation.sampling import Drawn, Sampling
from qlab.generation.schedule import Limits, Part, plan
from qlab.process.surroundings import undisturbed


def nothing(drawn: Drawn) -> bool:
    """Tell nobody, and end nothing."""
    return False


class Engine:
    """Continuous batching over a Hugging Face model, whose cache is in pages.

    `submit` may be called from any thread, `step` from one. The model's attention makes masks for
    the engine from then on.

    Args:
        model: lowered or dense, in evaluation mode.
        rows: how many requests run at a time.
        max_length: tokens of a request, prompt and new; None takes what the model takes, at most
            4096.
        page: tokens of a page.
        pages: how many pages there are; None makes as many as `rows` requests of max_length need,
            in the memory that they may take.
        memory: bytes that pages may take; None is a quarter of the memory that is free.
        chunk: tokens of a part of a prompt; prompts of models with recurrent states are one part.
        step_tokens: how many tokens of prompts a step computes beside its rows.
        reuse: whether requests whose prompts begin alike share pages.
        compile: what of a step is compiled while requests run: none, block or model
            (`qlab.generation.compiled`).

    Raises:
        QlabError: numbers below 1, more tokens than the model has positions, or an unknown
            compile.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rows: int = 16,
        max_length: int | None = None,
        page: int = 16,
        pages: int | None = None,
        memory: int | None = None,
        chunk: int = 256,
        step_tokens: int = 512,
        reuse: bool = True,
        compile: str = "none",
    ):
        self.model, self.max_length = model, longest(model, max_length)
        _refuse_below_one(rows=rows, page=page, pages=pages or 1, chunk=chunk, tokens=step_tokens)
        text = model.config.get_text_config()
        self.vocabulary = int(text.vocab_size)
        probe = probed(model)
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        self._cache_argument, self._has_states = cache_argument(model), has_states(probe)
        shapes = shapes_of(probe)
        layers = layers_of(model, shapes)
        self._together = not shapes or use_row_masks(model)
        prepare(model.device)
        size = page * layers.bytes_of_token
        free = int(SHARE * free_bytes(model.device)) if memory is None else memory
        most = free // max(size, 1)
        count = pages or max(1, min(rows * -(-self.max_length // page), most))
        self.pool = Pool(layers, count, page)
        self.pages = Pages(count, page, reuse=reuse and not self._has_states)
        # the code of some families (jamba) does not continue a state over parts of a prompt
        part = self.max_length if self._has_states else chunk
        self._limits = Limits(rows=rows, tokens=step_tokens, chunk=part, page=page)
        self._numbers = itertools.count()
        self._inbox: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._requests: dict[int, Request] = {}
        # what runs a pass: this process alone, or others with it
        self.forward: Callable[[Pass, States], Tensor] = self.compute
        self.compiled = Compiled(
            model,
            compile,
            rows=rows,
            pool=self.pool,
            arguments=self._arguments,
            why=self._why_eager(),
        )

    def _why_eager(self) -> str | None:
        """Why its steps are not compiled, or None."""
        if self._has_states:
            return "it has recurrent states, which are objects of their requests"
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            return "several processes run it together"
        return None if self._together else "it makes its masks in code of its own, row by row"

    def close(self) -> None:
        """Compile no more."""
        self.compiled.close()

    # -------------------------------------------------------------- requests
    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        told: Callable[[Drawn], bool] = nothing,
        word: Word | None = None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> Request:
        """Ask for new tokens behind a prompt.

        Args:
            prompt: token ids.
            sampling: how they are drawn, and how many.
            told: is called with every new token by whoever calls `step`; True ends the text.
            word: what the new text has to be, of a grammar.
            inputs: what the model takes beside the tokens, as its processor makes it of images.
                Such a prompt is computed in one part, and shares its pages with no other.

        Raises:
            QlabError: an empty prompt, ids outside the vocabulary, or more tokens than a request
                or the cache may have.
        """
        self._refuse(prompt, sampling)
        number = next(self._numbers)
        seed = torch.seed() % 2**62 if sampling.seed is None else sampling.seed
        request = Request(
            number=number,
            prompt=list(prompt),
            sampling=sampling,
            seed=seed,
            told=told,
            word=word,
            inputs=inputs or {},
        )
        self._inbox.put(request)
        return request

    def _refuse(self, prompt: Sequence[int], sampling: Sampling) -> None:
        if not len(prompt):
            raise QlabError("the prompt has no tokens; give at least one")
        wrong = [
            i
            for i in (*prompt, *sampling.logit_bias, *sampling.stop_ids)
            if not 0 <= i < self.vocabulary
        ]
        if wrong:
            raise QlabError(f"token {wrong[0]} is not in the vocabulary of {self.vocabulary}")
        wanted = len(prompt) + sampling.max_tokens
        if wanted > self.longest:
            raise QlabError(
                f"{len(prompt)} tokens of the prompt and {sampling.max_tokens} new ones are "
                f"{wanted}, and a request has at most {self.longest}; ask for fewer"
            )

    @property
    def longest(self) -> int:
        """How many tokens a request may have, prompt and new."""
        return min(self.max_length, self.pages.count * self.pages.size)

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for anything."""
        return not self._requests and self._inbox.empty()

    def drop_all(self) -> None:
        """End every request as failed."""
        for request in self._requests.values():
            request.finish = request.finish or ERROR
        self._retire()

    def run(self) -> None:
        """Step until nobody waits for anything."""
        while not self.is_idle:
            self.step()

    # -------------------------------------------------------------- one step
    @undisturbed
    @torch.no_grad()
    def step(self) -> None:
        """Compute what is planned for now, and tell the new tokens."""
        self._receive()
        self._claim_prefixes()
        places = [r.place(self.pages.alone(r.pages)) for r in self._requests.values()]
        step = plan(places, self.pages.available, self._limits)
        for number in step.preempted:
            self._give_back(self._requests[number])
        for number, count in step.grown.items():
            self._requests[number].pages += self.pages.take(count)
        for part in step.parts:
            self._run_part(part)
        self._run_rows([self._requests[number] for number in step.rows])
        self._retire()

    def _receive(self) -> None:
        """Take what was submitted, and let go of what was cancelled."""
        while not self._inbox.empty():
            request = self._inbox.get()
            self._requests[request.number] = request
        for request in self._requests.values():
            if request.is_cancelled and request.finish is None:
                request.finish = ABORT
        self._retire()

    def _claim_prefixes(self) -> None:
        """Let those that begin next hold the pages that are known already."""
        for request in [*self._requests.values()][: self._limits.rows]:
            asks = request.sampling.prompt_logprobs is not None
            if not request.pages and not request.done and not asks:
                request.pages = self.pages.prefix(request.shared)
                request.done = len(request.pages) * self.pages.size
                request.cached = max(request.cached, min(request.done, len(request.prompt)))

    def _give_back(self, request: Request) -> None:
        """All pages of a request, whose tokens are computed again if it goes on."""
        self.pages.remember(request.shared[: request.done], request.pages)
        self.pages.drop(request.pages)
        request.pages, request.done, request.states = [], 0, []

    def _retire(self) -> None:
        for request in [r for r in self._requests.values() if r.finish is not None]:
            self._give_back(request)
            request.told = nothing  # else it and who asked hold each other until a full collection
            del self._requests[request.number]

    def _run_part(self, part: Part) -> None:
        request = self._requests[part.request]
        if request.finish is not None:
            return  # an earlier part of it failed
        try:
            self._compute_part(request, part)
        except Exception as error:
            _fail(request, error)

    def _compute_part(self, request: Request, part: Part) -> None:
        tokens = request.tokens
        if self._has_states and part.begin == 0:
            request.states = DynamicCache(config=self.model.config).layers
        asked = request.sampling.prompt_logprobs
        ids = torch.tensor([tokens[part.begin : part.end]], dtype=torch.int64)
        seen = self._placed(request, ids)
        if asked is None and seen is None:
            logits = self._of_part(request, ids)
        else:
            keep = 0 if asked is not None else 1
            logits = self._forward(ids, [request], request.states, keep, seen)
        if asked is not None:
            request.tell_prompt(logits[0], part.begin, asked)
        request.done = part.end
        if part.end == len(tokens):
            self.pages.remember(request.shared[: request.done], request.pages)
            request.accept(draw(logits[:, -1], [request.drawing])[0])

    def _of_part(self, request: Request, ids_1q: Tensor) -> Tensor:
        """Logits of the last token of a part of a prompt."""
        run = partial(self._forward, ids_1q, [request], request.states, keep=1)
        bucket = self.compiled.prompt(ids_1q.shape[1])
        try:
            return run(bucket=bucket)
        except Exception as error:
            if bucket is None:
                raise
            logits = run()
            self.compiled.drop(bucket.shape, first_line(error))
            return logits

    def _placed(self, request: Request, ids_1q: Tensor) -> Placed | None:
        """The images of a prompt, among its tokens and those that it got before it began anew."""
        if not request.inputs:
            return None
        seen = placed(self.model, ids_1q, request.inputs, len(request.prompt))
        request.shift = seen.shift
        return seen

    def _run_rows(self, rows: Sequence[Request]) -> None:
        rows = [request for request in rows if request.finish is None]
        if not rows:
            return
        if not self._together:
            for request in rows:
                self._run_alone(request)
            return
        bucket = self.compiled.bucket(len(rows))
        try:
            self._compute_rows(rows, bucket)
        except Exception as error:  # one of them is to blame, and the others go on
            for request in rows:
                self._run_alone(request)
            if bucket is not None and not any(request.finish == ERROR for request in rows):
                self.compiled.drop(bucket.shape, first_line(error))

    def _run_alone(self, request: Request) -> None:
        try:
            self._compute_rows([request])
        except Exception as error:
            _fail(request, error)

    def _compute_rows(self, rows: Sequence[Request], bucket: Bucket | None = None) -> None:
        ids = torch.tensor([[request.last] for request in rows], dtype=torch.int64)
        if self._has_states:
            for request in rows:
                request.states = request.states or DynamicCache(config=self.model.config).layers
        states = side_by_side([r.states for r in rows]) if self._has_states else []
        logits = self._forward(ids, rows, states, keep=1, bucket=bucket)
        tokens = draw(logits[:, -1], [request.drawing for request in rows])
        if self._has_states:
            for request, own in zip(rows, apart(states, len(rows))):
                request.states = own
        for request, drawn in zip(rows, tokens):
            request.done += 1
            request.accept(drawn)

    def _forward(
        self,
        ids_bq: Tensor,
        requests: Sequence[Request],
        states: States,
        keep: int,
        seen: Placed | None = None,
        bucket: Bucket | None = None,
    ) -> Tensor:
        """Logits [b, keep, v] of the next tokens of requests; of all tokens where keep is 0. seen:
        the images among the tokens. bucket: what runs it, or None for the model as it is."""
        call = pass_over(requests, ids_bq, keep, seen.inputs if seen else {}, bucket)
        if bucket is None:
            return self.forward(call, states)
        return self.compute(call, states, bucket)[: len(requests)]

    def compute(self, call: Pass, states: States, bucket: Bucket | None = None) -> Tensor:
        """The logits [b, keep, v] of a pass. states: of recurrent layers, the rows side by side.
        bucket: what runs it, or None for the model as it is."""
        device = self.model.device
        start, shift = call.start_b.to(device), call.shift_b.to(device)
        rows = Rows(self.pool, call.table_bp.to(device), start, call.ids_bq.shape[1], states)
        more = self._arguments(rows, start + shift, call.keep, call.inputs)
        run = bucket or partial(logits_of, self.model)
        return run(call.ids_bq.to(device), use_cache=True, **more)

    def _arguments(
        self, rows: Rows, first_b: Tensor, keep: int = 1, inputs: Mapping[str, Tensor] | None = None
    ) -> dict[str, Any]:
        """What the model is called with beside ids. first_b: the positions of each row's first new
        token."""
        count = torch.arange(rows.writes.shape[1], dtype=torch.int64, device=first_b.device)
        more: dict[str, Any] = {"position_ids": first_b[:, None] + count, "logits_to_keep": keep}
        more |= inputs or {}
        taken = {name: value for name, value in more.items() if name in self._takes}
        return {**taken, self._cache_argument: rows}


# ------------------------------------------------------------------ bounds and failures
def _refuse_below_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise QlabError(f"{name} is {number}; give at least 1")


def _fail(request: Request, error: Exception) -> None:
    request.finish, request.error = ERROR, error
