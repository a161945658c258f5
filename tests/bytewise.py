"""A byte-level BPE tokenizer of 320 tokens, trained on a few words; a model directory with it."""

from pathlib import Path

from families import tiny
from model_folders import prose
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 320
SPECIAL = ["<pad>", "<s>", "</s>"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TEXTS = ["word7 word12, it's 2024!", " Ärger\n\n  mit  123456 Wörtern\t", "don't 3.14 <s>x</s> y"]
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA.replace("{1,3}", "")


def split(pattern):
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_of_words(False)]


def bytes_of_words(use_regex=True):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


# llama.cpp's name of the rules -> the steps, and whether a whole word needs no merges
RULES = {
    "gpt-2": ([bytes_of_words()], False),
    "smollm": ([pre_tokenizers.Digits(individual_digits=True), bytes_of_words()], False),
    "llama-bpe": (split(LLAMA), True),
    "dbrx": (split(LLAMA), False),
    "qwen2": (split(QWEN), False),
}


def tokenizer(rules="gpt-2", begins=False, size=VOCABULARY - 4):
    """A tokenizer that splits by these rules; begins: whether a text begins with <s>."""
    steps, whole_words = RULES[rules] if isinstance(rules, str) else (rules, False)
    made = Tokenizer(models.BPE(ignore_merges=whole_words))
    made.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([prose(300), *TEXTS], trainer)
    if begins:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.add_tokens(["<tool>"])
    fast.chat_template = TEMPLATE
    return fast


def model_folder(path: Path, family="llama", dtype=None, words=None, **config) -> Path:
    """A random model of 4 query heads and 2 key heads that has such a tokenizer."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny(family, **{"vocab_size": VOCABULARY, **heads, **config})
    (model.to(dtype) if dtype else model).save_pretrained(path)
    (words or tokenizer()).save_pretrained(path)
    return path
