"""Ranks that round keys and values, each those of its heads, answer as one process does."""

import shutil

import pytest
import torch
from model_folders import random_tokens
from ranks import run_ranks
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

import qlab
from qlab.errors import QlabError
from qlab.methods.kv import parse_cache_spec
from qlab.model.parallel import degrees

LONG = [5, 9, 17, 33, 21, 8, 90, 14, 3, 77, 60, *range(40, 70)]
PROMPTS = [[7, 8, 9], LONG]
SETTINGS = {"temperature": 0, "max_tokens": 5, "logprobs": 2, "prompt_logprobs": 1}
THREE = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
NAMED = [
    ("llama", "fp8", {}),
    ("llama", "KV_INT8_TOKEN", {}),
    ("llama", "KV_FP8_TENSOR", {}),
    ("gemma2", "int4", {}),  # not centred, windows
    ("phi3", "int4-token-asym", {}),  # every rank has all heads
    ("mixtral", "k8v4", {}),
]
OF_THREE = [("llama", "int4", THREE), ("llama", "int4-token-asym", THREE)]


@pytest.fixture(scope="module")
def spelled(saved, tmp_path_factory):
    """A tiny model whose tokenizer makes different tokens of a text."""

    def make(family, sizes):
        path = tmp_path_factory.mktemp("spelled") / "model"
        shutil.copytree(saved(family, **sizes), path)
        known = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(i): i for i in range(3, 127)}
        tokenizer = Tokenizer(WordLevel(known, unk_token="<pad>"))
        tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
        marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(path)
        return path

    return make


def replies(rank, asked):
    found = []
    for path, scheme in asked:
        with qlab.pipeline(path, dtype=torch.float32, kv_cache=scheme) as pipe:
            found.append((pipe(PROMPTS, **SETTINGS), pipe.cache_cost()))
    return found


def of_prompts(told):
    drawn = [d.logprob for reply in told for d in reply.prompt_drawn]
    return torch.tensor(drawn, dtype=torch.float64)


def agree(one, several, plain, case):
    """Tokens are the same, or as likely but for a code that a sum in another order moved, and this
    costs little of what rounding does."""
    for a, b in zip(one, several, strict=True):
        for x, y in zip(a.drawn, b.drawn):
            (_, most), (_, next_best) = x.likeliest
            assert x.token == y.token or most - next_best < 0.05, case
            if x.token != y.token:
                break
    moved = (of_prompts(several) - of_prompts(one)).norm()
    assert moved < (of_prompts(one) - of_prompts(plain)).norm() / 4, case


@pytest.mark.parametrize("world, cases", [(2, NAMED), (3, OF_THREE)])
def test_ranks_round_their_heads_as_one_process_does(spelled, tmp_path, world, cases):
    asked = [(spelled(family, sizes), scheme) for family, scheme, sizes in cases]
    alone, plain = replies(0, asked), replies(0, [(path, None) for path, _ in asked])
    first, *others = run_ranks(tmp_path, world, replies, asked)
    for case, (one, cost), (as_it_is, _), (several, told) in zip(cases, alone, plain, first):
        agree(one, several, as_it_is, case)
        assert told.ranks == world and told.kl == pytest.approx(cost.kl, rel=0.1), case
        if "token" not in case[1].lower():  # whose scales every rank has
            assert told.bytes_of_token * world == cost.bytes_of_token, case
    assert all(told is None for rank in others for told, _ in rank)


def saying(path, read, out):
    """A directory that rounds what its attentions read, and inputs of weights, or nothing else."""
    text, _, queries = read.partition(" of ")
    step = qlab.attention_inputs if queries else qlab.kv_cache
    steps = [step(parse_cache_spec(text))]
    if queries:
        steps.insert(0, qlab.scheme("W8A8").recipe("rtn"))
    data = random_tokens(path, 2, 16) if parse_cache_spec(text).static else None
    qlab.quantize(path, qlab.chain(*steps), data, out)
    return out


def replies_or_refusal(rank, asked):
    try:
        qlab.pipeline(asked[0][0], kv_cache="int8")
    except QlabError as error:
        return replies(rank, asked), str(error)


def test_ranks_do_what_a_directory_says_of_their_heads(spelled, tmp_path):
    path = spelled("llama", {})
    reads = ("int8-head", "fp8-tensor", "int4-g8", "int8-head of queries")
    made = [saying(path, read, tmp_path / f"{i}") for i, read in enumerate(reads)]
    assert all(degrees(qlab.open(folder)) == (1, 2) for folder in made)
    asked = [(folder, None) for folder in made]
    alone, ((plain, _),) = replies(0, asked), replies(0, [(path, None)])
    (first, said), (others, told) = run_ranks(tmp_path, 2, replies_or_refusal, asked)
    for read, (one, cost), (several, there) in zip(reads, alone, first):
        agree(one, several, plain, read)
        assert there.bytes_of_token * 2 == cost.bytes_of_token, read
    assert all(told is None for told, _ in others)
    assert "--kv-cache int8 away" in said and said in told
