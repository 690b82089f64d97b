"""Corpora against independent readings, rebuilt bit by bit, shared among workers, with pictures of every kind."""

import importlib.util
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dualstream.cli import main
from dualstream.data_builders.scenes import build_scenes
from dualstream.data_builders.token_maps import (
    BuildOptions,
    MapReader,
    Share,
    build_shards,
    compare_corpora,
    finalize,
    open_corpus,
    open_source,
    token_map_of_row,
)
from dualstream.modeling import VisualDecoder, load_model
from dualstream.processing import build_inputs, load_image, read_image

SIZES = ((96, 96), (60, 130), (130, 60), (96, 96), (200, 200), (33, 47), (96, 96), (60, 130), (1, 1), (300, 20))


@pytest.fixture(scope="session")
def readers():
    """Function (model, depths, **options) -> reader; models are loaded once."""
    loaded = {}

    def get(name: str, depths: str = "connector,2,last", **options) -> MapReader:
        if name not in loaded:
            loaded[name] = load_model(name, device="cpu")
        return MapReader(*loaded[name], name, depths, **options)

    return get


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder of pictures of odd sizes and modes; two of them cannot be read."""
    root = tmp_path_factory.mktemp("photographs") / "odd"
    root.mkdir()
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        image = image.convert("L") if number == 3 else image
        image.save(root / f"{number:02d}.png")
    (root / "04b.png").write_bytes((root / "04.png").read_bytes()[:500])
    (root / "07b.jpg").write_bytes(b"no picture at all")
    return root


def build(source, reader, out, share=None, batch_size=3, rows_per_shard=4, finish=True):
    source = open_source(str(source)) if isinstance(source, (str, Path)) else source
    corpus = open_corpus(source, reader, BuildOptions(batch_size, rows_per_shard), out)
    report = build_shards(source, reader, corpus, share)
    if finish:
        finalize(corpus, source, reader)
    return corpus, report


def rows_of(out: Path, part: str) -> list[dict]:
    return [row for file in sorted((out / "data" / part).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def assert_row_is_reading(row, token_map, reader):
    """A row says what `read_image`, one picture at a time, says."""
    scores = np.asarray(row["log_probs"])
    np.testing.assert_allclose(scores, token_map.scores, atol=2e-4)
    ids = np.asarray(row["token_ids"])
    settled = np.abs(np.diff(token_map.scores, axis=1)) > 1e-3  # where two readings tie, their order is left open
    clear = np.concatenate([settled, np.ones((len(ids), 1), bool)], axis=1)
    clear[:, 1:] &= settled
    clear[:, -1] = False  # the next best one, which is not kept, may tie with it
    assert clear[:, 0].any()
    np.testing.assert_array_equal(ids[clear], token_map.ids[clear])
    assert [tuple(grid) for grid in row["grids"]] == list(token_map.grids)
    np.testing.assert_allclose(row["boxes"], token_map.geometry.boxes, atol=1e-4)
    rebuilt = token_map_of_row(row, tokenizer=reader.processor.tokenizer)
    assert rebuilt.geometry == token_map.geometry
    if (ids[:, 0] == token_map.ids[:, 0]).all():
        assert rebuilt.words == token_map.words
        assert [(run["token_id"], run["length"]) for run in row["runs"]] == [
            (run.token_id, run.length) for run in token_map.runs
        ]
    assert "".join(run["text"] * run["length"] for run in row["runs"]) == "".join(row["text"])
    assert token_map_of_row(row).words == rebuilt.words


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2-vl"])
def test_every_row_is_what_read_image_says(name, readers, photographs, tmp_path):
    reader = readers(name)
    _, report = build(photographs, reader, tmp_path / "maps")
    assert (report.images, report.rejected, report.shards) == (len(SIZES), 2, 3)
    items = {item.index: item for item in open_source(str(photographs)).items()}
    for depth, part in ((None, "connector"), (2, "llm-2"), (5, "llm-5")):
        rows = rows_of(tmp_path / "maps", part)
        assert [row["index"] for row in rows] == [0, 1, 2, 3, 4, 6, 7, 8, 10, 11]
        for row in rows:
            image = load_image(photographs / row["source_id"])
            assert items[row["index"]].source_id == row["source_id"]
            assert (row["stage"], row["depth"]) == ("connector" if depth is None else "llm", depth)
            assert row["final_norm"] == (depth is not None)
            assert tuple(row["image_size"]) == image.size
            assert row["decoder_kind"] == (
                "unembedding" if depth is not None else reader.provenance(None).decoder_kind
            )
            expected = read_image(reader.model, reader.processor, image, depth=depth, top_k=5)
            assert_row_is_reading(row, expected, reader)


def test_rejects_say_why(readers, photographs, tmp_path):
    build(photographs, readers("tiny-llava", "connector"), tmp_path / "maps")
    rejects = [json.loads(line) for line in (tmp_path / "maps" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["index"], reject["source_id"]) for reject in rejects] == [(5, "04b.png"), (9, "07b.jpg")]
    assert "damaged" in rejects[0]["reason"] and "not a picture" in rejects[1]["reason"]
    written = "".join(path.read_text() for path in (tmp_path / "maps").rglob("*.json*"))
    assert str(photographs.parent) not in written + (tmp_path / "maps" / "README.md").read_text()


def test_workers_together_make_what_one_makes(readers, photographs, tmp_path):
    reader = readers("tiny-qwen2-vl", "connector,last")
    build(photographs, reader, tmp_path / "one")
    reports = []
    for worker in (1, 0, 2):
        corpus, report = build(photographs, reader, tmp_path / "three", Share(3, worker), finish=False)
        reports.append(report)
        assert (corpus.missing() == []) == (worker == 2)
    assert [report.shards for report in reports] == [1, 1, 1]
    finalize(corpus, open_source(str(photographs)), reader)
    result = compare_corpora(tmp_path / "one", tmp_path / "three")
    assert result.equal, result.examples
    assert result.identical_files == result.files == 6
    assert result.rows == {"connector": 10, "llm-5": 10}
    for name in ("README.md", "manifest.json", "rejects.jsonl", "figures/llm-5.png"):
        one, three = ((tmp_path / folder / name).read_bytes() for folder in ("one", "three"))
        assert one.replace(b'"one"', b'"three"') == three, name


@pytest.mark.parametrize("harm", ["no record", "no file", "cut off", "other configuration", "half a shard"])
def test_what_is_not_whole_is_made_again_bit_by_bit(harm, readers, tmp_path):
    reader = readers("tiny-llava", "connector,last")
    corpus, _ = build("scenes:test:10", reader, tmp_path / "maps")
    before = {path: path.read_bytes() for path in (tmp_path / "maps").rglob("*") if path.is_file()}
    file, record = corpus.file(1, None), corpus.record_file(1)
    if harm == "no record":
        record.unlink()
    elif harm == "no file":
        file.unlink()
    elif harm == "cut off":
        file.write_bytes(before[file][:-100])
    elif harm == "other configuration":
        record.write_text(record.read_text().replace(corpus.digest, "0" * 64))
    else:  # killed between the two files of the shard
        record.unlink()
        file.unlink()
    _, report = build("scenes:test:10", reader, tmp_path / "maps")
    assert (report.shards, report.skipped, report.images) == (1, 2, 4)
    after = {path: path.read_bytes() for path in (tmp_path / "maps").rglob("*") if path.is_file()}
    assert after == before


def test_a_finished_corpus_costs_nothing_more(readers, tmp_path):
    reader = readers("tiny-llava", "connector")
    build("scenes:test:6", reader, tmp_path / "maps")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "maps").rglob("*.parquet")}
    _, report = build("scenes:test:6", reader, tmp_path / "maps", finish=False)
    assert (report.shards, report.skipped) == (0, 2)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_another_configuration_or_a_strangers_folder_is_refused(readers, photographs, tmp_path):
    reader = readers("tiny-llava", "connector")
    build("scenes:test:4", reader, tmp_path / "maps", finish=False)
    others = [
        ("scenes:test:5", reader, 3, "source is .* there and .* here"),
        ("scenes:test:4", readers("tiny-llava", "connector", top_k=2), 3, "top_k is 5 there and 2 here"),
        ("scenes:test:4", readers("tiny-llava", "connector,1"), 3, "depths is"),
        ("scenes:test:4", readers("tiny-qwen2-vl", "connector"), 3, "model is 'tiny-llava' there"),
        ("scenes:test:4", reader, 2, "batch_size is 3 there and 2 here"),
    ]
    for source, other, batch_size, message in others:
        with pytest.raises(ValueError, match=f"another configuration: .*{message}"):
            build(source, other, tmp_path / "maps", batch_size=batch_size)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.txt\)"):
        build("scenes:test:4", reader, tmp_path / "full")
    with pytest.raises(ValueError, match="lies within the source"):
        build(photographs, reader, photographs / "maps")


@pytest.mark.parametrize("limit", [None, 7])
def test_a_stream_of_unknown_length_in_turns(limit, readers, tmp_path):
    build_scenes("test", 11).to_parquet(tmp_path / "scenes.parquet")
    reader = readers("tiny-llava", "connector")

    def source():
        return open_source(str(tmp_path / "scenes.parquet"), split="test", limit=limit)

    corpus, _ = build(source(), reader, tmp_path / "one", rows_per_shard=3)
    count = 11 if limit is None else limit
    assert corpus.count == count
    for worker in (1, 0, 1):
        last, report = build(source(), reader, tmp_path / "two", Share(2, worker), rows_per_shard=3, finish=False)
    assert report.shards == 0 and last.missing() == []
    result = compare_corpora(tmp_path / "one", tmp_path / "two")
    assert [difference for difference in result.examples if "rejects" not in difference] == []
    assert result.rows == {"connector": count}
    # the length is found again from the middle, also where the last shard is there and only the end was not noted
    for left in ([], [last.num_shards - 1], range(1, last.num_shards)):
        (tmp_path / "two" / ".build" / "end.json").unlink()
        for shard in left:
            last.record_file(shard).unlink()
        for worker in (0, 1):
            again, _ = build(source(), reader, tmp_path / "two", Share(2, worker), rows_per_shard=3, finish=False)
        assert again.count == count and again.missing() == []
    assert compare_corpora(tmp_path / "one", tmp_path / "two").rows == {"connector": count}


def test_it_loads_typed_streamed_and_in_parts(readers, photographs, tmp_path):
    reader = readers("tiny-qwen2-vl", "connector,last", top_k=3)
    build(photographs, reader, tmp_path / "maps")
    path, cache = str(tmp_path / "maps"), str(tmp_path / "cache")
    assert datasets.get_dataset_config_names(path) == ["all", "connector", "llm-5"]
    everything = datasets.load_dataset(path, split="train", cache_dir=cache)
    assert everything.num_rows == 20 and set(everything["stage"]) == {"connector", "llm"}
    for part in ("connector", "llm-5"):
        loaded = datasets.load_dataset(path, part, split="train", cache_dir=cache)
        streamed = datasets.load_dataset(path, part, split="train", streaming=True)
        assert loaded.features == streamed.features
        assert loaded.features["token_ids"] == datasets.List(datasets.List(datasets.Value("int32"), length=3))
        assert list(loaded) == list(streamed) == rows_of(tmp_path / "maps", part)
    metadata = pq.read_metadata(tmp_path / "maps" / "data" / "llm-5" / "train-00000.parquet").row_group(0).column(3)
    assert (metadata.compression, metadata.has_offset_index, metadata.has_column_index) == ("ZSTD", True, True)


def test_a_visual_decoder_reads_the_connector_and_is_named(readers, tmp_path):
    model = readers("tiny-llava").model
    decoder = VisualDecoder.initialized("linear", model.get_output_embeddings().weight.detach() * 0.5)
    reader = readers("tiny-llava", "connector,last", decoder=decoder)
    build("scenes:test:3", reader, tmp_path / "decoded")
    build("scenes:test:3", readers("tiny-llava", "connector,last"), tmp_path / "plain")
    decoded, plain = (rows_of(tmp_path / name, "connector") for name in ("decoded", "plain"))
    image = next(open_source("scenes:test:3").items()).load()
    expected = read_image(model, reader.processor, image, top_k=5, decoder=decoder)
    assert_row_is_reading(decoded[0], expected, reader)
    assert decoded[0]["decoder_kind"] == "linear"
    assert decoded[0]["decoder_hash"] != plain[0]["decoder_hash"]
    assert rows_of(tmp_path / "decoded", "llm-5") == rows_of(tmp_path / "plain", "llm-5")


def test_when_nothing_can_be_read_the_corpus_says_so(readers, tmp_path):
    (tmp_path / "bad").mkdir()
    for number in range(3):
        (tmp_path / "bad" / f"{number}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 3 pictures of bad could be read"):
        build(tmp_path / "bad", readers("tiny-llava", "connector"), tmp_path / "maps")


# --- the five families, as random models with processors made for them ---


@pytest.fixture(scope="module")
def make_processor():
    path = Path(__file__).parents[1] / "processing" / "conftest.py"
    spec = importlib.util.spec_from_file_location("processing_conftest", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_processor


@pytest.fixture
def family_reader(new_tiny_model, make_processor):
    """Function family -> reader of a random model whose vocabulary and grid are those of a real processor."""

    def get(family: str) -> MapReader:
        model = new_tiny_model(family).model
        if family == "llava":
            processor = make_processor(family, edge=32, patch_size=8)
        elif family == "internvl":
            processor = make_processor(family, size={"height": 64, "width": 64}, max_patches=4)
        else:
            processor = make_processor(family, patch_size=8, size={"shortest_edge": 1024, "longest_edge": 6400})
        torch.manual_seed(0)
        model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
        model.config.image_token_id = processor.image_token_id
        for name in ("video_token", "vision_start_token", "vision_end_token"):
            if hasattr(model.config, f"{name}_id") and hasattr(processor, name):
                setattr(
                    model.config, f"{name}_id", processor.tokenizer.convert_tokens_to_ids(getattr(processor, name))
                )
        return MapReader(model, processor, family, "connector,0,1,2", top_k=4)

    return get


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_every_family(family, family_reader, photographs, tmp_path):
    reader = family_reader(family)
    build(photographs, reader, tmp_path / "maps")
    for depth, part in ((None, "connector"), (0, "llm-0"), (1, "llm-1"), (2, "llm-2")):
        rows = rows_of(tmp_path / "maps", part)
        assert len(rows) == len(SIZES)
        for row in rows[::3]:
            image = load_image(photographs / row["source_id"])
            inputs = build_inputs(reader.processor, [image], ["x"])
            placeholders = int((inputs["input_ids"] == reader.model.config.image_token_id).sum())
            assert placeholders == len(row["token_ids"]) == sum(rows * cols for rows, cols in row["grids"])
            expected = read_image(reader.model, reader.processor, image, depth=depth, top_k=4)
            assert_row_is_reading(row, expected, reader)
    assert len({tuple(map(tuple, row["grids"])) for row in rows}) > (1 if family != "llava" else 0)


def test_command_reports_and_errs(tmp_path, capsys):
    arguments = [
        "build",
        "token-maps",
        "--images",
        "scenes:test:5",
        "--device",
        "cpu",
        "--rows-per-shard",
        "2",
        "--json",
    ]
    out = ["--out", str(tmp_path / "maps")]
    assert main([*arguments, *out, "--num-shards", "2", "--shard", "0"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["complete"], first["missing_shards"], first["shards"], first["workers"]) == (False, 1, 2, 2)
    assert main([*arguments, *out, "--finalize"]) == 2
    assert "1 of 3 shards are missing" in json.loads(capsys.readouterr().out)["error"]
    assert main([*arguments, *out, "--num-shards", "2", "--shard", "1", "--license", "cc0-1.0"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert (second["complete"], second["missing_shards"], second["images"]) == (True, 0, 2)
    assert "license: cc0-1.0" in (tmp_path / "maps" / "README.md").read_text()
    assert main(arguments) == 2
    assert "--out is needed" in json.loads(capsys.readouterr().out)["error"]
    assert main([*arguments, "--out", str(tmp_path / "new"), "--depths", "9"]) == 2
    assert "accepted are connector, last and 0..5" in json.loads(capsys.readouterr().out)["error"]
