"""Settings, caches and reports around compressed generation: nothing of the caller is changed, nothing goes stale."""

import copy

import pytest
import torch
from transformers import GenerationConfig, StaticCache, TextStreamer

from dualstream.modeling.compression_context import compressing
from dualstream.modeling.families import FAMILIES
from dualstream.modeling.visual_compression import CompressionConfig


def test_caller_settings_are_not_changed(tiny_model, coarse_decoder):
    tiny = tiny_model("llava")
    inputs = tiny.inputs(["ttittt"])
    limit = inputs["input_ids"].shape[1] + 2
    settings = GenerationConfig(max_length=limit, min_length=limit - 1, pad_token_id=0)
    before, given = copy.deepcopy(settings.to_dict()), {name: tensor.clone() for name, tensor in inputs.items()}
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        assert model.generate(**inputs, generation_config=settings).shape[1] == limit
    assert settings.to_dict() == before
    assert inputs.keys() == given.keys()
    assert all(torch.equal(inputs[name], given[name]) for name in given)


def test_too_small_max_length_is_refused_as_without_compression(tiny_model, coarse_decoder):
    tiny = tiny_model("llava")
    inputs = tiny.inputs(["ttittt"])
    length = inputs["input_ids"].shape[1]
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        for limit in (length, length - 1, 3):
            with pytest.raises(ValueError, match="max_length"):
                model.generate(**inputs, max_length=limit)


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_hold_the_compressed_prompt_only(family, new_tiny_model, coarse_decoder):
    tiny = new_tiny_model(family)  # a model keeps its largest static cache for later calls
    inputs = tiny.inputs(["ttititt"])
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        dynamic = model.generate(**inputs, **options).past_key_values
        static = model.generate(**inputs, **options, cache_implementation="static").past_key_values
        report = model.last_compression
    expected = inputs["input_ids"].shape[1] - report.visual_tokens + report.kept_tokens + 2
    assert dynamic.get_seq_length() == int(static.get_seq_length()) == expected
    assert static.get_max_length() == expected


def test_report_maps_columns_back(tiny_model, coarse_decoder):
    tiny = tiny_model("llava")
    inputs = tiny.inputs(["ttittt", "titt"])
    options = {"max_new_tokens": 1, "output_hidden_states": True, "return_dict_in_generate": True}
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        output = model.generate(**inputs, **options)
        report = model.last_compression
    plan = report.prompt_plan
    ids = plan.gather(inputs["input_ids"], -1)
    is_text = (ids >= 0) & (ids != tiny.model.config.image_token_id)
    embedded = output.hidden_states[0][0]  # (rows, compressed columns, width)
    assert torch.equal(embedded[is_text], model.get_input_embeddings()(ids[is_text]))
    assert (ids == tiny.model.config.image_token_id).sum(1).tolist() == [i.kept_tokens for i in report.images]


def test_report_of_text_only_calls_is_empty(tiny_model, coarse_decoder):
    tiny = tiny_model("qwen2_vl")
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        model.generate(**tiny.inputs(["ttittt"]), max_new_tokens=1)
        assert model.last_compression.reduction_rate > 0
        model.generate(**tiny.inputs(["tttt"]), max_new_tokens=1)
        assert model.last_compression is None


def test_a_cache_that_was_reset_starts_afresh(tiny_model, coarse_decoder):
    tiny = tiny_model("llava")
    inputs = tiny.inputs(["ttittt"])
    cache = StaticCache(config=tiny.model.config.get_text_config(), max_cache_len=64)
    options = {"past_key_values": cache, "max_new_tokens": 2, "do_sample": False}
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        first = model.generate(**inputs, **options)
        cache.reset()
        assert torch.equal(model.generate(**inputs, **options), first)


def test_a_cropped_prompt_is_refused(tiny_model, coarse_decoder):
    tiny = tiny_model("llava")
    inputs = tiny.inputs(["ttittt"])
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        first = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        first.past_key_values.crop(5 - first.past_key_values.get_seq_length())
        with pytest.raises(ValueError, match="cropped to 5 tokens"):
            model.generate(first.sequences, past_key_values=first.past_key_values)


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_vl"])
def test_chunked_prefill_with_flash_attention_is_refused(family, tiny_model, coarse_decoder, monkeypatch):
    """The kernels are not needed for this: the check comes before any forward pass."""
    tiny = tiny_model(family)
    inputs = tiny.inputs(["ttittt"])
    text = tiny.model.config.get_text_config()
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        monkeypatch.setattr(text, "_attn_implementation_internal", "flash_attention_2")
        if family.startswith("qwen"):
            model._check_chunked_prefill(GenerationConfig(prefill_chunk_size=4), CompressionConfig())
            return
        with pytest.raises(ValueError, match="mistakes the gaps"):
            model.generate(**inputs, prefill_chunk_size=4, max_new_tokens=1)
        compact = CompressionConfig(position_policy="compact")
        model._check_chunked_prefill(GenerationConfig(prefill_chunk_size=4), compact)


def test_videos_encoded_beforehand_beside_raw_images(tiny_model, coarse_decoder):
    tiny = tiny_model("qwen2_vl")
    inputs = tiny.inputs(["ttitvtt"])
    encoded = dict(inputs)
    with torch.no_grad():
        video = tiny.model.model.get_video_features(encoded.pop("pixel_values_videos"), inputs["video_grid_thw"])
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        output = model.generate(**encoded, mm_encoder_outputs={"video": video}, max_new_tokens=3, do_sample=False)
        assert model.last_compression.reduction_rate > 0
    assert torch.equal(output, expected)


def test_gradient_checkpointing(new_tiny_model, coarse_decoder):
    tiny = new_tiny_model("qwen3_vl")
    inputs = tiny.inputs(["ttitttt"])
    tiny.model.train()

    def gradient():
        tiny.model.zero_grad()
        with compressing(tiny.model, decoder=coarse_decoder) as model:
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return tiny.model.model.visual.patch_embed.proj.weight.grad.clone()

    plain = gradient()
    tiny.model.activation_checkpointing_enable()
    assert torch.allclose(gradient(), plain, atol=1e-6)


def test_a_real_text_streamer(tiny_model, coarse_decoder, capsys):
    class Digits:
        def decode(self, ids, **_):
            return "".join(f"{int(token)} " for token in ids)

    tiny = tiny_model("llava")
    inputs = tiny.inputs(["ttittt"])
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False, streamer=TextStreamer(Digits()))
    assert [int(token) for token in capsys.readouterr().out.split()] == output[0].tolist()


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"prefill_chunk_size": 4}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_images_may_vanish_if_asked(family, mode, tiny_model, reference, coarse_decoder):
    """With min_keep=0, a dropped image leaves only its delimiters: the prompt without its placeholders."""
    tiny = tiny_model(family)
    inputs = tiny.inputs(["ttittt", "titt", "ttt"])
    empty = copy.copy(coarse_decoder)
    empty._buffers = {**coarse_decoder._buffers, "meaningless": torch.ones(200, dtype=torch.bool)}
    config = CompressionConfig(method="rle_drop_top1", min_keep=0, position_policy="compact")
    options = {"max_new_tokens": 3, "do_sample": False, **mode}
    with compressing(tiny.model, config=config, decoder=empty) as model:
        output = model.generate(**inputs, **options)
        assert model.last_compression.kept_tokens == 0
    for row in range(3):
        ids = tiny.single(inputs, row)["input_ids"]
        bare = ids[ids != tiny.model.config.image_token_id][None]
        expected = tiny.model.generate(bare, attention_mask=torch.ones_like(bare), **options)
        assert output[row, inputs["input_ids"].shape[1] :].tolist() == expected[0, bare.shape[1] :].tolist()
