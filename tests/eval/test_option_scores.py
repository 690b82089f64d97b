"""Likelihoods of options equal those of one plain forward pass per option; answers are tokenised as written."""

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dualstream.eval.chat_inputs import answer_tokens, chat_batch, chat_prompt, user_turn
from dualstream.eval.encoded_once import reusing_image_features
from dualstream.eval.option_scores import (
    compression_context,
    option_log_likelihoods,
    option_log_likelihoods_under,
    option_probabilities,
    prepare_options,
    score_options,
)
from dualstream.modeling import CompressionConfig, VisualDecoder, family_of, load_model

PROCESSORS = {
    "llava": "LlavaProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "internvl": "InternVLProcessor",
}
SIZES = ((40, 60), (64, 64), (30, 90), (90, 33))
PROMPTS = ["word11 word12 word13", "word14", "word16 word17 word18 word19 word21", "word22 word23"]
OPTIONS = [["word31", "word32 word33 word34"], ["word36 word37"], ["word38", "word39", "word41"], ["word42", "word43"]]


def picture(number):
    """Four flat quarters, so that runs occur, in a colour of their own."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))
    return small.resize(SIZES[number % len(SIZES)], Image.Resampling.NEAREST)


IMAGES = [[picture(0)], [], [picture(1), picture(2)], [picture(3)]]  # one, none, two


@pytest.fixture(scope="module", params=PROCESSORS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def stock(family, tiny_model, publishing):
    """A stock model with its stock processor."""
    return tiny_model(family).model, publishing.make_processor(family, getattr(transformers, PROCESSORS[family]))


def tokens_of(processor, text):
    return processor.tokenizer(text, add_special_tokens=False).input_ids


def single_inputs(processor, images, prompt):
    """One prompt without padding, by the processor's own chat call."""
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    )  # fmt: skip


@torch.no_grad()
def by_whole_forward(model, processor, images, prompt, option):
    """log p of an option from one forward pass over prompt and option together, on the stock model."""
    inputs = single_inputs(processor, images, prompt)
    tokens = torch.tensor([tokens_of(processor, option)])
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tokens)], 1)
    log_p = model(**inputs, use_cache=False).logits[0, length - 1 : -1].log_softmax(-1)
    return float(log_p.gather(1, tokens[0, :, None]).sum())


def test_scores_equal_one_stock_forward_per_option_and_do_not_depend_on_the_batch(stock):
    model, processor = stock
    expected = [
        [by_whole_forward(model, processor, images, prompt, option) for option in options]
        for images, prompt, options in zip(IMAGES, PROMPTS, OPTIONS, strict=True)
    ]
    for batch_size in (1, 3, 8):
        found = option_log_likelihoods(model, processor, IMAGES, PROMPTS, OPTIONS, batch_size=batch_size)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == np.float64
            np.testing.assert_allclose(one, other, rtol=0, atol=3e-4)


@pytest.mark.parametrize("policy", ["original", "compact"])
def test_scores_of_compressed_prompts_equal_the_hand_made_reference(
    stock, tiny_models, reference, policy, monkeypatch
):
    model, processor = stock
    weight = tiny_models.coarse_decoder_weight()
    decoder = VisualDecoder.from_unembedding(weight)
    monkeypatch.setattr(VisualDecoder, "from_unembedding", lambda *args, **kwargs: decoder)
    config = CompressionConfig("rle", position_policy=policy)
    found = option_log_likelihoods(model, processor, IMAGES, PROMPTS, OPTIONS, compression=config, batch_size=4)
    shortened = 0
    for row, (images, prompt, options) in enumerate(zip(IMAGES, PROMPTS, OPTIONS, strict=True)):
        inputs = single_inputs(processor, images, prompt)
        with torch.no_grad():
            sample = reference.compress_sample(model, inputs, weight, {"method": "rle"}, policy == "compact")
            shortened += inputs["input_ids"].shape[1] - len(sample.columns)
            for number, option in enumerate(options):
                tokens = tokens_of(processor, option)
                log_p = reference.sample_logits(model, sample, tokens)[-len(tokens) - 1 : -1].log_softmax(-1)
                expected = float(log_p.gather(1, torch.tensor(tokens)[:, None]).sum())
                assert found[row][number] == pytest.approx(expected, abs=3e-4)
    assert shortened > 0, "nothing was compressed, so nothing was tested"


def test_several_compressions_at_once_equal_one_after_the_other(stock, family):
    model, processor = stock
    arms = ["none", "rle", "stride@0.5", CompressionConfig("rle", position_policy="compact")]
    if family != "llava" and family != "internvl":
        arms.insert(2, "rle+poly:9:2")  # another tower in between
    expected = [option_log_likelihoods(model, processor, IMAGES, PROMPTS, OPTIONS, arm, batch_size=3) for arm in arms]
    encoded = []
    handle = family_of(model).vision_blocks(model)[0].register_forward_hook(lambda *_: encoded.append(1))
    before = type(model), set(vars(model)), set(vars(model.model))
    found = option_log_likelihoods_under(model, processor, IMAGES, PROMPTS, OPTIONS, arms, batch_size=3)
    handle.remove()
    for one, other in zip(found, expected, strict=True):
        for row, wanted in zip(one, other, strict=True):
            np.testing.assert_array_equal(row, wanted)
    assert len(encoded) == 2 * (len(arms) - 3), "two batches, and a tower or two"
    assert (type(model), set(vars(model)), set(vars(model.model))) == before
    assert not np.allclose(np.concatenate(found[0]), np.concatenate(found[1])), "compression changes nothing here"


def test_features_are_looked_up_for_the_same_tensor_only(stock):
    model, processor = stock
    prompt = chat_prompt(processor, user_turn(PROMPTS[0], 1))
    inputs = [chat_batch(processor, [prompt], [[picture(number)]]) for number in (0, 4)]
    memory = {}
    with torch.no_grad():
        plain = [model(**each, logits_to_keep=1).logits for each in inputs]
        with reusing_image_features(model, memory), reusing_image_features(model, memory):
            again = [model(**inputs[number], logits_to_keep=1).logits for number in (0, 0, 1, 0)]
    for logits, number in zip(again, (0, 0, 1, 0), strict=True):
        assert torch.equal(logits, plain[number])
    assert not torch.equal(*plain) and "get_image_features" not in vars(model.model)
    with pytest.raises(RuntimeError, match="inside"), reusing_image_features(model, memory):
        raise RuntimeError("inside")
    assert "get_image_features" not in vars(model.model)


def test_counts_and_the_greedy_option(stock):
    model, processor = stock
    inputs = chat_batch(processor, [chat_prompt(processor, user_turn(PROMPTS[0], 1))], IMAGES[:1])
    length = inputs["input_ids"].shape[1]
    new = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, length:]
    answer = processor.tokenizer.decode(new)
    conversations = [user_turn(prompt, len(images)) for prompt, images in zip(PROMPTS, IMAGES, strict=True)]
    options = [[answer, "word31"], *OPTIONS[1:]]
    score, text_only, two, _ = score_options(model, prepare_options(processor, conversations, IMAGES, options))
    assert tokens_of(processor, answer) == new.tolist()
    assert score.greedy.tolist() == [True, False]
    assert score.num_tokens.tolist()[1:] == [1] and text_only.num_tokens.tolist() == [2]
    assert score.prompt.total == length and score.prompt.kept == score.prompt.visual > 0
    assert text_only.prompt.visual == text_only.prompt.kept == 0
    assert two.prompt.visual > 0 and two.first_token.tolist() == two.log_likelihoods.tolist()
    with compression_context(model, processor, "rle"):
        (after,) = score_options(model, prepare_options(processor, conversations[:1], IMAGES[:1], [["word31"]]))
    assert after.prompt.total == length - (after.prompt.visual - after.prompt.kept)


def test_a_stock_model_is_left_alone_without_compression(stock):
    model, processor = stock
    before = type(model), set(vars(model))
    for nothing in (None, "none", CompressionConfig("none")):
        with compression_context(model, processor, nothing):
            assert (type(model), set(vars(model))) == before
    with compression_context(model, processor, "rle"):
        assert type(model) is not before[0]
    assert (type(model), set(vars(model))) == before


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2-vl"])
def test_embedded_models_know_their_answers_and_batches_agree_under_compression(name):
    from dualstream.eval.scene_questions import draw_items

    model, processor = load_model(name, device="cpu")
    items = [item for item in draw_items(24, "validation", seed=3) if item.kind == "presence"]
    images, prompts = [[item.image] for item in items], [item.question for item in items]
    options = [["yes", "no"]] * len(items)
    for arm in ("none", "rle"):
        found = option_log_likelihoods(model, processor, images, prompts, options, arm, batch_size=4)
        alone = option_log_likelihoods(model, processor, images, prompts, options, arm, batch_size=1)
        np.testing.assert_allclose(found, alone, atol=1e-3)
        right = [options[0][int(np.argmax(row))] == item.truth for row, item in zip(found, items, strict=True)]
        assert all(right)
        # Greedy decoding ends the turn after the word: nearly all probability is on the two answers.
        assert np.exp(found).sum(1).min() > 0.9


def test_the_blank_between_prompt_and_answer_is_the_templates():
    """tiny-llava's template ends with "ASSISTANT:" and writes a blank before a reply; Qwen's ends with a line."""
    for name, seam in (("tiny-llava", " "), ("tiny-qwen2-vl", "")):
        _, processor = load_model(name, device="cpu")
        turn = user_turn("Is there a red star?", 1)
        prompt = chat_prompt(processor, turn)
        encode = processor.tokenizer
        expected = encode(prompt + seam + "yes").input_ids[len(encode(prompt).input_ids) :]
        assert answer_tokens(processor, turn, prompt, ["yes"]) == [expected]
        assert processor.tokenizer.decode(expected) == seam + "yes"
        assert answer_tokens(processor, turn, prompt, [" yes"]) == [encode(" yes", add_special_tokens=False).input_ids]


def test_an_answer_does_not_merge_with_the_prompt(publishing):
    """This tokenizer splits at blanks only, so an answer glued to the prompt would be lost in an unknown word."""
    processor = publishing.make_processor("llava", transformers.LlavaProcessor)
    for question in ("word11", "neverseen"):
        turn = user_turn(question)
        (tokens,) = answer_tokens(processor, turn, chat_prompt(processor, turn), ["word31 word32"])
        assert tokens == tokens_of(processor, "word31 word32") and len(tokens) == 2


def test_bad_input_is_named(stock):
    model, processor = stock
    images, prompts = IMAGES[:1], PROMPTS[:1]
    with pytest.raises(ValueError, match="options of row 0 are empty"):
        option_log_likelihoods(model, processor, images, prompts, [[]])
    with pytest.raises(ValueError, match="option ' ' is empty"):
        option_log_likelihoods(model, processor, images, prompts, [[" "]])
    with pytest.raises(ValueError, match="paired, got 1, 1 and 2"):
        option_log_likelihoods(model, processor, images, prompts, OPTIONS[:2])
    with pytest.raises(ValueError, match="squeeze"):
        option_log_likelihoods(model, processor, images, prompts, OPTIONS[:1], compression="squeeze")


@given(st.lists(st.floats(-5000, 0), min_size=1, max_size=9), st.floats(-1000, 1000))
def test_probabilities_are_a_distribution_that_a_shift_does_not_change(values, shift):
    found = option_probabilities(np.array(values))
    assert found.min() >= 0 and found.sum() == pytest.approx(1)
    assert np.all(np.diff(found[np.argsort(values)]) >= 0)
    np.testing.assert_allclose(option_probabilities(np.array(values) + shift), found, atol=1e-9)
