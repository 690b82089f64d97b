"""The configurations of LLaVA-1.5-7B and Qwen2.5-VL-7B, with their vocabularies, image sizes and token ids, but narrow
and shallow: one training step, save, reload, and use in compression, for every kind of decoder."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from dualstream.modeling import VisualDecoder, compressing, token_tables
from dualstream.modeling.visual_decoder import KINDS
from dualstream.processing import build_inputs
from dualstream.train.decoder_classes import read_classes
from dualstream.train.distillation import VisualDecoderDistillationTrainer
from dualstream.train.distillation_config import DistillationConfig

NARROW = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
LLAVA_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}ASSISTANT:"
)
QWEN_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for message in messages %}<|im_start|>user\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def word_tokenizer(size, special, **names):
    """A tokenizer of `size` words, some twice in another case, with special tokens at given ids."""
    at = {number: token for token, number in special.items()}
    vocab = {at.get(number, f"word{number}" if number % 3 else f"WORD{number + 1}"): number for number in range(size)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="word1"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=at[min(at)], extra_special_tokens=names)


def llava():
    """LLaVA-1.5-7B: CLIP-L/14 at 336 pixels, 576 tokens, 32,064 rows, image token 32000."""
    tokenizer = word_tokenizer(32064, {"</s>": 2, "<image>": 32000}, image_token="<image>")
    images = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "projection_dim": 32}
    vision |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {**NARROW, "model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000, image_seq_length=576)
    return LlavaForConditionalGeneration(config), processor, (200, 150)


def qwen():
    """Qwen2.5-VL-7B: windowed tower at native resolution, M-RoPE, 152,064 rows, its own token ids."""
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    special = dict(zip(names, range(151643, 151646), strict=True))
    special |= {"<|vision_start|>": 151652, "<|vision_end|>": 151653, "<|image_pad|>": 151655, "<|video_pad|>": 151656}
    tokenizer = word_tokenizer(151665, special, image_token="<|image_pad|>", video_token="<|video_pad|>")
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=QWEN_TEMPLATE
    )
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    text = {**NARROW, "vocab_size": 152064, "rope_parameters": rope, "max_position_embeddings": 4096}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {"fullatt_block_indexes": [1]}
    ids = {"image_token_id": 151655, "video_token_id": 151656}
    ids |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
    return (
        Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)),
        processor,
        (140, 84),
    )


@pytest.fixture(scope="module", params=[llava, qwen], ids=["llava-1.5", "qwen2.5-vl"])
def checkpoint(request):
    """Model with random weights, processor, pictures, token tables (made once: the vocabularies are large)."""
    torch.manual_seed(0)
    model, processor, size = request.param()
    model.generation_config.pad_token_id = 2
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for _ in range(2)]
    tables = token_tables(processor.tokenizer, model.get_output_embeddings().weight.shape[0])
    return model.eval(), processor, pictures, tables


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_save_reload_compress(checkpoint, kind, tmp_path, monkeypatch):
    model, processor, pictures, tables = checkpoint
    monkeypatch.setattr("dualstream.train.decoder_classes.token_tables", lambda *_: tables)
    config = DistillationConfig(
        output_dir=str(tmp_path / "run"),
        decoder_kind=kind,
        max_classes=20,
        teacher_depth=1,
        max_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        loss_chunk_size=64,
        logging_steps=1,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    unembedding = model.get_output_embeddings().weight.detach()
    classes = read_classes(config, model, processor, pictures) if kind == "pruned" else None
    options = () if classes is None else (classes.token_classes, classes.class_tokens)
    decoder = VisualDecoder.initialized(kind, unembedding, *options)
    decoder.meaningless, decoder.text_class = (table.clone() for table in tables)
    start = decoder.own_parameter.detach().clone()
    trainer = VisualDecoderDistillationTrainer(decoder, model, processor, config, pictures)
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert np.isfinite(row["loss"]) and row["loss"] > 0
    moved = (decoder.own_parameter - start).abs()
    assert 0 < moved.max() < 0.011 and bool(decoder.own_parameter.isfinite().all())  # one AdamW step of 0.01

    trainer.save_model(str(tmp_path / "decoder"))
    loaded = VisualDecoder.from_pretrained(tmp_path / "decoder")
    assert loaded.kind == kind and torch.equal(loaded.own_parameter, decoder.own_parameter)
    if kind != "linear":
        assert (tmp_path / "decoder" / "visual_decoder.safetensors").stat().st_size < 4 * unembedding.numel()
    inputs = build_inputs(processor, pictures, ["word1 word2", "word2"])
    with compressing(model, method="rle", decoder=loaded), torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        report = model.last_compression
    assert output.shape[0] == 2
    cells = [576, 576] if inputs.get("image_grid_thw") is None else [5 * 3, 5 * 3]
    assert [image.visual_tokens for image in report.images] == cells
    assert all(1 <= image.kept_tokens <= image.visual_tokens for image in report.images)
