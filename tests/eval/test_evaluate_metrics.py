"""CHAIR, POPE and spatial accuracy against counts by hand and an independent computation; loading by path."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualstream.eval.hallucination import ObjectWords, chair, pope, singulars
from dualstream.eval.spatial_tasks.scoring import relation_accuracy

METRICS = Path(__file__).resolve().parents[2] / "eval" / "metrics"
REAL = Path(os.environ.get("DUALSTREAM_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
needs_evaluate = pytest.mark.skipif(
    importlib.util.find_spec("evaluate") is None, reason="evaluate is not installed (pip install dualstream[eval])"
)
SYNONYMS = [
    "person, man, woman, baby, people",
    "dog, puppy",
    "hot dog",
    "elephant",
    "motorcycle,  motor bike, motorbike",  # the doubled blank stands in the published file
    "oven, stove top oven, stove",
    "chair, seat, stool",
    "toilet",
    "train, locomotive",
    "knife",
    "cat, kitten",
    "bus",
    "wine glass",
]
WORDS = ObjectWords(SYNONYMS)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man and two dogs.", ["person", "dog"]),
        ("A man eats a hot dog", ["person", "hot dog"]),
        ("a baby elephant", ["elephant"]),
        ("a baby on a motor bike", ["person", "motorcycle"]),
        ("A stove top oven", ["oven"]),
        ("a toilet seat", ["toilet"]),
        ("a passenger train on the train tracks", ["train"]),
        ("Knives, wine glasses and buses", ["knife", "wine glass", "bus"]),
        ("It is located in the category", []),
        ("The dog's puppy", ["dog", "dog"]),
        ("", []),
    ],
)
def test_mentions(caption, expected):
    assert WORDS.mentions(caption) == expected


def test_chair_counted_by_hand():
    captions = ["A man with a dog and a cat.", "A dog, a dog and a puppy!", "Nothing to see"]
    result = chair(captions, [["person", "dog"], ["cat"], ["bus"]], WORDS)
    assert result["mentions"] == 6 and result["hallucinated"] == 4
    assert result["chair_i"] == pytest.approx(4 / 6) and result["chair_s"] == pytest.approx(2 / 3)
    assert result["recall"] == pytest.approx(2 / 4) and result["length"] == pytest.approx((8 + 7 + 3) / 3)
    more = chair(captions, [["person", "dog"], ["cat"], ["bus"]], WORDS, [[], ["Two puppies."], []])
    assert more["hallucinated"] == 1  # the cat; people saw the dogs of the second picture


def test_captions_without_objects_are_not_perfect_but_undefined():
    result = chair(["Nothing."], [[]], WORDS)
    assert result["chair_i"] is None and result["recall"] is None and result["chair_s"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "must be paired: 0 and 0"),
        ((["a"], []), "must be paired: 1 and 0"),
        ((["a"], [["unicorn"]]), "'unicorn' is not in the vocabulary"),
    ],
)
def test_wrong_input_of_chair_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        chair(*arguments, WORDS)


def test_plurals():
    assert "berry" in singulars("berries") and "bus" in singulars("buses") and singulars("glass") == ["glass"]
    with pytest.raises(ValueError, match="no words"):
        ObjectWords(["", " , "])


@pytest.mark.skipif(not (REAL / "coco_synonyms.txt").is_file(), reason="no coco_synonyms.txt in the data folder")
def test_the_published_synonyms_are_80_objects_and_every_word_is_found():
    words = ObjectWords.from_file(REAL / "coco_synonyms.txt")
    assert len(set(words.names.values())) == 80
    unfound = [word for word, name in words.names.items() if words.mentions(f"a {word}") != [name]]
    assert not unfound


@pytest.mark.skipif(not (REAL / "pope").is_dir(), reason="no POPE questions in the data folder")
@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_pope_has_3000_questions_and_constant_answers_score_as_they_must(split):
    import json

    rows = [json.loads(line) for line in (REAL / "pope" / f"coco_pope_{split}.json").read_text().splitlines()]
    assert len(rows) == 3000
    truths = [row["label"] for row in rows]
    always_yes = pope(["Yes"] * 3000, truths)
    assert always_yes["accuracy"] == always_yes["precision"] == 0.5 and always_yes["yes_ratio"] == 1
    assert always_yes["f1"] == pytest.approx(2 / 3)
    always_no = pope(["No."] * 3000, truths)
    assert always_no["f1"] == always_no["yes_ratio"] == 0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_pope_equals_a_confusion_matrix(pairs):
    said, true = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])
    table = np.zeros((2, 2))
    np.add.at(table, (true.astype(int), said.astype(int)), 1)
    result = pope(["Yes, there is." if a else "No, sorry." for a in said], ["yes" if b else "no" for b in true])
    assert result["accuracy"] == pytest.approx(np.trace(table) / len(pairs))
    assert result["f1"] == pytest.approx(2 * table[1, 1] / max(1, table[1].sum() + table[:, 1].sum()))
    assert result["yes_ratio"] == pytest.approx(table[:, 1].sum() / len(pairs)) and result["invalid"] == 0


def test_pope_reports_what_says_neither_and_refuses_other_truths():
    result = pope(["perhaps", "", "yes and no", "yes"], ["no", "no", "no", "yes"])
    assert result["invalid"] == 0.75 and result["yes_ratio"] == 0.75
    with pytest.raises(ValueError, match=r"truths are \['maybe'\]"):
        pope(["yes"], ["maybe"])


def test_relations_counted_by_hand():
    answers = ["left", "It is right.", "not left", "under", "left", "left"]
    truths = ["left", "right", "on", "under", "left", "right"]
    pairs, sets = ["a", "a", "b", "b", "c", "c"], ["s"] * 4 + ["t"] * 2
    result = relation_accuracy(answers, truths, pairs, sets)
    assert result["individual"] == pytest.approx(4 / 6) and result["invalid"] == pytest.approx(1 / 6)
    assert result["pair"] == pytest.approx(1 / 3) and result["set"] == 0 and result["flip"] == pytest.approx(1 / 3)
    assert (result["n"], result["pairs"], result["sets"]) == (6, 3, 1)
    assert relation_accuracy(["left"], ["left"])["pair"] is None
    with pytest.raises(ValueError, match="predictions and pairs must be paired: 1 and 2"):
        relation_accuracy(["left"], ["left"], ["a", "a"])
    with pytest.raises(ValueError, match="'left' is not among the options up, down"):
        relation_accuracy(["left"], ["left"], options=["up", "down"])


@needs_evaluate
def test_metrics_load_by_path_and_agree(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import evaluate

    loaded = {name: evaluate.load(str(METRICS / name), cache_dir=str(tmp_path)) for name in ("pope", "chair")}
    metric = evaluate.load(str(METRICS / "spatial_accuracy"), cache_dir=str(tmp_path))
    answers, truths = ["Yes", "no", "perhaps"], ["yes", "yes", "no"]
    assert loaded["pope"].compute(predictions=answers, references=truths) == pope(answers, truths)
    file = tmp_path / "synonyms.txt"
    file.write_text("\n".join(SYNONYMS))
    captions, objects = ["A dog and a cat", "Nothing"], [["dog"], []]
    result = loaded["chair"].compute(predictions=captions, references=objects, synonyms_file=str(file))
    assert result == chair(captions, objects, WORDS) and result["chair_i"] == 0.5
    metric.add_batch(predictions=["left"], references=["left"])
    metric.add_batch(predictions=["left"], references=["right"])
    result = metric.compute(pairs=["a", "a"])
    assert result == relation_accuracy(["left", "left"], ["left", "right"], ["a", "a"]) and result["flip"] == 0
    with pytest.raises(ValueError, match="synonyms_file is missing"):
        loaded["chair"].compute(predictions=captions, references=objects)
