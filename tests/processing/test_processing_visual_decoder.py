"""Processors that carry the compression choice: calls, chat templates, saving, and into `generate`."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from PIL import Image

from dualstream.modeling.visual_compression import METHODS, CompressionConfig
from dualstream.processing import compression_choice
from dualstream.processing.compression_choice import plain_choice
from dualstream.processing.processing_visual_decoder import PROCESSOR_CLASSES

FAMILIES = tuple(PROCESSOR_CLASSES)
RED = Image.new("RGB", (60, 40), "red")


@pytest.fixture(scope="module")
def processors(make_processor) -> dict[str, Any]:
    return {family: make_processor(family, classes=PROCESSOR_CLASSES) for family in FAMILIES}


def prompt(processor, images: int = 1, text: str = "what is this") -> str:
    return processor.image_token * images + text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", ["rle", "none", "paper:rle", {"method": "rle", "pooling": "first"}])
def test_the_batch_is_the_stock_batch_and_the_choice(processors, make_processor, family: str, choice) -> None:
    ours, stock = processors[family], make_processor(family)
    arguments = {"images": [RED, RED], "text": [prompt(ours), prompt(ours, text="sky")], "padding": True}
    expected = stock(**arguments, return_tensors="pt")
    batch = ours(**arguments, return_tensors="pt", compression=choice)
    assert batch.pop("compression") == choice
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name
    moved = ours(**arguments, return_tensors="pt", compression=choice).to("cpu", torch.bfloat16)
    assert moved["compression"] == choice and moved["pixel_values"].dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_choice_the_batch_says_nothing(processors, family: str) -> None:
    processor = processors[family]
    assert "compression" not in processor(images=RED, text=prompt(processor))
    assert "compression" not in processor(text=["no picture"], compression="rle")
    with pytest.raises(ValueError, match="none, rle, rle_drop_top1, rle_drop_top2"):
        processor(text=["no picture"], compression="zip")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_choice_can_be_overridden_per_call(make_processor, family: str) -> None:
    processor = make_processor(family, classes=PROCESSOR_CLASSES)
    processor.compression = "rle"
    inputs = {"images": RED, "text": prompt(processor)}
    assert processor(**inputs)["compression"] == "rle"
    assert processor(**inputs, compression="none")["compression"] == "none"
    assert "compression" not in processor(**inputs, compression=None)
    with pytest.raises(ValueError, match="'zip' is unknown"):
        processor(**inputs, compression="zip")


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_templates_carry_the_choice(processors, family: str, caplog) -> None:
    processor = processors[family]
    content = [{"type": "image", "image": RED}, {"type": "text", "text": "what is this"}]
    chat = [{"role": "user", "content": content}]
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    assert "compression" not in processor.apply_chat_template(chat, **settings)
    for way in ({"compression": "rle"}, {"processor_kwargs": {"compression": "rle"}}):
        batch = processor.apply_chat_template(chat, **settings, **way)
        assert batch["compression"] == "rle" and batch["input_ids"].ndim == 2
    assert "user :" in processor.apply_chat_template(chat, compression="rle")
    batched = processor.apply_chat_template([chat, chat], **settings, compression="rle_drop_top1")
    assert batched["compression"] == "rle_drop_top1" and len(batched["input_ids"]) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_placeholder_mismatches_name_both_numbers(processors, family: str) -> None:
    processor = processors[family]
    one, two = prompt(processor), prompt(processor, 2)
    for images, text, message in [
        (RED, two, r"the text holds 2 image placeholder.*1 image\(s\)"),
        ([RED, RED], [one], r"the text holds 1 image placeholder.*2 image\(s\)"),
        ([RED], [one, one], r"the texts hold 2 .* 1 image"),
        ([[RED], [RED, RED]], [two, one], r"text 0 holds 2 .* 1 image"),
        ([[RED]], [one, one], "2 texts but 1 lists of images"),
        (RED, "no placeholder", r"the text holds 0 .* 1 image"),
        (None, one, r"the text holds 1 .* 0 image"),
    ]:
        with pytest.raises(ValueError, match=message):
            processor(images=images, text=text)
    batch = processor(images=[[RED, RED], [RED]], text=[two, one], padding=True, return_tensors="pt")
    assert len(batch["input_ids"]) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_and_token_map_runs(processors, family: str) -> None:
    processor = processors[family]
    ids = processor(text=["red dog"])["input_ids"]
    assert processor.batch_decode(ids) == [" red dog"]
    assert processor.post_process_image_text_to_text(torch.tensor(ids)) == [" red dog"]
    runs = processor.encode_token_map([5, 5, 5, 5, 7, 7], [(2, 2), (1, 2)])
    assert runs == [(5, 2), (5, 2), (7, 2)] and processor.decode_token_map(runs) == [5, 5, 5, 5, 7, 7]
    assert processor.encode_token_map([5, 5, 5, 5, 7, 7], [(2, 2), (1, 2)], wrap_rows=True) == [(5, 4), (7, 2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_auto_processor_knows_our_configurations(make_processor, tmp_path, family: str) -> None:
    import dualstream.processing as package

    processor_class = getattr(package, PROCESSOR_CLASSES[family].__name__)
    from transformers import AutoProcessor

    processor = make_processor(family, classes=PROCESSOR_CLASSES)
    processor.compression = {"method": "rle", "pooling": "first"}
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is processor_class
    assert loaded.compression == processor.compression
    inputs = {"images": RED, "text": prompt(processor), "return_tensors": "pt"}
    before, after = processor(**inputs), loaded(**inputs)
    assert before["compression"] == after["compression"]
    assert torch.equal(before["input_ids"], after["input_ids"])
    again = processor_class.from_pretrained(tmp_path, compression="none")
    assert again.compression == "none"


FRESH = """
import json, sys
sys.modules["dualstream"] = None  # as on a machine without the package
from PIL import Image
from transformers import AutoProcessor
out = {}
for folder in sys.argv[1:]:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    batch = processor(images=Image.new("RGB", (60, 40)), text=processor.image_token + "what")
    try:
        processor(images=Image.new("RGB", (60, 40)), text=processor.image_token, compression="zip")
    except ValueError as error:
        message = str(error)
    out[folder] = [type(processor).__name__, processor.compression, batch["compression"], message]
print(json.dumps(out))
"""


def test_a_fresh_process_without_the_package_keeps_the_choice(make_processor, tmp_path) -> None:
    folders = {}
    for family in FAMILIES:
        processor = make_processor(family, classes=PROCESSOR_CLASSES)
        processor.compression = "rle_drop_top2"
        processor.save_pretrained(tmp_path / family)
        folders[str(tmp_path / family)] = PROCESSOR_CLASSES[family].__name__
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FRESH), *folders],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env={"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for folder, (name, saved, carried, message) in json.loads(done.stdout.splitlines()[-1]).items():
        assert (name, saved, carried) == (folders[folder], "rle_drop_top2", "rle_drop_top2")
        assert "'zip' is unknown" in message


def test_choices_are_the_models_own() -> None:
    assert compression_choice.METHODS == METHODS
    assert set(compression_choice.OPTIONS) == set(CompressionConfig().to_dict())
    for name, accepted in compression_choice.OPTIONS.items():
        for value in accepted or (0, 3):
            config = CompressionConfig.from_any(plain_choice({name: value}))
            assert getattr(config, name) == value
    for method in METHODS:
        assert CompressionConfig.from_any(plain_choice(f"paper:{method}")) == CompressionConfig.paper(method)
    config = CompressionConfig(method="rle", wrap_rows=True)
    assert plain_choice(config) == config.to_dict() and CompressionConfig.from_any(plain_choice(config)) == config
    assert plain_choice(None) is None
    assert CompressionConfig.from_any(["rle", "rle"]).method == "rle"  # as batches collated row by row hold it
    with pytest.raises(ValueError, match="not understood"):
        CompressionConfig.from_any(["rle", "none"])


@pytest.mark.parametrize(
    ("value", "message"),
    [("zip", "'zip' is unknown"), ("paper:zip", "'paper:zip' is unknown"), ({"methods": "rle"}, "option 'methods'"),
     ({"pooling": "max"}, "mean, first, random"), (3, "not understood"), ({}, "not understood"), (True, "not under")],
)  # fmt: skip
def test_unknown_choices_are_named(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain_choice(value)


def _tiny_model(family: str, processor: Any) -> Any:
    """A random model of ours whose vocabulary is the test tokenizer's."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen2VLConfig

    import dualstream.modeling as modeling

    text = {"vocab_size": len(processor.tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 256, "eos_token_id": 257}  # fmt: skip
    if family == "llava":
        vision = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=8,
        )
        stock = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**text))
        config = modeling.LlavaWithVisualDecoderConfig.from_dict(stock.to_dict())
        config.image_token_index = config.image_token_id = processor.image_token_id
        model = modeling.LlavaWithVisualDecoder(config)
    else:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 14, "mlp_ratio": 2}
        special = {"image_token_id": processor.image_token_id, "video_token_id": processor.video_token_id}
        special |= {"vision_start_token_id": processor.tokenizer.convert_tokens_to_ids("<|vision_start|>")}
        stock = Qwen2VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision, **special)
        config = modeling.Qwen2VLWithVisualDecoderConfig.from_dict(stock.to_dict())
        model = modeling.Qwen2VLWithVisualDecoder(config)
    return model.eval()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_the_choice_travels_through_a_pipeline(make_processor, family: str) -> None:
    from transformers import pipeline

    processor = make_processor(family, classes=PROCESSOR_CLASSES)
    processor.compression = "rle"
    torch.manual_seed(0)
    model = _tiny_model(family, processor)
    answer = pipeline("image-text-to-text", model=model, processor=processor)
    content = [{"type": "image", "image": Image.new("RGB", (112, 112), "red")}, {"type": "text", "text": "what"}]
    chat = [{"role": "user", "content": content}]
    assert len(answer([chat, chat], max_new_tokens=2, batch_size=2)) == 2
    report = model.last_compression
    assert report.config.method == "rle" and len(report.images) == 2


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_the_choice_reaches_generate(processors, family: str) -> None:
    from dualstream.processing import TokenMap, token_geometry

    processor = processors[family]
    torch.manual_seed(0)
    model = _tiny_model(family, processor)
    image = Image.new("RGB", (112, 112), "red")
    call = {"images": image, "text": prompt(processor), "return_tensors": "pt"}
    inputs = processor(**call, compression="rle")
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    report = model.last_compression
    assert 0 < report.kept_tokens <= report.visual_tokens
    geometry = token_geometry(processor, image.size)
    token_map = TokenMap.from_reading(report, processor.tokenizer, geometry, image=image, compression=report)
    assert (token_map.kept, len(token_map)) == (report.kept_tokens, report.visual_tokens)
    assert token_map.compression["method"] == "rle"
    model.generate(**processor(**call, compression="none"), max_new_tokens=2, do_sample=False)
    assert model.last_compression is None or model.last_compression.reduction_rate == 0
