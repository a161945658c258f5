"""Ranks that run a model together answer as one process does, refuse what cannot be divided, and
leave nobody waiting."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_folders import add_tokenizer, prose, random_tokens
from ranks import run_ranks

import qlab
from qlab.algebra.grid import encode, minmax
from qlab.algebra.random import generator
from qlab.errors import QlabError, ToldElsewhere
from qlab.generation.parallel import GroupEnded
from qlab.lowering.resident import resident_bytes

LONG = [100, 50, 25, 12, 6, 3, 99, 98, 97, 96, 95, 94, 93, 92, 91, 90, 89, 88, 87]
PROMPTS = [LONG, [7, 8, 9], [5, 9, 17, 33, 21, 8, 90, 14, 3, 77, 60], [64], [*LONG, 5]]
SETTINGS = [
    {"temperature": 0, "max_tokens": 8, "logprobs": 2, "prompt_logprobs": 1},
    {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 6},
]
WIDE = {"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 192}
THREE = WIDE | {"num_attention_heads": 6, "num_key_value_heads": 3}
PAIRS = [
    ("llama", None, {}),
    ("llama", "int4-g32-asym", {}),
    ("qwen2", "int4-g16", {}),
    ("gemma3_text", "int4-g32", {}),
    ("mixtral", "int4-g16-asym", {}),
    ("qwen3_moe", None, {}),
    ("phi3", "int8-channel", {}),
    ("deepseek_v3", "int4-g16", {}),
    ("llama", "shuffled int4-g32-asym", {}),
    ("llama", "turned int4-g32", {}),
]
# Inputs that are rounded at run time, one of which is turned before that. Where a processor
# multiplies fewer outputs in another order, some move to the next code.
ROUNDED = [
    ("llama", "W8A8", {}),
    ("llama", "turned W4A8-g32", {}),
    ("llama", "NVFP4", {}),
    ("qwen2", "W8A8_STATIC", {}),
    ("mixtral", "FP8_DYNAMIC", {}),
    ("qwen3_moe", "W4A8-g16", {}),
]
A_CODE = 0.05  # of the log-probabilities here, at most
TRIPLES = [("llama", "int4-g16-asym", THREE), ("qwen2", None, THREE | {"vocab_size": 131})]


@pytest.fixture(scope="module")
def made(saved, tmp_path_factory):
    """made(family, numbers, sizes) -> a tiny directory with a tokenizer, quantized to a spec or a
    scheme, or dense."""

    def make(family, numbers, sizes):
        path = saved(family, **sizes)
        if not (path / "tokenizer.json").exists():
            add_tokenizer(path)
        if numbers is None:
            return path
        out = tmp_path_factory.mktemp("parallel") / "out"
        kind, _, name = numbers.rpartition(" ")
        codec = "gptq_v2_desc_act" if kind == "shuffled" else "compressed-tensors"
        data = random_tokens(path) if name in ("NVFP4", "W8A8_STATIC") else None
        qlab.quantize(path, recipe(kind, name), data, out, codec=codec)
        return out

    return make


def recipe(kind, name):
    if kind == "shuffled":
        return shuffled(replace(qlab.parse_spec(name), scale_dtype=torch.float16))
    rounded = qlab.rtn(name) if name.islower() else qlab.scheme(name).recipe("rtn")
    return qlab.chain(qlab.rotate_online(), rounded) if kind == "turned" else rounded


def shuffled(spec):
    """Rounded to groups whose channels lie anywhere."""

    def part(W_ok, stats, spec):
        perm = torch.randperm(W_ok.shape[1], generator=generator(0, f"{W_ok.shape}"))
        return replace(encode(minmax, W_ok[:, perm], spec), perm=perm), {}

    return qlab.each_weight("shuffled", part, spec)


def answers(path, device="cpu", rows=3):
    """What a pipeline replies in fp32, and the bytes of its weights and its cache."""
    with qlab.pipeline(path, device=device, dtype=torch.float32, rows=rows) as pipe:
        told = [pipe(PROMPTS, **settings) for settings in SETTINGS]
        if not pipe.answers:
            return told
        weights = resident_bytes(pipe.engine.model)
        return told, sum(weights.values()), weights["embeddings"], pipe.engine.pool.nbytes()


def all_answers(rank, paths):
    return [answers(path) for path in paths]


def tokens(told):
    return [[reply.tokens for reply in replies] for replies in told]


def logprobs(told):
    drawn = [(*reply.drawn, *reply.prompt_drawn) for reply in told[0]]
    return torch.tensor([one.logprob for several in drawn for one in several], dtype=torch.float64)


@pytest.mark.parametrize("world, cases", [(2, PAIRS), (3, TRIPLES)])
def test_ranks_reply_as_one_process_does(made, tmp_path, world, cases):
    paths = [made(*case) for case in cases]
    alone = [answers(path) for path in paths]
    first, *others = run_ranks(tmp_path, world, all_answers, paths)
    assert others == [[[None, None]] * len(paths)] * (world - 1), others
    for case, one, several in zip(cases, alone, first):
        assert tokens(several[0]) == tokens(one[0]), case
        torch.testing.assert_close(logprobs(several[0]), logprobs(one[0]), atol=1e-4, rtol=0)
        assert several[0][0][4].cached_tokens == one[0][0][4].cached_tokens
    held, whole = first[0], alone[0]
    assert held[1] <= (1 / world + 0.1) * whole[1] and held[3] * world == whole[3]


def likeliest(rank, paths):
    found = []
    for path in paths:
        with qlab.pipeline(path, dtype=torch.float32) as pipe:
            found.append(pipe(PROMPTS[:3], temperature=0, max_tokens=5, logprobs=2))
    return found


def test_inputs_are_rounded_as_in_one_process(made, tmp_path):
    paths = [made(*case) for case in ROUNDED]
    alone, (first, _) = likeliest(0, paths), run_ranks(tmp_path, 2, likeliest, paths)
    for case, ones, severals in zip(ROUNDED, alone, first):
        for one, several in zip(ones, severals, strict=True):
            for x, y in zip(one.drawn, several.drawn):
                if x.token != y.token:  # as likely, but for a code
                    (_, most), (_, next_best) = x.likeliest
                    assert most - next_best < A_CODE, case
                    break
                assert abs(x.logprob - y.logprob) < A_CODE, case


def refusals(rank, paths):
    said = []
    for path in paths:
        try:
            qlab.pipeline(path)
        except QlabError as error:
            said.append((type(error), str(error)))
    return said


def test_what_cannot_be_divided_is_refused_on_every_rank(made, tmp_path):
    paths = [
        made("llama", None, THREE),
        made("llama", "int4-g64", {}),
        made("opt", None, {}),
        made("qwen3_next", None, {}),
    ]
    first, second = run_ranks(tmp_path, 2, refusals, paths)
    words = [
        ("3 key-value heads", "2 ranks", "1, 3"),
        ("groups of 64 inputs", "o_proj", "run it on 1"),
        ("opt", "one process"),
        ("recurrent", "one process"),
    ]
    for (kind, said), (told, _), expected in zip(first, second, words, strict=True):
        assert kind is QlabError and told is ToldElsewhere
        assert all(word in said for word in expected), said


def one_fails(rank, path, dies):
    """Rank 1 fails in its fourth pass."""
    from qlab.generation import parallel

    compute, passes = parallel.Engine.compute, []

    def failing(self, call, states):
        passes.append(call)
        if rank == 1 and len(passes) == 4:
            os._exit(9) if dies else None
            raise RuntimeError("no memory\nat all")
        return compute(self, call, states)

    parallel.Engine.compute = failing
    with qlab.pipeline(path, dtype=torch.float32) as pipe:
        try:
            pipe(PROMPTS, temperature=0, max_tokens=20)
        except GroupEnded as first:
            with pytest.raises(GroupEnded, match="have ended"):
                pipe([7])
            return str(first)


@pytest.mark.parametrize("dies", [False, True])
def test_a_rank_that_fails_ends_all_with_a_sentence(made, tmp_path, dies):
    first, second = run_ranks(tmp_path, 2, one_fails, made("llama", None, {}), dies)
    assert first.startswith("qlab: rank 0 of 2: another rank is gone")
    if dies:
        assert second is None
    else:
        assert isinstance(second, GroupEnded) and "no memory" in str(second)


def leaves(rank, path):
    """Rank 0 ends without closing its pipeline. Its model is not called alone."""
    pipe = qlab.pipeline(path, dtype=torch.float32)
    if pipe.answers:
        with pytest.raises(QlabError, match="2 ranks"):
            pipe.engine.model(torch.tensor([[7]]))
    return pipe([7], max_tokens=2) is None


def test_ranks_end_with_the_process_that_answers(made, tmp_path):
    assert run_ranks(tmp_path, 2, leaves, made("llama", None, {})) == [False, True]


def command(rank, *words):
    sys.argv = ["qlab", *map(str, words)]
    from qlab.cli import main

    main()


def test_run_answers_a_file_from_rank_0_alone(made, tmp_path):
    path, prompts = made("llama", "int4-g32-asym", {}), tmp_path / "prompts.jsonl"
    texts = [prose(n, seed=n) for n in (19, 3, 11, 1, 7)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    words = ["run", path, "--in", prompts, "--dtype", "float32", "--max-tokens", "5"]
    words += ["--kv-cache", "int8"]
    run_ranks(tmp_path, 2, command, *words, "--out", tmp_path / "two.jsonl", joins=False)
    with qlab.pipeline(path, dtype=torch.float32, kv_cache="int8") as pipe:
        replies = [reply.text for reply in pipe(texts, max_tokens=5)]
    written = (tmp_path / "two.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["text"] for line in written] == replies
    assert "5 answers" in said(tmp_path, "out0")
    assert "bytes a token on each of 2 ranks, 0.59 of 16 bits" in said(tmp_path, "err0")
    assert said(tmp_path, "out1") == said(tmp_path, "err1") == ""
    wrong = [*words[:1], made("opt", None, {}), *words[2:], "--out", tmp_path / "none.jsonl"]
    run_ranks(tmp_path, 2, command, *wrong, joins=False)
    assert said(tmp_path, "err0").count("one process") == 1 and said(tmp_path, "err1") == ""
    assert not (tmp_path / "none.jsonl").exists()
    run_ranks(tmp_path, 2, command, "run", tmp_path / "no", *words[2:], "--out", "x", joins=False)
    assert "no" in said(tmp_path, "err0") and said(tmp_path, "err1") == ""


def said(folder: Path, name: str) -> str:
    text = (folder / name).read_text()
    return "\n".join(line for line in text.splitlines() if "opaque value type" not in line)
