"""``dualstream doctor [MODEL]``: what works here and for this checkpoint, each line a check that was really run."""

from __future__ import annotations

import argparse
import importlib
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from dualstream.cli import Result, add_model_arguments, open_model

PACKAGES = ("torch", "torchvision", "transformers", "tokenizers", "datasets", "safetensors", "numpy", "PIL")
OPTIONAL_PACKAGES = {"trl": "train", "peft": "train", "accelerate": "train", "lmms_eval": "eval", "gradio": "space"}
LOGIT_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}  # relative to the largest logit


@dataclass(frozen=True)
class Check:
    """One finding: its name, whether it holds, and the numbers behind it."""

    name: str
    ok: bool
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    add_model_arguments(parser)
    parser.add_argument("checkpoint", nargs="?", default=None, metavar="MODEL", help="the same as --model MODEL")


def run(args: argparse.Namespace) -> Result:
    """Check the environment, then the checkpoint."""
    name = args.checkpoint or args.model
    environment = describe_environment()
    checks = check_model(lambda: open_model(args, name))
    ok = all(check.ok for check in checks)
    payload = {"model": name, "ok": ok, "environment": environment, "checks": [asdict(check) for check in checks]}
    lines = [f"{key:>14}  {value}" for key, value in environment.items()]
    lines += ["", f"{name}:"]
    lines += [f"  {'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}" for check in checks]
    return Result(payload, "\n".join(lines), ok)


def describe_environment() -> dict[str, str]:
    """Versions of what is installed and the devices that torch sees."""
    import torch

    found = {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    for package in PACKAGES:
        found[package] = getattr(importlib.import_module(package), "__version__", "installed")
    for package, extra in OPTIONAL_PACKAGES.items():
        installed = importlib.util.find_spec(package) is not None
        found[package] = "installed" if installed else f"absent (pip install 'dualstream[{extra}]')"
    found["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "no"
    return found


def check_model(load: Callable[[], tuple[Any, Any]]) -> list[Check]:
    """Run every check on the model that ``load`` returns; a check that raises is a failed check."""
    try:
        model, processor = load()
    except (ValueError, OSError) as error:
        return [Check("load", False, str(error))]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    checks = [Check("load", True, f"{type(model).__name__}, {parameters / 1e6:.1f} M parameters, {model.dtype}")]
    inputs = None
    for name, function in (
        ("image spans", check_spans),
        ("grid", check_grid),
        ("lens identity", check_lens),
        ("compression, nothing merged", check_identity),
        ("compression, rle", check_compression),
    ):
        try:
            inputs = _probe_inputs(model, processor) if inputs is None else inputs
            ok, detail = function(model, processor, inputs)
        except Exception as error:  # the doctor reports every way a checkpoint can fail
            ok, detail = False, f"{type(error).__name__}: {error}"
        checks.append(Check(name, ok, detail))
    return checks


def _probe_image():
    """A picture with different content left and right, neither square nor a multiple of any patch size."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (317, 211), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 30, 130, 140), fill="crimson")
    draw.rectangle((180, 60, 290, 190), fill="royalblue")
    return image


def _probe_inputs(model, processor):
    from dualstream.processing import build_inputs

    inputs = build_inputs(processor, [_probe_image()], ["What is in this image?"]).to(model.device)
    inputs.pop("compression", None)
    return inputs


def _feature_count(model, inputs) -> tuple[int, list[tuple[int, int]]]:
    from dualstream.modeling import read_visual_tokens

    reading = read_visual_tokens(model, inputs)
    return reading.ids.shape[0], [tuple(grid) for grid in reading.grids.tolist()]


def check_spans(model, processor, inputs) -> tuple[bool, str]:
    """As many placeholders in the prompt as the connector makes features."""
    from dualstream.modeling import family_of

    placeholders = int((inputs["input_ids"] == family_of(model).image_token_id(model.config)).sum())
    features, _ = _feature_count(model, inputs)
    return placeholders == features, f"{placeholders} placeholders, {features} features"


def check_grid(model, processor, inputs) -> tuple[bool, str]:
    """The processor's geometry and the model's features agree on every block's rows and columns."""
    from dualstream.processing import token_geometry

    _, grids = _feature_count(model, inputs)
    expected = [tuple(grid) for grid in token_geometry(processor, _probe_image().size).grids]
    described = ", ".join(f"{rows}x{columns}" for rows, columns in grids)
    return grids == expected, f"{described} cells" if grids == expected else f"{described}, geometry says {expected}"


def check_lens(model, processor, inputs) -> tuple[bool, str]:
    """Reading after the last block with the final norm equals the model's own next-token choice on image cells."""
    import torch

    from dualstream.modeling import family_of, read_visual_tokens

    family = family_of(model)
    with torch.no_grad():
        logits = model(**inputs).logits[inputs["input_ids"] == family.image_token_id(model.config)].float()
    reading = read_visual_tokens(model, inputs, depth=len(family.llm_blocks(model)), final_norm=True)
    stated = reading.scores[:, 0]
    own = logits.log_softmax(-1).gather(1, reading.ids[:, :1])[:, 0]
    gap = float((stated - own).abs().max())
    same = float((logits.argmax(-1) == reading.ids[:, 0]).float().mean())
    tolerance = LOGIT_TOLERANCE[str(model.dtype).removeprefix("torch.")] * max(1.0, float(logits.abs().max()))
    return gap <= tolerance, f"top-1 agreement {100 * same:.1f} %, largest log-probability gap {gap:.1e}"


def check_identity(model, processor, inputs) -> tuple[bool, str]:
    """Where no two neighbours read alike, the compressed forward pass equals the stock one bit for bit."""
    import torch

    from dualstream.modeling import VisualDecoder, compressing, family_of

    class EveryCellDiffers(VisualDecoder):
        def top_k(self, features, k=1, unembedding=None):
            ids = torch.arange(features.shape[0], device=features.device) % self.vocab_size
            return ids[:, None].expand(-1, k)

    decoder = EveryCellDiffers.from_unembedding(family_of(model).unembedding(model).weight)
    with torch.no_grad():
        stock = model(**inputs).logits
        with compressing(model, method="rle", decoder=decoder):
            rewritten = model(**inputs).logits
    equal = torch.equal(stock, rewritten)
    return equal, "identical logits" if equal else f"logits differ by {float((stock - rewritten).abs().max()):.1e}"


def check_compression(model, processor, inputs) -> tuple[bool, str]:
    """Run-length compression shortens the prompt and still answers."""
    from dualstream.processing import answer_questions

    (answer,) = answer_questions(
        model, processor, [_probe_image()], ["What is in this image?"], compression="rle", max_new_tokens=8
    )
    return answer.kept_tokens > 0, f"{answer.kept_tokens} of {answer.visual_tokens} visual tokens kept"
