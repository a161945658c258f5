"""What the command gives the server (keys, certificates, bounds), what it says of an open door, and
readers that do not read."""

import asyncio
import shutil
import socket
import ssl
import subprocess

import pytest
import torch
from ports import free_port
from servers import get, served

import qlab
from qlab.cli import main
from qlab.serving import app, running, worker
from qlab.serving.schemas import Completion


@pytest.fixture(scope="module")
def directory(saved, tmp_path_factory):
    out = tmp_path_factory.mktemp("behind") / "out"
    qlab.quantize(saved("llama"), qlab.rtn("int8-channel"), None, out)
    return out


@pytest.fixture
def serving(directory, command, monkeypatch):
    """serving(options) -> (the server that would run, how it would listen, what was said)."""

    def serve(*options):
        asked = []
        monkeypatch.setattr(running, "run", lambda *given, **more: asked.append((given, more)))
        code, _, said = command(main, "serve", directory, "--dtype", "float32", *options)
        (((server, drain), listening),) = asked
        assert code == 0
        return server, listening | {"drain": drain}, said

    return serve


def test_keys_come_from_options_a_file_and_the_environment(serving, tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("of a file\n\n")
    monkeypatch.setenv("QLAB_API_KEY", "of the environment\nanother")
    keys = ("--api-key", "one", "--api-key", "two", "--api-key-file", tmp_path / "keys")
    server, _, said = serving(*keys, "--host", "0.0.0.0")
    assert server.settings.keys == ["one", "two", "of the environment", "another", "of a file"]
    assert "no key" not in said
    monkeypatch.delenv("QLAB_API_KEY")
    assert "0.0.0.0 is open to others" in serving("--host", "0.0.0.0")[2]
    assert "open to others" not in serving()[2]


def test_bounds_and_names_reach_the_server(serving):
    port = free_port()
    bounds = {
        "--port": port,
        "--served-model-name": "mine",
        "--max-model-len": 64,
        "--max-num-seqs": 3,
        "--max-queue-tokens": 99,
        "--request-timeout": 7.5,
        "--drain-timeout": 2,
    }
    server, listening, _ = serving(*[part for option in bounds.items() for part in option])
    assert listening == {"host": "127.0.0.1", "port": port, "drain": 2}
    assert (server.settings.name, server.settings.timeout) == ("mine", 7.5)
    facts = server.settings.facts
    assert server.worker.queue_tokens == 99
    assert facts["scheme"].startswith("14 int8-channel") and facts["max_model_len"] == 64


def test_what_cannot_be_served_is_refused(directory, command, tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"\xff\n")
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    pair = ("--ssl-certfile", tmp_path / "empty", "--ssl-keyfile", tmp_path / "bytes")
    for options, said in {
        ("--ssl-certfile", "a.pem"): "--ssl-keyfile",
        ("--ssl-certfile", "a.pem", "--ssl-keyfile", "b.pem"): "a.pem",
        ("--api-key-file", tmp_path / "empty"): "keys are empty",
        ("--api-key-file", tmp_path / "none"): "none",
        ("--api-key-file", tmp_path / "bytes"): "no text in UTF-8",
        ("--api-key-file", tmp_path): str(tmp_path),
        ("--port", port): f"127.0.0.1:{port}",
        ("--host", "no.such.host.invalid"): "no.such.host.invalid",
        pair: "no certificate with its key",
        ("--max-model-len", 4096): "128",
    }.items():
        code, _, error = command(main, "serve", directory, *options)
        assert code == 2 and said in error
    taken.close()


def test_a_certificate_makes_it_https(directory, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate, and is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    more = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run([*made, *more], check=True, capture_output=True)
    context = ssl.create_default_context(cafile=certificate)
    listening = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
    with served(directory, **listening) as server:
        assert get(f"{server.url}/ready", verify=context).status_code == 200


def test_a_client_that_left_before_the_first_event_is_answered_no_more(directory):
    body = Completion(prompt="word1", max_tokens=100, ignore_eos=True, stream=True)

    async def leave(server):
        server.worker.start()
        response = await server.completions(body, None)
        gone = lambda: asyncio.sleep(0, {"type": "http.disconnect"})
        await response({"type": "http"}, gone, lambda message: asyncio.sleep(0))
        is_cancelled = [answer.asked.request.is_cancelled for answer in response.answers]
        await asyncio.to_thread(server.worker.stop)
        return is_cancelled

    with qlab.pipeline(directory, dtype=torch.float32) as pipe:
        server = app.Server(worker.Worker(pipe, 1000), app.Settings(name="tiny", facts={}))
        assert asyncio.run(leave(server)) == [True]


def test_a_reader_that_does_not_read_is_cut_off(directory, monkeypatch):
    monkeypatch.setattr(worker, "PIECES", 5)
    body = Completion(prompt="word1", max_tokens=100, ignore_eos=True, stream=True)

    async def read_one_and_wait(server):
        server.worker.start()
        (answer,) = server.ask(body, body.prompts, {})
        stream = server.stream([answer], body, {}, lambda index, piece: [{"finish": piece.finish}])
        await anext(stream)
        while server.worker.answers:
            await asyncio.sleep(0.01)
        rest = [event async for event in stream]
        await asyncio.to_thread(server.worker.stop)
        return answer.asked.request.finish, rest

    with qlab.pipeline(directory, dtype=torch.float32) as pipe:
        server = app.Server(worker.Worker(pipe, 1000), app.Settings(name="tiny", facts={}))
        finish, rest = asyncio.run(read_one_and_wait(server))
        assert finish == "abort" and '"abort"' in rest[-2] and len(rest) < 12
        assert pipe.engine.pages.available == pipe.engine.pages.count
