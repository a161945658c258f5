"""A folder of tasks in lm-eval's form, in the words of the tests' tokenizer: one of each kind."""

import json
import random

from model_folders import WORDS, prose

CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl, validation: questions.jsonl}}
test_split: test
fewshot_split: validation
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: data/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
WRITING = """
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["word7"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
GROUP = """
group: both
task: [choices, writing]
"""


def write_tasks(folder, documents=8):
    """The tasks `choices`, `rolling` and `writing`, and the group `both` of two of them."""
    draw = random.Random(0)
    (folder / "data").mkdir(parents=True)
    tasks = {"choices": CHOICES, "rolling": ROLLING, "writing": WRITING, "both": GROUP}
    for name, text in tasks.items():
        (folder / f"{name}.yaml").write_text(text)
    questions = [
        {"question": prose(6 + i, seed=i), "choices": draw.sample(WORDS, 4), "gold": i % 4}
        for i in range(documents)
    ]
    texts = [{"text": prose(40 + 60 * i, seed=99 + i)} for i in range(3)]
    for file, rows in {"questions.jsonl": questions, "data/texts.jsonl": texts}.items():
        (folder / file).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder
