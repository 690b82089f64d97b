"""The command from end to end on an embedded model, and the report drawn from the file it wrote."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchFeature

from dualstream.cli import main
from dualstream.eval.decoder_comparison import SHIPPED, ComparisonSettings, collect_decoders, draw_pictures
from dualstream.eval.decoder_metrics import BASELINE, GAIN, classes_of, measure_decoder, other_share, read_batch
from dualstream.eval.decoder_questions import CONTROL_MAP, ORACLE
from dualstream.eval.decoder_report import draw_figure
from dualstream.eval.decoder_table import ANSWERS, FIGURE, PER_IMAGE, SUMMARY
from dualstream.eval.scene_questions import FULL
from dualstream.modeling import VisualDecoder, load_model
from dualstream.processing import register_processors

N, QUESTIONS = 6, 6
OPTIONS = ("--images", str(N), "--questions", str(QUESTIONS), "--split", "validation", "--image-size", "96")


def frequent_classes(vocab_size: int, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A class for each of the first tokens, the rest together."""
    return torch.arange(vocab_size).clamp(max=kept - 1).int(), torch.arange(kept)


@pytest.fixture(scope="module")
def embedded():
    register_processors()
    return load_model("tiny-llava", device="cpu")


@pytest.fixture(scope="module")
def folders(embedded, tmp_path_factory):
    """Untrained decoders of every kind, read by the command as any others."""
    model, processor = embedded
    weight = model.get_output_embeddings().weight
    folder = tmp_path_factory.mktemp("decoders")
    for kind in ("linear", "factored", "pruned"):
        classes = frequent_classes(len(weight), 500) if kind == "pruned" else (None, None)
        decoder = VisualDecoder.initialized(kind, weight.detach(), *classes, tokenizer=processor.tokenizer)
        decoder.training_facts = {"note": kind}
        decoder.save_pretrained(folder / kind)
    return [folder / kind for kind in ("linear", "factored", "pruned")]


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """Output folder, exit status and stdout of one run."""
    import contextlib
    import io

    out, stdout = tmp_path_factory.mktemp("out"), io.StringIO()
    with contextlib.redirect_stdout(stdout):
        code = main(["decoders", *OPTIONS, "--decoder", *map(str, folders), "--out", str(out), "--json"])
    return SimpleNamespace(out=out, code=code, stdout=stdout.getvalue())


def test_one_json_object_and_the_same_in_the_file(finished):
    assert finished.code == 0 and finished.stdout.count("\n") == 1
    payload = json.loads(finished.stdout)
    assert payload == json.loads((finished.out / SUMMARY).read_text())
    names = [row["name"] for row in payload["readers"] if row["name"] != SHIPPED]
    assert names == [FULL, BASELINE, "linear", "factored", "pruned", ORACLE, CONTROL_MAP]
    assert payload["class_space"] in ("pruned", SHIPPED)
    assert payload["manifest"]["decoders"]["factored"] == {"note": "factored"}
    for row in payload["readers"]:
        for estimate in (row["agreement"] or {}).values():
            assert estimate["n"] == N and estimate["low"] <= estimate["value"] <= estimate["high"]
        assert row["answers"]["accuracy"]["n"] == QUESTIONS


def test_decoders_that_read_like_the_unembedding_gain_nothing(finished):
    rows = {row["name"]: row for row in json.loads(finished.stdout)["readers"]}
    for name in ("linear", "factored"):
        for figure, estimate in rows[name]["agreement"].items():
            if figure.endswith(GAIN):
                assert (estimate["value"], estimate["low"], estimate["high"]) == (0, 0, 0), figure
        assert rows[name]["answers"][f"difference_to_{BASELINE}"]["value"] == 0
    assert rows["factored"]["agreement"]["top1_of_linear"]["value"] == 1
    assert rows["unembedding"]["agreement"]["top1"]["value"] > rows[CONTROL_MAP]["agreement"]["top1"]["value"]


def test_costs_are_those_of_the_modules(finished, folders):
    rows = {row["name"]: row["cost"] for row in json.loads(finished.stdout)["readers"]}
    for folder in folders:
        decoder = VisualDecoder.from_pretrained(folder)
        cost = rows[folder.name]
        assert (cost["kind"], cost["num_classes"]) == (decoder.kind, decoder.num_classes)
        assert (cost["parameters"], cost["multiply_adds"]) == (decoder.num_own_parameters, decoder.multiply_adds)
    assert rows[BASELINE]["parameters"] == 0 and rows[ORACLE]["share_of_llm_token"] == 1
    assert rows[FULL] is None and rows[CONTROL_MAP] is None


def test_single_rows_are_on_disk_and_give_the_means(finished):
    from datasets import Dataset

    rows = json.loads(finished.stdout)["readers"]
    agreement = Dataset.from_parquet(str(finished.out / PER_IMAGE)).to_list()
    for row in rows:
        own = [line for line in agreement if line["reader"] == row["name"]]
        assert len(own) == (N if row["agreement"] else 0)
        if own:
            assert np.mean([line["top1"] for line in own]) == pytest.approx(row["agreement"]["top1"]["value"])
    answers = Dataset.from_parquet(str(finished.out / ANSWERS)).to_list()
    assert len(answers) == QUESTIONS * len(rows)
    for row in rows:
        correct = [line["correct"] for line in answers if line["arm"] == row["name"]]
        assert np.mean(correct) == pytest.approx(row["answers"]["accuracy"]["value"])


def test_the_figure_is_drawn_from_the_file_alone(finished, tmp_path):
    target = tmp_path / "again.png"
    draw_figure(finished.out / SUMMARY, target)
    assert target.read_bytes() == (finished.out / FIGURE).read_bytes()
    with Image.open(target) as picture:
        assert picture.format == "PNG" and min(picture.size) > 200


def test_text_tables_and_photos_without_questions(folders, tmp_path, capsys):
    draws = np.random.default_rng(0)
    for number in range(3):
        noise = draws.integers(0, 255, (60 + number, 90, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    arguments = ["--photos", str(tmp_path), "--questions", "0", "--depth", "2", "--no-final-norm"]
    assert main(["decoders", *arguments, "--decoder", str(folders[2])]) == 0
    shown = capsys.readouterr().out
    assert "after block 2, without final norm, on 3 pictures" in shown
    assert "held-out questions" not in shown and "Qwen2.5-VL-7B" in shown
    second_pass = next(line for line in shown.splitlines() if line.startswith(ORACLE))
    assert second_pass.endswith("40.00")  # 2 of 5 blocks
    widths = {len(line) for line in shown.split("\n\n")[0].splitlines()[2:]}
    assert len(widths) == 1, "columns are aligned"


def test_measure_decoder_agrees_with_the_table(embedded, finished, folders):
    model, processor = embedded
    settings = ComparisonSettings(images=N, split="validation", image_size=96)
    pictures = list(draw_pictures(settings).values())
    pruned = VisualDecoder.from_pretrained(folders[2])
    found = measure_decoder(model, processor, pictures, pruned, batch_size=4)
    row = next(row for row in json.loads(finished.stdout)["readers"] if row["name"] == "pruned")
    for name in ("top1", "boundary_f1", "kept_ratio_difference_by_id", "other_share", "top1" + GAIN):
        assert found[name].value == pytest.approx(row["agreement"][name]["value"], abs=0.02), name
    assert {"top1_by_class", "top1_by_class" + GAIN} <= found.keys()


class StubProcessor:
    """Prompts of a tiny random model, one image each; the pictures themselves are not looked at."""

    chat_template = "none"

    def __init__(self, tiny):
        self.tiny = tiny

    def apply_chat_template(self, conversations, **_):
        return conversations

    def __call__(self, text, **_):
        return BatchFeature(self.tiny.inputs(["tit"] * len(text)))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_every_family_is_read_image_by_image(tiny_model, family):
    tiny = tiny_model(family)
    decoder = VisualDecoder.from_unembedding(tiny.model.get_output_embeddings().weight)
    readings = read_batch(tiny.model, StubProcessor(tiny), [None] * 3, {"plain": decoder})
    tiles = (1, 2, 3) if family == "internvl" else (1, 1, 1)
    assert torch.bincount(readings.image_index).tolist() == list(tiles)
    cells = int(readings.grids.prod(-1).sum())
    assert readings.students["plain"].shape == (cells, 5) and readings.teacher.shape == (cells, 2)
    assert readings.other_picture().shape == (cells, 2)


def test_a_pruned_decoder_knows_what_it_cannot_name():
    readings = SimpleNamespace(
        teacher=torch.tensor([[0], [7], [8], [1]]), grids=torch.tensor([[1, 2], [2, 1]]), image_index=torch.arange(2)
    )
    pruned = VisualDecoder.initialized("pruned", torch.randn(9, 4), *frequent_classes(9, 3))
    assert classes_of(pruned).tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 2]
    assert other_share(readings, pruned).tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="only a pruned decoder has the class 'other', this one is 'linear'"):
        other_share(readings, VisualDecoder(9, 4))


def test_the_models_own_decoder_has_a_row_once_it_is_another_than_the_unembedding(folders):
    model, _ = load_model("tiny-llava", device="cpu", visual_decoder=True)
    weight = model.get_output_embeddings().weight
    model.set_visual_decoder(VisualDecoder.from_unembedding(weight))
    assert list(collect_decoders(model, [])) == [BASELINE]
    for folder in folders[1:]:
        model.set_visual_decoder(VisualDecoder.from_pretrained(folder))
        found = collect_decoders(model, [])
        assert list(found) == [BASELINE, SHIPPED] and found[SHIPPED] is model.visual_decoder


def test_bad_input_is_refused(embedded, folders, tmp_path, capsys):
    model, _ = embedded
    with pytest.raises(ValueError, match="there is a row 'linear' already"):
        collect_decoders(model, [str(folders[0]), str(folders[0])])
    VisualDecoder(10, 4).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="belongs to another model"):
        collect_decoders(model, [str(tmp_path / "small")])
    VisualDecoder(10, 4).save_pretrained(tmp_path / ORACLE)
    with pytest.raises(ValueError, match="there is a row 'llm map' already"):
        collect_decoders(model, [str(tmp_path / ORACLE)])
    for arguments, message in (
        (["--images", "1"], "images must be at least 2, got 1"),
        (["--questions", "-1"], "questions must be at least 0, got -1"),
        (["--photos", str(tmp_path / ORACLE), "--images", "1"], "images must be at least 2"),
    ):
        assert main(["decoders", *arguments]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["decoders", "--photos", str(tmp_path / "empty")]) == 2
    assert "holds 0 files; at least 2 pictures are needed" in capsys.readouterr().err
