"""Loading by name, folder or Hub id, what is refused, and the public names of the package."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import CLIPImageProcessor, LlamaConfig, LlavaProcessor, PreTrainedTokenizerFast, SiglipConfig

import dualstream.modeling
from dualstream.modeling import (
    EMBEDDED_MODELS,
    RopeScaling,
    VisualDecoder,
    apply_rope_scaling,
    default_model_path,
    infer_class,
    load_model,
    rope_scaling_of,
)


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A stock LLaVA checkpoint with a processor."""
    path = tmp_path_factory.mktemp("stock")
    tiny_model("llava").model.save_pretrained(path)
    words = {f"word{i}": i for i in range(190)} | {"<image>": 190}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="word1")),
        unk_token="word1",
        additional_special_tokens=["<image>"],
    )
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    LlavaProcessor(images, tokenizer, 8, "default", image_token="<image>").save_pretrained(path)
    return path


def copy_of(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_folder_loads_as_what_it_is(folder, tmp_path):
    model, processor = load_model(folder, device="cpu")
    assert type(model).__name__ == "LlavaForConditionalGeneration" and not model.training
    assert isinstance(processor, LlavaProcessor)
    ours, processor = load_model(folder, "cpu", "bfloat16", visual_decoder=True)
    assert type(ours) is infer_class(model) is infer_class(model.config) is infer_class(ours)
    assert ours.dtype == torch.bfloat16 and ours.visual_decoder.has_token_tables
    ours.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor = load_model(str(tmp_path), device="cpu")
    assert type(again) is type(ours) and isinstance(processor, LlavaProcessor)


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2-vl"])
def test_embedded_models_load(name):
    if name not in EMBEDDED_MODELS:
        pytest.skip(f"{name} has not been trained in this tree")
    model, processor = load_model(name, device="cpu")
    assert model.config.image_token_id == processor.image_token_id
    assert (default_model_path(name) / "README.md").is_file()


@pytest.mark.parametrize("way", ["asked for", "asked for and decoder", "saved", "noted by stock", "decoder beside"])
def test_a_scaled_model_is_loaded_as_one(way, tmp_path):
    """Whatever says that the RoPE is scaled, the model is of a class that acts on it, and keeps its processor."""
    decoder, source = way.endswith("decoder") or way.endswith("beside"), "tiny-qwen2-vl"
    options = {"vision_rope_scaling": "poly:9:2"} if way.startswith("asked for") else {}
    if not options:
        scaling = None if way == "noted by stock" else "poly:9:2"
        model, processor = load_model(source, "cpu", vision_rope_scaling=scaling, visual_decoder=False)
        apply_rope_scaling(model, "poly:9:2")
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        source = tmp_path
    if way == "decoder beside":
        VisualDecoder.from_unembedding(model.lm_head.weight).save_pretrained(tmp_path)
    else:  # the embedded model has a decoder beside it
        options["visual_decoder"] = decoder
    scaled, processor = load_model(source, "cpu", **options)
    assert type(scaled).__name__ == ("Qwen2VLWithVisualDecoder" if decoder else "Qwen2VLRopeScaled")
    assert str(rope_scaling_of(scaled)) == "poly:9:2" and not scaled.training
    assert type(processor).__name__ in ("Qwen2VLProcessor", "Qwen2VLWithVisualDecoderProcessor")


def test_a_saved_scaling_can_be_switched_off(tmp_path):
    model, processor = load_model("tiny-qwen2-vl", "cpu", vision_rope_scaling=RopeScaling("exp", gamma=2))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert rope_scaling_of(load_model(tmp_path, "cpu")[0]) == RopeScaling("exp", gamma=2)
    assert rope_scaling_of(load_model(tmp_path, "cpu", vision_rope_scaling="poly:0")[0]) is None


@pytest.mark.parametrize("visual_decoder", [False, True])
def test_a_tower_without_rope_is_refused(folder, visual_decoder):
    words = "'poly:99:8' needs a vision tower with a rotary table, which a 'llava' model has not"
    with pytest.raises(ValueError, match=words):
        load_model(folder, vision_rope_scaling="poly:99:8", visual_decoder=visual_decoder)
    with pytest.raises(ValueError, match="type 'cubic' is unknown"):
        load_model(folder, vision_rope_scaling="cubic")


@pytest.mark.parametrize("name", ["tiny-lava", "./nowhere", "/no/such/folder", "a/b/c"])
def test_unknown_names_are_refused_with_what_exists(name):
    with pytest.raises(ValueError, match="neither a folder, nor a Hub id") as error:
        load_model(name)
    assert repr(name) in str(error.value)


def test_unknown_embedded_name():
    with pytest.raises(ValueError, match="name='big-llava' is no embedded model"):
        default_model_path("big-llava")


def test_hub_id_without_network():
    with pytest.raises(ValueError, match="does not load as a model"):
        load_model("nobody/nothing", local_files_only=True)


def test_not_a_vision_language_model(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama' model without a vision tower"):
        load_model(tmp_path)


def test_unsupported_family(tmp_path):
    SiglipConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="supported are llava, qwen2_vl"):
        load_model(tmp_path)


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_model(tmp_path)


def test_corrupt_weights(folder, tmp_path):
    broken = copy_of(folder, tmp_path)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="does not load as a model"):
        load_model(broken)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
@pytest.mark.parametrize("visual_decoder", [False, True])
def test_incomplete_weights(folder, tmp_path, change, visual_decoder):
    """A lost output head would only be a warning in transformers, and nonsense at the end."""
    broken = copy_of(folder, tmp_path)
    state = load_file(broken / "model.safetensors")
    name = next(key for key in state if key.endswith("lm_head.weight"))
    if change == "missing":
        del state[name]
    else:
        state["language_model.model.extra.weight"] = torch.zeros(1)
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 {change} keys"):
        load_model(broken, visual_decoder=visual_decoder)


def test_broken_config(folder, tmp_path):
    broken = copy_of(folder, tmp_path)
    (broken / "config.json").write_text("{")
    with pytest.raises(ValueError, match="does not load as a model"):
        load_model(broken)


def test_every_public_name_resolves():
    for name in dualstream.modeling.__all__:
        value = getattr(dualstream.modeling, name)
        assert not isinstance(value, type(sys)), name
    assert set(dir(dualstream.modeling)) >= set(dualstream.modeling.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dualstream.modeling.nothing  # noqa: B018


def test_imports_in_a_fresh_process():
    """The package loads nothing heavy and its classes register themselves."""
    code = """
import json, sys
import dualstream.modeling
heavy = [name for name in ("torch", "transformers") if name in sys.modules]
from dualstream.modeling import LlavaWithVisualDecoder, compressing
from transformers import AutoConfig
print(json.dumps([heavy, callable(compressing), type(AutoConfig.for_model("llava_visual_decoder")).__name__]))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout
    assert json.loads(out) == [[], True, "LlavaWithVisualDecoderConfig"]
