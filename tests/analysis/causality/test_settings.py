"""Targets, prompts and first tokens on the embedded models; measures against a plain softmax and against generate."""

import json

import numpy as np
import pytest
import torch

from dualstream.analysis.annotated_images import AnnotatedImage, AnnotatedObject, open_annotated
from dualstream.analysis.causality.settings import (
    ALL_SETTINGS,
    answer,
    answer_forward,
    answer_tokens,
    first_tokens,
    outcome_of,
    prepare,
    query_of,
    rendered,
    right_token,
    with_article,
)
from dualstream.analysis.causality.targets import area_of, question_for, read_questions, select_targets
from dualstream.modeling import load_model
from dualstream.processing import register_processors

MODELS = ("tiny-llava", "tiny-qwen2-vl")


@pytest.fixture(scope="module")
def targets():
    return select_targets(open_annotated("scenes:validation:16")).targets


@pytest.fixture(scope="module", params=MODELS)
def embedded(request):
    register_processors()
    return load_model(request.param, device="cpu")


def picture(name, objects, size=(64, 48)):
    return AnnotatedImage(name, tuple(objects), lambda: None, size)


def thing(name, box=(0, 0, 10, 10), **options):
    return AnnotatedObject(name, box, **options)


def test_the_funnel_counts_every_rule_and_every_picture():
    half = np.zeros((48, 64), dtype=bool)
    half[:5, :10] = True
    images = [
        picture("empty.jpg", []),
        picture("crowd.jpg", [thing("person", is_crowd=True)]),
        picture("two_cats.jpg", [thing("cat"), thing("cat", (20, 20, 30, 30))]),
        picture("large.jpg", [thing("dog", (0, 0, 40, 40))]),
        picture("COCO_val_000000000042.jpg", [thing("dog", read_mask=lambda: half), thing("cat"), thing("cat")]),
        picture("unasked.jpg", [thing("cup", (5, 5, 12, 12))]),
    ]
    found = select_targets(images, questions={"42": "What is on the grass?"}, area=(40, 80))
    assert [target.image.name for target in found.targets] == ["COCO_val_000000000042.jpg"]
    assert [(row["removed"], row["left"]) for row in found.funnel] == [(0, 6), (2, 4), (1, 3), (1, 2), (1, 1)]
    target = found.targets[0]
    assert target.name == "dog" and area_of(target.object) == 50 and target.question == "What is on the grass?"
    assert target.absent in {"cup", "person"} and target.rivals == ()
    found.require("a right answer", [False])
    assert found.funnel[-1] == {"step": "a right answer", "removed": 1, "left": 0} and not found.targets


def test_scene_targets_can_be_named_by_shape_and_asked_for_by_colour(targets):
    assert targets
    for target in targets:
        shapes = [item.shape for item in target.image.scene.objects]
        colors = [item.color for item in target.image.scene.objects]
        assert shapes.count(target.name) == 1 and target.absent not in shapes
        color = target.question.split()[-2]
        assert colors.count(color) == 1 and shapes[colors.index(color)] == target.name
        assert target.object.attributes[0] == color


def test_targets_depend_on_seed_and_picture_alone(targets):
    again = select_targets(open_annotated("scenes:validation:16")).targets
    assert [target.name for target in again] == [target.name for target in targets]
    fewer = select_targets(open_annotated("scenes:validation:8")).targets
    assert [target.name for target in fewer] == [target.name for target in targets[: len(fewer)]]


def test_questions_of_a_file(tmp_path):
    file = tmp_path / "questions.json"
    file.write_text(json.dumps({"42": ["What is it?", "other"], "7": [], "photo.jpg": "What is there?"}))
    questions = read_questions(file)
    assert questions == {"42": "What is it?", "photo.jpg": "What is there?"}
    assert question_for("COCO_train2017_000000000042.jpg", questions) == "What is it?"
    assert question_for("photo.jpg", questions) == "What is there?" and question_for("7.jpg", questions) is None
    for content in ("[]", "{", "{}"):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"questions='questions\.json'"):
            read_questions(file)


def test_wordings():
    assert with_article("orange") == "an orange" and with_article("tie") == "a tie"
    target = select_targets([picture("a.jpg", [thing("umbrella")])], need_question=False).targets[0]
    assert query_of(target, "polling").question == "Is there an umbrella in the image?"
    assert query_of(target, "generative").question == "Describe the image."
    with pytest.raises(ValueError, match="needs a question"):
        query_of(target, "vqa")
    with pytest.raises(ValueError, match="no class is known"):
        query_of(target, "polling-absent")
    with pytest.raises(ValueError, match="setting='guess' is unknown"):
        query_of(target, "guess")


def test_polling_is_judged_by_the_words_and_absent_classes_want_no(targets):
    there, absent = (query_of(targets[0], setting) for setting in ("polling", "polling-absent"))
    assert (there.judge("Yes."), there.judge("no"), there.judge("well")) == (True, False, None)
    assert (absent.judge("Yes."), absent.judge("no")) == (False, True)


@pytest.mark.parametrize("setting", ALL_SETTINGS)
def test_answers_measure_what_a_plain_softmax_says(embedded, targets, setting):
    model, processor = embedded
    queries = [query_of(target, setting) for target in targets[:5]]
    inputs = prepare(processor, [target.image.image() for target in targets[:5]], queries)
    outcomes = answer(model, processor, inputs, queries)
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1].double()
    for query, outcome, row in zip(queries, outcomes, logits, strict=True):
        assert outcome.correct == (query.judge(outcome.text) is True)
        if setting == "generative":
            assert np.isnan(outcome.probability) and np.isnan(outcome.margin)
            continue
        tokens = answer_tokens(processor, query)
        p = (row.exp() / row.exp().sum()).numpy()
        assert outcome.probability == pytest.approx(p[list(tokens.right)].sum(), abs=1e-5)
        assert outcome.rank == 1 + (p > p[list(tokens.right)].max()).sum()
        best_rival = max(p[list(ids)].sum() for ids in tokens.rivals)
        assert outcome.margin == pytest.approx(np.log(p[list(tokens.right)].sum() / best_rival), abs=1e-4)


def test_first_tokens_are_those_that_the_model_writes(embedded, targets):
    """Where the answer is right, its first generated token must be among them: no special token, right blank."""
    model, processor = embedded
    queries = [query_of(target, "vqa") for target in targets]
    inputs = prepare(processor, [target.image.image() for target in targets], queries)
    output = model.generate(**inputs, max_new_tokens=1, do_sample=False)[:, -1].tolist()
    outcomes = answer(model, processor, inputs, queries)
    right = [row for row, outcome in enumerate(outcomes) if outcome.correct]
    assert right
    assert all(output[row] in answer_tokens(processor, queries[row]).right for row in right)
    special = set(processor.tokenizer.all_special_ids)
    for query in queries:
        tokens = answer_tokens(processor, query)
        assert special.isdisjoint({*tokens.right, *sum(tokens.rivals, ())})
        piece = processor.tokenizer.decode([right_token(processor, query)]).strip()
        assert piece and query.right[0].startswith(piece)


def test_one_forward_pass_gives_the_measures_of_generate(embedded, targets):
    model, processor = embedded
    queries = [query_of(target, "polling") for target in targets[:4]]
    inputs = prepare(processor, [target.image.image() for target in targets[:4]], queries)
    for one, other in zip(
        answer(model, processor, inputs, queries), answer_forward(model, processor, inputs, queries), strict=True
    ):
        assert one.probability == pytest.approx(other.probability, abs=1e-5) and one.rank == other.rank


def test_rows_do_not_depend_on_their_batch(embedded, targets):
    model, processor = embedded
    queries = [query_of(targets[0], "polling"), query_of(targets[1], "vqa"), query_of(targets[2], "polling-absent")]
    images = [target.image.image() for target in targets[:3]]
    together = answer_forward(model, processor, prepare(processor, images, queries), queries)
    for image, query, outcome in zip(images, queries, together, strict=True):
        (alone,) = answer_forward(model, processor, prepare(processor, [image], [query]), [query])
        assert outcome.probability == pytest.approx(alone.probability, rel=1e-3)


def test_an_answer_can_be_begun_for_the_model(embedded, targets):
    processor = embedded[1]
    query = query_of(targets[0], "vqa", answer_start="It is a")
    text = rendered(processor, query)
    assert text.endswith(("ASSISTANT: It is a", "assistant\nIt is a"))
    ids = prepare(processor, [targets[0].image.image()], [query])["input_ids"][0]
    assert processor.tokenizer.decode(ids).rstrip().endswith("It is a")
    first = answer_tokens(processor, query).right[0]
    assert processor.tokenizer.decode([first]) == f" {query.right[0]}"


def test_other_spellings_count_only_as_single_tokens(embedded):
    tokenizer = embedded[1].tokenizer
    ids = first_tokens(tokenizer, "ASSISTANT:", "circle")
    assert {tokenizer.decode([i]).strip() for i in ids} == {"circle"}  # "Circle" is several tokens, begun by "C"


def test_no_answer_is_not_right(embedded, targets):
    processor = embedded[1]
    query = query_of(targets[0], "vqa")
    logits = torch.zeros(672)
    outcome = outcome_of(processor, query, logits, " ")
    assert outcome.abstained and not outcome.correct
    logits[tokenizer_end(processor)] = 5
    assert not outcome_of(processor, query, logits).correct  # the end of the turn begins no class
    with pytest.raises(ValueError, match="needs generated text"):
        outcome_of(processor, query_of(targets[0], "generative"), logits)


def tokenizer_end(processor):
    return processor.tokenizer.eos_token_id
