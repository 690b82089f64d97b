"""Pictures of a run: sources, separation by content, order, padding, and prompts that end with the image."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dualstream.data_builders.token_maps.images import image_hash
from dualstream.modeling import load_model
from dualstream.train.distillation_config import DistillationConfig
from dualstream.train.image_dataset import (
    NOTHING,
    EpochSampler,
    ImageCollator,
    PaddedImages,
    load_image_sets,
)
from dualstream.train.image_sources import open_images


def picture(seed, size=(20, 14)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def folder_of(path, numbers, suffix=".png"):
    path.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        picture(number).save(path / f"{number:03d}{suffix}")
    return str(path)


def config(tmp_path, **options):
    return DistillationConfig(output_dir=str(tmp_path / "run"), use_cpu=True, **options)


def test_training_never_sees_a_validation_or_test_picture(tmp_path):
    """Copies under other names, in other formats and folders are told by their pixels."""
    train = folder_of(tmp_path / "train", range(10))
    folder_of(tmp_path / "train" / "more", [3, 4])  # further copies inside the training folder
    validation = folder_of(tmp_path / "validation", [3, 20, 30], ".bmp")
    test = folder_of(tmp_path / "test", [7, 30], ".tiff")
    sets = load_image_sets(config(tmp_path, train_images=train, eval_images=validation, test_images=test))
    assert {role: row["images"] for role, row in sets.report.items()} == {"train": 9, "validation": 2, "test": 2}
    assert {role: row["left_out"] for role, row in sets.report.items()} == {"train": 3, "validation": 1, "test": 0}
    shown = [
        {image_hash(images[i]) for i in range(len(images))} for images in (sets.train, sets.validation, sets.test)
    ]
    assert not (shown[0] & shown[1] or shown[0] & shown[2] or shown[1] & shown[2])
    assert shown[0] == {image_hash(picture(number)) for number in (0, 1, 2, 4, 5, 6, 8, 9)}


def test_held_out_pictures_do_not_depend_on_names_or_order(tmp_path):
    one = folder_of(tmp_path / "one", range(12))
    (tmp_path / "two").mkdir()
    for place, number in enumerate([5, 3, 11, 0, 8, 2, 9, 1, 4, 10, 7, 6]):
        picture(number).save(tmp_path / "two" / f"x{place}.png")
    picture(5).save(tmp_path / "two" / "copy.png")
    results = [
        load_image_sets(config(tmp_path, train_images=source, num_eval_images=4))
        for source in (one, str(tmp_path / "two"))
    ]
    assert len(results[0].validation) == 4
    assert results[0].validation.fingerprint() == results[1].validation.fingerprint()
    assert set(results[0].train.hashes) == set(results[1].train.hashes)
    assert not set(results[1].train.hashes) & set(results[1].validation.hashes)


def test_unreadable_pictures_are_counted_or_an_error(tmp_path, caplog):
    train = folder_of(tmp_path / "train", range(4))
    (tmp_path / "train" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    validation = folder_of(tmp_path / "validation", [9])
    options = {"train_images": train, "eval_images": validation}
    sets = load_image_sets(config(tmp_path, **options))
    assert sets.report["train"]["unreadable"] == 1
    assert len(sets.train) == 4
    assert "1 of 5 images" in caplog.text and "broken.png" in caplog.text
    with pytest.raises(ValueError, match=r"broken.png.*unreadable_images=skip"):
        load_image_sets(config(tmp_path, **options, unreadable_images="error"))


def test_hashes_are_kept_for_a_continued_run(tmp_path, monkeypatch):
    options = {"train_images": folder_of(tmp_path / "t", range(3)), "eval_images": folder_of(tmp_path / "v", [9])}
    first = load_image_sets(config(tmp_path, **options), tmp_path)
    assert len(json.loads((tmp_path / "images_train.json").read_text())["hashes"]) == 3
    monkeypatch.setattr("dualstream.train.image_dataset.image_hash", None)  # would fail if it were called
    second = load_image_sets(config(tmp_path, **options), tmp_path)
    assert second.report == first.report


def test_parquet_files_and_folders_of_them(tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    rows = {"picture": [picture(number) for number in range(3)], "label": [0, 1, 2]}
    dataset = Dataset.from_dict(rows, features=Features({"picture": ImageFeature(), "label": Value("int32")}))
    (tmp_path / "data").mkdir()
    dataset.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    for source in (tmp_path / "data", tmp_path / "data" / "train-00000-of-00001.parquet"):
        opened = open_images(str(source))
        assert [image_hash(opened[i]) for i in range(3)] == [image_hash(picture(i)) for i in range(3)]
    with pytest.raises(ValueError, match=r"image_column='label'.*picture"):
        open_images(str(tmp_path / "data"), column="label")


def test_scenes_are_drawn_from_their_split():
    from dualstream.data_builders.scenes import SPLIT_SEEDS, make_scene, rasterize

    opened = open_images("scenes:validation:2:48")
    expected = rasterize(make_scene(SPLIT_SEEDS["validation"][1]), 48).image
    assert len(opened) == 2
    assert np.array_equal(np.asarray(opened[1]), expected)


@pytest.mark.parametrize("source", ["scenes:train", "scenes:train:x", "scenes:nowhere:3", "missing-folder"])
def test_sources_that_do_not_exist(source):
    with pytest.raises(ValueError, match="accepted"):
        open_images(source)


def test_a_folder_without_pictures(tmp_path):
    with pytest.raises(ValueError, match="split"):
        open_images(str(tmp_path))


@given(count=st.integers(1, 40), multiple=st.integers(1, 9), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_every_epoch_shows_every_picture_once_in_its_own_order(count, multiple, seed, epoch):
    sampler = EpochSampler(count, multiple, seed)
    sampler.epoch = epoch
    order = list(sampler)
    assert len(order) == len(sampler) and len(order) % multiple == 0 and len(order) - count < multiple
    assert sorted(order[:count]) == list(range(count))
    assert order[count:] == [NOTHING] * (len(order) - count)
    assert order == list(sampler)


def test_orders_differ_between_epochs_and_seeds():
    orders = set()
    for seed in range(3):
        for epoch in range(3):
            sampler = EpochSampler(20, 4, seed)
            sampler.epoch = epoch
            orders.add(tuple(sampler))
    assert len(orders) == 9
    assert list(EpochSampler(5, 3)) == [0, 1, 2, 3, 4, NOTHING]


def test_padding_is_no_picture():
    padded = PaddedImages([picture(0), picture(1)])
    assert len(padded) == 2
    assert padded[NOTHING] is None
    assert padded[1].size == (20, 14)


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2-vl"])
def test_the_prompt_ends_with_the_image(name):
    _, processor = load_model(name)
    collator = ImageCollator(processor)
    batch = collator([picture(0, (96, 96)), None, picture(1, (60, 120))])
    token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert len(batch["input_ids"]) == 2
    assert (batch["input_ids"][:, -1] == token).all()
    assert collator([None])["input_ids"].shape == (0, 0)
    full = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    assert full.startswith(collator.prompt) and len(full) > len(collator.prompt)


def test_a_template_that_shows_no_image():
    _, processor = load_model("tiny-llava")
    processor.chat_template = "{% for message in messages %}hello{% endfor %}"
    with pytest.raises(ValueError, match="writes no <image>"):
        ImageCollator(processor)


def test_torch_seed_has_no_say():
    sampler = EpochSampler(10, 2, 1)
    torch.manual_seed(0)
    first = list(sampler)
    torch.manual_seed(1)
    assert list(sampler) == first
