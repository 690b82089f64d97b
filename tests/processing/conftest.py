"""Real processors of every family, built from their config classes without a download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WORDS = ["a", "red", "blue", "dog", "sky", "grass", ",", ".", "what", "is", "this", "?", "user", ":"]
SPECIAL = {
    "image_token": "<image>",
    "video_token": "<video>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {% for c in m.content %}"
    "{% if c.type == 'image' %}IMAGE {% else %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}"
)


def byte_tokenizer(**special: str) -> Any:
    """A byte-level BPE tokenizer: 256 bytes, WORDS with a leading blank, the special tokens."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: number for number, piece in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        piece = "Ġ"
        for letter in word:
            if piece + letter not in vocab:
                merges.append((piece, letter))
                vocab[piece + letter] = len(vocab)
            piece += letter
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<pad>", "</s>", *special.values())])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", extra_special_tokens=special or None
    )


def _image_processor(name: str, backend: str, **settings: Any) -> Any:
    import transformers

    return getattr(transformers, name if backend == "torchvision" else f"{name}Pil")(**settings)


def build_processor(family: str, backend: str = "torchvision", classes: Any = None, **settings: Any) -> Any:
    """A processor of `family`; `settings` overrides the image processor's; `classes` maps family -> class."""
    import transformers

    stock = {
        "llava": "LlavaProcessor",
        "qwen2_vl": "Qwen2VLProcessor",
        "qwen2_5_vl": "Qwen2_5_VLProcessor",
        "qwen3_vl": "Qwen3VLProcessor",
        "internvl": "InternVLProcessor",
    }
    cls = classes[family] if classes else getattr(transformers, stock[family])
    if family == "llava":
        patch = settings.pop("patch_size", 8)
        edge = settings.pop("edge", 64)
        settings = {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}, **settings}
        name = "LlavaImageProcessor" if "do_pad" in settings else "CLIPImageProcessor"
        image_processor = _image_processor(name, backend, **settings)
        tokenizer = byte_tokenizer(image_token="<image>")
        return cls(
            image_processor,
            tokenizer,
            patch_size=patch,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE.replace("IMAGE", "<image>"),
        )
    if family == "internvl":
        tokens = settings.pop("image_seq_length", 16)
        settings = {"size": {"height": 32, "width": 32}, "crop_to_patches": True, **settings}
        image_processor = _image_processor("GotOcr2ImageProcessor", backend, **settings)
        tokenizer = byte_tokenizer(**SPECIAL)
        video_processor = transformers.InternVLVideoProcessor()
        template = CHAT_TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>")
        return cls(image_processor, tokenizer, video_processor, image_seq_length=tokens, chat_template=template)
    settings = {"patch_size": 16 if family == "qwen3_vl" else 14, **settings}
    image_processor = _image_processor("Qwen2VLImageProcessor", backend, **settings)
    video = transformers.Qwen3VLVideoProcessor() if family == "qwen3_vl" else transformers.Qwen2VLVideoProcessor()
    tokens = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokens |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    template = CHAT_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return cls(image_processor, byte_tokenizer(**tokens), video, chat_template=template)


@pytest.fixture(scope="session")
def make_processor() -> Callable[..., Any]:
    """Factory: make_processor(family, backend="torchvision", classes=None, **image_processor_settings)."""
    return build_processor


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """Factory of the byte-level tokenizer the processors use."""
    return byte_tokenizer
