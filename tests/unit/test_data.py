from __future__ import annotations

import copy
import csv
import hashlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    XGLMConfig,
    XGLMForCausalLM,
    logging,
)

from lowbit.data import bos_token, calibration_of, calibration_set, tokenize, windows
from lowbit.generation import Sampling, judge, write_tokens
from lowbit.rows import lines_of
from lowbit.texts import TextError, disjoint_parts, load_text

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


@pytest.fixture(scope="module")
def tokenizer():
    """One id a byte, a beginning-of-text token by default, and a context shorter than any text here."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={"<s>": 256} | {char: i for i, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", model_max_length=16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers, with one data set of known rows; `asked` records what was loaded."""
    datasets = pytest.importorskip("datasets", reason="hub texts need the package datasets")
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"text": [f"{split} one", "", "two"], "label": [0, 1, 2]})

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, timeout: None)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["test", "train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(self, name, timeout):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)


def _flat_paragraphs(text):
    return {flat for part in text.split("\n\n") if len(flat := " ".join(part.split())) >= 60}


def test_python_docs_parts_share_no_paragraph_and_are_of_like_length():
    calibration, evaluation = load_text("python-docs", "calibration"), load_text("python-docs", "evaluation")
    assert not _flat_paragraphs(calibration.text) & _flat_paragraphs(evaluation.text)
    assert min(len(calibration.text), len(evaluation.text)) > 100_000
    assert 0.8 < len(calibration.text) / len(evaluation.text) < 1.25
    assert "python-docs" in calibration.name and "calibration" in calibration.name and "evaluation" in evaluation.name


def test_python_docs_are_the_same_text_each_time():
    assert load_text("python-docs") == load_text("python-docs")


def test_topics_that_quote_each_other_stay_in_one_part_and_lose_nothing_else():
    quoted, own = "q" * 60, {key: f"{key}\n\n" + key * 70 for key in "abcdef"}
    topics = own | {"a": own["a"] + "\n\n" + quoted, "e": own["e"] + "\n\n" + quoted}
    first, second = disjoint_parts(topics)
    assert ("a" * 70 in first) == ("e" * 70 in first)
    assert (first + second).count(quoted) == 1
    for key in "abcdef":
        assert (key * 70 in first) != (key * 70 in second)


def test_a_file_is_its_whole_text_with_its_own_line_ends(tmp_path):
    raw = "first\r\nsecond\n\nthird é\n".encode()
    (tmp_path / "t.txt").write_bytes(raw)
    for split in ("calibration", "evaluation"):
        text = load_text(str(tmp_path / "t.txt"), split)
        assert (text.name, text.text, text.sha256) == ("t.txt", raw.decode(), hashlib.sha256(raw).hexdigest())


@pytest.mark.parametrize(
    ("content", "words"), [(b" \n\n ", "the text is empty"), (b"abc\xff", r"not UTF-8 text \(byte 3\)")]
)
def test_an_unusable_file_is_refused(tmp_path, content, words):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(TextError, match=words):
        load_text(str(tmp_path / "t.txt"))


@pytest.mark.parametrize("spec", ["missing.txt", "/no/such/file", "two words"])
def test_a_missing_file_is_refused_with_what_is_accepted(spec):
    with pytest.raises(TextError, match=f"'{spec}': no such file. .*Expected python-docs, a text file"):
        load_text(spec)


def test_no_text_where_text_is_needed_is_not_looked_for_on_a_hub():
    with pytest.raises(TextError, match=r"^none: text is needed here\. Expected python-docs, a text file"):
        load_text("none")


def test_a_directory_is_no_text(tmp_path):
    with pytest.raises(TextError, match="a directory"):
        load_text(str(tmp_path))


def test_a_misspelt_name_is_answered_with_the_right_one(no_hub):
    with pytest.raises(TextError, match=r"no route.*Did you mean python-docs"):
        load_text("pythondocs")


def test_wikitext2_gives_its_train_split_to_calibrate_and_its_test_split_to_evaluate(hub):
    calibration, evaluation = load_text("wikitext2", "calibration"), load_text("wikitext2", "evaluation")
    assert calibration.text == "train one\n\n\n\ntwo"
    assert evaluation.name == "Salesforce/wikitext:wikitext-2-raw-v1:test"
    assert hub == [("Salesforce/wikitext", "wikitext-2-raw-v1", split) for split in ("train", "test")]


def test_a_data_set_is_named_with_config_split_and_column(hub):
    assert load_text("org/name:small:validation:text").text == "validation one\n\n\n\ntwo"
    assert hub == [("org/name", "small", "validation")]
    with pytest.raises(TextError, match="columns are text, label; name one: org/name::train:COLUMN"):
        load_text("org/name:::body")


@pytest.fixture
def library_warnings(caplog):
    """Warnings of transformers as they come, whatever another test of this process has set; put back afterwards."""
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.enable_propagation()  # otherwise they do not reach caplog
    yield caplog
    logging.disable_propagation()
    logging.set_verbosity(before)


def test_a_text_is_tokenized_as_one_string_without_special_tokens_or_warnings(tokenizer, library_warnings):
    caplog = library_warnings
    text = "Line one.\n\nLine two is longer than the context.\n"
    ids = tokenize(text, tokenizer)
    assert ids.dtype == torch.int64
    assert ids.shape == (len(text),)
    assert tokenizer.decode(ids) == text
    assert not caplog.records
    assert tokenizer(text)["input_ids"][0] == 256 and caplog.records  # a plain call has both


def test_windows_follow_each_other_from_the_start_and_drop_the_tail():
    ids = torch.arange(23)
    assert torch.equal(windows(ids, 5), ids[:20].view(4, 5))
    assert torch.equal(windows(ids, 5, 2), ids[:10].view(2, 5))
    assert torch.equal(windows(ids, 23, 1), ids[None])


@pytest.mark.parametrize(
    ("seq_len", "count", "words"),
    [
        (5, 5, "23 tokens = 4 windows of 5; asked for 5. Use a longer text, fewer samples or a smaller seq_len"),
        (24, None, "23 tokens = 0 windows of 24; asked for 1"),
        (0, None, "must be at least 1"),
        (5, 0, "must be at least 1"),
    ],
)
def test_a_text_too_short_for_its_windows_is_refused(seq_len, count, words):
    with pytest.raises(TextError, match=words):
        windows(torch.arange(23), seq_len, count)


@pytest.mark.parametrize(
    ("samples", "seq_len", "words"),
    [
        (0, 16, "0 calibration windows were asked; expected 1 or more"),
        (-2, 16, "-2 calibration windows"),
        (4, 1, "windows of 1 tokens were asked"),
        (4, -1, "windows of -1 tokens"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_a_model_writes_anything(samples, seq_len, words):
    with pytest.raises(TextError, match=words):
        calibration_set("self", None, samples, seq_len, model=object())
    with pytest.raises(TextError, match=words):
        calibration_of(Mock(load_full=Mock(side_effect=AssertionError)), "self", samples, seq_len)


def test_a_calibration_set_is_the_first_windows_of_the_text_and_its_hash_is_of_the_ids(tokenizer, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("0123456789" * 10)
    one = calibration_set(str(path), tokenizer, 3, 20, bos="no", vocab_size=257)
    assert one.name == "t.txt"
    assert torch.equal(one.ids, tokenize("0123456789" * 6, tokenizer).view(3, 20))
    path.write_text("0123456789" * 6 + "another end, not used")
    assert calibration_set(str(path), tokenizer, 3, 20, bos="no").sha256 == one.sha256
    assert calibration_set(str(path), tokenizer, 2, 30, bos="no").sha256 != one.sha256  # the same ids in another shape
    path.write_text("1" + "0123456789" * 6)
    assert calibration_set(str(path), tokenizer, 3, 20, bos="no").sha256 != one.sha256


def test_windows_begin_with_bos_where_the_model_was_trained_so(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("0123456789" * 10)
    made = calibration_set(str(tmp_path / "t.txt"), tokenizer, 3, 20)
    assert made.name == "t.txt, windows with BOS" and made.ids[:, 0].tolist() == [256] * 3
    assert torch.equal(made.ids[:, 1:], tokenize("0123456789" * 10, tokenizer)[: 3 * 19].view(3, 19))
    plain = PreTrainedTokenizerFast(tokenizer_object=_without_bos(tokenizer), bos_token="<s>")
    assert bos_token(plain, "auto") is None and bos_token(plain, "yes") == 256
    with pytest.raises(TextError, match="no BOS token"):
        bos_token(PreTrainedTokenizerFast(tokenizer_object=_without_bos(tokenizer)), "yes")


def _without_bos(tokenizer):
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    return inner


def test_files_of_rows_are_read_by_their_text_or_messages(tokenizer, tmp_path):
    """Names, braces and escapes of a file format are not calibrated on."""
    rows = [{"id": i, "text": f'row {i} with "quotes"\nand a line'} for i in range(3)]
    expected = "\n\n".join(row["text"] for row in rows)
    lines = "\n".join(json.dumps(row) for row in rows)
    table = io.StringIO()
    writer = csv.DictWriter(table, ["id", "text"])
    writer.writeheader(), writer.writerows(rows)
    for name, content in {
        "a.jsonl": lines,
        "a.json": json.dumps(rows),
        "b.json": json.dumps({"data": rows}),
        "c.json": json.dumps({"text": [row["text"] for row in rows]}),
        "lines.json": lines,
        "no-suffix.txt": lines,
        "a.csv": table.getvalue(),
        "bom.jsonl": "\ufeff" + lines,
    }.items():
        (tmp_path / name).write_text(content, newline="")
        assert load_text(str(tmp_path / name)).text == expected, name
    assert load_text(f"{tmp_path / 'a.csv'}:id").text == "0\n\n1\n\n2"
    assert load_text([row["text"] for row in rows]).text == expected
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert load_text(str(tmp_path / "a.parquet")).text == expected
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfplain")
    assert load_text(str(tmp_path / "bom.txt")).text == "plain"


def test_a_single_row_is_one_row_whatever_lists_it_holds(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"text": "a text", "question": "why", "tags": ["x", "y"]}))
    assert load_text(str(path)).text == "a text"
    assert load_text(f"{path}:question").text == "why"
    assert load_text(f"{path}:tags").text == "x\n\ny"
    path.write_text(json.dumps({"question": "why", "tags": ["x", "y"]}))
    assert load_text(f"{path}:question").text == "why"
    path.write_text(json.dumps(["x", "y"]))
    with pytest.raises(TextError, match="row 1 has no column question"):
        load_text(f"{path}:question")


def test_lines_end_where_files_end_them_and_not_at_characters_that_texts_hold(tmp_path):
    texts = ["one\u2028text", "another\x85one", "a\x0cpage"]
    path = tmp_path / "a.jsonl"
    path.write_text("\r\n".join(json.dumps({"text": each}, ensure_ascii=False) for each in texts), newline="")
    assert load_text(str(path)).rows == tuple(texts)
    assert lines_of("a\u2028b\r\nc\n\nd\n") == ["a\u2028b", "c", "", "d"]


def test_chat_messages_go_through_the_models_template(tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]})
    )
    with pytest.raises(TextError, match="no chat template"):
        load_text(str(path), tokenizer=tokenizer)
    chatty = copy.copy(tokenizer)
    chatty.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert load_text(str(path), tokenizer=chatty).text == "<user>hi<assistant>ho"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.json", '[{"content": "a"}]', "no column text or messages; its columns are content. Name one"),
        ("a.json", "3", "a JSON int, expected rows"),
        ("a.json", '[{"text": 3}]', "row 1 holds int"),
        ("a.json", '[{"messages": [{"text": "a"}]}]', "need a role and a content"),
        ("a.parquet", "PAR", "not a parquet file"),
        ("a.csv", "a,b\n1,2", "its columns are a, b"),
    ],
)
def test_a_file_of_rows_that_cannot_be_used_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=words) as error:
        load_text(str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


def test_windows_that_a_model_cannot_be_calibrated_on_are_refused(model):
    ids = torch.arange(48).view(2, 24)
    config = GPT2Config(vocab_size=97, n_positions=32, n_embd=16, n_layer=1, n_head=2, pad_token_id=7)
    gpt2 = SimpleNamespace(config=config, skeleton=lambda: GPT2LMHeadModel(config), tokenizer=lambda: None)
    llama = SimpleNamespace(config=model.config, skeleton=lambda: model)
    assert calibration_of(gpt2, ids, 1, 8).warnings == ()
    padded = ids.clone()
    padded[1, 8:] = 7
    for bad, words in (
        (ids[:, :1], "one token"),
        (torch.full((2, 24), 3), "window 0 is padding"),
        (padded, "window 1 is padding"),
        (ids.float(), "found torch.float32"),
        (ids[0], r"found torch.int64 \[24\]"),
        (ids + 90, "from 0 to 96, found 90 to 137"),
        (torch.arange(80).view(2, 40), "has 32 positions"),
        (3, "type int"),
    ):
        with pytest.raises(TextError, match=words):
            calibration_of(gpt2, bad, 1, 8)
    assert (
        "longer than the model's context of 32" in calibration_of(llama, torch.arange(80).view(2, 40), 1, 8).warnings[0]
    )


def test_windows_longer_than_a_computed_table_of_positions_are_refused():
    config = GPTJConfig(vocab_size=97, n_positions=32, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    gptj = SimpleNamespace(config=config, skeleton=lambda: GPTJForCausalLM(config))
    assert calibration_of(gptj, torch.arange(64).view(2, 32), 1, 8).warnings == ()
    with pytest.raises(TextError, match="windows of 40 tokens were asked; the model has 32 positions: use seq_len 32"):
        calibration_of(gptj, torch.arange(80).view(2, 40), 1, 8)
    config = XGLMConfig(
        vocab_size=97, max_position_embeddings=32, d_model=16, num_layers=1, attention_heads=2, ffn_dim=16
    )
    growing = SimpleNamespace(config=config, skeleton=lambda: XGLMForCausalLM(config))
    assert "context of 32" in calibration_of(growing, torch.arange(80).view(2, 40), 1, 8).warnings[0]


def test_the_path_of_a_text_is_the_text(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("One sentence and another one. " * 20)
    source = SimpleNamespace(
        config=GPT2Config(vocab_size=60_000),
        tokenizer=lambda: tokenizer,
        skeleton=lambda: GPT2LMHeadModel(GPT2Config(n_layer=1)),
    )
    assert torch.equal(calibration_of(source, file, 2, 8).ids, calibration_of(source, str(file), 2, 8).ids)


def test_a_tokenizer_of_another_model_is_refused(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("z" * 40)
    highest = int(tokenize("z", tokenizer)[0])
    with pytest.raises(TextError, match=f"gives id {highest}, the model's vocabulary has {highest}"):
        calibration_set(str(tmp_path / "t.txt"), tokenizer, 1, 40, bos="no", vocab_size=highest)
    calibration_set(str(tmp_path / "t.txt"), tokenizer, 1, 40, bos="no", vocab_size=highest + 1)


def test_a_models_own_text_repeats_with_the_seed_and_leaves_the_global_generator_alone(model):
    before = torch.get_rng_state()
    made = calibration_set("self", None, 6, 12, vocab_size=97, model=model, seed=1)
    assert made.ids.shape == (6, 12) and made.ids.dtype == torch.int64 and made.name == "self (seed 1)"
    assert torch.equal(made.ids, calibration_set("self", None, 6, 12, model=model, seed=1).ids)
    assert not torch.equal(made.ids, calibration_set("self", None, 6, 12, model=model, seed=2).ids)
    assert torch.equal(before, torch.get_rng_state())


def test_a_models_own_text_is_what_the_generator_writes_and_more_of_it_to_measure_on(model):
    made = calibration_set("self", None, 6, 12, model=model)
    texts = [text.ids for batch in write_tokens(model, None, Sampling(), 7 * 12, 12) for text in batch]
    assert torch.cat([made.ids, made.held_out]).flatten().tolist() == [id for text in texts for id in text][: 7 * 12]


@pytest.mark.parametrize("strategy", ["hybrid", "greedy"])
def test_text_that_a_model_writes_now_is_judged_as_kept_text_is(strategy, model):
    made = calibration_set(f"self:{strategy}", None, 4, 30, vocab_size=97, model=model)
    texts = [text for batch in write_tokens(model, None, Sampling(strategy), 5 * 30 + 1, 30) for text in batch]
    lengths = np.array([len(text.ids) for text in texts])
    chosen = lengths - [len(text.start.ids) for text in texts]
    assert made.quality == judge(
        np.array([id for text in texts for id in text.ids]),
        lengths,
        np.array([text.ended for text in texts]),
        sum(text.confidence * count for text, count in zip(texts, chosen, strict=True)) / chosen.sum(),
        range(97),
    )
    assert made.quality.problems  # a model with random weights writes noise
    assert made.warnings == tuple(f"self:{strategy} is bad data: {each}" for each in made.quality.problems)


def test_text_of_people_has_no_report_on_what_a_model_wrote(tokenizer):
    assert calibration_set(["x" * 200], tokenizer, 2, 10).quality is None


@pytest.mark.parametrize("strategy", ["hybrid", "sampled", "greedy"])
def test_a_models_own_text_is_of_the_strategy_that_is_named(strategy, model):
    made = calibration_set(f"self:{strategy}", None, 4, 12, model=model, seed=3)
    texts = [text.ids for batch in write_tokens(model, None, Sampling(strategy, seed=3), 49, 12) for text in batch]
    assert made.ids.flatten().tolist() == [id for text in texts for id in text][:48]
    assert made.name == f"self:{strategy} (seed 3)"
    with pytest.raises(TextError, match="a model writes greedy, sampled, hybrid text, such as self:greedy"):
        calibration_set("self:warm", None, 4, 12, model=model)


def test_windows_of_a_models_own_text_begin_with_bos_where_it_was_trained_so(model, tokenizer):
    wide = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "vocab_size": 257})).eval()
    made = calibration_set("self", tokenizer, 3, 12, model=wide)
    assert made.ids.shape == (3, 12) and made.ids[:, 0].tolist() == [256] * 3 and made.ids[0, 1] != 256
    assert made.name == "self (seed 0), windows with BOS"


def test_a_models_own_text_does_not_pass_its_context(model):
    with pytest.raises(ValueError, match="texts of 33 tokens were asked; the model's context is 32"):
        calibration_set("self", None, 2, 33, model=model)


def test_self_is_a_calibration_text_that_needs_the_model(tokenizer):
    for ask in (lambda: calibration_set("self", tokenizer, 2, 8), lambda: load_text("self")):
        with pytest.raises(TextError, match="a loaded model"):
            ask()


def test_wikitext2_has_the_token_ids_that_published_numbers_rest_on():
    if not (SHARED / "text").is_dir():
        pytest.skip("the shared data directory is not beside this checkout")
    from lowbit.checkpoints.source import ModelError
    from lowbit.checkpoints.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer("smollm2-135m")
    except ModelError as error:
        pytest.skip(str(error))
    ids = tokenize(load_text(str(SHARED / "text" / "wikitext2.valid.raw")).text, tokenizer)
    assert len(ids) == 266_979
    assert ids[:6].tolist() == [3717, 446, 12928, 21777, 310, 2078]


@pytest.mark.parametrize("bos", ["auto", "no"])
def test_windows_for_training_follow_the_calibration_and_the_held_out_windows(tokenizer, bos):
    text = ["".join(chr(33 + i * 7 % 90) for i in range(400))]
    made = calibration_set(text, tokenizer, 8, 10, bos=bos, further=(5, 20))
    assert made.held_out is not None and made.further is not None and not made.warnings
    assert made.further.shape == (5, 20)
    first = int(bos == "auto")
    parts = (made.ids, made.held_out, made.further)
    found = torch.cat([part[:, first:].flatten() for part in parts])
    assert torch.equal(found, tokenize(text[0], tokenizer)[: len(found)])  # in order, each token once
    assert all(bool((part[:, :first] == 256).all()) for part in parts)


def test_a_text_that_is_too_short_for_training_gives_what_it_has_and_says_so(tokenizer):
    made = calibration_set(["x" * 200], tokenizer, 8, 10, bos="no", further=(50, 20))
    assert made.further is not None and made.further.shape == (5, 20)
    assert made.warnings == ("training asks for 50 windows of 20 tokens; behind the calibration text there are 5",)
    none = calibration_set(["x" * 90], tokenizer, 8, 10, bos="no", further=(2, 20))
    assert none.further is None and "there are 0" in none.warnings[0]


def test_a_model_writes_its_own_text_for_training_too(model):
    made = calibration_set("self", None, 2, 12, model=model, further=(3, 8))
    assert made.further is not None and made.further.shape == (3, 8)
    assert not torch.equal(made.further[:2], made.ids[:, :8])
