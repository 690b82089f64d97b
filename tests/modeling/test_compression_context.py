"""The context manager: restores everything, nests, and copes with PEFT, our own classes, hooks and pipelines."""

import copy

import pytest
import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from dualstream.modeling.compressed_model import VisualCompressionMixin
from dualstream.modeling.compression_context import compressing, compressing_class
from dualstream.modeling.families import FAMILIES
from dualstream.modeling.visual_compression import CompressionConfig
from dualstream.modeling.visual_decoder import VisualDecoder


def fingerprint(model):
    return type(model), set(model.__dict__), set(model._modules), list(model.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_class_and_attributes_are_restored(family, tiny_model, coarse_decoder):
    tiny = tiny_model(family)
    inputs = tiny.inputs(["ttittt"])
    tiny.model.generate(**inputs, max_new_tokens=1)
    before = fingerprint(tiny.model)
    expected = tiny.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        assert model is tiny.model
        assert isinstance(model, VisualCompressionMixin)
        assert type(model).__name__ == before[0].__name__
        assert list(model.state_dict()) == before[3]
        model.generate(**inputs, max_new_tokens=1)
        model(**inputs)
    assert fingerprint(tiny.model) == before
    with pytest.raises(RuntimeError, match="inside"), compressing(tiny.model, decoder=coarse_decoder):
        raise RuntimeError("inside")
    assert fingerprint(tiny.model) == before
    assert torch.equal(tiny.model.generate(**inputs, max_new_tokens=3, do_sample=False), expected)
    assert not issubclass(before[0], VisualCompressionMixin)


def test_nested_blocks_the_inner_one_wins(tiny_model, coarse_decoder):
    tiny = tiny_model("llava")
    inputs = tiny.inputs(["ttittt"])

    def kept(model):
        model.generate(**inputs, max_new_tokens=1)
        return model.last_compression and model.last_compression.config.method

    with compressing(tiny.model, "rle", coarse_decoder) as outer:
        assert kept(outer) == "rle"
        with compressing(outer, "rle_drop_top1", coarse_decoder) as inner:
            assert kept(inner) == "rle_drop_top1"
        with compressing(outer, "none") as inner:
            assert kept(inner) is None
        assert kept(outer) == "rle"
    assert type(tiny.model) is LlavaForConditionalGeneration


def test_without_a_decoder_the_output_matrix_reads(tiny_model):
    tiny = tiny_model("qwen2_vl")
    inputs = tiny.inputs(["ttitittt"])
    with compressing(tiny.model) as model:
        model.generate(**inputs, max_new_tokens=1)
        report = model.last_compression
    with torch.no_grad():
        grid = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
        features = torch.cat(tiny.model.model.get_image_features(**grid).pooler_output)
        assert torch.equal(report.ids[:, 0], tiny.model.lm_head(features).argmax(-1))


def test_report_describes_every_image(tiny_model, coarse_decoder):
    tiny = tiny_model("internvl")
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        model.generate(**tiny.inputs(["titt", "tt", "titi"]), max_new_tokens=1)
        report = model.last_compression
    assert [image.row for image in report.images] == [0, 2, 2]
    assert [len(image.grids) for image in report.images] == [1, 2, 3]
    assert sum(image.kept_tokens for image in report.images) == report.kept_tokens == report.plan.num_kept
    assert report.reduction_rate == pytest.approx(1 - report.kept_tokens / report.visual_tokens)
    for image in report.images:
        assert len(image.ids) == image.visual_tokens == len(image.plan.segment)
        assert image.plan.num_kept == image.kept_tokens == int(image.plan.segment.max()) + 1
        assert int(image.plan.anchor.min()) >= 0
        assert torch.equal(image.plan.segment[image.plan.anchor], torch.arange(image.kept_tokens))
        assert image.reduction_rate == pytest.approx(1 - image.kept_tokens / image.visual_tokens)


def test_a_model_of_ours_only_changes_its_settings(new_tiny_model, coarse_decoder):
    tiny = new_tiny_model("llava")
    inputs = tiny.inputs(["ttittt"])
    ours = compressing_class(type(tiny.model))
    tiny.model.__class__ = ours
    tiny.model.visual_decoder = coarse_decoder
    tiny.model.compression_config = CompressionConfig(method="rle")
    tiny.model.generate(**inputs, max_new_tokens=1)
    default = tiny.model.last_compression
    assert default.config.method == "rle"
    with compressing(tiny.model, "rle_drop_top1") as model:
        model.generate(**inputs, max_new_tokens=1)
        assert model.last_compression.config.method == "rle_drop_top1"
        assert torch.equal(model.last_compression.ids, default.ids)  # read by its own decoder
    assert type(tiny.model) is ours
    assert tiny.model.last_compression is default
    tiny.model.generate(**inputs, max_new_tokens=1, compression="none")
    assert tiny.model.last_compression is None


def test_peft_wrapper(new_tiny_model, tiny_model, coarse_decoder):
    peft = pytest.importorskip("peft")
    tiny, plain = new_tiny_model("llava"), tiny_model("llava")
    inputs = tiny.inputs(["ttittt"])
    wrapped = peft.get_peft_model(tiny.model, peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
    with compressing(plain.model, decoder=coarse_decoder) as model:
        expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    with compressing(wrapped, decoder=coarse_decoder) as model:
        assert model is wrapped
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), expected)
        assert torch.allclose(model(**inputs, labels=inputs["input_ids"]).loss, loss)
        assert wrapped.get_base_model().last_compression.reduction_rate > 0
    assert type(wrapped.get_base_model()) is LlavaForConditionalGeneration


def test_forward_replaced_by_device_hooks(new_tiny_model, coarse_decoder):
    accelerate = pytest.importorskip("accelerate")
    tiny = new_tiny_model("llava")
    inputs = tiny.inputs(["ttittt"])
    with compressing(tiny.model, decoder=coarse_decoder) as model, torch.no_grad():
        expected = model(**inputs).logits
    accelerate.hooks.add_hook_to_module(tiny.model, accelerate.hooks.ModelHook())
    with compressing(tiny.model, decoder=coarse_decoder) as model, torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
    with torch.no_grad():
        assert tiny.model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_pipeline(tiny_model, tiny_models, coarse_decoder, caplog):
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast, pipeline

    tiny = tiny_model("llava")
    words = {f"w{index}": index for index in range(tiny_models.VOCAB)}
    del words[f"w{tiny_models.IMAGE}"]
    backend = Tokenizer(models.WordLevel({**words, "<image>": tiny_models.IMAGE}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", additional_special_tokens=["<image>"]),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    picture = Image.effect_noise((40, 32), 90).convert("RGB")
    prompt = {"text": "w5 <image> w6 w7", "images": picture, "max_new_tokens": 3, "return_full_text": False}
    pipe = pipeline("image-text-to-text", model=tiny.model, processor=processor)
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        answer = pipe(**prompt)[0]["generated_text"]
        assert model.last_compression.reduction_rate > 0
        inputs = processor(images=picture, text=prompt["text"], return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=3)
        new = processor.decode(output[0, inputs["input_ids"].shape[1] :])
        assert answer.split() == new.split()
        # A pipeline made inside the block accepts the class: it goes by its name.
        caplog.clear()
        pipeline("image-text-to-text", model=model, processor=processor)
        assert "not supported" not in caplog.text


def test_model_can_be_copied_afterwards(new_tiny_model, coarse_decoder):
    tiny = new_tiny_model("llava")
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        model.generate(**tiny.inputs(["ttittt"]), max_new_tokens=1)
    duplicate = copy.deepcopy(tiny.model)
    assert type(duplicate) is type(tiny.model)
    assert torch.equal(duplicate.lm_head.weight, tiny.model.lm_head.weight)


def test_token_tables_come_from_the_tokenizer_or_the_checkpoint(new_tiny_model, tiny_models, monkeypatch):
    tiny = new_tiny_model("llava")

    class Words:
        all_special_ids = ()

        def __len__(self):
            return tiny_models.VOCAB

        def get_added_vocab(self):
            return {}

        def batch_decode(self, batch):
            return ["," if index % 2 else f"word{index}" for (index,) in batch]

    def meaningless(**options):
        with compressing(tiny.model, "rle_drop_top1", **options) as model:
            model.generate(**tiny.inputs(["ttittt"]), max_new_tokens=1)
            return model._compression_override.decoder.meaningless

    assert int(meaningless(tokenizer=Words()).sum()) == tiny_models.VOCAB // 2
    asked = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path, **options: asked.append(path) or Words())
    with pytest.raises(ValueError, match=r"pass tokenizer=processor\.tokenizer"):
        meaningless()
    tiny.model.config._name_or_path = "some/model"
    assert int(meaningless().sum()) == tiny_models.VOCAB // 2
    assert asked == ["some/model"]
    bare = VisualDecoder.from_unembedding(tiny.model.lm_head.weight)
    meaningless(decoder=bare, tokenizer=Words())
    assert not bare.has_token_tables, "the caller's decoder is left alone"


def test_paper_preset(tiny_model, coarse_decoder):
    tiny = tiny_model("qwen2_vl")
    with compressing(tiny.model, "paper:rle_drop_top2", coarse_decoder) as model:
        model.generate(**tiny.inputs(["ttittt"]), max_new_tokens=1)
        assert model.last_compression.config == CompressionConfig.paper("rle_drop_top2")


def test_errors(tiny_model, tiny_models):
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = tiny_model("llava")
    with pytest.raises(ValueError, match="method='zip'"), compressing(tiny.model, "zip"):
        pass
    with pytest.raises(ValueError, match="pooling='median'"), compressing(tiny.model, pooling="median"):
        pass
    foreign = VisualDecoder(300, 64)
    with pytest.raises(ValueError, match="another model"), compressing(tiny.model, decoder=foreign):
        pass
    llama = LlamaForCausalLM(LlamaConfig(**tiny_models.TEXT))
    with pytest.raises(ValueError, match="model type 'llama'"), compressing(llama):
        pass
    assert type(tiny.model) is LlavaForConditionalGeneration
