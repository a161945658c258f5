"""Tasks of lm-eval: the same scores in process and through the server, differences that are paired
by documents, and refusals in a sentence."""

import json
import math
import sys

import pytest
import requests
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_folders import refused
from task_folders import write_tasks

import qlab
from qlab.cli import main
from qlab.data.calibration import tokenizer_of
from qlab.evaluation.statistics import paired_shares, resampled
from qlab.evaluation.tasks.scores import Score, TaskScores

lm_eval = pytest.importorskip("lm_eval")
serving = pytest.importorskip("serving.servers")

KINDS = ["choices", "rolling", "writing"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks")


@pytest.fixture(scope="module")
def quantized(saved, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "q"
    return qlab.quantize(saved(), qlab.rtn("int2-g32"), None, out).path


@pytest.fixture(scope="module")
def reference(saved, folder):
    return qlab.evaluate_tasks(saved(), [*KINDS, "both"], folder=folder, dtype=torch.float32)


# ------------------------------------------------------------------ laws
@pytest.mark.filterwarnings("ignore:no int4 kernel")
@pytest.mark.parametrize("is_quantized", [False, True], ids=["dense", "quantized and chat"])
def test_scores_through_the_server_are_those_in_process(saved, quantized, folder, is_quantized):
    model = quantized if is_quantized else saved()
    # in the chat template of the tests a choice has no token of its own
    tasks = ["rolling", "writing"] if is_quantized else KINDS
    asked = {"tasks": tasks, "folder": folder, "dtype": torch.float32, "chat": is_quantized}
    here = qlab.evaluate_tasks(model, batch=3, **asked)
    with serving.served(model) as server:
        there = qlab.evaluate_tasks(model, server=server.url, **asked)
    assert here.texts == there.texts and any(here.texts["writing"])
    assert [score.key for score in here.scores] == [score.key for score in there.scores]
    for one, other in zip(here.scores, there.scores):
        pairs = zip(one.of_documents, other.of_documents)
        for a, b in (torch.tensor(pair, dtype=torch.float64) for pair in pairs):
            # lm-eval adds up the tokens of a text in float32 in process, and in float64 here
            assert torch.allclose(a, b, rtol=1.2e-7, atol=1e-4), one.name


def test_log_likelihoods_are_the_models_own(saved, folder, reference):
    model = qlab.open(saved())
    [rolling] = [score for score in reference.scores if score.task == "rolling"]
    texts = (folder / "data/texts.jsonl").read_text().splitlines()
    for line, (likelihood, _) in list(zip(texts, rolling.of_documents))[:2]:
        ids = [1, *tokenizer_of(model).encode(json.loads(line)["text"])]
        log_p = qlab.logits(model, [ids])[0].log_softmax(-1)
        own = log_p[:-1].gather(-1, torch.tensor(ids)[1:, None]).sum()
        assert likelihood == pytest.approx(float(own), abs=1e-3)


def test_a_model_against_itself_has_lost_nothing(reference):
    for row in reference.against(reference).rows:
        assert row.difference == 0 and row.recovery in (1.0, None)
        assert row.lost in (0, None) and row.gained in (0, None)
        assert row.verdict == "indistinguishable"


def test_every_metric_and_the_documents_of_a_group_are_scored(reference):
    by_name = {score.name: score for score in reference.scores}
    # the tasks of the group `both` have no metric in common, so that it has no score
    assert {score.task for score in reference.scores} == {*KINDS}
    assert by_name["choices (acc)"].is_of_answers and by_name["choices (acc)"].is_higher_better
    assert not by_name["rolling (word_perplexity)"].is_higher_better
    assert all(low <= s.value <= high for s in reference.scores for low, high in [s.interval])


# ------------------------------------------------------------------ statistics
def scores_of(answers, task="t", documents=None):
    values = tuple(map(float, answers))
    documents = documents or tuple(str(i) for i in range(len(values)))
    score = Score(
        task=task,
        metric="acc",
        filter="none",
        value=sum(values) / len(values),
        is_higher_better=True,
        of_documents=values,
        documents=documents,
    )
    return TaskScores(scores=(score,), texts={})


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_flips_and_differences_are_of_the_same_documents(pairs):
    before, now = zip(*pairs)
    [row] = scores_of(now).against(scores_of(before)).rows
    assert row.lost == sum(a and not b for a, b in pairs)
    assert row.gained == sum(b and not a for a, b in pairs)
    assert row.difference == pytest.approx((row.gained - row.lost) / len(pairs))
    low, high = row.interval
    shrunk = (row.gained - row.lost) / (len(pairs) + 2)  # where the interval is centred
    assert -1 <= low < shrunk < high <= 1


def test_no_change_is_an_interval_and_no_point():
    """By hand: 2 of 100 answers changed, so that the variance of the difference is 0.02 / 100."""
    assert paired_shares(0, 0, 98) == pytest.approx((-0.027718, 0.027718), abs=1e-6)


def test_a_group_is_scored_over_the_documents_of_its_tasks(saved, folder):
    (folder / "group.yaml").write_text("group: twice\ntask: [choices, again]\n")
    again = (folder / "choices.yaml").read_text().replace("task: choices", "task: again")
    (folder / "again.yaml").write_text(again)
    scores = qlab.evaluate_tasks(saved(), ["twice"], folder=folder, limit=3).scores
    one, other, both = (
        next(s for s in scores if (s.task, s.metric) == (task, "acc"))
        for task in ("choices", "again", "twice")
    )
    assert both.of_documents == one.of_documents + other.of_documents
    assert both.value == pytest.approx((one.value + other.value) / 2)


@pytest.mark.parametrize("p_lost, p_gained", [(0.12, 0.05), (0.02, 0.02), (0.3, 0.01)])
def test_an_interval_holds_its_level(p_lost, p_gained):
    """Over all outcomes of 40 questions, each with its chance."""
    n, held = 40, 0.0
    for lost in range(n + 1):
        for gained in range(n + 1 - lost):
            ways = math.comb(n, lost) * math.comb(n - lost, gained)
            rest = (1 - p_lost - p_gained) ** (n - lost - gained)
            chance = ways * p_lost**lost * p_gained**gained * rest
            low, high = paired_shares(lost, gained, n)
            held += chance * (low <= p_gained - p_lost <= high)
    assert 0.94 <= held <= 0.999


def test_documents_are_drawn_for_both_alike():
    def total(items):
        return float(sum(items))

    ours = [float(i) for i in range(20)]
    low, high = resampled(total, ours, [x - 1 for x in ours])
    assert low == high == 20  # unpaired draws would differ
    alone = resampled(total, ours)
    assert alone[0] < sum(ours) < alone[1]


# ------------------------------------------------------------------ refusals
def test_other_documents_and_other_tasks_are_refused():
    ours = scores_of([1, 0])
    refused(lambda: ours.against(scores_of([1, 0], task="other")), "no score in t")
    refused(lambda: ours.against(scores_of([1, 0], documents=("a", "b"))), "others", "same limit")


def test_names_and_folders_are_refused_in_a_sentence(saved, folder, tmp_path):
    def act(tasks, folder):
        return lambda: qlab.evaluate_tasks(saved(), tasks, folder=folder)

    refused(act(["choises"], folder), "no task 'choises'", "near are choices")
    refused(act(["*_*"], folder), "no task '*_*'", "there are ")
    refused(act([], folder), "no task to evaluate")
    refused(act(["x"], tmp_path / "none"), "no folder")
    (tmp_path / "broken.yaml").write_text("task: [")
    refused(act(["x"], tmp_path), "has no task", "broken.yaml")
    (tmp_path / "lost.yaml").write_text(
        "task: lost\ndataset_path: json\ndataset_kwargs: {data_files: {test: lost.jsonl}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: a\ndoc_to_target: 0\n"
        "doc_to_choice: [a, b]\n"
    )
    refused(act(["lost"], tmp_path), "task lost cannot be loaded", "lost.jsonl")


def test_a_choice_without_a_token_is_refused(saved, folder):
    asked = {"folder": folder, "chat": True, "limit": 1}
    refused(lambda: qlab.evaluate_tasks(saved(), ["choices"], **asked), "no token of its own")


def test_a_task_of_the_hub_without_the_hub_is_refused(saved, monkeypatch):
    path = f"{lm_eval.__path__[0]}/tasks/hellaswag"  # the index of all takes ten seconds
    names = lm_eval.tasks.TaskManager(include_path=path, include_defaults=False)
    monkeypatch.setattr("qlab.evaluation.tasks.loading._of_lm_eval", lambda: names)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(
        lambda: qlab.evaluate_tasks(saved(), ["hellaswag"]),
        "task hellaswag cannot be loaded",
        "data_files are local",
    )


def test_what_is_no_server_is_refused(saved, folder, monkeypatch):
    def act(url="http://127.0.0.1:9", **more):
        return lambda: qlab.evaluate_tasks(saved(), ["choices"], folder=folder, server=url, **more)

    refused(act("localhost:8000"), "http://HOST:PORT")
    refused(act(), "no server answers at http://127.0.0.1:9/v1/models")
    with serving.served(saved(), keys=["secret"]) as server:
        refused(act(server.url), "closed to this key", "--api-key")
        refused(act(server.url, api_key="secret", served_model_name="large"), "has the models tiny")
        refused(act(f"{server.url}/docs", api_key="secret"), "OpenAI-compatible")


def test_a_server_without_prompt_logprobs_is_refused_where_they_score(saved, folder, monkeypatch):
    """lm-eval would take each answer for certain."""
    monkeypatch.setattr("qlab.serving.app.completion_logprobs", lambda *a, **k: None)
    with serving.served(saved()) as server:
        asked = {"folder": folder, "server": server.url}
        refused(
            lambda: qlab.evaluate_tasks(saved(), ["choices"], **asked),
            "no log-probabilities of a prompt",
        )
        assert qlab.evaluate_tasks(saved(), ["writing"], limit=1, **asked).texts["writing"]


def test_without_lm_eval_the_extra_is_named(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(lambda: qlab.evaluate_tasks(saved(), ["x"]), "pip install 'qlab[eval]'")


# ------------------------------------------------------------------ the command
def test_the_command_prints_a_table_writes_json_and_draws(
    command, saved, quantized, folder, tmp_path
):
    out, figure = tmp_path / "tasks.json", tmp_path / "tasks.png"
    given = ["--tasks", "choices,rolling", "--tasks-from", folder]
    code, shown, said = command(
        main,
        *["eval", quantized, "--against", saved(), *given],
        *["--limit", 3, "--json", out, "--plot", figure],
    )
    assert code == 0, said
    assert "choices (acc)" in shown and "recovery" in shown and "rolling (word_perplexity)" in shown
    rows = json.loads(out.read_text())["tasks"]
    assert [row["metric"] for row in rows] == ["acc", "acc_norm", "word_perplexity"]
    assert all(row["documents"] == 3 and row["verdict"] for row in rows)
    assert figure.read_bytes().startswith(b"\x89PNG")
    code, shown, said = command(main, "eval", "--method", "rtn", saved(), *given, "--limit", 2)
    assert code == 0 and "by rtn" in shown, said


@pytest.mark.parametrize(
    "words, said",
    [
        (["--server", "http://x"], "--server would not be used"),
        (["--limit", "3"], "--limit would not be used"),
        (["--tasks", "a", "--windows", "3"], "--windows is of perplexity"),
        (["--tasks", "a", "--length", "64"], "--length is of perplexity"),
        (["--tasks", "a", "--plot", "x.png"], "--plot would not be used without a reference"),
        (["--tasks", "a", "--method", "rtn", "--server", "http://x"], "runs a model as it is"),
        (["--tasks", "a", "--samples", "3"], "--samples would not be used"),
    ],
)
def test_options_that_would_not_be_used_are_refused(command, saved, words, said):
    code, _, complaint = command(main, "eval", saved(), *words)
    assert code == 2 and said in complaint, complaint


def test_a_server_that_fails_in_the_middle_is_no_score(saved, folder, monkeypatch):
    def fails(self, *args, **kwargs):
        raise requests.HTTPError("500 Server Error")

    monkeypatch.setattr("qlab.evaluation.tasks.models.Served.model_call", fails)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    with serving.served(saved()) as server:
        refused(
            lambda: qlab.evaluate_tasks(saved(), ["writing"], folder=folder, server=server.url),
            "the server failed",
            "500 Server Error",
        )
