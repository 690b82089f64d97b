"""Every tower of the table: its frequencies, its scaled rotation recomputed by hand, and its forward pass."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from rotary_towers import EVERY, GIVEN_POSITIONS, MODELS, run, tower

from dualstream.modeling import ROTARY_TOWERS, RopeScaling, rope_scaled
from dualstream.modeling.rope_towers import stock_frequencies, tower_of, vision_rotaries

torch.set_num_threads(1)

# Axial tables of the memory attention of video segmentation: no part of a vision tower.
LEFT_OUT = {
    "EdgeTamVideoVisionRotaryEmbedding",
    "Sam2VideoVisionRotaryEmbedding",
    "Sam3TrackerVideoVisionRotaryEmbedding",
}


def test_the_table_is_complete():
    """No axial rotary class of the installed transformers is missing from the table, none is there in vain."""
    defined = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for block in re.split(r"^(?=class )", path.read_text(), flags=re.MULTILINE):
            if "def compute_axial_rope_parameters" in block:
                defined.add(re.match(r"class (\w+)", block).group(1))
    unusual = {"DINOv3ViTRopePositionEmbedding", "Llama4VisionRotaryEmbedding"}
    assert defined - LEFT_OUT == set(ROTARY_TOWERS) - unusual
    assert set(MODELS) == set(ROTARY_TOWERS)


@EVERY
def test_frequencies_follow_from_the_configuration(name):
    for module in vision_rotaries(tower(name)).values():
        row, config = tower_of(module), module.config
        frequencies = stock_frequencies(module)
        base = config.rope_theta if row.form == "coordinates" else config.rope_parameters["rope_theta"]
        torch.testing.assert_close(frequencies.double(), base ** -row.ratios(len(frequencies)), rtol=1e-6, atol=0)
        if row.form != "complex":
            assert torch.equal(module.inv_freq, frequencies)


def expected_angles(name, module, positions, g):
    """(..., channels) angles by the definition, and nothing of the package: position x theta_i x g_i."""
    config, count, columns = module.config, len(stock_frequencies(module)), ROTARY_TOWERS[name].columns
    base = config.rope_parameters["rope_theta"]
    angles = {}
    for column, axis in enumerate(columns):
        ratios = [i / count for i in range(count)]
        if MODELS[name][0] == "pixtral":
            ratios = ratios[0::2] if axis == "h" else ratios[1::2]
        scaled = torch.tensor([base**-r * g(axis, r) for r in ratios], dtype=torch.float64)
        angles[axis] = positions[..., column, None].double() * scaled
    parts = []
    for word in MODELS[name][4].split():
        stacked = torch.stack([angles[axis] for axis in word], -1)  # "wh": one frequency of w, one of h, the next of w
        parts.append(stacked.flatten(-2))
    return torch.cat(parts, -1)


@pytest.mark.parametrize("axes", ["both", "h", "w"])
@GIVEN_POSITIONS
def test_scaled_rotation_equals_the_formula(name, axes):
    g = lambda axis, ratio: 1 + 99 * ratio**4 if axis in ("h", "w") and axes in ("both", axis) else 1.0
    with rope_scaled(tower(name), RopeScaling("poly", alpha=99, p=4, axes=axes)):
        _, seen = run(name)
        assert seen
        for module, (_, positions), (cos, sin) in seen:
            angles = expected_angles(name, module, positions, g)
            torch.testing.assert_close(cos.double().reshape(angles.shape), angles.cos(), rtol=0, atol=3e-6)
            torch.testing.assert_close(sin.double().reshape(angles.shape), angles.sin(), rtol=0, atol=3e-6)


@GIVEN_POSITIONS
def test_columns_are_named_right(name):
    """Patches come row by row (of an image or of a merge block): a step that moves one coordinate moves w."""
    columns = ROTARY_TOWERS[name].columns
    moved = {"h": 0, "w": 0, "t": 0}
    _, seen = run(name)
    for _, (_, positions), _ in seen:
        steps = positions.reshape(-1, len(columns)).diff(dim=0)
        for step in steps[(steps != 0).sum(-1) == 1]:
            moved[columns[int(step.nonzero())]] += 1
    assert moved["w"] > moved["h"]
    assert moved["t"] == 0


@EVERY
def test_forward_changes_and_comes_back_bit_for_bit(name):
    model = tower(name)
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    before, _ = run(name)
    with rope_scaled(model, "poly:0"):
        assert torch.equal(run(name)[0], before)
    with rope_scaled(model, "poly:99:4"):
        assert list(model.state_dict()) == keys
        assert float((run(name)[0] - before).abs().max()) > 1e-5
    assert torch.equal(run(name)[0], before)
    assert [type(module) for module in model.modules()] == classes
    after = dict(model.named_buffers())
    assert after.keys() == buffers.keys() and all(torch.equal(after[key], buffers[key]) for key in buffers)


def test_the_documented_table_is_the_table_in_code():
    page = (Path(__file__).parents[2] / "docs" / "rope_towers.md").read_text()
    documented = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and "`" in cells[1]:
            documented[cells[1].split("`")[1]] = (cells[0], cells[2], *(cell.split(",")[0] for cell in cells[3:]))
    said = lambda value: "yes" if value else "no"
    assert documented == {
        name: (
            row.name,
            ", ".join(row.columns),
            said(row.form != "coordinates"),
            said(row.form != "coordinates"),
            said(row.packed),
        )
        for name, row in ROTARY_TOWERS.items()
    }
