"""serve: a model behind OpenAI's HTTP interface."""

import os
import socket
import ssl
from pathlib import Path
from typing import Annotated, Any

import typer

from qlab.cli.handing_over import (
    EngineName,
    EnginePython,
    PrintCommand,
    TensorParallel,
    hand_over,
    refuse_without_engine,
)
from qlab.cli.opening import (
    Activations,
    Compile,
    Dtype,
    Head,
    KvCache,
    opened,
    pipeline_of,
    roundings,
    say_cost,
)
from qlab.cli.options import Device, Model
from qlab.errors import QlabError, first_line
from qlab.process.extras import needed
from qlab.process.progress import say

KEY = "QLAB_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    context: typer.Context,
    model: Model,
    host: Annotated[str, typer.Option("--host", help="the address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8000,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    activations: Activations = "",
    head: Head = "",
    compile: Compile = "block",
    kv_cache: KvCache = "",
    name: Annotated[
        str, typer.Option("--served-model-name", help="(default: the directory's)")
    ] = "",
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", help=f"may be given several times; also one a line in ${KEY}"),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="keys, one a line")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", min=1, help="tokens of a request")
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option("--max-num-seqs", min=1, help="requests at a time")
    ] = 16,
    max_queue_tokens: Annotated[
        int, typer.Option("--max-queue-tokens", min=1, help="of all requests; above, 429")
    ] = 262_144,
    request_timeout: Annotated[
        float | None, typer.Option("--request-timeout", min=0.01, help="seconds")
    ] = None,
    drain_timeout: Annotated[
        float, typer.Option("--drain-timeout", min=0, help="seconds for requests at SIGTERM")
    ] = 30.0,
    ssl_certfile: Annotated[Path | None, typer.Option("--ssl-certfile")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option("--ssl-keyfile")] = None,
    engine: EngineName = "",
    engine_python: EnginePython = None,
    print_command: PrintCommand = False,
    tensor_parallel: TensorParallel = None,
) -> None:
    """Serve a model over OpenAI's API, with a page to talk to it at /. With --engine another engine
    serves it."""
    keys = _keys(api_key or [], api_key_file)
    if engine:
        _warn_open(host, keys)
        hand_over(context, keys)
        return
    refuse_without_engine(context)
    for library in ("fastapi", "fastapi_offline", "uvicorn", "prometheus_client"):
        needed(library, "serve")
    from qlab.serving.app import Server, Settings
    from qlab.serving.facts import facts_of
    from qlab.serving.running import run
    from qlab.serving.worker import Worker

    listening = {"host": host, "port": port, **_certificates(ssl_certfile, ssl_keyfile)}
    _refuse_taken(host, port)
    checkpoint = opened(model)
    rounded = roundings(checkpoint, device, activations, head)
    shared = {"rows": max_num_seqs, "max_length": max_model_len}
    pipe = pipeline_of(checkpoint, rounded, device, dtype, compile, kv_cache, **shared)
    if not pipe.answers:
        return
    _warn_open(host, keys)
    say_cost(pipe)
    settings = Settings(
        name=name or checkpoint.path.name,
        facts=facts_of(pipe, rounded["activations"] or dtype),
        keys=keys,
        timeout=request_timeout,
    )
    say(f"qlab: {settings.name} at {'https' if ssl_certfile else 'http'}://{host}:{port}")
    with pipe:
        run(Server(Worker(pipe, max_queue_tokens), settings), drain_timeout, **listening)


def _warn_open(host: str, keys: list[str]) -> None:
    if not keys and host not in LOCAL:
        say(f"qlab: {host} is open to others and asks for no key; --api-key sets one")


def _refuse_taken(host: str, port: int) -> None:
    """Refuse an address on which nobody can listen before a model is read for it."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except OSError as error:
        raise QlabError(
            f"nobody can listen at {host}:{port} ({error.strerror or error}); give another --port, "
            "or another --host"
        ) from error


def _keys(given: list[str], file: Path | None) -> list[str]:
    lines = [*given, *os.environ.get(KEY, "").splitlines()]
    if file is not None:
        try:
            lines += file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise QlabError(f"{file} is no text in UTF-8; give keys, one a line") from error
    keys = [line.strip() for line in lines if line.strip()]
    if (given or file) and not keys:
        raise QlabError("the keys are empty; give --api-key a text")
    return keys


def _certificates(certfile: Path | None, keyfile: Path | None) -> dict[str, Any]:
    if (certfile is None) != (keyfile is None):
        raise QlabError(
            "a certificate and its key go together; give both --ssl-certfile and --ssl-keyfile"
        )
    if certfile is None or keyfile is None:
        return {}
    for path in (certfile, keyfile):
        path.open("rb").close()
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certfile, keyfile, password=lambda: "")  # nobody is asked for one
    except ssl.SSLError as error:
        raise QlabError(
            f"{certfile} and {keyfile} are no certificate with its key in PEM ({first_line(error)})"
            "; give a pair that belongs together, the key without a password"
        ) from error
    return {"ssl_certfile": str(certfile), "ssl_keyfile": str(keyfile)}
