"""Models as lm-eval asks them: in this process, or behind an OpenAI-compatible server.

Both take the same tokens of a text. In fp32 they give the same log-likelihoods, up to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import requests
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from transformers import PreTrainedModel

from qlab.data.calibration import tokenizer_of
from qlab.driver.apply import Quantized
from qlab.errors import QlabError, first_line
from qlab.files.checkpoint import Checkpoint
from qlab.lowering import lower
from qlab.lowering.devices import device_named
from qlab.model.whole import load_whole

LONGEST = 4096  # tokens of a text and its answer, unless others are asked for
SECONDS = 3600  # that a server may take for one request
SPARE = 2  # tokens by which lm-eval cuts texts for a server shorter than for a model


@dataclass(frozen=True, kw_only=True)
class Server:
    """An OpenAI-compatible server. url: with or without /v1. key: that opens it, or "". name: of
    the model there; "" takes the only one."""

    url: str
    key: str = ""
    name: str = ""

    @property
    def root(self) -> str:
        """The URL up to /v1."""
        url = self.url.rstrip("/").removesuffix("/completions").rstrip("/")
        return url if url.endswith("/v1") else f"{url}/v1"

    @property
    def header(self) -> dict[str, str]:
        """Of every request."""
        key = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return {"Accept": "application/json", **key}

    def ask(self, path: str, body: Any = None) -> Any:
        """The JSON that the server answers; refuses, in a sentence, what is none."""
        where = f"{self.root}/{path}"
        if not where.startswith(("http://", "https://")):
            raise QlabError(f"{self.url} is no address of a server; write http://HOST:PORT")
        try:
            answer = requests.request(
                "GET" if body is None else "POST",
                where,
                json=body,
                headers=self.header,
                timeout=SECONDS if body else 30,
            )
        except requests.RequestException as error:
            raise QlabError(
                f"no server answers at {where} ({type(error).__name__}); start it, or correct the "
                "address"
            ) from error
        if answer.status_code in (401, 403):
            raise QlabError(f"{where} is closed to this key; give the server's --api-key")
        try:
            found = answer.json() if answer.ok else None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise QlabError(
                f"{where} answers {answer.status_code} {answer.text.strip()[:100]!r}, which is no "
                "OpenAI-compatible server; give the address of one"
            )
        return found

    def model(self) -> dict[str, Any]:
        """What the server says of the model that is meant."""
        models = self.ask("models").get("data")
        if not isinstance(models, list) or not all(
            isinstance(each, dict) and isinstance(each.get("id"), str) for each in models
        ):
            raise QlabError(f"{self.root}/models lists no models; give an OpenAI-compatible server")
        found = [each for each in models if self.name in ("", each["id"])]
        if len(found) != 1:
            names = ", ".join(each["id"] for each in models) or "none"
            raise QlabError(f"{self.root} has the models {names}; give the name of one of them")
        return found[0]

    def refuse_without_prompt_logprobs(self, name: str, ids: Sequence[int]) -> None:
        """lm-eval takes an answer without log-probabilities of the prompt for one of probability
        1."""
        body = {"model": name, "prompt": [list(ids)], "max_tokens": 1, "temperature": 0}
        found = self.ask("completions", {**body, "logprobs": 1, "echo": True})
        try:
            of_tokens = found["choices"][0]["logprobs"]["token_logprobs"]
            complete = len(of_tokens) == len(ids) + 1 and None not in of_tokens[1:]
        except (LookupError, TypeError):
            complete = False
        if not complete:
            raise QlabError(
                f"{self.root}/completions gives no log-probabilities of a prompt (echo with "
                "logprobs), which these tasks are scored by; give tasks that generate, or another "
                "server"
            )


class Served(LocalCompletionsAPI):
    """lm-eval's client of /v1/completions, whose texts become tokens as in `InProcess`.

    Args:
        tokenizer: of transformers.
        begins: whether a text begins with the token of a beginning.
        options: of lm-eval's client.
    """

    def __init__(self, tokenizer: Any, begins: bool, **options: Any):
        super().__init__(
            tokenizer_backend="huggingface", tokenizer=tokenizer.name_or_path, **options
        )
        self.tokenizer, self.begins = tokenizer, begins

    def tok_encode(  # type: ignore[override]
        self, string: Any, left_truncate_len: int | None = None, **options: Any
    ) -> list[Any]:
        """Token ids of a text, or of several."""
        if not isinstance(string, str):
            return [self.tok_encode(each, left_truncate_len) for each in string]
        has_one = bool(self.tokenizer.bos_token) and string.startswith(self.tokenizer.bos_token)
        ids = self.tokenizer.encode(string, add_special_tokens=self.begins and not has_one)
        return ids[-left_truncate_len:] if left_truncate_len else ids


def in_process(
    model: Checkpoint | Quantized,
    device: str,
    dtype: torch.dtype,
    batch: int,
    max_length: int | None,
) -> HFLM:
    """A model that lm-eval runs here, lowered where it is quantized."""
    checkpoint = model.model if isinstance(model, Quantized) else model
    tokenizer = tokenizer_of(checkpoint)
    return HFLM(
        pretrained=_ready(model, device, dtype),
        tokenizer=tokenizer,
        batch_size=batch,
        max_length=_length(checkpoint, max_length) - SPARE,
        add_bos_token=_begins(tokenizer),
    )


def served(
    checkpoint: Checkpoint,
    server: Server,
    batch: int,
    max_length: int | None,
    needs_prompts: bool,
) -> Served:
    """A model that a server runs. needs_prompts: whether tasks need log-probabilities of
    prompts."""
    tokenizer, told = tokenizer_of(checkpoint), server.model()
    most = told.get("max_model_len")
    length = _length(checkpoint, max_length)
    if needs_prompts:
        server.refuse_without_prompt_logprobs(told["id"], tokenizer.encode("one two three"))
    return Served(
        tokenizer,
        _begins(tokenizer),
        model=told["id"],
        base_url=f"{server.root}/completions",
        header=server.header,
        batch_size=batch,
        max_length=min(length, most) if isinstance(most, int) else length,
        timeout=SECONDS,
    )


def answers(error: requests.RequestException) -> QlabError:
    """A request that failed while tasks were asked, as a sentence."""
    said = getattr(error.response, "text", "") or first_line(error)
    return QlabError(f"the server failed while it was asked: {said.strip():.300}; look at its log")


def _ready(model: Checkpoint | Quantized, device: str, dtype: torch.dtype) -> PreTrainedModel:
    if isinstance(model, Quantized) or model.quantized or model.extras:
        return lower(model, device, dtype)
    dense: Any = load_whole(model, dtype)
    return dense.to(device_named(device)).eval()


def _length(checkpoint: Checkpoint, asked: int | None) -> int:
    has = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    length = min(has or LONGEST, LONGEST) if asked is None else asked
    if length <= SPARE or (has and length > has):
        raise QlabError(f"max_length is {length}; {checkpoint.path} takes up to {has} tokens")
    return length


def _begins(tokenizer: Any) -> bool:
    """Whether the tokenizer puts the token of a beginning before a text."""
    return tokenizer.encode("one")[:1] == [tokenizer.bos_token_id]
