"""The parts of a corpus build by themselves: sources, batches, shares, files that are whole or not at all."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dualstream.data_builders.scenes import SPLIT_SEEDS, make_scene, rasterize
from dualstream.data_builders.token_maps import Share, image_hash, open_source
from dualstream.data_builders.token_maps.atomic import atomic_file, read_json, remove_orphans, write_json
from dualstream.data_builders.token_maps.depths import config_name, parse_depths
from dualstream.data_builders.token_maps.images import ImageFacts, Opened, Reject, open_item
from dualstream.data_builders.token_maps.pipeline import Member, form_batches, prefetched
from dualstream.data_builders.token_maps.sources import image_files

FAST = settings(max_examples=60, deadline=None)


def picture(seed: int, width: int = 20, height: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Files whose order by parts differs from their order as strings, and what must be left out."""
    root = tmp_path / "pictures"
    for number, name in enumerate(["a.png", "b/2.png", "b/1.JPG", "b-1/x.webp", "b.png"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(root / name)
    (root / "notes.txt").write_text("no picture")
    (root / ".hidden").mkdir()
    picture(9).save(root / ".hidden" / "z.png")
    return root


def test_folder_is_sorted_by_parts_and_read_from_anywhere(folder):
    expected = sorted(
        (p.relative_to(folder) for p in folder.rglob("*.*") if p.suffix != ".txt" and ".hidden" not in str(p)),
        key=lambda path: path.parts,
    )
    source = open_source(str(folder))
    assert source.count == 5 and source.split == "train"
    ids = [item.source_id for item in source.items()]
    assert ids == [path.as_posix() for path in expected]
    assert [p.relative_to(folder).as_posix() for p in image_files(folder)] == ids
    for start in range(6):
        assert [(item.index, item.source_id) for item in source.items(start)] == list(enumerate(ids))[start:]
    assert [item.source_id for item in open_source(str(folder), limit=2, split="test").items()] == ids[:2]
    assert str(folder.parent) not in str(source.describe())


def test_folder_notices_that_it_has_changed(folder):
    before = open_source(str(folder)).describe()
    assert open_source(str(folder)).describe() == before
    picture(3, 40, 40).save(folder / "a.png")
    assert open_source(str(folder)).describe() != before


def test_scenes_are_the_pictures_of_their_seeds():
    source = open_source("scenes:validation:3:48")
    assert (source.count, source.split) == (3, "validation")
    for item, seed in zip(source.items(), SPLIT_SEEDS["validation"][:3], strict=True):
        assert np.array_equal(np.asarray(item.load()), rasterize(make_scene(seed), 48).image)
        assert item.source_id == f"validation/{seed}"
    assert [item.index for item in source.items(2)] == [2]


def rows_of(count: int) -> datasets.Dataset:
    features = datasets.Features({"picture": datasets.Image(), "name": datasets.Value("string")})
    return datasets.Dataset.from_dict(
        {"picture": [picture(i) for i in range(count)], "name": [f"n{i}" for i in range(count)]}, features=features
    )


@pytest.mark.parametrize("as_file", [True, False])
def test_datasets_are_streamed_from_parquet(tmp_path, as_file):
    for number in range(2):
        rows_of(7).select(range(4 * number, 4 * number + 3 + number % 1)).to_parquet(
            tmp_path / f"train-{number}.parquet"
        )
    path = tmp_path / "train-0.parquet" if as_file else tmp_path
    source = open_source(str(path), id_column="name")
    assert source.count is None
    items = list(source.items())
    assert [item.source_id for item in items] == [f"n{i}" for i in ((0, 1, 2) if as_file else (0, 1, 2, 4, 5, 6))]
    assert [item.index for item in source.items(2)] == list(range(2, len(items)))
    assert image_hash(items[1].load()) == image_hash(picture(1))
    assert [item.source_id for item in open_source(str(path), limit=2).items()] == ["train/0", "train/1"]
    assert str(tmp_path) not in str(source.describe())


def test_sources_that_cannot_be_are_refused(tmp_path, folder):
    rows_of(2).to_parquet(tmp_path / "data.parquet")
    (tmp_path / "empty").mkdir()
    cases = [
        (("nothing",), {}, "is no source of pictures; accepted is"),
        (("scenes:test",), {}, "names no scenes"),
        (("scenes:nowhere:3",), {}, "accepted are train"),
        (("scenes:test:3",), {"limit": 2}, "limit cannot be given"),
        ((str(folder),), {"image_column": "x"}, "image_column cannot be given"),
        ((str(folder),), {"split": "train[:3]"}, "must be a plain name"),
        ((str(folder),), {"limit": 0}, "at least 1"),
        ((str(tmp_path / "data.parquet"),), {"image_column": "name"}, r"its image columns are \['picture'\]"),
        ((str(tmp_path / "data.parquet"),), {"id_column": "other"}, "is no column of data.parquet"),
        ((str(tmp_path / "empty"),), {}, "does not load as a dataset"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            open_source(*arguments, **options)


def test_hash_is_of_size_and_pixels():
    image = picture(0)
    assert image_hash(image) == hashlib.sha256(b"20x12:" + np.asarray(image).tobytes()).hexdigest()
    assert image_hash(image) != image_hash(Image.fromarray(np.asarray(image).reshape(20, 12, 3)))


def test_unreadable_pictures_become_rejects_without_machine_paths(folder):
    (folder / "b.png").write_bytes(b"not a picture")
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:60])
    opened = [open_item(item) for item in open_source(str(folder)).items()]
    rejects = [item for item in opened if isinstance(item, Reject)]
    assert [(reject.index, reject.source_id) for reject in rejects] == [(0, "a.png"), (4, "b.png")]
    assert all(reject.reason and str(folder) not in reject.reason for reject in rejects)


def test_depths():
    assert parse_depths("last, connector,2,connector", 5) == (None, 2, 5)
    assert [config_name(depth) for depth in (None, 0, 12)] == ["connector", "llm-0", "llm-12"]
    for text in ("6", "-1", "", "first", "1.5"):
        with pytest.raises(ValueError, match=r"is no depth of this model; accepted are connector, last and 0\.\.5"):
            parse_depths(text, 5)


def member(place: int, kind: int) -> Member:
    return Member(place, Opened(None, ImageFacts(place, str(place), "", (1, 1))), ((kind, kind),))


@FAST
@given(st.lists(st.integers(1, 6), max_size=60), st.integers(1, 5), st.integers(1, 12))
def test_batches_hold_every_picture_once_and_one_grid_each(kinds, batch_size, max_waiting):
    taken = []
    in_hand = {"count": 0}

    def arriving():
        for place, kind in enumerate(kinds):
            in_hand["count"] += 1
            assert in_hand["count"] <= max_waiting + 1
            yield member(place, kind)

    for batch in form_batches(arriving(), batch_size, max_waiting):
        in_hand["count"] -= len(batch)
        taken += batch
        assert 1 <= len(batch) <= batch_size
        assert len({item.grids for item in batch}) == 1
        assert [item.place for item in batch] == sorted(item.place for item in batch)
    assert sorted(item.place for item in taken) == list(range(len(kinds)))


def test_batches_of_one_grid_are_full():
    batches = list(form_batches((member(place, 1) for place in range(10)), 4))
    assert [[item.place for item in batch] for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_prefetching_keeps_order_runs_ahead_a_little_and_passes_errors():
    asked = []

    def items():
        for number in range(20):
            asked.append(number)
            yield number

    with ThreadPoolExecutor(3) as pool:
        results = prefetched(items(), lambda number: number * number, pool, ahead=4)
        for number, result in enumerate(results):
            assert result == number * number
            assert len(asked) <= number + 5
        with pytest.raises(ZeroDivisionError):
            list(prefetched([1, 0, 1], lambda number: 1 // number, pool, ahead=2))


@FAST
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 40))
def test_shares_split_the_shards(outer, inner, shards):
    made = Counter()
    for worker in range(outer):
        for rank in range(inner):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("WORLD_SIZE", str(inner))
                patch.setenv("RANK", str(rank))
                share = Share.from_environment(outer, worker)
            made.update(range(share.worker, shards, share.workers))
    assert made == Counter(range(shards))


def test_a_share_out_of_range_is_refused(monkeypatch):
    for workers, worker in ((2, 2), (1, -1), (0, 0)):
        with pytest.raises(ValueError, match="must lie within"):
            Share.from_environment(workers, worker)


def test_atomic_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": "ü"})
    assert read_json(path) == {"a": "ü"}
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert read_json(path) == {"a": "ü"}
    assert os.listdir(path.parent) == ["file.json"]
    assert read_json(tmp_path / "absent.json") is None


def test_orphans_of_killed_writers_are_removed_and_living_writers_are_not(tmp_path):
    code = (
        "import os, sys; from pathlib import Path\n"
        "from dualstream.data_builders.token_maps.atomic import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "killed")], check=False)
    assert [name.startswith(".killed.") for name in os.listdir(tmp_path)] == [True]
    with atomic_file(tmp_path / "alive") as file:
        file.write(b"all of it")
        assert remove_orphans(tmp_path) == 1
    assert os.listdir(tmp_path) == ["alive"]
    assert (tmp_path / "alive").read_bytes() == b"all of it"
