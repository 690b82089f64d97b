"""The commands of the recipes, taken from their pages, run to a release on the loopback Hub with tiny checkpoints."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest

from dualstream.cli import COMMANDS, build_parser
from dualstream.data_builders.scenes import make_scene, render
from dualstream.hub_cards.recipe_costs import WORKLOADS, table
from dualstream.modeling import default_model_path

RECIPES = Path(__file__).parents[2] / "recipes"
PAGES = sorted(path.stem for path in RECIPES.glob("*.md"))
EVAL = {"SUITE": "scenes", "EVAL_OPTIONS": "--tasks scenes_relation_fair --limit 4 --batch-size 4"}
DISTILL = "--max_steps 2 --num_eval_images 4 --eval_steps 2 --save_steps 2 --warmup_steps 0 --dataloader_num_workers 0"
SMALL = {
    "DEVICE": "cpu",
    "CARD_OPTIONS": "--device cpu",
    **EVAL,
}
SIZES = {
    "llava-1.5-7b": {
        "DISTILL_OPTIONS": f"--config tiny-llava {DISTILL}",
        "MAP_OPTIONS": "--limit 4 --license other --depths connector,2,last",
    },
    "qwen2-vl": {"DISTILL_OPTIONS": f"--config tiny-qwen2-vl --decoder_kind pruned {DISTILL}"},
    "qwen2.5-vl": {
        "DISTILL_OPTIONS": f"--config tiny-qwen2-vl --decoder_kind pruned {DISTILL}",
        "DATA_OPTIONS": "--source scenes --train 4 --validation 2 --test 2",
        "SFT_OPTIONS": "--config tiny-qwen2-vl-lora --max_steps 1 --max_train_rows 4 --max_eval_rows 4 "
        "--per_device_train_batch_size 2 --eval_strategy no --save_strategy no",
    },
}


def blocks(page):
    """The lines of the shell blocks of a page, continued lines joined."""
    text = (RECIPES / f"{page}.md").read_text()
    found = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    return [line for line in found.replace("\\\n", " ").splitlines() if line.strip()]


def settings_of(page):
    """The variables at the top of a page."""
    assigned = {}
    for line in blocks(page):
        if match := re.fullmatch(r"([A-Z_]+)=(.*)", line.strip()):
            (assigned[match[1]],) = shlex.split(match[2], comments=True) or [""]
    return assigned


def commands_of(page, **changed):
    """Arguments of every command of a page, with some of its variables changed.

    Raises:
        KeyError: a command uses a variable that the page does not define.
    """
    assigned = settings_of(page)
    assert set(changed) <= set(assigned), "a variable that the page does not have"
    values = {**assigned, **changed}
    lines = [line for line in blocks(page) if not re.match(r"[A-Z_]+=", line)]
    found = [shlex.split(string.Template(line).substitute(values)) for line in lines]
    assert found and all(words[0] == "dualstream" for words in found)
    return [words[1:] for words in found]


def tiny_qwen2_5(folder):
    """A random Qwen2.5-VL with the tokenizer and the picture sizes of the embedded Qwen2-VL."""
    import torch
    from transformers import (
        AutoConfig,
        AutoProcessor,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
    )

    source = default_model_path("tiny-qwen2-vl")
    like, parts = AutoConfig.from_pretrained(source).to_dict(), AutoProcessor.from_pretrained(source)
    text = {key: value for key, value in like["text_config"].items() if key not in ("model_type", "architectures")}
    patch = like["vision_config"]["patch_size"]
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": patch,
        "out_hidden_size": text["hidden_size"], "window_size": 4 * patch, "fullatt_block_indexes": [1],
        "spatial_merge_size": 2, "temporal_patch_size": like["vision_config"]["temporal_patch_size"],
    }  # fmt: skip
    ids = {key: value for key, value in like.items() if key.endswith("token_id")}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=like["tie_word_embeddings"], **ids
    )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2_5_VLProcessor(
        parts.image_processor, parts.tokenizer, parts.video_processor, chat_template=parts.chat_template
    ).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")


def photos(folder, seeds):
    folder.mkdir(parents=True)
    for seed in seeds:
        render(make_scene(seed), 96).save(folder / f"{seed}.png")


def stand_in(page, folder, stock_files):
    if page == "qwen2.5-vl":
        tiny_qwen2_5(folder)
    else:
        stock_files(default_model_path("tiny-llava" if page.startswith("llava") else "tiny-qwen2-vl"), folder)


@pytest.fixture(scope="module")
def run_page(module_hub, tmp_path_factory):
    """Function (folder, commands) -> runs the commands there, in a process that serves all pages."""
    for module in ("lmms_eval", "trl"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    home = tmp_path_factory.mktemp("home")
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": module_hub.url,
        "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_local", "OMP_NUM_THREADS": "1", "DUALSTREAM_SCENES": "8",
        "ACCELERATE_USE_CPU": "true", "CI": "1",
    }  # fmt: skip
    log, script = home / "log.txt", Path(__file__).with_name("run_commands.py")
    with log.open("w") as stderr, subprocess.Popen(
        [sys.executable, str(script)],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
    ) as process:  # fmt: skip

        def run(folder, commands):
            process.stdin.write(json.dumps({"folder": str(folder), "commands": commands}) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            assert answer == "\n", (answer or "the process ended") + log.read_text()[-4000:]

        yield run
        process.stdin.close()
    shutil.rmtree(home)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_recipe_lead_to_a_release(page, run_page, module_hub, stock_files, tmp_path):
    from huggingface_hub import HfApi

    settings, hub = settings_of(page), module_hub
    stand_in(page, tmp_path / "stock", stock_files)
    api = HfApi(endpoint=hub.url, token="hf_local")
    api.create_repo(settings["MODEL"])
    api.upload_folder(folder_path=tmp_path / "stock", repo_id=settings["MODEL"])
    photos(tmp_path / settings["PHOTOS"], range(16))
    photos(tmp_path / settings["TEST_PHOTOS"], range(1_100_000_000, 1_100_000_004))
    changed = {name: value for name, value in SMALL.items() if name in settings} | SIZES[page]
    run_page(tmp_path, commands_of(page, **changed))
    stored = hub.files(settings["REPO"], revision="v0.1.0")
    whole = page == "qwen2.5-vl"
    assert ("model.safetensors" in stored) == whole and ("visual_decoder.safetensors" in stored) != whole
    card = stored["README.md"].decode()
    assert f"base_model: {settings['MODEL']}" in card and "### Benchmarks" in card and "### Visual decoder" in card
    assert f'"{settings["REPO"]}", revision="v0.1.0"' in card and str(tmp_path) not in card


@pytest.mark.parametrize("page", PAGES)
def test_the_real_options_of_a_recipe_exist(page):
    """The sizes that a run here replaces: their commands are parsed, their presets are there."""
    for arguments in commands_of(page):
        name = next(name for name in (" ".join(arguments[:2]), arguments[0]) if name in COMMANDS)
        args, rest = build_parser(name).parse_known_args(arguments)
        assert not rest or name.startswith("train ")
        if name.startswith("train "):
            module = importlib.import_module(COMMANDS[name][0])
            assert args.config in module.PRESETS
            options = {word.removeprefix("--") for word in rest if word.startswith("--")}
            kind = importlib.import_module(
                "dualstream.train.sft_config" if name == "train sft" else "dualstream.train.distillation_config"
            )
            fields = kind.VisionSFTConfig if name == "train sft" else kind.DistillationConfig
            assert options <= set(fields.__dataclass_fields__)


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_costs_of_a_recipe_are_those_that_are_computed(name):
    page = next(page for page in PAGES if name.startswith(page))
    assert table(name) in (RECIPES / f"{page}.md").read_text()


def test_published_figures_of_a_recipe_are_those_we_store():
    from dualstream.eval.suites.benchmarks import PUBLISHED

    for page in PAGES:
        text = (RECIPES / f"{page}.md").read_text()
        for figure in PUBLISHED:
            if figure.model == settings_of(page)["MODEL"] and figure.arm == "rle":
                assert f"{figure.value:.2f}" in text
