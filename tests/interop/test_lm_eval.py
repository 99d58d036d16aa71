"""Zero-shot scores against lm-eval's own, item by item, on the same prompts; packed models through lm-eval."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.evaluation.harness import score_with_lm_eval
from lowbit.evaluation.likelihood import Request, likelihoods
from lowbit.evaluation.zero_shot import read_tasks, score_task

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "evaluation"))
from evaluation_models import char_tokenizer, tiny_model

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval (extra harness) is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # lm-eval's and its dependencies' own

QUESTIONS = [
    ("Question: why?\n", ["because", "no", "of course not"], 0),
    ("Question: what is a long question with many words in it?", ["a", "this one"], 1),
    ("Where? ", ["here", "there, and in every other place", "nowhere", "in"], 2),
    ("Question: so long that its start does not fit into the positions of the model at hand, is it?", ["yes", "no"], 0),
]
SCHEMAS = [(["Ann met Eve so Ann", "Ann met Eve so Eve"], "was glad.", 1), (["The cat", "The big dog"], "slept.", 0)]
PASSAGES = [
    "one two three two",
    "to be or not to be",
    "a longer passage, which ends with a word of many letters: incomprehensible",
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Files of items, and lm-eval's tasks on the same files."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "questions": [{"query": q, "choices": c, "gold": g} for q, c, g in QUESTIONS],
        "schemas": [{"context_options": o, "continuation": c, "gold": g} for o, c, g in SCHEMAS],
        "passages": [{"text": text} for text in PASSAGES],
    }
    choice = "output_type: multiple_choice\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    forms = {
        "questions": choice + 'doc_to_text: "{{query}}"\ndoc_to_choice: choices\ndoc_to_target: gold\n',
        "schemas": "output_type: multiple_choice\nmetric_list: [{metric: acc}]\n"
        "doc_to_text: gold\ndoc_to_choice: context_options\ndoc_to_target: continuation\n",
        "passages": "output_type: loglikelihood\nmetric_list: [{metric: acc}, {metric: perplexity}]\n"
        "doc_to_text: \"{{text.split(' ')[:-1]|join(' ')}}\"\ndoc_to_target: \"{{' '+text.split(' ')[-1]}}\"\n",
    }
    for name, items in rows.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(item) + "\n" for item in items))
        head = f"task: our_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {folder}/cache}}\n"
        (folder / f"{name}.yaml").write_text(f"{head}test_split: test\n{forms[name]}")
    return folder


@pytest.mark.parametrize("adds_bos", [False, True])
def test_scores_are_lm_evals_item_by_item(tasks, adds_bos):
    model, tokenizer = tiny_model(dtype=torch.float32), char_tokenizer(adds_bos=adds_bos)
    ours = [score_task(model, tokenizer, task) for task in read_tasks(("questions", "schemas", "passages"), tasks)]
    names = ("our_questions", "our_schemas", "our_passages")
    theirs = {score.task: score for score in score_with_lm_eval(model, tokenizer, names, directory=tasks)}
    for score in ours:
        for metric in score.metrics:
            other = next(each for each in theirs[f"our_{score.task}"].metrics if each.name == metric.name)
            assert metric.values == pytest.approx(other.values, rel=1e-5), (score.task, metric.name)
            assert metric.value == pytest.approx(other.value, rel=1e-5)
            assert metric.stderr == pytest.approx(other.stderr, rel=1e-5)
    assert ours[0].cut == 1 + adds_bos  # questions that do not fit


def test_log_likelihoods_are_lm_evals_for_packed_models_too(tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    lowbit.quantize(tmp_path / "model", lowbit.recipe("rtn", bits=4, group_size=32), None, out=tmp_path / "packed")
    model, tokenizer = lowbit.load(tmp_path / "packed", torch.float32), char_tokenizer()
    pairs = [(query, f" {choice}") for query, choices, _ in QUESTIONS for choice in choices] + [("", "start")]
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=3, max_length=64)
    asked = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
    theirs = wrapped.loglikelihood(asked, disable_tqdm=True)
    ours = list(likelihoods(model, tokenizer, ([Request(*pair)] for pair in pairs)))
    assert [each.nats for (each,) in ours] == pytest.approx([nats for nats, _ in theirs], rel=1e-5)
    assert [each.greedy for (each,) in ours] == [bool(greedy) for _, greedy in theirs]


def test_what_lm_eval_cannot_score_is_refused(tmp_path):
    model, tokenizer = tiny_model(dtype=torch.float32), char_tokenizer()
    with pytest.raises(ValueError, match="lm-eval has no task no_such_task"):
        score_with_lm_eval(model, tokenizer, ["no_such_task"])
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="cache is quantized, and lm-eval reads texts without a cache"):
        score_with_lm_eval(lowbit.load(tmp_path / "model", torch.float32, kv="kv-int:4"), tokenizer, ["piqa"])


def test_without_a_hub_its_tasks_are_refused_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)  # HF_HUB_OFFLINE is set for all tests
    with pytest.raises(ValueError, match=r"could not get the data of piqa .*--task-files DIR"):
        score_with_lm_eval(tiny_model(dtype=torch.float32), char_tokenizer(), ["piqa"], limit=2)
