"""The tokenizer and the chat templates of the tiny checkpoints."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.train.tiny_models import TinyModelConfig, build_processor
from dualstream.train.tiny_tokenizer import CONTENT_WORDS, build_tokenizer

TOKENIZERS = {family: build_tokenizer(family) for family in ("llava", "qwen2_vl")}


@pytest.mark.parametrize("family", TOKENIZERS)
def test_content_words_are_single_tokens(family):
    tokenizer = TOKENIZERS[family]
    for word in CONTENT_WORDS:
        for text in (word, f" {word}"):
            (index,) = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.decode([index]) == text


@pytest.mark.parametrize("family", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_survives(family, text):
    tokenizer = TOKENIZERS[family]
    specials = tokenizer.all_special_tokens
    if not any(token in text for token in specials):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_training_is_deterministic():
    assert build_tokenizer("llava").get_vocab() == TOKENIZERS["llava"].get_vocab()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="family is 'gpt'"):
        build_tokenizer("gpt")
    with pytest.raises(ValueError, match="vocab_size 300"):
        build_tokenizer("llava", 300)


CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a ring?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    {"role": "user", "content": "Where is the ring?"},
]


def test_llava_template():
    processor = build_processor(TinyModelConfig(family="llava"))
    assert processor.apply_chat_template(CHAT, add_generation_prompt=True) == (
        "USER: <image>\nIs there a ring? ASSISTANT: yes</s>USER: Where is the ring? ASSISTANT:"
    )
    assert processor.apply_chat_template(CHAT[2:], add_generation_prompt=True) == "USER: Where is the ring? ASSISTANT:"
    assert processor.image_token == "<image>"


def test_qwen_template():
    processor = build_processor(TinyModelConfig(family="qwen2_vl"))
    assert processor.apply_chat_template(CHAT, add_generation_prompt=True) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Is there a ring?<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nWhere is the ring?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert processor.image_token == "<|image_pad|>"


@pytest.mark.parametrize("size", [(96, 96), (448, 448), (103, 103), (448, 336), (30, 200)])
def test_qwen_grids_stay_within_the_trained_range(size):
    from PIL import Image

    processor = build_processor(TinyModelConfig(family="qwen2_vl"))
    _, height, width = (
        processor.image_processor([Image.new("RGB", size)], return_tensors="pt").image_grid_thw[0].tolist()
    )
    assert 36 <= height * width // 4 <= 64
    if size[0] == size[1]:
        assert (height, width) == (16, 16)
