"""Rows to batches: labels are the answers with their end and nothing else; prompts are those of testing."""

import copy

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from dualstream.modeling import default_model_path
from dualstream.processing import build_inputs
from dualstream.train.sft_collator import IGNORED, AnswerCollator, with_placeholders
from dualstream.train.sft_trainer import answer_columns, answer_losses

MODELS = ("tiny-llava", "tiny-qwen2-vl")
QUESTIONS = ("Is the red circle left of or right of the blue star?", "How many squares are there?")
ANSWERS = ("left", "a striped red circle and 2")


@pytest.fixture(scope="module", params=MODELS)
def processor(request):
    return AutoProcessor.from_pretrained(default_model_path(request.param))


def picture(width=96, height=96):
    return Image.radial_gradient("L").resize((width, height)).convert("RGB")


def image_token_id(processor):
    return processor.tokenizer.convert_tokens_to_ids(processor.image_token)


def collator(processor, **options):
    return AnswerCollator(processor, [], image_token_id(processor), **options)


def row(*turns, images=None):
    messages = []
    for number, (question, answer) in enumerate(turns):
        content = [{"type": "image", "text": None}] * (number == 0) + [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"messages": messages, "images": [picture()] if images is None else images}


def labelled(processor, batch, number):
    labels = batch["labels"][number]
    return processor.tokenizer.decode(labels[labels != IGNORED])


def test_only_answers_and_their_ends_are_labelled(processor):
    batch = collator(processor)([row((q, a)) for q, a in zip(QUESTIONS, ANSWERS, strict=True)])
    end = processor.tokenizer.eos_token
    for number, answer in enumerate(ANSWERS):
        assert labelled(processor, batch, number).strip() == answer + end
        found = batch["labels"][number] != IGNORED
        assert torch.equal(batch["labels"][number][found], batch["input_ids"][number][found])
    visual = batch["input_ids"] == image_token_id(processor)
    assert visual.any(1).all()
    assert (batch["labels"][visual | (batch["attention_mask"] == 0)] == IGNORED).all()
    if "mm_token_type_ids" in batch:
        assert torch.equal(batch["mm_token_type_ids"].bool(), visual)


def test_the_prompt_is_the_one_the_model_is_tested_with(processor):
    batch = collator(processor)([row((q, a)) for q, a in zip(QUESTIONS, ANSWERS, strict=True)])
    for number, question in enumerate(QUESTIONS):
        tested = build_inputs(processor, [picture()], [question])
        own = batch["input_ids"][number][batch["attention_mask"][number].bool()]
        length = tested["input_ids"].shape[1]
        assert torch.equal(own[:length], tested["input_ids"][0])
        first = int((batch["labels"][number] != IGNORED).nonzero()[0])
        assert first == batch["input_ids"].shape[1] - len(own) + length
    both = build_inputs(processor, [picture()] * 2, list(QUESTIONS))
    assert torch.equal(batch["pixel_values"], both["pixel_values"])


def test_every_answer_of_a_conversation_counts(processor):
    end = processor.tokenizer.eos_token
    batch = collator(processor)([row((QUESTIONS[0], "left"), ("Is there a star?", "yes")), row((QUESTIONS[1], "2"))])
    assert labelled(processor, batch, 0).replace(" ", "") == f"left{end}yes{end}"
    assert labelled(processor, batch, 1).strip() == f"2{end}"
    assert batch["attention_mask"][1, 0] == 0  # padding is on the left


def test_plain_texts_and_several_pictures(processor):
    listed = row((QUESTIONS[0], "left"))
    plain = {
        "messages": [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": "left"}],
        "images": [picture()],
    }
    make = collator(processor)
    assert torch.equal(make([plain])["input_ids"], make([listed])["input_ids"])
    two = {**plain, "images": [picture(), picture()]}
    tokens = [int((make([r])["input_ids"] == image_token_id(processor)).sum()) for r in (plain, two)]
    assert tokens[1] == 2 * tokens[0]
    grey = {**plain, "images": [picture().convert("L")]}
    assert make([grey])["pixel_values"].shape == make([plain])["pixel_values"].shape


def test_an_answer_that_the_template_does_not_end_gets_an_end(processor):
    end = processor.tokenizer.eos_token
    original = processor.chat_template
    try:
        processor.chat_template = original.replace("</s>", " ").replace("<|im_end|>\n{% endfor", "\n{% endfor")
        assert end not in processor.chat_template
        batch = collator(processor)([row((QUESTIONS[0], "left"))])
        assert labelled(processor, batch, 0).strip() == "left" + end
        assert batch["labels"][0, -1] == processor.tokenizer.eos_token_id
    finally:
        processor.chat_template = original


def test_scored_columns_give_the_loss_of_the_whole_forward_pass(processor, request):
    from dualstream.modeling import load_model

    model, _ = load_model(default_model_path(MODELS["qwen" in type(processor).__name__.lower()]), device="cpu")
    rows = [row((q, a)) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    batch = collator(processor)([*rows, row((QUESTIONS[0], "left"), ("Is there a star?", "yes"))])
    labels = batch.pop("labels")
    columns = answer_columns(labels)
    assert columns < labels.shape[1] and (labels[:, : 1 - columns] == IGNORED).all()
    with torch.no_grad():
        logits = model(**batch, logits_to_keep=columns).logits
        stock = model(**batch, labels=labels).loss
    nll, right = answer_losses(logits, labels[:, -columns:])
    count = (labels != IGNORED).sum()
    torch.testing.assert_close(nll.sum() / count, stock)
    assert right.shape == nll.shape and not right[labels[:, 1 - columns :] == IGNORED].any()


LONG = "Is there a star? " * 30


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": []}, "no picture"),
        ({"images": None}, "no picture"),
        ({"images": [picture(), picture()]}, "1 image part"),
        ({"messages": row(("Q", "A"))["messages"][:1]}, "must end with the assistant"),
        ({"messages": row(("Q", " "))["messages"]}, "is empty"),
        ({"messages": [*row(("Q", "A"))["messages"], {"role": "user", "content": "more?"}]}, "must end with"),
        ({"messages": row(("IMAGE", "A"))["messages"]}, "no text may spell a placeholder"),
        ({"messages": row(("Q", "IMAGE"))["messages"]}, "an answer spells the image placeholder"),
        ({"messages": row((LONG * 9, "A"))["messages"], "max_length": 200}, "would cut the end of the answer"),
        ({"messages": row(("Q", "A"))["messages"], "max_length": 20}, "image token"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(processor, change, words):
    change = copy.deepcopy(change)
    limit = change.pop("max_length", None)
    example = row((QUESTIONS[0], "left")) | change
    for message in example["messages"]:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "text":
                part["text"] = part["text"].replace("IMAGE", processor.image_token)
    with pytest.raises(ValueError, match=words):
        collator(processor, max_length=limit)([example])


def test_pictures_after_an_answer_are_refused(processor):
    late = row((QUESTIONS[0], "left"), ("And here?", "right"), images=[picture()])
    late["messages"][0]["content"] = late["messages"][0]["content"][1:]
    late["messages"][2]["content"] = [{"type": "image", "text": None}, *late["messages"][2]["content"]]
    with pytest.raises(ValueError, match="before the first answer"):
        collator(processor)([late])


def test_a_template_that_rewrites_earlier_turns_is_refused(processor):
    original = processor.chat_template
    try:
        processor.chat_template = "{{ messages | length }}" + original
        with pytest.raises(ValueError, match="differently once it goes on"):
            collator(processor)([row((QUESTIONS[0], "left"))])
        processor.chat_template = None
        with pytest.raises(ValueError, match="no chat template"):
            collator(processor)
    finally:
        processor.chat_template = original


def test_placeholders_are_counted_not_guessed():
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}
    assert with_placeholders([user], 1)[0]["content"][0] == {"type": "image"}
    with pytest.raises(ValueError, match="1 image part"):
        with_placeholders([user], 2)
