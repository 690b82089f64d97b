"""The five classes: where the decoder comes from, what is saved, and that training tools treat them as usual."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, PreTrainedTokenizerFast

from dualstream.modeling import (
    CompressionConfig,
    LlavaWithVisualDecoder,
    LlavaWithVisualDecoderConfig,
    Qwen2VLWithVisualDecoder,
    infer_class,
)

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")


def save_tokenizer(folder):
    """Tokens 0, 10, 20, ... are punctuation; all else is a word."""
    words = {f"word{i}" if i % 10 else "?" * (i // 10 + 1): i for i in range(200)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="word1").save_pretrained(folder)


@pytest.fixture(scope="module")
def stock_folder(tiny_model, tmp_path_factory):
    """Function family -> folder with a stock checkpoint and a tokenizer."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny_model(family).model.save_pretrained(made[family])
            save_tokenizer(made[family])
        return made[family]

    return get


@pytest.fixture(scope="module")
def our_model(tiny_model, stock_folder):
    """Function family -> one of our models from the stock checkpoint; tests copy it before changing it."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = infer_class(tiny_model(family).model).from_pretrained(stock_folder(family))
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_as_stock_until_told_to_compress(family, tiny_model, our_model):
    tiny, ours = tiny_model(family), our_model(family)
    inputs = tiny.inputs(["tiittt", "itt"])
    options = {"max_new_tokens": 4, "do_sample": False}
    stock_ids = tiny.model.generate(**inputs, **options)
    assert torch.equal(ours.generate(**inputs, **options), stock_ids)
    assert ours.last_compression is None
    changed = copy.deepcopy(ours)
    changed.config.visual_compression = "rle_drop_top1"
    by_default = changed.generate(**inputs, **options)
    report = changed.last_compression
    assert report.kept_tokens < report.visual_tokens
    assert torch.equal(by_default, ours.generate(**inputs, **options, compression="rle_drop_top1"))
    assert torch.equal(changed.generate(**inputs, **options, compression="none"), stock_ids)


def test_tables_come_from_the_tokenizer_beside_the_checkpoint(our_model):
    decoder = our_model("llava").visual_decoder
    assert decoder.has_token_tables
    assert decoder.meaningless.nonzero().flatten().tolist()[:3] == [0, 1, 10]  # 1 is the unknown token
    assert not decoder.weight.requires_grad


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_without_a_tokenizer_drop_methods_raise(family, tiny_model, tmp_path, caplog):
    tiny = tiny_model(family)
    tiny.model.save_pretrained(tmp_path)
    ours = infer_class(tiny.model).from_pretrained(tmp_path)
    assert "No tokenizer beside" in caplog.text
    assert not ours.visual_decoder.has_token_tables and not ours.visual_decoder.meaningless.any()
    inputs = tiny.inputs(["tit"])
    ours.generate(**inputs, max_new_tokens=1, compression="rle")
    with pytest.raises(ValueError, match="set_token_tables"):
        ours.generate(**inputs, max_new_tokens=1, compression="rle_drop_top1")


def test_decoder_survives_saving_also_in_shards_and_bf16(our_model, tmp_path):
    ours = copy.deepcopy(our_model("qwen2_vl"))
    torch.nn.init.normal_(ours.visual_decoder.weight)
    ours.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, info = Qwen2VLWithVisualDecoder.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.dtype == again.visual_decoder.weight.dtype == torch.bfloat16
    for key, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_lost_decoder_is_refused(our_model, tmp_path):
    our_model("llava").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_decoder.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="without the weight of its visual decoder"):
        LlavaWithVisualDecoder.from_pretrained(tmp_path)


def test_decoder_of_another_shape_is_refused(our_model, tmp_path):
    our_model("llava").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["visual_decoder.weight"] = torch.zeros(7, 64)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="mismatched"):
        LlavaWithVisualDecoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another shape"):
        LlavaWithVisualDecoder.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_checkpoint_of_another_family_is_refused(stock_folder):
    with pytest.raises(ValueError, match="is of type 'llava'"):
        Qwen2VLWithVisualDecoder.from_pretrained(stock_folder("llava"))


def test_a_model_from_a_configuration_has_its_decoder(tiny_model):
    config = LlavaWithVisualDecoderConfig(**tiny_model("llava").model.config.to_dict())
    model = LlavaWithVisualDecoder(config)
    assert config.model_type == "llava_visual_decoder"
    assert torch.equal(model.visual_decoder.weight, model.lm_head.weight)
    assert model.visual_decoder.weight.data_ptr() != model.lm_head.weight.data_ptr()


def test_loading_from_a_state_dict(tiny_model):
    stock = tiny_model("llava").model
    config = LlavaWithVisualDecoderConfig(**stock.config.to_dict())
    model = LlavaWithVisualDecoder.from_pretrained(None, config=config, state_dict=stock.state_dict())
    assert torch.equal(model.visual_decoder.weight, stock.lm_head.weight)


def test_offload_while_loading_a_stock_checkpoint(stock_folder, tmp_path):
    """The decoder is filled before modules leave for the disk; an unembedding on disk cannot be copied."""
    device_map = {"model": "disk", "lm_head": "cpu", "visual_decoder": "cpu"}
    model = LlavaWithVisualDecoder.from_pretrained(
        stock_folder("llava"), device_map=device_map, offload_folder=str(tmp_path)
    )
    assert torch.equal(model.visual_decoder.weight, model.lm_head.weight)
    with pytest.raises(ValueError, match="disk offload"):
        LlavaWithVisualDecoder.from_pretrained(
            stock_folder("llava"), device_map={**device_map, "lm_head": "disk"}, offload_folder=str(tmp_path)
        )


@pytest.mark.parametrize("old_layout", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_decoder_on_disk_reads(family, old_layout, tiny_model, our_model, tmp_path):
    """Also beside Qwen2-VL's old keys, whose renaming ``visual`` -> ``model.visual`` must not catch the decoder."""
    ours = copy.deepcopy(our_model(family))
    torch.nn.init.normal_(ours.visual_decoder.weight)
    ours.save_pretrained(tmp_path, save_original_format=old_layout)
    device_map = {"model": "cpu", "lm_head": "cpu", "visual_decoder": "disk"}
    offloaded = type(ours).from_pretrained(tmp_path, device_map=device_map, offload_folder=str(tmp_path / "disk"))
    assert offloaded.visual_decoder.weight.is_meta
    options = {**tiny_model(family).inputs(["tit"]), "max_new_tokens": 3, "compression": "rle_drop_top1"}
    assert torch.equal(offloaded.generate(**options), ours.generate(**options))
    again, info = type(ours).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(again.visual_decoder.weight, ours.visual_decoder.weight)


def test_an_adapter_folder_loads_over_its_base(tiny_model, our_model, tmp_path):
    our_model("llava").save_pretrained(tmp_path / "base")
    base = LlavaWithVisualDecoder.from_pretrained(tmp_path / "base")
    lora = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    adapted = get_peft_model(base, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    options = {**tiny_model("llava").inputs(["tit"]), "max_new_tokens": 3, "compression": "rle"}
    again = LlavaWithVisualDecoder.from_pretrained(tmp_path / "adapter")
    assert torch.equal(again.generate(**options), adapted.generate(**options))


@pytest.mark.parametrize("value", ["shrink", {"method": "rle", "pool": "mean"}, {"pooling": "max"}, 3])
def test_configuration_refuses_unknown_compression(value):
    with pytest.raises(ValueError):
        LlavaWithVisualDecoderConfig(visual_compression=value)
    config = LlavaWithVisualDecoderConfig()
    with pytest.raises(ValueError):
        config.visual_compression = value


def test_configuration_round_trip(tmp_path):
    config = LlavaWithVisualDecoderConfig(visual_compression="rle_drop_top2", visual_decoder_trained=True)
    assert config.visual_compression == CompressionConfig(method="rle_drop_top2").to_dict()
    config.visual_compression = CompressionConfig.paper("rle")
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is LlavaWithVisualDecoderConfig and again.visual_decoder_trained
    assert CompressionConfig.from_any(again.visual_compression) == CompressionConfig.paper("rle")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llava_visual_decoder"


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText])
def test_auto_classes_know_ours(auto_class, our_model, tmp_path):
    our_model("qwen2_vl").save_pretrained(tmp_path)
    assert type(auto_class.from_pretrained(tmp_path)) is Qwen2VLWithVisualDecoder


def test_lora_trains_and_the_decoder_stays(tiny_model, our_model):
    ours = copy.deepcopy(our_model("llava"))
    decoder = ours.visual_decoder.weight.clone()
    wrapped = get_peft_model(ours, LoraConfig(target_modules="all-linear", r=2))
    inputs = tiny_model("llava").inputs(["tittt"])
    wrapped.train()
    ours.activation_checkpointing_enable()
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    for compression in ("none", "rle"):
        loss = wrapped(**inputs, labels=inputs["input_ids"], compression=compression).loss
        loss.backward()
        optimizer.step()
    moved = [p for name, p in wrapped.named_parameters() if "lora_B" in name and "language_model" in name]
    assert moved and any(p.abs().sum() > 0 for p in moved)
    assert torch.equal(ours.visual_decoder.weight, decoder)
    assert not [name for name, _ in wrapped.named_parameters() if "visual_decoder" in name and "lora" in name]
    assert type(wrapped.merge_and_unload()) is LlavaWithVisualDecoder


def test_resized_vocabulary_keeps_a_fitting_decoder(tiny_model, our_model, tmp_path):
    ours = copy.deepcopy(our_model("llava"))
    ours.resize_token_embeddings(208)
    assert ours.visual_decoder.weight.shape == ours.lm_head.weight.shape
    assert torch.equal(ours.visual_decoder.weight[:200], our_model("llava").visual_decoder.weight)
    assert ours.visual_decoder.meaningless[200:].all()
    ours.generate(**tiny_model("llava").inputs(["tit"]), max_new_tokens=1, compression="rle_drop_top1")
    ours.save_pretrained(tmp_path)
    again = LlavaWithVisualDecoder.from_pretrained(tmp_path)
    assert torch.equal(again.visual_decoder.text_class, ours.visual_decoder.text_class)


def test_saving_next_to_old_code_replaces_it(our_model, tmp_path):
    """Saving twice into a folder leaves one consistent set of files."""
    our_model("llava").save_pretrained(tmp_path)
    (tmp_path / "families.py").write_text("# an old version")
    our_model("llava").save_pretrained(tmp_path)
    assert "an old version" not in (tmp_path / "families.py").read_text()
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == auto_map["AutoModelForImageTextToText"]
    assert auto_map["AutoModel"] == "modeling_llava_visual_decoder.LlavaWithVisualDecoder"
    assert auto_map["AutoConfig"] == "configuration_visual_decoder.LlavaWithVisualDecoderConfig"
