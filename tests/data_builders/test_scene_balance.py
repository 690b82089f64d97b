"""Nothing but looking answers a scene question: simple classifiers on shortcuts stay at chance.

Every classifier is fitted on one half and judged on the other; "chance" is the best constant answer on the judged
half, and a classifier may exceed it by what a 99.9 % binomial bound allows, no more.
"""

import random
from functools import cache

import numpy as np
import pytest

from dualstream.data_builders.scenes import ask, make_scene

COUNT = 2400
scene_of = cache(make_scene)


@cache
def collect(kind, form):
    rows, seed = [], 0
    while len(rows) < COUNT:
        scene = scene_of(seed)
        question = ask(scene, kind, random.Random(f"balance-{seed}"))
        if question and question.form == form:
            rows.append((scene, question))
        seed += 1
    return rows


def label(question):
    """What is asked to be guessed: the answer, or for "which" whether the first-named object is right."""
    if question.form == "which":
        names = question.text.rstrip("?").split("the ", 1)[1]
        return int(names.startswith(question.answer + " or "))
    return question.answer


def logistic(x, y, steps=300):
    """Multinomial logistic regression on quadratic features, by gradient descent."""
    classes = np.unique(y)
    features = quadratic(x)
    mean, scale = features.mean(0), features.std(0) + 1e-9
    features = np.c_[(features - mean) / scale, np.ones(len(x))]
    target = (y[:, None] == classes).astype(float)
    weights = np.zeros((features.shape[1], len(classes)))
    for _ in range(steps):
        scores = features @ weights
        p = np.exp(scores - scores.max(1, keepdims=True))
        weights -= features.T @ (p / p.sum(1, keepdims=True) - target) / len(x)
    return lambda z: classes[(np.c_[(quadratic(z) - mean) / scale, np.ones(len(z))] @ weights).argmax(1)]


def quadratic(x):
    return np.c_[x, *(x[:, i : i + 1] * x[:, i:] for i in range(x.shape[1]))]


def nearest(x, y, k=25):
    classes = np.unique(y)

    def predict(z):
        order = np.argsort(((z[:, None] - x[None]) ** 2).sum(-1), axis=1)[:, :k]
        votes = (y[order][..., None] == classes).sum(1)
        return classes[votes.argmax(1)]

    return predict


def excess(x, labels):
    """Largest accuracy above the best constant, in standard errors, over both classifiers."""
    labels = np.asarray(labels)
    half = len(x) // 2
    constant = max((labels[half:] == c).mean() for c in np.unique(labels))
    error = np.sqrt(constant * (1 - constant) / (len(x) - half))
    accuracies = [(fit(x[:half], labels[:half])(x[half:]) == labels[half:]).mean() for fit in (logistic, nearest)]
    return max((accuracy - constant) / error for accuracy in accuracies), max(accuracies), constant


CASES = [
    ("presence", "yes_no"),
    ("attribute", "yes_no"),
    ("attribute", "color"),
    ("attribute", "shape"),
    ("attribute", "texture"),
    ("count", "all"),
    ("relation", "yes_no"),
    ("relation", "which"),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def rows(request):
    return collect(*request.param)


def objects_of(rows):
    """The deciding objects of every question, any object of the scene where none decides."""
    return [[scene.objects[i] for i in question.objects or (0,)] for scene, question in rows]


@pytest.mark.parametrize("which", [0, -1])
def test_one_position_does_not_answer(rows, which):
    x = np.array([(objects[which].x, objects[which].y) for objects in objects_of(rows)])
    assert excess(x, [label(q) for _, q in rows])[0] < 3.3


def test_sizes_do_not_answer(rows):
    """The size of the deciding object, or of both of a pair; the number of sizes would answer a count."""
    pair = rows[0][1].kind == "relation"
    x = np.array([[o.radius for o in (objects if pair else objects[:1])] for objects in objects_of(rows)])
    assert excess(x, [label(q) for _, q in rows])[0] < 3.3


def test_option_order_does_not_answer():
    for kind, form in (("relation", "which"), ("direction", "option"), ("attribute", "texture"), ("where", "half")):
        first = []
        for _, question in collect(kind, form):
            text = question.text
            others = {"left", "right", "above", "below", "top", "bottom", "solid", "striped", "dotted"}
            if form == "which":
                first.append(label(question))
            elif form == "option" or form == "half" or " or " in text:
                words = [w.strip("?,") for w in text.split() if w.strip("?,") in others]
                first.append(int(words[0] == question.answer))
        rate, expected = np.mean(first), 1 / 3 if form == "texture" else 1 / 2
        assert abs(rate - expected) < 3.3 * np.sqrt(expected * (1 - expected) / len(first)), (kind, rate)


def test_yes_and_no_are_even():
    for kind in ("presence", "attribute", "relation"):
        rate = np.mean([q.answer == "yes" for _, q in collect(kind, "yes_no")])
        assert abs(rate - 0.5) < 3.3 * 0.5 / np.sqrt(COUNT)


def test_present_and_absent_descriptions_share_their_words():
    """A classifier on the words of a presence question alone stays at chance."""
    rows = collect("presence", "yes_no")
    words = sorted({word for _, q in rows for word in q.text.split()})
    x = np.array([[word in q.text.split() for word in words] for _, q in rows], float)[:, :40]
    half = len(rows) // 2
    labels = np.array([q.answer for _, q in rows])
    guess = logistic(x[:half], labels[:half], steps=100)(x[half:])
    assert (guess == labels[half:]).mean() - 0.5 < 3.3 * 0.5 / np.sqrt(len(rows) - half)


def test_a_direction_answer_leaks_a_known_amount():
    """Naming the direction makes one position informative whatever the placement, so the leak is measured instead."""
    rows = [(s, q) for s, q in collect("direction", "option") if q.answer in ("left", "right")]
    x = np.array([(s.objects[q.objects[0]].x, s.objects[q.objects[0]].y) for s, q in rows])
    _, accuracy, constant = excess(x, [q.answer for _, q in rows])
    assert constant < 0.55
    assert accuracy < 0.82
