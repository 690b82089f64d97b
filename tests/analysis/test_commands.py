"""The commands as a user runs them: pictures of every kind, one JSON object on stdout, errors that help."""

import json

import numpy as np
import pytest
from PIL import Image

from dualstream.cli import main
from dualstream.modeling import load_model

MODELS = ("tiny-llava", "tiny-qwen2-vl")


def run_json(capsys, *arguments) -> dict:
    code = main([*map(str, arguments), "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1, "stdout must hold one JSON object and nothing else"
    return {"exit": code, **json.loads(out)}


def photograph(kind: str, folder):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (97, 161, 3), dtype=np.uint8)
    path = folder / f"{kind}.png"
    if kind == "rgba":
        Image.fromarray(np.dstack([noise, noise[..., 0]]), "RGBA").save(path)
    elif kind == "grey":
        Image.fromarray(noise[..., 0]).save(path)
    elif kind == "16-bit":
        Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(path)
    elif kind == "exif":
        path = path.with_suffix(".jpg")
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(noise).save(path, exif=exif)
    elif kind == "thin":
        Image.fromarray(rng.integers(0, 255, (2000, 1, 3), dtype=np.uint8)).save(path)
    elif kind == "wide":
        Image.fromarray(rng.integers(0, 255, (1, 2000, 3), dtype=np.uint8)).save(path)
    elif kind == "dot":
        Image.new("RGB", (1, 1), "red").save(path)
    return path


KINDS = ("rgba", "grey", "16-bit", "exif", "thin", "wide", "dot")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_read_takes_any_photograph(tmp_path, capsys, kind, model):
    result = run_json(capsys, "read", photograph(kind, tmp_path), "--model", model)
    assert result["exit"] == 0
    assert sum(rows * columns for rows, columns in result["grid"]) == len(result["tokens"])
    assert all(isinstance(word, str) for word in result["tokens"])
    assert sum(run["length"] for run in result["runs"]) == len(result["tokens"])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_ask_takes_any_photograph(tmp_path, capsys, kind, model):
    image = photograph(kind, tmp_path)
    result = run_json(capsys, "ask", image, "Is there a red circle?", "--compression", "rle", "--model", model)
    assert result["exit"] == 0
    assert 1 <= result["kept_tokens"] <= result["visual_tokens"]
    assert result["reduction_rate"] == pytest.approx(1 - result["kept_tokens"] / result["visual_tokens"], abs=1e-6)
    assert isinstance(result["answer"], str) and isinstance(result["answer_full"], str)


def test_ask_without_compression_gives_the_full_answer(tmp_path, capsys):
    image = photograph("grey", tmp_path)
    result = run_json(capsys, "ask", image, "What is in the picture?", "--compression", "none")
    assert result["answer"] == result["answer_full"]
    assert result["reduction_rate"] == 0


def test_every_option_of_ask_reaches_the_compression(tmp_path, capsys):
    options = ("--compression", "paper:rle_drop_top2", "--pooling", "first", "--position-policy", "original")
    result = run_json(capsys, "ask", photograph("grey", tmp_path), "How many stars are there?", *options)
    described = result["compression"]
    assert (described["method"], described["pooling"], described["position_policy"]) == (
        "rle_drop_top2",
        "first",
        "original",
    )
    assert described["wrap_rows"] is True


QUESTION = "Is the red circle left of the blue square?"


def test_ask_and_read_scale_the_rope_of_the_vision_tower(tmp_path, capsys):
    image = photograph("rgba", tmp_path)
    model = ("--model", "tiny-qwen2-vl")
    stock = run_json(capsys, "read", image, *model)
    scaled = run_json(capsys, "read", image, *model, "--rope-scaling", "linear:99")
    assert stock["rope_scaling"] is None and stock["exit"] == scaled["exit"] == 0
    assert scaled["rope_scaling"] == {"type": "linear", "axes": "both", "alpha": 99}
    assert scaled["grid"] == stock["grid"] and scaled["tokens"] != stock["tokens"]
    answered = run_json(capsys, "ask", image, QUESTION, *model, "--rope-scaling", "sigmoid:9:w")
    assert answered["exit"] == 0 and isinstance(answered["answer"], str)
    assert answered["rope_scaling"]["type"] == "sigmoid" and answered["rope_scaling"]["axes"] == "w"
    off = run_json(capsys, "read", image, *model, "--rope-scaling", "poly:0")
    assert off["rope_scaling"] is None and off["tokens"] == stock["tokens"]


def test_a_saved_scaling_is_used_and_named(tmp_path, capsys):
    model, processor = load_model("tiny-qwen2-vl", device="cpu", vision_rope_scaling="poly:99:8")
    model.save_pretrained(tmp_path / "scaled")
    processor.save_pretrained(tmp_path / "scaled")
    image = photograph("rgba", tmp_path)
    saved = run_json(capsys, "ask", image, QUESTION, "--model", tmp_path / "scaled")
    given = run_json(capsys, "ask", image, QUESTION, "--model", "tiny-qwen2-vl", "--rope-scaling", "poly:99:8")
    assert saved["rope_scaling"] == given["rope_scaling"]
    for name in ("answer", "answer_full", "kept_tokens"):
        assert saved[name] == given[name]


def test_quiz_scales_and_writes_it_down(tmp_path, capsys):
    options = ("-n", "6", "--methods", "rle", "--image-size", "64", "--out", tmp_path)
    result = run_json(capsys, "quiz", "--model", "tiny-qwen2-vl", "--rope-scaling", "poly:49:8:h", *options)
    stored = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    for manifest in (result["manifest"], stored["manifest"]):
        assert manifest["rope_scaling"] == {"type": "poly", "axes": "h", "alpha": 49, "p": 8}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("read", "{corrupt}"), "corrupt.png"),
        (("read", "{text}"), "notes.txt"),
        (("read", "{folder}/absent.png"), "absent.png"),
        (("read", "{good}", "--depth", "99"), "depth"),
        (("read", "{good}", "--top-k", "0"), "--top-k"),
        (("ask", "{good}", "  "), "question must not be empty"),
        (("ask", "{good}", "Why?", "--compression", "zip"), "rle_drop_top2"),
        (("ask", "{good}", "Why?", "--pooling", "max"), "pooling"),
        (("ask", "{good}", "Why?", "--model", "no-such-model"), "tiny-llava"),
        (("ask", "{good}", "Why?", "--model", "{folder}"), "{folder}"),
        (("ask", "{good}", "Why?", "--rope-scaling", "poly:99:8"), "which a 'llava' model has not"),
        (("read", "{good}", "--rope-scaling", "poly:99:8"), "Families that can be scaled: qwen2_vl"),
        (("read", "{good}", "--model", "tiny-qwen2-vl", "--rope-scaling", "cubic"), "known are poly, sigmoid"),
        (("ask", "{good}", "Why?", "--model", "tiny-qwen2-vl", "--rope-scaling", "poly:x"), "alpha='x'"),
        (("demo", "--scenes", "0"), "--scenes"),
        (("quiz", "--questions", "0"), "questions must be at least 1"),
    ],
)
def test_bad_input_is_explained(tmp_path, capsys, arguments, words):
    (tmp_path / "corrupt.png").write_bytes(photograph("grey", tmp_path).read_bytes()[:400])
    (tmp_path / "notes.txt").write_text("not a picture")
    names = {
        "corrupt": tmp_path / "corrupt.png",
        "text": tmp_path / "notes.txt",
        "good": photograph("rgba", tmp_path),
        "folder": tmp_path,
    }
    code = main([argument.format(**names) for argument in arguments] + ["--json"])
    captured = capsys.readouterr()
    assert code == 2
    assert words.format(**names) in json.loads(captured.out)["error"]
    assert "Traceback" not in captured.err


def test_read_writes_the_files_it_promises(tmp_path, capsys):
    page, picture = tmp_path / "map.html", tmp_path / "map.png"
    image = photograph("rgba", tmp_path)
    assert main(["read", str(image), "--html", str(page), "--picture", str(picture), "--depth", "2"]) == 0
    assert "http://" not in page.read_text(encoding="utf-8").replace("http://www.w3.org", "")
    assert Image.open(picture).size[0] >= 161
    assert str(page) in capsys.readouterr().out


@pytest.mark.parametrize("model", MODELS)
def test_doctor_finds_nothing_wrong_with_the_embedded_models(capsys, model):
    result = run_json(capsys, "doctor", model)
    assert [check["name"] for check in result["checks"] if not check["ok"]] == []
    assert result["exit"] == 0 and len(result["checks"]) == 13


def test_doctor_reports_a_broken_checkpoint(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    result = run_json(capsys, "doctor", tmp_path)
    assert result["exit"] == 1 and result["checks"][0]["ok"] is False


@pytest.mark.slow
def test_demo_writes_a_report_that_stands_alone(tmp_path, capsys):
    result = run_json(capsys, "demo", "--out", tmp_path, "--scenes", "1", "--questions", "24")
    assert result["exit"] == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 6
    assert "<script src" not in page and 'src="http' not in page
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert [model["model"] for model in summary["models"]] == list(MODELS)
    for model in summary["models"]:
        assert {row["arm"] for row in model["measured"]} == {
            "full",
            "rle",
            "rle_drop_top1",
            "rle_drop_top2",
            "other picture",
        }
        assert all(row["accuracy"]["n"] == 24 for row in model["measured"])
    assert len(list(tmp_path.glob("*.png"))) == 8
