"""A tokenizer of SentencePiece's kind: BPE over characters that falls back to bytes."""

from bytewise import SPECIAL, TEXTS
from model_folders import prose
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"
# what is done to spaces -> (normalizers, what splits)
SPACES = {
    "before": ([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)], None),
    "nowhere": (
        [normalizers.Replace(" ", SPACE)],
        pre_tokenizers.Split(" ", "merged_with_previous"),
    ),
    "never": ([], pre_tokenizers.Metaspace(SPACE, "never", split=False)),
    "always": ([], pre_tokenizers.Metaspace(SPACE, "always", split=False)),
    "first": ([], pre_tokenizers.Metaspace(SPACE, "first", split=False)),
}


def tokenizer(spaces="before", size=400, complete=True):
    """Such a tokenizer of at most `size` tokens. complete: whether every two tokens whose join is a
    token have a merge, as SentencePiece joins them."""
    words = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", SPACE)
    trainer = trainers.BpeTrainer(vocab_size=size - len(words), show_progress=False)
    learned.train_from_iterator([prose(300), *TEXTS[:1]], trainer)
    by_id = sorted(learned.get_vocab().items(), key=lambda each: each[1])
    words += [token for token, _ in by_id]
    there = set(words)
    merges = [
        (token[:i], token[i:])
        for token, _ in by_id
        for i in range(1, len(token))
        if token[:i] in there and token[i:] in there
    ]
    model = models.BPE(
        {word: id for id, word in enumerate(words)},
        merges if complete else list({a + b: (a, b) for a, b in merges}.values()),
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    made = Tokenizer(model)
    changes, split = SPACES[spaces]
    if changes:
        made.normalizer = normalizers.Sequence(changes)
    if split:
        made.pre_tokenizer = split
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback()])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", words.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
