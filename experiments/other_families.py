"""Is any method worse than plain RTN: on other families, on another kind of text than it was
calibrated on?

Usage: python experiments/other_families.py FOLDER [NAME...] [steps=N] [methods=rtn,NAME,...]
(default: every family, then demo; other steps or methods are a run of their own, NAME-N.json)

A small model of each family is trained on an encyclopedia and on Python's standard library, windows
of both in one random order, each seen once. It is quantized on windows of one of them and compared
on held-out files of both. FOLDER receives the models, and one that is there is not trained again.
Figures go to results/other-families/NAME.json, row by row.
"""

import json
import shutil
import sys
import sysconfig
from dataclasses import replace
from math import log
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import qlab
from qlab.demo.build import demo_text
from qlab.evaluation.perplexity import read

RESULTS = Path(__file__).parent / "results" / "other-families"
METHODS = ("rtn", "rtn-weighted", "hqq", "awq", "gptq", "awq-gptq", "gptaq")
STEPS, BATCH, LENGTH, RATE = 1000, 2, 256, 1.5e-3
CALIBRATION, EVALUATION = 16384, 4096  # tokens
SPECS = ("int4-g64", "int3-g64")

SIZES = dict(
    vocab_size=2048,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
)
GATED = SIZES | dict(intermediate_size=704, num_key_value_heads=2, tie_word_embeddings=True)
FAMILIES = {
    "gpt2": SIZES,
    "opt": SIZES | dict(ffn_dim=1024, word_embed_proj_dim=256),
    "gpt_neox": SIZES | dict(intermediate_size=1024),
    "qwen3": GATED | dict(head_dim=64),
    "phi3": GATED,
    "gemma2": GATED | dict(head_dim=64, sliding_window=128, query_pre_attn_scalar=64),
    "mixtral": GATED | dict(intermediate_size=384, num_local_experts=4, num_experts_per_tok=2),
}


def texts(folder):
    """kind -> (to calibrate on, held out). Of half of the standard library every fifth file is held
    out, as articles are."""
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::2]
    for name, files in (
        ("calibration", [f for i, f in enumerate(library) if i % 5]),
        ("heldout", library[::5]),
    ):
        (folder / f"python-{name}.txt").write_text(
            "\n\n".join(f.read_text(encoding="utf-8") for f in files), encoding="utf-8"
        )
    return {
        "encyclopedia": (demo_text("calibration"), demo_text("heldout")),
        "python": (folder / "python-calibration.txt", folder / "python-heldout.txt"),
    }


def tokenizer(folder, corpus):
    """Byte-level BPE of 2048 tokens."""
    bpe = ByteLevelBPETokenizer()
    lines = [
        json.loads(line)["text"]
        for line in corpus["encyclopedia"][0].read_text(encoding="utf-8").splitlines()
    ]
    bpe.train_from_iterator(
        [*lines, corpus["python"][0].read_text(encoding="utf-8")],
        vocab_size=2048,
        special_tokens=["<end>"],
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<end>").save_pretrained(
        folder
    )


def train(family, folder, corpus, steps):
    """A bfloat16 directory of the family in `folder`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **FAMILIES[family]), dtype=torch.float32
    )
    model.save_pretrained(folder)
    tokenizer(folder, corpus)
    data = qlab.tokens(
        qlab.open(folder),
        [calibration for calibration, _ in corpus.values()],
        steps * BATCH,
        LENGTH,
    )
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=RATE,
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    for ids in data.ids.split(BATCH):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)


def windows(model, reference, data):
    """KL divergence from the reference, and the mean negative log-likelihood, of every window: [2,
    n]."""
    reading = read(model, data)
    values = []
    for i in range(len(data.ids)):
        ours, theirs = (replace(r, hidden=r.hidden[i : i + 1]) for r in (reading, reference))
        e = qlab.evaluate(ours, theirs, replace(data, ids=data.ids[i : i + 1]))
        values.append((e.kl, log(e.perplexity)))
    return torch.tensor(values, dtype=torch.float64).T


def interval(values):
    """The mean over windows and its 95 % bootstrap interval."""
    picks = torch.randint(
        len(values), (2000, len(values)), generator=torch.Generator().manual_seed(0)
    )
    low, high = (
        values[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    )
    return [float(values.mean()), low, high]


def measure(model, corpus, spec, folder, methods):
    """One row per method, text calibrated on and text evaluated on, with per-site calibration
    losses.

    kl: of the unquantized model's predictions from ours; kl_over_rtn and nll_over_rtn: differences
    to RTN's, paired by window.
    """
    held_out = {
        kind: qlab.first_windows(model, [file], LENGTH, EVALUATION // LENGTH)
        for kind, (_, file) in corpus.items()
    }
    calibration = {
        kind: qlab.tokens(model, [file], CALIBRATION // LENGTH, LENGTH)
        for kind, (file, _) in corpus.items()
    }
    reference = {kind: read(model, data) for kind, data in held_out.items()}
    plain = {
        kind: float(windows(model, reference[kind], data)[1].mean().exp())
        for kind, data in held_out.items()
    }
    rtn = {}
    for method in methods:
        recipe = qlab.METHODS[method](qlab.parse_spec(spec))
        sees_data = any(stage.needs for stage in recipe)
        for calibrated, data in calibration.items() if sees_data else [(None, None)]:
            out = folder / f"{model.path.name}-quantized"
            # the GPTQ format holds the transposed linears of gpt2, too
            result = qlab.quantize(model, recipe, data, out, overwrite=True, codec="gptq")
            losses = {
                site: round(row["loss"], 6) for site, row in result.sites.items() if "loss" in row
            }
            for kind in corpus:
                ours = windows(qlab.open(result.path), reference[kind], held_out[kind])
                kl, nll = ours
                kl_over_rtn, nll_over_rtn = ours - rtn.setdefault(kind, ours)
                yield {
                    "spec": spec,
                    "method": method,
                    "calibrated": calibrated,
                    "evaluated": kind,
                    "reference_perplexity": plain[kind],
                    "perplexity": float(nll.mean().exp()),
                    "kl": interval(kl),
                    "kl_over_rtn": interval(kl_over_rtn),
                    "nll_over_rtn": interval(nll_over_rtn),
                    "calibration_losses": losses if kind == calibrated else None,
                }
            shutil.rmtree(result.path)


def line(name, row):
    """One row of the summary; WORSE where a paired interval of the difference to RTN lies above
    0."""
    kl, nll = row["kl_over_rtn"], row["nll_over_rtn"]
    worse = " ".join(
        f"WORSE {what}" for what, (_, low, _) in (("KL", kl), ("perplexity", nll)) if low > 0
    )
    change = 100 * (row["perplexity"] / row["reference_perplexity"] - 1)
    return (
        f"{name:9} {row['spec']:9} {row['method']:12} {row['calibrated'] or '-':12} "
        f"{row['evaluated']:12} {change:+7.2f} %  KL {row['kl'][0]:.5f}, over rtn {kl[0]:+.5f} "
        f"({kl[1]:+.5f} to {kl[2]:+.5f}) {worse}"
    )


def main(folder, names, steps=STEPS, methods=METHODS):
    run = "" if steps == STEPS and methods == METHODS else f"-{steps}"
    folder.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    corpus = texts(folder)
    for name in names:
        if name in FAMILIES and not (folder / name).exists():
            train(name, folder / f"{name}.untrained", corpus, steps)
            (folder / f"{name}.untrained").rename(folder / name)
        model, rows = qlab.open(folder / name if name in FAMILIES else name), []
        for spec in SPECS:
            for row in measure(model, corpus, spec, folder, methods):
                rows.append(row)
                print(line(name, row), flush=True)
                record = {
                    "name": name,
                    "tokens": {"calibration": CALIBRATION, "evaluation": EVALUATION},
                    "rows": rows,
                }
                (RESULTS / f"{name}{run}.json").write_text(
                    json.dumps(record, indent=1) + "\n", encoding="utf-8"
                )


if __name__ == "__main__":
    options = dict(word.split("=") for word in sys.argv[2:] if "=" in word)
    main(
        Path(sys.argv[1]),
        [word for word in sys.argv[2:] if "=" not in word] or [*FAMILIES, "demo"],
        int(options.get("steps", STEPS)),
        tuple(options["methods"].split(",")) if "methods" in options else METHODS,
    )
