"""Every kind of visual decoder inside the five model classes: set, saved, loaded, resized, frozen."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from dualstream.modeling import LlavaWithVisualDecoder, LlavaWithVisualDecoderConfig, infer_class, read_visual_tokens
from dualstream.modeling.visual_decoder import KINDS, VisualDecoder

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
VOCAB, WIDTH, CLASSES = 200, 64, 7


def make_decoder(kind, trained=True):
    """A decoder of random weights with token tables; token i belongs to class i % 7."""
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    decoder = VisualDecoder(VOCAB, WIDTH, kind, CLASSES if kind == "pruned" else None)
    if kind == "pruned":
        decoder.set_classes(torch.arange(VOCAB) % CLASSES, torch.arange(CLASSES) + 7)
    with torch.no_grad():
        decoder.own_parameter.copy_(torch.randn(decoder.own_parameter.shape, generator=generator))
    decoder.meaningless.copy_(torch.arange(VOCAB) % 3 == 0)
    decoder.text_class.copy_(torch.arange(VOCAB))
    decoder.training_facts = {"epochs": 2, "loss": [2.5, 1.0]} if trained else {}
    return decoder


@pytest.fixture(scope="module")
def our_model(tiny_model, tmp_path_factory):
    """Function family -> one of our models; tests copy it before changing it."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            tiny_model(family).model.save_pretrained(folder)
            made[family] = infer_class(tiny_model(family).model).from_pretrained(folder)
        return made[family]

    return get


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_set_save_and_load(kind, family, tiny_model, our_model, tmp_path):
    model, decoder, inputs = copy.deepcopy(our_model(family)), make_decoder(kind), tiny_model(family).inputs(["titt"])
    model.set_visual_decoder(decoder)
    expected = read_visual_tokens(tiny_model(family).model, inputs, top_k=2, decoder=decoder)
    assert torch.equal(read_visual_tokens(model, inputs, top_k=2).ids, expected.ids)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["visual_decoder_kind"] == kind
    assert stored["visual_decoder_classes"] == (CLASSES if kind == "pruned" else None)
    keys = load_file(tmp_path / "model.safetensors")
    own = "transform" if kind == "factored" else "weight"
    assert torch.equal(keys[f"visual_decoder.{own}"], decoder.own_parameter)
    if kind != "linear":
        shapes = [tuple(value.shape) for key, value in keys.items() if key.startswith("visual_decoder.")]
        assert (VOCAB, WIDTH) not in shapes, "no matrix of the vocabulary's size beside the model's own"

    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(model) and not info["missing_keys"] and not info["unexpected_keys"]
    assert again.visual_decoder.kind == kind and again.visual_decoder.training_facts == decoder.training_facts
    assert again.config.visual_decoder_trained
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(again.visual_decoder.state_dict()[name], tensor), name
    assert not [name for name, p in again.named_parameters() if "visual_decoder" in name and p.requires_grad]
    options = {**inputs, "max_new_tokens": 3, "do_sample": False, "compression": "rle_drop_top1"}
    assert torch.equal(again.generate(**options), model.generate(**options))
    assert again.last_compression.kept_tokens == model.last_compression.kept_tokens
    assert torch.equal(again.last_compression.ids, expected.ids[:, :1])


@pytest.mark.parametrize("kind", KINDS)
def test_loading_in_bfloat16(kind, our_model, tmp_path):
    model = copy.deepcopy(our_model("llava"))
    model.set_visual_decoder(make_decoder(kind))
    model.save_pretrained(tmp_path)
    again = LlavaWithVisualDecoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.visual_decoder.own_parameter.dtype == torch.bfloat16
    assert torch.equal(again.visual_decoder.own_parameter, make_decoder(kind).own_parameter.bfloat16())
    for name in ("text_class", "class_tokens", "token_classes", "meaningless"):
        before, after = getattr(model.visual_decoder, name), getattr(again.visual_decoder, name)
        assert (before is None and after is None) or (torch.equal(before, after) and before.dtype == after.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_the_given_decoder_is_copied(kind, our_model):
    model, decoder = copy.deepcopy(our_model("llava")).to(torch.bfloat16), make_decoder(kind, trained=False)
    model.set_visual_decoder(decoder)
    assert model.visual_decoder.own_parameter.dtype == torch.bfloat16
    assert decoder.own_parameter.dtype == torch.float32 and decoder.own_parameter.requires_grad
    assert not model.visual_decoder.own_parameter.requires_grad
    assert not model.config.visual_decoder_trained and model.config.visual_decoder_training is None
    with torch.no_grad():
        decoder.own_parameter.zero_()
    assert model.visual_decoder.own_parameter.abs().sum() > 0


def test_token_tables_are_taken_over(our_model):
    model = copy.deepcopy(our_model("llava"))
    model.set_visual_decoder(make_decoder("linear"))
    bare = VisualDecoder(VOCAB, WIDTH, "factored")
    model.set_visual_decoder(bare)
    assert torch.equal(model.visual_decoder.meaningless, make_decoder("linear").meaningless)
    assert not bare.has_token_tables


@pytest.mark.parametrize("family", FAMILIES)
def test_another_models_decoder_is_refused(family, our_model):
    model = our_model(family)
    decoder = make_decoder("factored")
    decoder.model_type = "qwen2_vl" if family == "llava" else "llava"
    with pytest.raises(ValueError, match=rf"model type '{decoder.model_type}', .* and '{family}'.*another model"):
        model.set_visual_decoder(decoder)
    with pytest.raises(ValueError, match="another model"):
        model.set_visual_decoder(VisualDecoder(VOCAB, WIDTH + 1))
    assert model.visual_decoder.model_type == family and model.visual_decoder.kind == "linear"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [208, 195])
def test_resized_vocabulary(kind, size, tiny_model, our_model, tmp_path):
    model = copy.deepcopy(our_model("llava"))
    model.set_visual_decoder(make_decoder(kind))
    model.resize_token_embeddings(size)
    decoder, kept = model.visual_decoder, min(size, VOCAB)
    assert (decoder.kind, decoder.vocab_size) == (kind, size) and not decoder.own_parameter.requires_grad
    assert decoder.meaningless[kept:].all() and decoder.has_token_tables
    if kind == "linear":
        assert torch.equal(decoder.weight[:kept], make_decoder(kind).weight[:kept])
        assert torch.equal(decoder.weight[kept:], model.lm_head.weight[kept:])
    else:
        assert torch.equal(decoder.own_parameter, make_decoder(kind).own_parameter)
    if kind == "pruned":
        assert (decoder.token_classes[kept:] == CLASSES - 1).all()
    model.generate(**tiny_model("llava").inputs(["tit"]), max_new_tokens=1, compression="rle_drop_top1")
    model.save_pretrained(tmp_path)
    again = LlavaWithVisualDecoder.from_pretrained(tmp_path)
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(again.visual_decoder.state_dict()[name], tensor), name
    assert again.visual_decoder.training_facts == make_decoder(kind).training_facts


@pytest.mark.parametrize("kind", KINDS)
def test_tied_embeddings(kind, tiny_model, tmp_path):
    """The unembedding that a factored decoder borrows is the embedding, which moves when tokens are added."""
    stock = copy.deepcopy(tiny_model("qwen2_vl").model)
    stock.config.tie_word_embeddings = stock.config.get_text_config().tie_word_embeddings = True
    stock.tie_weights()
    stock.save_pretrained(tmp_path / "stock")
    model = infer_class(stock).from_pretrained(tmp_path / "stock")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.visual_decoder.weight, model.lm_head.weight)
    model.set_visual_decoder(make_decoder(kind))
    model.resize_token_embeddings(208)
    model.save_pretrained(tmp_path / "ours")
    again, info = infer_class(stock).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    inputs = tiny_model("qwen2_vl").inputs(["titt"])
    assert torch.equal(read_visual_tokens(again, inputs).ids, read_visual_tokens(model, inputs).ids)
    assert again.visual_decoder.kind == kind
    assert not [key for key in again.state_dict() if "visual_decoder" in key and key.endswith("unembedding")]


@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_every_trainable_parameter_a_gradient(kind, tiny_model, our_model):
    """Else distributed training waits for the decoder's."""
    model = copy.deepcopy(our_model("qwen2_vl")).train()
    model.set_visual_decoder(make_decoder(kind))
    inputs = tiny_model("qwen2_vl").inputs(["titt"])
    model(**inputs, labels=inputs["input_ids"], compression="rle").loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "visual_decoder.transform" if kind == "factored" else "visual_decoder.weight"
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_from_a_configuration(kind, tiny_model):
    classes = CLASSES if kind == "pruned" else None
    config = LlavaWithVisualDecoderConfig(
        **tiny_model("llava").model.config.to_dict(), visual_decoder_kind=kind, visual_decoder_classes=classes
    )
    model = LlavaWithVisualDecoder(config)
    assert (model.visual_decoder.kind, model.visual_decoder.num_classes) == (kind, classes or VOCAB)
    if kind == "factored":
        assert torch.equal(model.visual_decoder.transform, torch.eye(WIDTH))


def test_a_stock_checkpoint_may_be_loaded_with_a_factored_decoder(tiny_model, tmp_path):
    tiny_model("llava").model.save_pretrained(tmp_path)
    model = LlavaWithVisualDecoder.from_pretrained(tmp_path, visual_decoder_kind="factored")
    assert torch.equal(model.visual_decoder.transform, torch.eye(WIDTH))
    inputs = tiny_model("llava").inputs(["titt"])
    stock = read_visual_tokens(tiny_model("llava").model, inputs, top_k=3)
    assert torch.equal(read_visual_tokens(model, inputs, top_k=3).ids, stock.ids)
    with pytest.raises(ValueError, match="a pruned one cannot start from the unembedding"):
        LlavaWithVisualDecoder.from_pretrained(tmp_path, visual_decoder_kind="pruned", visual_decoder_classes=5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_decoder_is_refused(kind, our_model, tmp_path):
    model = copy.deepcopy(our_model("llava"))
    model.set_visual_decoder(make_decoder(kind))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in make_decoder(kind).state_dict().keys() - {"meaningless", "text_class"}:
        less = {key: value for key, value in weights.items() if key != f"visual_decoder.{name}"}
        save_file(less, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"without the weight of its visual decoder|holds no visual decoder"):
            LlavaWithVisualDecoder.from_pretrained(tmp_path)


def test_configuration_refuses_unknown_kinds():
    with pytest.raises(ValueError, match="visual_decoder_kind='deep' is unknown; choose one of linear"):
        LlavaWithVisualDecoderConfig(visual_decoder_kind="deep")
