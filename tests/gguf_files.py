"""Tiny GGUF files, written by the format's own library."""

import gguf
import numpy as np
from families import tiny
from model_folders import WORDS

from qlab.codecs.gguf_models import FOREIGN

KINDS = gguf.GGMLQuantizationType
SCALES = {
    KINDS.Q2_K: (80, 82),
    KINDS.Q3_K: (108,),
    KINDS.Q4_K: (0, 2),
    KINDS.Q5_K: (0, 2),
    KINDS.Q6_K: (208,),
}  # where they lie
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def k_blocks(shape, kind):
    """Random blocks of a K-quant, which the package does not make: any bytes are one, if their
    float16 scales are numbers."""
    draw = np.random.default_rng(int(kind))
    blocks = draw.integers(
        0, 256, (shape[0], shape[1] // 256, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8
    )
    for at in SCALES[kind]:
        blocks[..., at : at + 2] = np.full(blocks.shape[:2], 2e-4, dtype=np.float16)[
            ..., None
        ].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def write(path, kinds, arch="llama", keys=lambda writer: None, **config):
    """A random model, a llama where qlab does not read `arch`; `kinds`: the last part of a matrix's
    name -> how it is stored; `keys` adds some of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model = tiny(
        arch if arch in FOREIGN else "llama",
        num_key_value_heads=2,
        num_attention_heads=4,
        **config,
    )
    writer, config = gguf.GGUFWriter(path, arch), model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if arch == "qwen3" else config.hidden_size // 4)
    writer.add_value_length(config.head_dim if arch == "qwen3" else config.hidden_size // 4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(config.head_dim if arch == "qwen3" else config.hidden_size // 4)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<pad>", "<s>", "</s>", "w", "o", "wo", "ow", *WORDS[4:]])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * len(WORDS))
    writer.add_token_merges(["w o", "o w"])  # a list of one is no list to transformers 5.17
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    keys(writer)
    table = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, config.model_type.upper()), config.num_hidden_layers
    )
    for name, W in model.state_dict().items():
        module, _, suffix = name.rpartition(".")
        file_name = table.get_name(module)
        kind = kinds.get(file_name.rpartition(".")[2], KINDS.F32) if W.ndim == 2 else KINDS.F32
        if kind in SCALES:
            data = k_blocks(W.shape, kind)
        else:
            data = (
                W.numpy().astype(np.float16)
                if kind == KINDS.F16
                else gguf.quantize(W.numpy(), kind)
            )
        writer.add_tensor(f"{file_name}.{suffix}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
