"""Compressed forward passes: labels, alignment, gradients, signatures and hand-written decoding."""

import inspect

import pytest
import torch

from dualstream.modeling.compression_context import compressing
from dualstream.modeling.families import FAMILIES
from dualstream.modeling.visual_decoder import VisualDecoder

TOLERANCE = 5e-6
ROWS = ["ttitttt", "titittttt", "tttttttt"]


@pytest.fixture
def sample_of(reference, coarse_decoder):
    return lambda tiny, inputs, row, **options: reference.compress_sample(
        tiny.model, tiny.single(inputs, row), coarse_decoder.weight, {"method": "rle", **options}, False
    )


def labels_of(inputs):
    """Text tokens are predicted, visual tokens and padding are not."""
    ids = inputs["input_ids"]
    return ids.masked_fill((inputs["attention_mask"] == 0) | (ids >= 180), -100)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_loss_equal_reference(family, padding, tiny_model, reference, sample_of, coarse_decoder):
    tiny = tiny_model(family)
    inputs = tiny.inputs(ROWS, padding=padding)
    labels = labels_of(inputs)
    with compressing(tiny.model, decoder=coarse_decoder) as model, torch.no_grad():
        output = model(**inputs, labels=labels)
    width, length = output.logits.shape[1], labels.shape[1]
    total, count = 0.0, 0
    for row in range(len(ROWS)):
        with torch.no_grad():
            sample = sample_of(tiny, inputs, row)
            logits = reference.sample_logits(tiny.model, sample, [])
        original = inputs["attention_mask"][row].nonzero().flatten()[sample.columns]
        own = labels[row][original]  # the row's first token is a label too: nothing may predict it
        total += torch.nn.functional.cross_entropy(logits[:-1], own[1:], ignore_index=-100, reduction="sum")
        count += int((own[1:] != -100).sum())
        right_padding = length - 1 - int(original[-1])
        columns = torch.arange(len(sample.columns)) + width - right_padding - len(sample.columns)
        assert (output.logits[row, columns] - logits).abs().max() <= TOLERANCE
    assert float(output.loss) == pytest.approx(float(total / count), abs=1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_last_columns_keep_their_meaning(family, padding, tiny_model, coarse_decoder):
    """Labels, logits_to_keep and TRL-style slices count from the right edge."""

    class ConstantReader(VisualDecoder):
        def top_k(self, features, k=1, unembedding=None):
            return torch.full((len(features), k), 7)

    tiny = tiny_model(family)
    inputs = tiny.inputs(["ttitttt", "titittttt"], padding=padding)
    with compressing(tiny.model, decoder=ConstantReader(*coarse_decoder.weight.shape)) as model, torch.no_grad():
        whole = model(**inputs).logits
        assert whole.shape[1] < inputs["input_ids"].shape[1]
        assert torch.allclose(model(**inputs, logits_to_keep=3).logits, whole[:, -3:], atol=TOLERANCE)
        length = inputs["input_ids"].shape[1]
        index = torch.tensor([length - 4, -2])
        assert torch.allclose(model(**inputs, logits_to_keep=index).logits, whole[:, [-4, -2]], atol=TOLERANCE)
        with pytest.raises(ValueError, match="logits_to_keep asks for column 0"):
            model(**inputs, logits_to_keep=torch.tensor([0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_merged_is_stock_bit_for_bit(family, tiny_model, coarse_decoder):
    class DistinctReader(VisualDecoder):
        def top_k(self, features, k=1, unembedding=None):
            return (torch.arange(len(features))[:, None] + torch.arange(k)) % self.vocab_size

    tiny = tiny_model(family)
    for padding in ("left", "right"):
        inputs = tiny.inputs(ROWS, padding=padding)
        labels = labels_of(inputs)
        for given in (inputs, {name: value for name, value in inputs.items() if name != "attention_mask"}):
            with torch.no_grad():
                stock = tiny.model(**given, labels=labels)
                with compressing(tiny.model, decoder=DistinctReader(*coarse_decoder.weight.shape)) as model:
                    ours = model(**given, labels=labels)
            assert torch.equal(ours.logits, stock.logits)
            assert torch.equal(ours.loss, stock.loss)


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_reference_and_reach_the_vision_tower(
    family, pooling, new_tiny_model, reference, sample_of, coarse_decoder
):
    tiny = new_tiny_model(family)
    inputs = tiny.inputs(["ttitttt"])
    labels = labels_of(inputs)
    tiny.model.train()
    with compressing(tiny.model, decoder=coarse_decoder, pooling=pooling) as model:
        model(**inputs, labels=labels).loss.backward()
    ours = {name: p.grad.clone() for name, p in tiny.model.named_parameters() if p.grad is not None}
    tiny.model.zero_grad()
    sample = sample_of(tiny, inputs, 0, pooling=pooling)
    own = labels[0][sample.columns]
    logits = reference.sample_logits(tiny.model, sample, [])
    torch.nn.functional.cross_entropy(logits[:-1], own[1:], ignore_index=-100).backward()
    expected = {name: p.grad for name, p in tiny.model.named_parameters() if p.grad is not None}
    assert ours.keys() == expected.keys()
    assert any(("vision_tower" in name or "visual" in name) and grad.abs().max() > 0 for name, grad in ours.items())
    for name, gradient in expected.items():
        assert torch.allclose(ours[name], gradient, atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize("family", FAMILIES)
def test_hand_written_decoding_needs_no_positions(family, tiny_model, reference, sample_of, coarse_decoder):
    """The mask may grow in original coordinates, in compressed coordinates, or be left out."""
    tiny = tiny_model(family)
    inputs = tiny.inputs(["ttitttt", "titittttt"])
    with compressing(tiny.model, decoder=coarse_decoder) as model, torch.no_grad():
        references = [reference.greedy(tiny.model, sample_of(tiny, inputs, row), 4) for row in (0, 1)]
        expected = torch.stack([logits for _, logits in references])
        for grow in ("original", "compressed", "none"):
            output = model(**inputs, use_cache=True)
            mask = inputs["attention_mask"]
            if grow == "compressed":
                mask = output.past_key_values._visual_prompt_session.attention_mask
            said = []
            for step in range(4):
                assert (output.logits[:, -1] - expected[:, step]).abs().max() <= TOLERANCE
                said.append(output.logits[:, -1].argmax(-1))
                mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
                given = {} if grow == "none" else {"attention_mask": mask}
                output = model(input_ids=said[-1][:, None], past_key_values=output.past_key_values, **given)
            assert torch.stack(said, 1).tolist() == [tokens for tokens, _ in references]


@pytest.mark.parametrize("policy", ["original", "compact"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family.startswith("qwen")])
def test_rope_deltas_alone_continue_m_rope(family, policy, tiny_model, reference, coarse_decoder):
    """What transformers computes by itself from ``rope_deltas`` is right too, should a cache lose its session."""
    tiny = tiny_model(family)
    inputs = tiny.inputs(["ttitttt"])
    with torch.no_grad():
        options = {"method": "rle"}, policy == "compact"
        sample = reference.compress_sample(tiny.model, inputs, coarse_decoder.weight, *options)
        tokens, logits = reference.greedy(tiny.model, sample, 3)
        with compressing(tiny.model, decoder=coarse_decoder, position_policy=policy) as model:
            output, said = model(**inputs, use_cache=True), []
            del output.past_key_values._visual_prompt_session
            for step in range(3):
                assert (output.logits[0, -1] - logits[step]).abs().max() <= TOLERANCE
                said.append(int(output.logits[0, -1].argmax()))
                output = model(input_ids=torch.tensor([said[-1:]]), past_key_values=output.past_key_values)
    assert said == tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_signature_is_the_parents(family, tiny_model):
    model = tiny_model(family).model
    stock = inspect.signature(type(model).forward).parameters
    with compressing(model):
        ours = dict(inspect.signature(type(model).forward).parameters)
        assert ours.pop("compression").kind is inspect.Parameter.KEYWORD_ONLY
        assert list(ours) == list(stock)
        assert model._supports_logits_to_keep()
        assert model._supports_mm_encoder_outputs()


def test_positional_arguments_and_tuples(tiny_model, coarse_decoder):
    tiny = tiny_model("llava")
    inputs = tiny.inputs(["ttitttt"])
    with compressing(tiny.model, decoder=coarse_decoder) as model, torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(
            model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]).logits, expected
        )
        assert torch.equal(model(**inputs, return_dict=False)[0], expected)


def test_refusals(tiny_model, coarse_decoder):
    tiny = tiny_model("llava")
    inputs = tiny.inputs(["ttitttt"])
    with compressing(tiny.model, decoder=coarse_decoder) as model, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="already holds tokens"):
            model(**inputs, past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask has 3 columns"):
            model(inputs["input_ids"][:, :1], past_key_values=cache, attention_mask=torch.ones(1, 3))
        with pytest.raises(ValueError, match="2-D attention_mask"):
            model(**{**inputs, "attention_mask": torch.ones(1, 1, 4, 4)})
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(ValueError, match="inputs_embeds"):
            model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"], compression="rle")


def test_trainer_keeps_the_columns(tiny_model, coarse_decoder, tmp_path):
    from transformers import Trainer, TrainingArguments

    tiny = tiny_model("qwen2_vl")
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
        trainer._set_signature_columns_if_needed()
        assert {*tiny.inputs(["ti"]), "labels", "compression"} <= set(trainer._signature_columns)
        assert (
            trainer.model_accepts_loss_kwargs
            == Trainer(
                tiny.model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
            ).model_accepts_loss_kwargs
        )


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "internvl"])
def test_trainer_trains_on_compressed_prompts(family, new_tiny_model, coarse_decoder, tmp_path):
    from transformers import Trainer, TrainingArguments

    tiny = new_tiny_model(family)
    batch = tiny.inputs(["ttitttt", "titittttt"], padding="right")
    batch["labels"] = labels_of(batch)
    before = {name: parameter.clone() for name, parameter in tiny.model.named_parameters()}
    settings = TrainingArguments(
        str(tmp_path), max_steps=4, learning_rate=1e-3, logging_steps=1, report_to="none", use_cpu=True, save_steps=99
    )
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        trainer = Trainer(model, settings, train_dataset=[0, 1, 2, 3], data_collator=lambda rows: dict(batch))
        trainer.train()
        assert model.last_compression.reduction_rate > 0
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    changed = [name for name, parameter in tiny.model.named_parameters() if not torch.equal(parameter, before[name])]
    assert any("vision_tower" in name or "visual" in name for name in changed)
