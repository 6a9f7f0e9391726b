"""easy-VQA as the demo reads it: what is in it, how it is split, and that the test split stays out of training."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("easy_vqa", reason="the demo's data set is the package easy-vqa")
pytest.importorskip("transformers", reason="the demo's model is Hugging Face's")

from fastpetl.demo import data, make_assets, pretrain

SIZES = {
    ("train", "pretext"): 28407,
    ("train", "downstream"): 10168,
    ("test", "pretext"): 7136,
    ("test", "downstream"): 2537,
}


def test_all_questions_and_answers_are_there():
    questions = data.load_questions("train") + data.load_questions("test")
    assert len(questions) == 48_248
    assert {q.answer for q in questions} == set(data.ANSWERS) and len(data.ANSWERS) == 13


@pytest.mark.parametrize("split", ["train", "test"])
def test_kinds_split_the_questions(split):
    questions = data.load_questions(split)
    yes_no, open_ = data.pretext(questions), data.downstream(questions)
    assert (len(yes_no), len(open_)) == (SIZES[split, "pretext"], SIZES[split, "downstream"])
    assert len(yes_no) + len(open_) == len(questions)
    assert {q.answer for q in yes_no} == set(data.YES_NO)
    assert {q.answer for q in open_} == set(data.COLOURS + data.SHAPES)


def test_an_unknown_split_or_kind_is_an_error():
    with pytest.raises(ValueError, match="load_questions: split is 'val', expected 'train' or 'test'"):
        data.load_questions("val")
    with pytest.raises(ValueError, match="load: kind is 'open', expected 'pretext' or 'downstream'"):
        data.load("train", "open")


def test_no_test_image_is_a_training_image():
    package = data._package()
    digests = [
        {hashlib.sha256(Path(path).read_bytes()).digest() for path in paths.values()}
        for paths in (package.get_train_image_paths(), package.get_test_image_paths())
    ]
    assert [len(d) for d in digests] == [4000, 1000]
    assert not digests[0] & digests[1]


def test_each_split_reads_its_own_images():
    train, test = (data.load_images(split, range(4), quiet=True) for split in ("train", "test"))
    assert all(not torch.equal(train[i], test[i]) for i in range(4))


def test_vocabulary_file_is_what_the_script_writes_and_covers_the_test_split():
    assert (data.ASSETS / "vocab.txt").read_text().split() == make_assets.vocabulary()
    tokenizer = data.load_tokenizer()
    texts = sorted({q.text for q in data.load_questions("test")})
    ids = tokenizer(texts, padding="max_length", max_length=data.MAX_TEXT, return_tensors="pt")["input_ids"]
    assert ids.shape == (len(texts), data.MAX_TEXT)
    assert not (ids == tokenizer.unk_token_id).any()


def test_asset_files_are_what_the_script_writes(tmp_path):
    make_assets.write(tmp_path)
    for file in tmp_path.iterdir():
        if file.name != "config.json":  # holds the version of transformers that wrote it
            assert file.read_text() == (data.ASSETS / file.name).read_text(), file.name


def test_batches_are_keyword_arguments_of_the_model():
    tensors = data.load("test", "downstream", limit=40, quiet=True)
    indices = torch.tensor([7, 3, 39])
    batch = tensors.batch(indices)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, data.MAX_TEXT)
    assert batch["pixel_values"].shape == (3, 3, make_assets.IMAGE_SIZE, make_assets.IMAGE_SIZE)
    assert batch["pixel_mask"].shape == (3, make_assets.IMAGE_SIZE, make_assets.IMAGE_SIZE)
    image = data.load_images("test", [tensors.questions[3].image], quiet=True)
    assert torch.equal(batch["pixel_values"][1], image[tensors.questions[3].image])
    assert [data.ANSWERS[i] for i in tensors.answers[indices]] == [tensors.questions[i].answer for i in (7, 3, 39)]


def test_pretext_reads_training_yes_no_questions_only(monkeypatch):
    read = []
    load = data.load_images
    monkeypatch.setattr(
        data, "load_questions", lambda split, real=data.load_questions: read.append(split) or real(split)
    )
    monkeypatch.setattr(
        data, "load_images", lambda split, ids, **o: load(split, [0], **o) | dict.fromkeys(ids, torch.zeros(3, 48, 48))
    )
    source = pretrain.Pretext(0, quiet=True)
    assert read == ["train"]
    questions = source.train.questions + source.held_out.questions
    assert {q.answer for q in questions} == set(data.YES_NO) and len(questions) == 5149
    assert not {q.image for q in source.train.questions} & {q.image for q in source.held_out.questions}


def test_masked_statements_are_true_of_their_images():
    """What a yes/no question says of its image is what the open questions about that image answer."""
    known = {(q.image, q.answer) for q in data.downstream(data.load_questions("train"))}
    asked = Counter(image for image, _ in known)
    wrong = 0
    for question in filter(pretrain.informative, data.pretext(data.load_questions("train"))):
        word = next(w for w in data.COLOURS + data.SHAPES if w in question.text.replace("?", "").split())
        group = data.COLOURS if word in data.COLOURS else data.SHAPES
        other = {answer for answer in group if (question.image, answer) in known} - {word}
        wrong += bool(other) and asked[question.image] > 0
    assert wrong == 0
