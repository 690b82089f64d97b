"""The interface of the Space, in Gradio. ``python app.py`` serves it; so does ``dualstream space``."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import gradio as gr

from dualstream.data_builders.scenes import COLORS, SHAPES, TEXTURES, caption
from dualstream.hub_cards.space.drawing import empty_scene, picture_of, random_scene, suggestions, with_shape
from dualstream.hub_cards.space.workbench import COMPRESSIONS, SCALINGS, STOCK, Workbench, framed

INTRODUCTION = """# What a vision-language model sees, as words
Upload a picture or draw one. Every visual token is read with the model's own vocabulary, at every depth; neighbours
that read alike can be merged, and the question is answered from fewer tokens. The tiny models served here were trained
on drawn shapes: ask them about shapes."""
COLUMNS = ["model", "RoPE", "prompt", "answer", "visual tokens", "saved"]
STYLE = ".gradio-container { max-width: 1500px !important; }"
FIRST = (7, 4)  # seed and number of shapes of the scene that is there at the start


def build(bench: Workbench) -> gr.Blocks:
    """Lay the page out; nothing is loaded yet."""
    first = random_scene(*FIRST)
    with gr.Blocks(title="dualstream", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(INTRODUCTION)
        scene = gr.State(first)
        with gr.Row():
            with gr.Column(scale=1, min_width=330):
                picture = _picture(first)
                described = gr.Markdown(_described(first), elem_id="described")
                drawing, placing = _random_tab(), _shapes_tab()
            with gr.Column(scale=2, min_width=420):
                asking = _asking(bench, first)
        words = gr.HTML(elem_id="words")
        _connect_drawing(drawing, placing, [scene, picture, described, asking["question"]])
        _connect_models(bench, picture, asking, words)
    return page


def _picture(first: Any) -> gr.Image:
    """The picture asked about: drawn, uploaded or pasted."""
    return gr.Image(
        picture_of(first),
        type="pil",
        format="png",
        label="Picture",
        sources=["upload", "clipboard"],
        height=330,
        elem_id="picture",
    )


def _random_tab() -> dict[str, Any]:
    """The tab that draws a scene of a seed."""
    with gr.Tab("A random scene"):
        return {
            "seed": gr.Number(FIRST[0], precision=0, minimum=0, label="Seed", elem_id="seed"),
            "objects": gr.Slider(1, 6, FIRST[1], step=1, label="Shapes"),
            "draw": gr.Button("Draw it", elem_id="draw"),
            "surprise": gr.Button("Another one", elem_id="surprise"),
        }


def _shapes_tab() -> dict[str, Any]:
    """The tab that puts shapes on the picture one by one."""
    with gr.Tab("Shape by shape"):
        return {
            "shape": gr.Dropdown(list(SHAPES), value="star", label="Shape"),
            "color": gr.Dropdown(list(COLORS), value="blue", label="Colour"),
            "texture": gr.Dropdown(list(TEXTURES), value="solid", label="Texture"),
            "x": gr.Slider(0, 1, 0.5, step=0.01, label="From left to right"),
            "y": gr.Slider(0, 1, 0.5, step=0.01, label="From top to bottom"),
            "place": gr.Button("Put it there", elem_id="place"),
            "clear": gr.Button("Start with nothing", elem_id="clear"),
        }


def _asking(bench: Workbench, first: Any) -> dict[str, Any]:
    """Models, what is changed about them, the question, and the table of answers."""
    asked = [item.question for item in suggestions(first)]
    names = list(bench.names)
    found: dict[str, Any] = {
        "models": gr.CheckboxGroup(names, value=names, label="Models", elem_id="models"),
    }
    with gr.Row():
        found["compression"] = gr.Dropdown(
            list(COMPRESSIONS), value=COMPRESSIONS[0], label="Compression", allow_custom_value=True
        )
        found["scaling"] = gr.Dropdown(
            list(SCALINGS),
            value=STOCK,
            label="RoPE scaling of the vision tower (Qwen-VL)",
            allow_custom_value=True,
            elem_id="scaling",
        )
    found["question"] = gr.Dropdown(
        asked, value=asked[0], label="Question", allow_custom_value=True, elem_id="question"
    )
    with gr.Row():
        found["ask"] = gr.Button("Ask, with and without", variant="primary", elem_id="ask")
        found["read"] = gr.Button("Read as words", variant="primary", elem_id="read")
    found["replies"] = gr.Dataframe(headers=COLUMNS, label="Answers", interactive=False, wrap=True, elem_id="replies")
    return found


def _connect_drawing(drawing: dict[str, Any], placing: dict[str, Any], shown: list[Any]) -> None:
    """Redraw the picture, its description and the questions, which `shown` holds behind the scene."""
    scene, picture, described, question = shown
    scene_inputs = [drawing["seed"], drawing["objects"]]
    drawn = _told(lambda number, count: show(random_scene(number, count)))
    drawing["draw"].click(drawn, scene_inputs, shown)
    drawing["surprise"].click(lambda: random.randrange(1_000_000), None, drawing["seed"]).then(
        drawn, scene_inputs, shown
    )
    shape_inputs = [scene, *(placing[name] for name in ("shape", "color", "texture", "x", "y"))]
    placing["place"].click(_told(lambda *inputs: show(with_shape(*inputs))), shape_inputs, shown)
    placing["clear"].click(lambda: show(empty_scene()), None, shown)
    picture.upload(lambda: (None, "", gr.update(choices=[])), None, [scene, described, question])


def _connect_models(bench: Workbench, picture: gr.Image, asking: dict[str, Any], words: gr.HTML) -> None:
    """Read and ask on a click."""
    asking["read"].click(
        _told(lambda *inputs: framed(bench.read(*inputs))),
        [picture, asking["models"], asking["scaling"]],
        words,
        api_name="read",
    )
    asking["ask"].click(
        _told(lambda *inputs: [reply.row for reply in bench.ask(*inputs)]),
        [picture, *(asking[name] for name in ("question", "models", "compression", "scaling"))],
        asking["replies"],
        api_name="ask",
    )


def show(scene: Any) -> tuple[Any, ...]:
    """What the page shows of a scene: the scene, its picture, what is in it, and questions about it."""
    asked = suggestions(scene)
    questions = gr.update(choices=[item.question for item in asked], value=asked[0].question if asked else "")
    return scene, picture_of(scene), _described(scene), questions


def serve(bench: Workbench, **options: Any) -> Any:
    """Serve the page without a request to any other machine; see ``gradio.Blocks.launch`` for the options."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return build(bench).launch(theme=theme, css=STYLE, share=False, ssr_mode=False, footer_links=[], **options)


def _described(scene: Any) -> str:
    """The picture in words, with the true answers."""
    if not scene.objects:
        return "*nothing yet*"
    answers = "; ".join(f"{item.question} **{item.answer}**" for item in suggestions(scene))
    return f"{caption(scene)}.\n\n<details><summary>True answers</summary>\n\n{answers}\n\n</details>"


def _told(act: Callable[..., Any]) -> Callable[..., Any]:
    """Show what a person can mend as a message on the page."""

    @wraps(act)
    def told(*inputs: Any) -> Any:
        try:
            return act(*inputs)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error)) from error

    return told


def main(names: Sequence[str] = ()) -> None:
    """Serve the embedded models, as the Space does."""
    from dualstream.modeling.auto import EMBEDDED_MODELS

    serve(Workbench(names or EMBEDDED_MODELS))


if __name__ == "__main__":
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    main()
