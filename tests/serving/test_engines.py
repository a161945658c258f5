"""serve --engine: what each engine is asked, what it is not asked, and an engine that runs in the
place of the command. The engines are stubs."""

import json
import shlex
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from model_folders import refused

import qlab
from qlab.__main__ import main
from qlab.directories.loaded_by import format_of, refuse_unloadable
from qlab.files.checkpoint import open_checkpoint
from qlab.serving.engines import ENGINES, command_for

STUB = """
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
told = [sys.argv[1:], os.environ.get("VLLM_API_KEY"), os.getpid()]
print(json.dumps(told), flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def made(saved, tmp_path_factory):
    """made(spec, family, codec) -> a quantized directory, made once."""
    folder, there = tmp_path_factory.mktemp("engines"), {}

    def make(spec="int4-g32", family="llama", codec="compressed-tensors"):
        key = f"{family}-{spec}-{codec}"
        if key not in there:
            model = open_checkpoint(saved(family, torch.float16))
            recipe = qlab.rtn(spec) if isinstance(spec, str) else spec
            there[key] = qlab.quantize(model, recipe, None, folder / str(len(there)), codec=codec)
        return there[key].path

    return make


def printed(command, directory, engine, *words):
    code, out, error = command(main, "serve", directory, "--engine", engine, "--print", *words)
    assert code == 0, error
    return shlex.split(out), error


def pairs(words):
    return set(pairwise(words))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_options_that_mean_the_same_are_translated(engine, made, command):
    flags = ENGINES[engine].flags
    given = {
        "--host": "::1",
        "--port": "8123",
        "--served-model-name": "a name",
        "--max-model-len": "64",
        "--max-num-seqs": "3",
        "--tensor-parallel": "2",
        "--dtype": "float16",
    }
    options = [word for pair in given.items() for word in pair]
    words, _ = printed(command, made(), engine, *options, "--kv-cache", "FP8")
    assert words[1:3] == ["-m", ENGINES[engine].module] and str(made()) in words
    assert {(flags[name], value) for name, value in given.items()} <= pairs(words)
    assert (flags["--kv-cache"], ENGINES[engine].caches["fp8"]) in pairs(words)
    plain, _ = printed(command, made(), engine)
    assert {("--host", "127.0.0.1"), ("--server-name", "127.0.0.1")} & pairs(plain)
    assert not {"--max-num-seqs", "--max-batch-size", "--max-running-requests"} & set(plain)


def test_keys_are_not_shown_and_go_by_the_environment_where_they_can(made, command):
    words, error = printed(command, made(), "vllm", "--api-key", "se cret")
    assert words[0] == "VLLM_API_KEY=KEY" and "--api-key" not in words and not error
    told = command_for("vllm", open_checkpoint(made()), {}, ["se cret"])
    assert told.environment == {"VLLM_API_KEY": "se cret"} and "se cret" not in told.words
    several = command_for("vllm", open_checkpoint(made()), {}, ["a", "b"])
    assert several.words[-3:] == ("--api-key", "a", "b") and str(several).endswith("KEY KEY")
    words, error = printed(command, made(), "lmdeploy", "--api-key", "se cret")
    assert words[-2:] == ["--api-keys", "KEY"] and "on its command line" in error
    refused(
        lambda: command_for("sglang", open_checkpoint(made()), {}, ["a", "b"]),
        "sglang takes one API key, and 2 were given",
    )


@pytest.mark.parametrize(
    "engine, words, reason",
    [
        ("vllm", ["--request-timeout", "3"], "vllm has nothing that means --request-timeout"),
        ("lmdeploy", ["--max-queue-tokens", "9"], "nothing that means --max-queue-tokens"),
        ("sglang", ["--device", "cuda"], "sglang has nothing that means --device"),
        ("sglang", ["--kv-cache", "int8"], "has no cache 'int8'"),
        ("tgi", [], "the engine 'tgi' is unknown; qlab runs vllm, lmdeploy, sglang"),
        ("vllm", ["--tensor-parallel", "3"], "cannot be divided over 3 ranks; run it on 1, 2"),
    ],
)
def test_what_an_engine_does_not_have_is_refused_by_name(engine, words, reason, made, command):
    code, out, error = command(main, "serve", made(), "--engine", engine, "--print", *words)
    assert code == 2 and not out and reason in error


@pytest.mark.parametrize("option", [["--print"], ["--tensor-parallel", "2"]])
def test_options_of_engines_go_with_one(option, made, command):
    code, _, error = command(main, "serve", made(), *option)
    assert code == 2 and f"{option[0]} goes with --engine" in error


def test_directories_that_an_engine_does_not_load_are_refused(made, saved):
    def loads(engine, *how):
        return command_for(engine, open_checkpoint(made(*how)), {}).words

    assert ("--backend", "turbomind") in pairs(loads("lmdeploy"))
    wide = qlab.rules({"*.up_proj": qlab.rtn("int4-g64"), "*": qlab.rtn("int4-g32")})
    refused(lambda: loads("lmdeploy", "int4-g64"), "lmdeploy-turbomind loads no int4-g64")
    refused(lambda: loads("lmdeploy", "int8-g32"), "turbomind loads no int8-g32", "int4-g32")
    refused(lambda: loads("sglang", "int4-g16"), "sglang loads no int4-g16")
    refused(lambda: loads("vllm", wide), "gate_proj", "vllm joins these weights")
    refused(lambda: loads("sglang", "int4-g32", "llama", "gptq"), "the codec compressed-tensors")
    assert loads("vllm", "int4-g32", "llama", "gptq")
    assert format_of(open_checkpoint(made("int4-g32", "llama", "gptq"))) == "gptq"
    # its PyTorch engine takes codes of experts, where linears are dense
    experts = qlab.rules({"*experts*": qlab.rtn("int4-g32"), "*": qlab.keep()})
    mixture = open_checkpoint(made(experts, "mixtral"))
    refuse_unloadable(mixture, "lmdeploy-pytorch")
    whole = open_checkpoint(made("int4-g32", "mixtral"))
    refused(lambda: refuse_unloadable(whole, "lmdeploy-pytorch"), "self_attn", "int4-g32 weights")
    plain = open_checkpoint(saved("llama", torch.float16))
    assert command_for("sglang", plain, {}).words[-1] == str(plain.path)


def test_what_is_rounded_at_run_time_is_refused_where_an_engine_does_not(made):
    scheme = qlab.scheme("W4A8-g32").recipe()
    model = open_checkpoint(made(scheme))
    refuse_unloadable(model, "vllm")
    refused(lambda: refuse_unloadable(model, "sglang"), "sglang rounds no inputs to int8-channel")
    extra = replace(model, inputs={}, extras=cached(model))
    refuse_unloadable(extra, "sglang")
    refused(lambda: refuse_unloadable(extra, "lmdeploy"), "keys are rounded", "does not do")
    read = replace(
        extra, extras=tuple(replace(e, applied=True, attended=True) for e in cached(model))
    )
    refuse_unloadable(read, "vllm")
    refused(lambda: refuse_unloadable(read, "vllm", 2), "keys are rounded", "run it on 1")


def test_an_engine_that_does_not_build_a_model_is_not_asked_to(made):
    def named(name, **more):
        model = open_checkpoint(made())
        return replace(model, raw=model.raw | {"architectures": [name]}, **more)

    dense = command_for("lmdeploy", named("MistralForCausalLM", quantized={}), {})
    assert ("--backend", "pytorch") in pairs(dense.words)
    words = ["turbomind builds no MistralForCausalLM", "lmdeploy-pytorch loads no int4-g32"]
    refused(lambda: command_for("lmdeploy", named("MistralForCausalLM"), {}), *words)
    refused(lambda: command_for("lmdeploy", named("OPTForCausalLM"), {}), "choose another engine")
    assert command_for("vllm", named("OPTForCausalLM"), {}).words


def test_inputs_that_are_turned_over_all_ranks_are_not_handed_over(made):
    turned = qlab.chain(qlab.rotate_online(), qlab.rtn("int4-g32"))
    model = open_checkpoint(made(turned))
    refuse_unloadable(model, "vllm")
    refused(lambda: refuse_unloadable(model, "vllm", 2), "down_proj is turned at run time", "on 1")


def cached(model):
    from qlab.codecs.extra import Extra

    return (Extra("kv_cache_scheme", "keys are rounded"),)


@pytest.fixture
def stub(tmp_path):
    """The interpreter of an environment that holds a stub of vLLM."""
    cli = tmp_path / "site" / "vllm" / "entrypoints" / "cli"
    cli.mkdir(parents=True)
    for folder in (cli, cli.parent, cli.parent.parent):
        (folder / "__init__.py").touch()
    (cli / "main.py").write_text(STUB)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python


def test_an_engine_runs_in_the_place_of_the_command(made, stub):
    words = [sys.executable, "-m", "qlab", "serve", made(), "--engine", "vllm"]
    words += ["--engine-python", stub, "--api-key", "se cret", "--port", "8001"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line, process.stderr.read()
    told, key, pid = json.loads(line)
    assert told[:2] == ["serve", str(made())] and key == "se cret" and "se cret" not in told
    assert ("--port", "8001") in pairs(told) and pid == process.pid
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 7


def test_an_engine_that_is_not_there_is_one_sentence(made, stub, command, tmp_path):
    run = ("serve", made(), "--engine-python")
    code, _, error = command(main, *run, stub, "--engine", "sglang")
    assert code == 2 and f"sglang is not installed for {stub}; install it there" in error
    code, _, error = command(main, *run, tmp_path / "none", "--engine", "vllm")
    assert code == 2 and "none cannot be run (No such file or directory)" in error
