"""A stock checkpoint with the files of a trained decoder beside its weights: ours takes it, stock ignores it."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from dualstream.modeling import (
    LlavaWithVisualDecoder,
    VisualDecoder,
    compressing,
    infer_class,
    load_model,
    read_visual_tokens,
)
from dualstream.modeling.decoder_files import CONFIG_NAME, WEIGHTS_NAME, holds_decoder
from dualstream.modeling.visual_decoder import KINDS

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
VOCAB, WIDTH = 200, 64
INFO = {"output_loading_info": True}


def make_decoder(kind="pruned", model_type="", tables=True):
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    decoder = VisualDecoder(VOCAB, WIDTH, kind, 4 if kind == "pruned" else None)
    if kind == "pruned":
        decoder.set_classes(torch.arange(VOCAB) % 4, torch.arange(4) + 8)
    with torch.no_grad():
        decoder.own_parameter.copy_(torch.randn(decoder.own_parameter.shape, generator=generator))
    if tables:
        decoder.meaningless.copy_(torch.arange(VOCAB) % 2 == 0)
        decoder.text_class.copy_(torch.arange(VOCAB))
    decoder.training_facts, decoder.model_type = {"steps": 9}, model_type
    return decoder


@pytest.fixture(scope="module")
def stock_folder(tiny_model, tmp_path_factory):
    """A stock LLaVA checkpoint with its processor, no decoder; tests copy it."""
    folder = tmp_path_factory.mktemp("stock")
    tiny_model("llava").model.save_pretrained(folder)
    words = {f"word{i}": i for i in range(190)} | {"<image>": 190}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="word1")),
        unk_token="word1",
        additional_special_tokens=["<image>"],
    )
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(images, tokenizer, 8, "default", image_token="<image>").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(stock_folder, tmp_path):
    return shutil.copytree(stock_folder, tmp_path / "model")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_our_classes_take_it_and_stock_classes_do_not(kind, family, tiny_model, tmp_path):
    tiny, decoder = tiny_model(family), make_decoder(kind, family)
    tiny.model.save_pretrained(tmp_path)
    decoder.save_pretrained(tmp_path)
    ours, info = infer_class(tiny.model).from_pretrained(tmp_path, **INFO)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert ours.visual_decoder.kind == ours.config.visual_decoder_kind == kind
    assert ours.visual_decoder.training_facts == {"steps": 9} and ours.config.visual_decoder_trained
    assert not ours.visual_decoder.own_parameter.requires_grad
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(ours.visual_decoder.state_dict()[name], tensor), name

    stock, info = AutoModelForImageTextToText.from_pretrained(tmp_path, **INFO)
    assert type(stock) is type(tiny.model)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    inputs = tiny.inputs(["titt"])
    with torch.no_grad():
        assert torch.equal(stock(**inputs).logits, tiny.model(**inputs).logits)

    expected = read_visual_tokens(stock, inputs, decoder=decoder).ids
    with compressing(ours, "rle_drop_top1") as model:
        model.generate(**inputs, max_new_tokens=1)
        assert torch.equal(model.last_compression.ids, expected)

    ours.save_pretrained(tmp_path / "ours")
    assert not holds_decoder(tmp_path / "ours"), "it travels in the weights"
    again = infer_class(tiny.model).from_pretrained(tmp_path / "ours")
    assert torch.equal(read_visual_tokens(again, inputs).ids, expected)


def test_load_model_picks_our_class(folder, tiny_model):
    assert type(load_model(folder, device="cpu")[0]) is LlavaForConditionalGeneration
    make_decoder().save_pretrained(folder)
    model, processor = load_model(folder, device="cpu")
    assert type(model) is LlavaWithVisualDecoder and isinstance(processor, LlavaProcessor) and not model.training
    assert type(load_model(folder, device="cpu", visual_decoder=False)[0]) is LlavaForConditionalGeneration
    half = load_model(folder, device="cpu", dtype="bfloat16")[0]
    assert half.dtype == half.visual_decoder.weight.dtype == torch.bfloat16
    inputs = tiny_model("llava").inputs(["titt"])
    expected = read_visual_tokens(tiny_model("llava").model, inputs, decoder=make_decoder()).ids
    assert torch.equal(read_visual_tokens(model, inputs).ids, expected)


def test_tables_of_the_decoder_win_and_the_tokenizer_fills_missing_ones(folder):
    make_decoder().save_pretrained(folder)
    assert LlavaWithVisualDecoder.from_pretrained(folder).visual_decoder.meaningless[:4].tolist() == [1, 0, 1, 0]
    make_decoder(tables=False).save_pretrained(folder)
    decoder = LlavaWithVisualDecoder.from_pretrained(folder).visual_decoder
    assert decoder.has_token_tables and decoder.meaningless[:4].tolist() == [0, 1, 0, 0]  # 1 is the unknown token


def test_a_decoder_of_another_model_is_refused(folder):
    for decoder in (
        VisualDecoder(VOCAB, 32, "factored"),
        VisualDecoder(150, WIDTH),
        make_decoder("linear", "qwen2_vl"),
    ):
        decoder.save_pretrained(folder)
        with pytest.raises(ValueError, match=rf"decoder from {folder} has .* belongs to another model"):
            load_model(folder)
        with pytest.raises(ValueError, match="belongs to another model"):
            LlavaWithVisualDecoder.from_pretrained(folder)
    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is LlavaForConditionalGeneration
    (folder / CONFIG_NAME).unlink()
    (folder / WEIGHTS_NAME).unlink()
    model = LlavaWithVisualDecoder.from_pretrained(folder)
    assert model.visual_decoder.kind == "linear", "a failed load leaves nothing behind"


def test_half_a_decoder_is_refused(folder):
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        make_decoder().save_pretrained(folder)
        (folder / name).unlink()
        for load in (load_model, LlavaWithVisualDecoder.from_pretrained):
            with pytest.raises(ValueError, match=f"half of a visual decoder: the file {name} is missing"):
                load(folder)
        assert type(load_model(folder, visual_decoder=False)[0]) is LlavaForConditionalGeneration


def test_a_broken_decoder_is_refused(folder):
    make_decoder().save_pretrained(folder)
    whole = {name: (folder / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)}
    description = json.loads(whole[CONFIG_NAME])
    broken = {
        WEIGHTS_NAME: [whole[WEIGHTS_NAME][:100], whole[WEIGHTS_NAME][:-8], b""],
        CONFIG_NAME: [
            whole[CONFIG_NAME][:20],
            b"[]",
            *(
                json.dumps({**description, **change}).encode()
                for change in ({"kind": "deep"}, {"num_classes": 3}, {"kind": "linear"}, {"kind": "factored"})
            ),
        ],
    }
    for name, contents in broken.items():
        for content in contents:
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match="does not hold a readable visual decoder"):
                load_model(folder)
        (folder / name).write_bytes(whole[name])
    assert load_model(folder)[0].visual_decoder.num_classes == 4


def test_saving_over_a_decoder_replaces_it_whole(folder, monkeypatch):
    """A process that dies while it writes leaves the old weights readable."""
    make_decoder().save_pretrained(folder)

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dualstream.modeling.decoder_files.os.replace", die)
        with pytest.raises(KeyboardInterrupt):
            make_decoder("factored").save_pretrained(folder)
    assert VisualDecoder.from_pretrained(folder).kind == "pruned"
    make_decoder("factored").save_pretrained(folder)
    assert VisualDecoder.from_pretrained(folder).kind == "factored"


def test_files_beside_one_of_our_checkpoints_are_ignored_with_a_warning(folder, tmp_path, caplog):
    make_decoder("factored").save_pretrained(folder)
    LlavaWithVisualDecoder.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    make_decoder("pruned").save_pretrained(tmp_path / "ours")
    model = LlavaWithVisualDecoder.from_pretrained(tmp_path / "ours")
    assert model.visual_decoder.kind == "factored"
    assert "decoder files beside them are ignored" in caplog.text


@pytest.mark.parametrize("base", ["stock", "stock with another", "ours"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_by_itself_is_read_with(kind, base, folder, tmp_path):
    decoder = make_decoder(kind)
    decoder.save_pretrained(tmp_path / "decoder")
    if base == "stock with another":
        make_decoder("factored" if kind == "pruned" else "pruned").save_pretrained(folder)
    if base == "ours":
        LlavaWithVisualDecoder.from_pretrained(folder).save_pretrained(tmp_path / "ours")
        LlavaProcessor.from_pretrained(folder).save_pretrained(tmp_path / "ours")
        folder = tmp_path / "ours"
    stock = LlavaForConditionalGeneration.from_pretrained(folder) if base != "ours" else None
    for given in (tmp_path / "decoder", str(tmp_path / "decoder"), decoder):
        model, info = LlavaWithVisualDecoder.from_pretrained(folder, decoder=given, **INFO)
        assert model.visual_decoder.kind == model.config.visual_decoder_kind == kind
        assert torch.equal(model.visual_decoder.own_parameter, decoder.own_parameter)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert not any(parameter.requires_grad for parameter in model.visual_decoder.parameters())
        if stock is not None:
            assert torch.equal(model.get_output_embeddings().weight, stock.get_output_embeddings().weight)
    loaded, _ = load_model(folder, decoder=tmp_path / "decoder")
    assert isinstance(loaded, LlavaWithVisualDecoder) and loaded.visual_decoder.kind == kind
    model.save_pretrained(tmp_path / "saved")
    again = LlavaWithVisualDecoder.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.visual_decoder.own_parameter, decoder.own_parameter)


def test_a_decoder_that_is_none_or_of_another_model_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="holds no visual decoder"):
        load_model(folder, decoder=tmp_path)
    with pytest.raises(ValueError, match="visual_decoder=False"):
        load_model(folder, visual_decoder=False, decoder=make_decoder())
    make_decoder(model_type="qwen2_vl").save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match="qwen2_vl"):
        load_model(folder, decoder=tmp_path / "decoder")


def test_subfolder(folder, tmp_path):
    make_decoder("factored").save_pretrained(folder)
    model = LlavaWithVisualDecoder.from_pretrained(tmp_path, subfolder="model")
    assert torch.equal(model.visual_decoder.transform, make_decoder("factored").transform)


def offloaded(folder, part, tmp_path):
    """The model with one part on disk."""
    device_map = {**dict.fromkeys(("model", "lm_head", "visual_decoder"), "cpu"), part: "disk"}
    return LlavaWithVisualDecoder.from_pretrained(folder, device_map=device_map, offload_folder=str(tmp_path / "disk"))


def test_a_device_map_that_sends_the_decoder_to_disk(folder, tiny_model, tmp_path):
    """It stays in memory: only what the checkpoint's own weights hold can be read from disk."""
    inputs = tiny_model("llava").inputs(["titt"])
    stock = read_visual_tokens(tiny_model("llava").model, inputs)
    model = offloaded(folder, "visual_decoder", tmp_path)
    assert torch.equal(read_visual_tokens(model, inputs).ids, stock.ids)
    make_decoder("factored").save_pretrained(folder)
    model = offloaded(folder, "visual_decoder", tmp_path)
    assert torch.equal(model.visual_decoder.transform, make_decoder("factored").transform)
    expected = read_visual_tokens(tiny_model("llava").model, inputs, decoder=make_decoder("factored")).ids
    assert torch.equal(read_visual_tokens(model, inputs).ids, expected)
    model.generate(**inputs, max_new_tokens=1, compression="rle_drop_top1")
    assert torch.equal(model.last_compression.ids, expected)


def test_a_device_map_that_sends_the_unembedding_to_disk(folder, tiny_model, tmp_path):
    """Only a decoder that borrows it minds."""
    inputs = tiny_model("llava").inputs(["titt"])
    make_decoder("pruned").save_pretrained(folder)
    model = offloaded(folder, "lm_head", tmp_path)
    expected = read_visual_tokens(tiny_model("llava").model, inputs, decoder=make_decoder("pruned")).ids
    assert torch.equal(read_visual_tokens(model, inputs).ids, expected)
    model.generate(**inputs, max_new_tokens=1, compression="rle")
    assert torch.equal(model.last_compression.ids, expected)
    make_decoder("factored").save_pretrained(folder)
    model = offloaded(folder, "lm_head", tmp_path)
    with pytest.raises(ValueError, match="offloaded; load the model with a device_map that keeps lm_head"):
        model.generate(**inputs, max_new_tokens=1, compression="rle")


def test_an_adapter_takes_the_decoder_of_its_base(folder, tiny_model, tmp_path):
    make_decoder("factored").save_pretrained(folder)
    base = LlavaForConditionalGeneration.from_pretrained(folder)
    get_peft_model(base, LoraConfig(target_modules="all-linear", r=2)).save_pretrained(tmp_path / "adapter")
    model = LlavaWithVisualDecoder.from_pretrained(tmp_path / "adapter")
    assert torch.equal(model.visual_decoder.transform, make_decoder("factored").transform)
    assert model.config.visual_decoder_kind == "factored"


class TestHub:
    """A repository in the local cache of the Hub, without network."""

    @pytest.fixture
    def cache(self, folder, tmp_path):
        """Lay out files as huggingface_hub does; returns the cache folder."""

        def lay_out(files):
            repository = tmp_path / "cache" / "models--someone--model"
            (repository / "refs").mkdir(parents=True)
            (repository / "refs" / "main").write_text("c0ffee")
            snapshot = repository / "snapshots" / "c0ffee"
            shutil.copytree(folder, snapshot, ignore=lambda _, names: set(names) - set(files))
            return {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}

        return lay_out

    def test_with_a_decoder(self, folder, cache):
        make_decoder("factored").save_pretrained(folder)
        arguments = cache([path.name for path in folder.iterdir()])
        model, _ = load_model("someone/model", device="cpu", **arguments)
        assert type(model) is LlavaWithVisualDecoder
        assert torch.equal(model.visual_decoder.transform, make_decoder("factored").transform)
        alone = VisualDecoder.from_pretrained("someone/model", **arguments)
        assert alone.kind == "factored" and alone.origin == "someone/model"
        assert type(AutoModelForImageTextToText.from_pretrained("someone/model", **arguments)) is not type(model)

    def test_without_one_and_half_of_one(self, folder, cache):
        make_decoder("factored").save_pretrained(folder)
        names = [path.name for path in folder.iterdir()]
        arguments = cache([name for name in names if not name.startswith("visual_decoder")])
        assert type(load_model("someone/model", device="cpu", **arguments)[0]) is LlavaForConditionalGeneration
        with pytest.raises(ValueError, match="someone/model holds no visual decoder"):
            VisualDecoder.from_pretrained("someone/model", **arguments)
        snapshot = next((folder.parent / "cache").rglob("c0ffee"))
        shutil.copy(folder / CONFIG_NAME, snapshot)
        with pytest.raises(ValueError, match=f"half of a visual decoder: the file {WEIGHTS_NAME} is missing"):
            load_model("someone/model", device="cpu", **arguments)

    def test_unreachable(self):
        with pytest.raises(ValueError, match="neither a folder nor a Hub repository that can be reached"):
            VisualDecoder.from_pretrained("/no/such/folder")


def test_training_continues_with_the_decoder_in_place(folder, tiny_model):
    """deepcopy, state_dict and a second load in the same process see no trace of the loading."""
    make_decoder("factored").save_pretrained(folder)
    model = LlavaWithVisualDecoder.from_pretrained(folder)
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    plain = LlavaWithVisualDecoder.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(plain.visual_decoder.transform, twin.visual_decoder.transform)
