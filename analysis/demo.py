"""``dualstream demo``: the main job on the embedded models, ending in a report to look at and to share."""

from __future__ import annotations

import argparse
import base64
import random
import time
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream.cli import Result, add_model_arguments, model_facts, open_model
from dualstream.eval.manifest import make_manifest, write_json
from dualstream.eval.scene_questions import (
    DEFAULT_METHODS,
    FULL,
    answer_items,
    draw_items,
    format_table,
    normalize,
    summarize,
    summary_cells,
)

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE_SIZE = 448  # pixels of the shorter side of the pictures shown
QUESTIONS_SHOWN = 4
SHOWN_METHOD = "rle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    parser.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="default: %(default)s")
    add_model_arguments(parser)
    parser.set_defaults(model=None)
    parser.add_argument("--scenes", type=int, default=3, help="pictures shown for each model (default: %(default)s)")
    parser.add_argument(
        "-n",
        "--questions",
        type=int,
        default=150,
        help="held-out questions measured (default: %(default)s; 0: none)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pictures and questions")


def run(args: argparse.Namespace) -> Result:
    """Read, ask and measure, then write ``report.html``, ``summary.json`` and the pictures."""
    from dualstream.modeling import EMBEDDED_MODELS

    started = time.time()
    if args.scenes < 1 or args.questions < 0:
        raise ValueError(f"--scenes must be at least 1 and --questions at least 0: {args.scenes}, {args.questions}.")
    names = [args.model] if args.model else list(EMBEDDED_MODELS)
    args.out.mkdir(parents=True, exist_ok=True)
    models = [show_model(name, *open_model(args, name), args) for name in names]
    manifest = make_manifest(args.seed, started, models=names)
    summary = {"models": [model["summary"] for model in models], "manifest": manifest}
    write_json(args.out / "summary.json", summary)
    (args.out / "report.html").write_text(render_report(models, manifest), encoding="utf-8")
    payload = {**summary, "report": str(args.out / "report.html")}
    tables = "\n\n".join(f"{model['title']}\n{model['table']}" for model in models)
    return Result(payload, f"{tables}\n\nLook at {args.out / 'report.html'}")


def show_model(name: str, model: Any, processor: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Everything the report says of one model."""
    slug = Path(name).name
    scenes = [
        show_scene(model, processor, scene, args.out, f"{slug}-{index + 1}")
        for index, scene in enumerate(draw_scenes(args.scenes, args.seed))
    ]
    measured: list[dict[str, Any]] = []
    if args.questions:
        items = draw_items(args.questions, seed=args.seed, image_size=PICTURE_SIZE // 2)
        measured = summarize(answer_items(model, processor, items))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "title": slug,
        "description": f"{type(model).__name__}, {parameters / 1e6:.1f} M parameters",
        "scenes": scenes,
        "headline": headline(measured),
        "accuracy": {"n": args.questions, "rows": summary_cells(measured)} if measured else None,
        "table": format_table(measured) if measured else f"{len(scenes)} pictures read",
        "summary": {
            **model_facts(name, model),
            "parameters": parameters,
            "scenes": [{k: v for k, v in scene.items() if k not in IMAGE_FIELDS} for scene in scenes],
            "measured": measured,
        },
    }


IMAGE_FIELDS = ("picture", "read", "compressed")


def draw_scenes(n: int, seed: int) -> list[Any]:
    """Held-out scenes with enough objects to be worth a look."""
    from dualstream.data_builders.scenes import SPLIT_SEEDS, make_scene

    rng = random.Random(f"demo-{seed}")
    return [make_scene(rng.choice(SPLIT_SEEDS["test"]), n_objects=3 + index % 2) for index in range(n)]


def show_scene(model: Any, processor: Any, scene: Any, out: Path, stem: str) -> dict[str, Any]:
    """Read one scene, ask about it with every method, and write its pictures and its interactive page."""
    from dualstream.data_builders.scenes import caption, questions, render
    from dualstream.processing import answer_questions, read_image

    image = render(scene, PICTURE_SIZE)
    token_map = read_image(model, processor, image)
    compressed = read_image(model, processor, image, compression=SHOWN_METHOD)
    asked = questions(scene, random.Random(scene.seed), ("attribute", "relation", "presence", "count"))
    rows: list[dict[str, Any]] = [
        {"question": question.text, "truth": question.answer, "answers": {}} for question in asked[:QUESTIONS_SHOWN]
    ]
    kept = {}
    for method in (FULL, *DEFAULT_METHODS):
        answers = answer_questions(
            model,
            processor,
            [image] * len(rows),
            [row["question"] for row in rows],
            compression=None if method == FULL else method,
        )
        for row, answer in zip(rows, answers, strict=True):
            row["answers"][method] = {
                "text": answer.text,
                "correct": normalize(answer.text) == normalize(row["truth"]),
                "kept_tokens": answer.kept_tokens,
            }
        kept[method] = answers[0]
    shown = kept[SHOWN_METHOD]
    pictures = {"picture": image, "read": token_map.to_image(), "compressed": compressed.to_image()}
    side_by_side(list(pictures.values())).save(out / f"{stem}.png")
    inline = {name: save_picture(picture, out / f"{stem}-{name}.png") for name, picture in pictures.items()}
    (out / f"{stem}.html").write_text(compressed.to_html(), encoding="utf-8")
    return {
        "caption": caption(scene),
        "page": f"{stem}.html",
        "method": SHOWN_METHOD,
        "visual_tokens": shown.visual_tokens,
        "kept_tokens": shown.kept_tokens,
        "reduction_rate": shown.reduction_rate,
        "words": token_map.words,
        "questions": rows,
        **inline,
    }


def save_picture(image: Image, path: Path) -> str:
    """Write a PNG and return it as a data URI, so that the report stays whole when it is mailed alone."""
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    path.write_bytes(buffer.getvalue())
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def side_by_side(images: list[Image], gap: int = 16) -> Image:
    """Join pictures at their tops on white, all as wide as the widest: one file to share."""
    from PIL import Image as Pillow

    width = max(image.width for image in images)
    scaled = [image.convert("RGB").resize((width, round(image.height * width / image.width))) for image in images]
    size = (len(scaled) * (width + gap) - gap, max(image.height for image in scaled))
    sheet = Pillow.new("RGB", size, "white")
    for index, image in enumerate(scaled):
        sheet.paste(image, (index * (width + gap), 0))
    return sheet


def headline(measured: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The three numbers that stand on top of a model's section."""
    if not measured:
        return []
    cells = {row["name"]: row for row in summary_cells(measured)}
    return [
        {"value": cells[FULL]["accuracy"], "label": "% of answers right, all visual tokens"},
        {"value": cells[SHOWN_METHOD]["accuracy"], "label": f"% right after {SHOWN_METHOD}"},
        {"value": cells[SHOWN_METHOD]["reduction"], "label": f"% fewer visual tokens by {SHOWN_METHOD}"},
    ]


def render_report(models: list[dict[str, Any]], manifest: dict[str, Any]) -> str:
    """Fill the page's template; all text is escaped."""
    from importlib.resources import files

    from jinja2 import Environment

    template = files("dualstream.analysis").joinpath("templates/report.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(template)
    return page.render(models=models, manifest=manifest, methods=(FULL, *DEFAULT_METHODS))
