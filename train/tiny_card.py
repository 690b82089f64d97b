"""Measure a tiny checkpoint on held-out scenes and write its model card.

    python -m dualstream.train.tiny_card --checkpoint FOLDER --config RECIPE --run RUN

`evaluation.json` (figures and manifest) and `README.md` (the card) are written into the checkpoint folder. Answers
come from `generate()` on the real processor's chat template; every figure carries n, a 95 % interval and its control.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from tqdm import tqdm

from dualstream.data_builders.scenes import COLORS, SHAPES, SPLIT_SEEDS, TEXTURES, make_scene, rasterize
from dualstream.eval.manifest import make_manifest, write_json
from dualstream.eval.result_tables import arm_metrics, arm_table, cell_table, kind_table, percent
from dualstream.eval.scene_questions import FULL, answer_items, draw_items, summarize
from dualstream.eval.statistics import bootstrap_mean
from dualstream.modeling import family_of, load_model, read_visual_tokens

from .tiny import TinyTrainConfig, load_config
from .tiny_data import IGNORE, label_cells
from .tiny_models import TOKEN_PIXELS

CELL_SCENES = 500
OUTPUT, CONNECTOR = "language model output", "connector output"
FIRST_SCENE = 1_000_000  # cells are read on other test scenes than questions are drawn from, by and large


def measure_cells(model: Any, processor: Any, scenes: int = CELL_SCENES, split: str = "test") -> dict[str, Any]:
    """How often an object's cell reads as a word of that object (shape, colour or texture).

    The control compares the same readings with the objects of the next scene's cells, in random order.

    Returns:
        Place ("connector output", "language model output") -> {"readable", "control"} as plain estimates over scenes.
    """
    side = int(processor.image_processor.crop_size["height"]) if family_of(model).name == "llava" else 96
    grid = (side // TOKEN_PIXELS, side // TOKEN_PIXELS)
    seeds = SPLIT_SEEDS[split][FIRST_SCENE : FIRST_SCENE + scenes]
    rng = np.random.default_rng(0)
    rates: dict[str, dict[str, list[float]]] = {p: {"readable": [], "control": []} for p in (CONNECTOR, OUTPUT)}
    for seed in tqdm(seeds, desc="cells", disable=None):
        scene = make_scene(seed)
        raster = rasterize(scene, side)
        cells = label_cells(scene, raster, grid)
        owners = np.flatnonzero(cells.color != IGNORE)
        truth = [_words(cells, int(i)) for i in owners]
        other = make_scene(seed + len(seeds))
        foreign = label_cells(other, rasterize(other, side), grid)
        pool = np.flatnonzero(foreign.color != IGNORE)
        wrong = [_words(foreign, int(i)) for i in rng.choice(pool, len(owners))]
        for place, ids in _read(model, processor, Image.fromarray(raster.image)).items():
            said = [processor.tokenizer.decode([int(ids[i])]).strip() for i in owners]
            rates[place]["readable"].append(float(np.mean([w in words for w, words in zip(said, truth, strict=True)])))
            rates[place]["control"].append(float(np.mean([w in words for w, words in zip(said, wrong, strict=True)])))
    return {
        place: {name: bootstrap_mean(np.array(values)).to_dict() for name, values in by_name.items()}
        for place, by_name in rates.items()
    }


def _words(cells: Any, index: int) -> set[str]:
    return {SHAPES[cells.word[index]], list(COLORS)[cells.color[index]], TEXTURES[cells.texture[index]]}


def _read(model: Any, processor: Any, image: Image.Image) -> dict[str, torch.Tensor]:
    prompt = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    inputs = processor(images=[image], text=[prompt], return_tensors="pt")
    depth = model.config.text_config.num_hidden_layers
    places = {CONNECTOR: None, OUTPUT: depth}
    return {place: read_visual_tokens(model, inputs, depth=k).ids[:, 0] for place, k in places.items()}


def measure(
    checkpoint: Path, questions: int, split: str = "test", seed: int = 0, image_size: int = 224
) -> dict[str, Any]:
    """All figures of a checkpoint."""
    started = time.time()
    model, processor = load_model(checkpoint, device="cpu")
    items = draw_items(questions, split, seed, image_size)
    arms = summarize(answer_items(model, processor, items))
    cells = measure_cells(model, processor, split=split)
    manifest = make_manifest(
        seed, started, model=checkpoint.name, split=split, questions=questions, image_size=image_size
    )
    return {"arms": arms, "cells": cells, "manifest": manifest}


def write_card(
    checkpoint: Path, figures: dict[str, Any], recipes: dict[str, TinyTrainConfig], run: dict[str, Any]
) -> None:
    """Write `README.md` from figures, recipes (file name -> recipe, in the order they were run) and run facts."""
    config, last = next(iter(recipes.values())), list(recipes.values())[-1]
    template = Template((Path(__file__).parent / "tiny_card.md").read_text(encoding="utf-8"))
    llava = config.model.family == "llava"
    tower = "CLIP ViT (12-pixel patches)" if llava else "Qwen2-VL ViT (6-pixel patches, 2-D RoPE, 2 x 2 merge)"
    language = "Llama (1-D RoPE)" if llava else "Qwen2 (M-RoPE)"
    arms = {row["arm"]: row for row in figures["arms"]}
    index = _model_index(checkpoint.name, figures["arms"], figures["manifest"]["split"])
    text = template.substitute(
        name=checkpoint.name,
        recipe=f"train/{next(iter(recipes))}",
        continued="".join(
            f", then in the same folder by `{name}` ({recipe.steps:,} steps)"
            for name, recipe in list(recipes.items())[1:]
        ),
        model_class="LlavaForConditionalGeneration" if llava else "Qwen2VLForConditionalGeneration",
        architecture=f"{tower}, {config.model.vision_depth} blocks of width {config.model.vision_width}; "
        f"{language}, {config.model.depth} blocks of width {config.model.width}",
        parameters=f"{run['parameters'] / 1e6:.2f}",
        vision_images=f"{config.vision_steps * config.vision_batch:,}",
        images=f"{sum(recipe.steps * recipe.batch_size for recipe in recipes.values()):,}",
        hours=f"{run['hours']:.1f}",
        notes=run["notes"],
        looked=run["looked"],
        compress=f"{100 * config.compress_share:.0f}",
        compress_last=f"{100 * last.compress_share:.0f}",
        compress_from=f"{100 * config.compress_from:.0f}",
        drop=f"{100 * config.drop_share:.0f}",
        connector=config.weights["connector"],
        lens=config.weights["lens"],
        named=config.weights["named"],
        compared=config.weights["compared"],
        questions=arms[FULL]["accuracy"]["n"],
        size=figures["manifest"].get("image_size", 224),
        accuracy=kind_table(figures["arms"]),
        compression=arm_table(figures["arms"]),
        cells=cell_table(figures["cells"]),
        decoder=decoder_section(checkpoint / "distillation.json"),
        metrics=yaml.safe_dump(index, sort_keys=False).rstrip(),
    )
    (checkpoint / "README.md").write_text(text, encoding="utf-8")


def decoder_section(record: Path) -> str:
    """What the decoder beside the weights gains over the unembedding; empty where there is none.

    The control is the decoder's reading of one picture against the model's reading of another.
    """
    if not record.is_file():
        return ""
    content = json.loads(record.read_text(encoding="utf-8"))
    figures = content["figures"]
    decoder = figures["decoder"]
    rows = []
    for key, name in (("top1", "cells read alike %"), ("boundary_f1", "run boundaries, F1 %")):
        gain = percent(decoder[f"{key}_gain"], signed=True)
        found = " | ".join(percent(figures[who][key]) for who in ("unembedding", "decoder", "another picture"))
        rows.append(f"| {name} | {found} | {gain} |")
    facts = content["decoder"]
    lines = [
        "## Visual decoder",
        "",
        f"Beside the weights lies a {facts['kind']} visual decoder of {facts['classes']} readings, which `load_model`",
        "uses and stock transformers ignores, distilled from this model's own reading after block",
        f"{facts['teacher_depth']} (`{content['manifest']['command']}`). Agreement with that reading on",
        f"{decoder['top1']['n']} held-out scenes:",
        "",
        "| | unembedding | this decoder | control: another picture | decoder minus unembedding, paired, points |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
        "The gain is small because the read-out objective had made the connector's output readable already. All other",
        "figures of this card were measured with the decoder.",
        "",
        "",
    ]
    return "\n".join(lines)


def _model_index(name: str, arms: list[dict[str, Any]], split: str) -> dict[str, Any]:
    from huggingface_hub.repocard_data import eval_results_to_model_index

    return {"model-index": eval_results_to_model_index(name, arm_metrics(arms, split))}


def run_facts(run: Path, checkpoint: Path, notes: str, looked: str) -> dict[str, Any]:
    """Wall-clock hours from the run's log (pauses of more than two minutes left out), and the parameter count."""
    from safetensors import safe_open

    times = [json.loads(line)["time"] for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = sum(min(b - a, 120) for a, b in itertools.pairwise(times))
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        parameters = sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    return {"hours": seconds / 3600, "parameters": parameters, "notes": notes, "looked": looked}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m dualstream.train.tiny_card")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder to measure; gets the card")
    parser.add_argument(
        "--config", type=Path, nargs="+", required=True, help="the recipes it was trained with, in order"
    )
    parser.add_argument("--run", type=Path, required=True, help="its run folder (log.jsonl)")
    parser.add_argument("--questions", type=int, default=3000)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of scenes and questions")
    parser.add_argument("--notes", default="", help="sentence about the run for the card")
    parser.add_argument("--looked", default="Looked at once.", help="how often the test seeds were looked at")
    parser.add_argument("--reuse", action="store_true", help="write the card from the stored evaluation.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stored = arguments.checkpoint / "evaluation.json"
    if arguments.reuse:
        figures = json.loads(stored.read_text(encoding="utf-8"))
    else:
        figures = measure(arguments.checkpoint, arguments.questions, arguments.split, arguments.seed)
        write_json(stored, figures)
    facts = run_facts(arguments.run, arguments.checkpoint, arguments.notes, arguments.looked)
    recipes = {path.name: load_config(path) for path in arguments.config}
    write_card(arguments.checkpoint, figures, recipes, facts)


if __name__ == "__main__":
    main()
