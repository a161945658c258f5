"""llama.cpp on one GGUF file, in a process of its own: reads {"texts", "prompts"} as JSON, and
writes the ids of each text and, for each prompt of ids, the log-probabilities of the next token by
id. With "float32" keys and values are kept as float32, and attention is computed in it."""

import json
import os
import sys
import urllib.request

import xllamacpp


def main(file: str) -> None:
    asked = json.loads(sys.stdin.read())
    answers = os.dup(1)  # llama.cpp writes to the other two
    os.dup2(2, 1)
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = 1
    if asked.get("float32"):
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        flash = xllamacpp.llama_flash_attn_type
        params.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    told = {
        "ids": [tokenized(server, text) for text in asked.get("texts", [])],
        "logprobs": [next_token(server, ids, asked["size"]) for ids in asked.get("prompts", [])],
    }
    with os.fdopen(answers, "w") as stream:
        json.dump(told, stream)
    os._exit(0)  # nothing is left to do, and its threads need not be joined


def tokenized(server, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]


def next_token(server, ids: list[int], size: int) -> list[float]:
    """The log-probabilities of all tokens behind a prompt. They are told before what is asked of
    the sampler, which takes a letter: an end, or half of a character, would have none."""
    letter = tokenized(server, "a")[-1]
    sampler = {"n_predict": 1, "temperature": 0, "logit_bias": [[letter, 1000]]}
    answer = server.handle_completions({"prompt": ids, "n_probs": size, **sampler})
    rows = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    by_id = {row["id"]: row["logprob"] for row in rows}
    return [by_id.get(token, float("-inf")) for token in range(size)]


if __name__ == "__main__":
    main(sys.argv[1])
