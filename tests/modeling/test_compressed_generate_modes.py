"""Sampling, streaming, length limits, assistants, later turns, videos and refusals of compressed generation."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor

from dualstream.modeling.compression_context import compressing
from dualstream.modeling.families import FAMILIES
from dualstream.modeling.visual_compression import CompressionConfig
from dualstream.modeling.visual_decoder import VisualDecoder

TOLERANCE = 5e-6
QWEN = [family for family in FAMILIES if family.startswith("qwen")]
RAGGED = ["ttittt", "titittttt", "itt"]


@pytest.fixture
def sample_of(reference, coarse_decoder):
    def get(tiny, inputs, row):
        with torch.no_grad():
            return reference.compress_sample(
                tiny.model, tiny.single(inputs, row), coarse_decoder.weight, {"method": "rle"}, False
            )

    return get


@pytest.fixture
def greedy_of(reference, sample_of):
    return lambda tiny, inputs, row, steps: reference.greedy(tiny.model, sample_of(tiny, inputs, row), steps)[0]


class Recorder:
    def __init__(self):
        self.chunks, self.ended = [], False

    def put(self, value):
        self.chunks.append(value)

    def end(self):
        self.ended = True


class DistinctReader(VisualDecoder):
    """Reads every cell differently from its neighbours."""

    def top_k(self, features, k=1, unembedding=None):
        return (torch.arange(len(features))[:, None] + torch.arange(k)) % self.vocab_size


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_equals_reference(family, copies, tiny_model, reference, sample_of, coarse_decoder):
    tiny = tiny_model(family)
    inputs = tiny.inputs(RAGGED)
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        torch.manual_seed(5)
        output = model.generate(**inputs, do_sample=True, top_k=0, num_return_sequences=copies, max_new_tokens=3)
    torch.manual_seed(5)
    samples = [sample_of(tiny, inputs, row) for row in range(3) for _ in range(copies)]
    drawn = [[] for _ in samples]
    for _ in range(3):
        logits = [reference.sample_logits(tiny.model, s, d)[-1].detach() for s, d in zip(samples, drawn, strict=True)]
        tokens = torch.multinomial(torch.stack(logits).softmax(-1), 1).flatten().tolist()
        for row, token in zip(drawn, tokens, strict=True):
            row.append(token)
    assert output[:, inputs["input_ids"].shape[1] :].tolist() == drawn


@pytest.mark.parametrize("family", FAMILIES)
def test_streamer_sees_the_original_prompt(family, tiny_model, greedy_of, coarse_decoder):
    tiny = tiny_model(family)
    inputs, recorder = tiny.inputs(["ttittt"]), Recorder()
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        model.generate(**inputs, max_new_tokens=4, do_sample=False, streamer=recorder)
    assert torch.equal(recorder.chunks[0], inputs["input_ids"])
    assert torch.cat([c.flatten() for c in recorder.chunks[1:]]).tolist() == greedy_of(tiny, inputs, 0, 4)
    assert recorder.ended


@pytest.mark.parametrize("through", ["keyword", "config", "model", "positional"])
@pytest.mark.parametrize("family", FAMILIES)
def test_length_limits_count_the_original_prompt(family, through, tiny_model, coarse_decoder, monkeypatch):
    tiny = tiny_model(family)
    inputs = tiny.inputs(["ttittt"])
    limit = inputs["input_ids"].shape[1] + 3
    args, options = [], {}
    if through == "keyword":
        options = {"max_length": limit}
    elif through == "config":
        options = {"generation_config": GenerationConfig(max_length=limit, pad_token_id=0)}
    elif through == "positional":
        args = [inputs["input_ids"], GenerationConfig(max_length=limit, pad_token_id=0)]
        inputs = {name: value for name, value in inputs.items() if name != "input_ids"}
    else:
        monkeypatch.setattr(tiny.model.generation_config, "max_length", limit)
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        assert model.generate(*args, **inputs, **options).shape[1] == limit
        assert model.last_compression.reduction_rate > 0


def test_min_length_counts_the_original_prompt(tiny_model, coarse_decoder):
    tiny = tiny_model("llava")
    inputs = tiny.inputs(["ttittt"])
    length = inputs["input_ids"].shape[1]
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        first = int(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1])
        stop = {"eos_token_id": first, "pad_token_id": 0, "max_length": length + 5, "do_sample": False}
        assert model.generate(**inputs, **stop).shape[1] == length + 1
        longer = model.generate(**inputs, **stop, min_length=length + 3)
        assert longer.shape[1] >= length + 3
        assert first not in longer[0, length : length + 2].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup_and_assistants(family, tiny_model, new_tiny_model, greedy_of, coarse_decoder):
    tiny = tiny_model(family)
    inputs = tiny.inputs(["ttittt"])
    expected = greedy_of(tiny, inputs, 0, 6)
    length = inputs["input_ids"].shape[1]
    twin, stranger = new_tiny_model(family).model, new_tiny_model(family, seed=1).model
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": twin}, {"assistant_model": stranger}):
            output = model.generate(**inputs, **options, max_new_tokens=6, do_sample=False)
            assert output[0, length:].tolist() == expected
        assert model.last_compression.reduction_rate > 0


@pytest.mark.parametrize("family", ["llava", "internvl"])  # stock Qwen models pass mm_token_type_ids to the assistant
def test_text_only_assistant(family, tiny_model, tiny_models, greedy_of, coarse_decoder):
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = tiny_model(family)
    inputs = tiny.inputs(["ttittt"])
    assistant = LlamaForCausalLM(LlamaConfig(**tiny_models.TEXT)).eval()
    assistant.generation_config.eos_token_id = None
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        output = model.generate(**inputs, assistant_model=assistant, max_new_tokens=5, do_sample=False)
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == greedy_of(tiny, inputs, 0, 5)


@pytest.mark.parametrize("whole", [True, False], ids=["whole conversation", "new tokens only"])
@pytest.mark.parametrize("batch", [["ttittt"], RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_next_turn_on_the_returned_cache(family, batch, whole, tiny_model, reference, sample_of, coarse_decoder):
    tiny = tiny_model(family)
    inputs = tiny.inputs(batch)
    question = torch.randint(10, 180, (len(batch), 3), generator=torch.Generator().manual_seed(2))
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        first = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        conversation = torch.cat([first.sequences, question], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(batch), 7, dtype=torch.long)], dim=1)
        turn = {"input_ids": conversation, "attention_mask": mask}
        if not whole:  # the last generated token is not in the cache yet
            turn["input_ids"] = conversation[:, -4:]
        options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        second = model.generate(**turn, past_key_values=first.past_key_values, **options)
    assert torch.equal(second.sequences[:, : turn["input_ids"].shape[1]], turn["input_ids"])
    for row in range(len(batch)):
        said = conversation[row, inputs["input_ids"].shape[1] :].tolist()
        for step in range(4):
            logits = reference.sample_logits(tiny.model, sample_of(tiny, inputs, row), said)[-1]
            assert (second.logits[step][row] - logits).abs().max() <= TOLERANCE
            said.append(int(logits.argmax()))
        assert second.sequences[row, -4:].tolist() == said[-4:]


def test_third_turn_on_the_callers_cache_and_max_length(tiny_model, reference, sample_of, coarse_decoder):
    tiny = tiny_model("qwen2_vl")
    inputs = tiny.inputs(["ttittt"])
    options = {"do_sample": False, "output_logits": True}
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        cache, ids = DynamicCache(config=tiny.model.config.get_text_config()), inputs["input_ids"]
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=2, do_sample=False)
        for turn in (11, 12):
            ids = torch.cat([out, torch.tensor([[turn]])], dim=1)
            details = model.generate(
                ids, past_key_values=cache, max_length=ids.shape[1] + 2, return_dict_in_generate=True, **options
            )
            out = details.sequences
            assert out.shape[1] == ids.shape[1] + 2
    said = out[0, inputs["input_ids"].shape[1] : -1].tolist()
    logits = reference.sample_logits(tiny.model, sample_of(tiny, inputs, 0), said)[-1]
    assert (details.logits[-1][0] - logits).abs().max() <= TOLERANCE


def test_cache_refusals(tiny_model, coarse_decoder):
    tiny = tiny_model("llava")
    inputs = tiny.inputs(["ttittt"])
    options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        cache = model.generate(**inputs, **options).past_key_values
        with pytest.raises(ValueError, match="images cannot be added"):
            model.generate(**inputs, past_key_values=cache)
        with pytest.raises(ValueError, match="does not continue it"):
            model.generate(inputs["input_ids"][:, :5], past_key_values=cache)
        with pytest.raises(ValueError, match="does not continue it"):
            model.generate(torch.full((1, 40), 9), past_key_values=cache)
        beams = model.generate(**inputs, **options, num_beams=2).past_key_values
        with pytest.raises(ValueError, match="reordered by beam search"):
            model.generate(torch.cat([inputs["input_ids"]] * 2), past_key_values=beams)
        plain = model.generate(**inputs, **options, compression="none").past_key_values
        with pytest.raises(ValueError, match="already holds tokens"):
            model.generate(**inputs, past_key_values=plain)


@pytest.mark.parametrize("family", QWEN)
def test_video_beside_an_image_stays_untouched(family, tiny_model, coarse_decoder):
    """A distinct reader merges nothing, so stock generation with both modalities is the reference."""
    tiny = tiny_model(family)
    inputs = tiny.inputs(["ttitvtt", "tivt"])
    stock = tiny.model.generate(
        **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    reader = DistinctReader(*coarse_decoder.weight.shape)
    with compressing(tiny.model, decoder=reader) as model:
        same = model.generate(**inputs, **options)
    assert torch.equal(same.sequences, stock.sequences)
    assert all(torch.equal(a, b) for a, b in zip(same.logits, stock.logits, strict=True))
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        output = model.generate(**inputs, **options)
        forward = model(**inputs).logits[:, -1]
        assert model.last_compression.reduction_rate > 0
    assert (output.logits[0] - forward).abs().max() <= TOLERANCE
    video_only = tiny.inputs(["tvtt"])
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        assert torch.equal(
            model.generate(**video_only, max_new_tokens=2, do_sample=False),
            tiny.model.generate(**video_only, max_new_tokens=2, do_sample=False),
        )


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
@pytest.mark.parametrize("batch", [["ttittt"], ["ttittt", "titittttt", "tttttttt"]], ids=["one", "ragged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_merged_is_stock_bit_for_bit(family, batch, options, tiny_model, coarse_decoder):
    tiny = tiny_model(family)
    inputs = tiny.inputs(batch)
    settings = {
        "max_new_tokens": 3,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        **options,
    }
    stock = tiny.model.generate(**inputs, **settings)
    with compressing(tiny.model, decoder=DistinctReader(*coarse_decoder.weight.shape)) as model:
        ours = model.generate(**inputs, **settings)
        assert model.last_compression.reduction_rate == 0
        off = model.generate(**inputs, **settings, compression="none")
        assert model.last_compression is None
    for output in (ours, off):
        assert torch.equal(output.sequences, stock.sequences)
        assert all(torch.equal(a, b) for a, b in zip(output.logits, stock.logits, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_method_that_drops_everything_keeps_one_token_per_block(family, tiny_model, coarse_decoder):
    tiny = tiny_model(family)
    inputs = tiny.inputs(RAGGED)
    empty = VisualDecoder.from_unembedding(coarse_decoder.weight)
    empty.meaningless = torch.ones_like(empty.meaningless)
    empty.text_class = coarse_decoder.text_class
    with compressing(tiny.model, "rle_drop_top1", empty) as model:
        for options in ({}, {"num_beams": 2}):
            output = model.generate(**inputs, **options, max_new_tokens=2, do_sample=False)
            assert output.shape[1] == inputs["input_ids"].shape[1] + 2
        report = model.last_compression
    assert report.plan.kept_per_block.tolist() == [1] * len(report.grids)
    assert [image.row for image in report.images] == [0, 1, 1, 2]
    assert sum(image.visual_tokens for image in report.images) == int((inputs["input_ids"] == 190).sum())


def test_mismatches_and_wrong_arguments(tiny_model, coarse_decoder):
    tiny = tiny_model("llava")
    inputs = tiny.inputs(["ttittt"])
    short = {**inputs, "input_ids": inputs["input_ids"][:, :-8], "attention_mask": inputs["attention_mask"][:, :-8]}
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        with pytest.raises(ValueError, match=r"has 12 image placeholders .* give 16 features"):
            model.generate(**short, max_new_tokens=2)
        with pytest.raises(ValueError, match=r"has 12 image placeholders .* give 16 features"):
            model(**short)
        with pytest.raises(ValueError, match="unknown; choose"):
            model.generate(**inputs, compression="zip", max_new_tokens=2)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(ValueError, match="inputs_embeds"):
            model.generate(inputs_embeds=embeds, pixel_values=inputs["pixel_values"], compression="rle")
        default = model.generate(inputs_embeds=embeds, pixel_values=inputs["pixel_values"], max_new_tokens=2)
        assert model.last_compression is None
        assert default.shape[1] == 2
    bare = VisualDecoder.from_unembedding(coarse_decoder.weight)
    with compressing(tiny.model, decoder=bare) as model, pytest.raises(ValueError, match="no token tables"):
        model.generate(**inputs, compression="rle_drop_top1", max_new_tokens=2)


def test_per_call_override_and_custom_processors_see_the_compressed_prompt(tiny_model, coarse_decoder):
    tiny = tiny_model("qwen2_vl")
    inputs = tiny.inputs(["ttittt"])
    widths = []

    class Spy(LogitsProcessor):
        def __call__(self, input_ids, scores):
            widths.append(input_ids.shape[1])
            return scores

    with compressing(tiny.model, "none", coarse_decoder) as model:
        for method in ("none", "rle", {"method": "rle_drop_top1"}, CompressionConfig(method="rle", pooling="first")):
            model.generate(**inputs, compression=method, max_new_tokens=1, do_sample=False, logits_processor=[Spy()])
    length = inputs["input_ids"].shape[1]
    assert widths[0] == length
    assert max(widths[1:]) < length


def test_bfloat16_eager_attentions(new_tiny_model, coarse_decoder):
    tiny = new_tiny_model("llava")
    tiny.model.to(torch.bfloat16).set_attn_implementation("eager")
    inputs = tiny.inputs(["ttittt", "titt"])
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    options = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 2, "do_sample": False}
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        output = model.generate(**inputs, **options)
        kept = max(
            sum(i.kept_tokens - i.visual_tokens for i in model.last_compression.images if i.row == r) for r in (0, 1)
        )
    assert output.attentions[0][0].shape[-1] <= inputs["input_ids"].shape[1]
    assert kept < 0
