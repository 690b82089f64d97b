"""Replacement values: streaming equals all at once (T13), every kind, every stage, every family."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dualstream.analysis.annotated_images import AnnotatedImage
from dualstream.analysis.causality.ablations.replacement import (
    KINDS,
    RunningMean,
    collect_reference,
    load_mean,
    relative_places,
    replacing,
    take_mean,
)
from dualstream.analysis.interventions import edited_features, edited_states, encoded_images, visual_places
from dualstream.modeling.families import FAMILIES, flatten_features
from dualstream.modeling.lens import visual_features
from dualstream.modeling.lens_depths import visit_depths
from dualstream.processing import build_inputs, token_geometry
from dualstream.processing.inference import READING_PROMPT


def pictures(sizes, seed=0):
    rng = np.random.default_rng(seed)

    def make(size, number):
        pixels = np.random.default_rng([seed, number]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    rng.shuffle(sizes)
    return [AnnotatedImage(f"p{n}", (), partial(make, size, n), size) for n, size in enumerate(sizes)]


@pytest.fixture(scope="module")
def family_pair(tiny_model, publishing):
    """Function family -> tiny model and a processor that fits it."""
    built = {}

    def get(name):
        if name not in built:
            built[name] = (tiny_model(name).model, publishing.make_processor(name))
        return built[name]

    return get


@pytest.mark.parametrize("name", FAMILIES)
def test_streaming_mean_is_the_mean_of_all_tokens(name, family_pair):
    model, processor = family_pair(name)
    images = pictures([(40, 40), (64, 30), (30, 64), (48, 48), (33, 57)])
    reference = collect_reference(model, processor, images, depths=(0, 2), batch_size=2)
    connector, at_two = [], []
    for image in images:
        inputs = build_inputs(processor, [image.image()], [READING_PROMPT])
        inputs.pop("compression", None)
        connector.append(torch.cat(visual_features(model, inputs)))
        visit_depths(model, inputs, [2], lambda depth, states: at_two.append(states), final_norm=False)
    assert reference.images == 5 and reference.tokens == sum(map(len, connector))
    assert torch.allclose(reference.means["connector", 0], torch.cat(connector).mean(0), atol=1e-5)
    assert torch.allclose(reference.means["depth", 2], torch.cat(at_two).mean(0), atol=1e-3)
    deep = [stage for stage in reference.means if stage[0] == "deepstack"]
    assert deep == ([("deepstack", 0), ("deepstack", 1)] if name == "qwen3_vl" else [])
    whole = collect_reference(model, processor, images, batch_size=5)
    assert torch.allclose(whole.means["connector", 0], reference.means["connector", 0], atol=1e-5)
    distances = torch.cdist(reference.pool["connector", 0].double(), torch.cat(connector).double()).amin(1)
    assert float(distances.max()) < 1e-3
    assert ("connector", 0) in reference.position_means or name != "llava"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_only_chosen_tokens_change_at_every_stage(name, kind, family_pair):
    model, processor = family_pair(name)
    images = pictures([(40, 40)] * 4)
    reference = collect_reference(model, processor, images[:3], depths=(1,))
    own = [image.image() for image in images[2:]]
    inputs = build_inputs(processor, own, ["word11 word12", "word13"])
    inputs.pop("compression", None)
    geometries = [token_geometry(processor, picture.size) for picture in own]
    chosen = [np.array([0, 3]), np.array([], dtype=int)]
    edit = replacing(reference, kind, chosen, geometries, ["a", "b"], seed=1)
    seen = {}

    def watched(states, place):
        new = edit(states, place)
        seen[place.stage, place.number, place.image] = (states, new)
        return new

    with torch.no_grad(), edited_features(model, watched):
        model(**inputs)
    with torch.no_grad(), edited_states(model, 1, watched):
        model(**inputs)
    stages = {key[:2] for key in seen}
    assert {("connector", 0), ("depth", 1)} <= stages and (len(stages) == 4) == (name == "qwen3_vl")
    for (stage, number, image), (old, new) in seen.items():
        changed = (old != new).any(1).nonzero().flatten().tolist()
        assert changed == (chosen[image].tolist() if image == 0 else [])
        if kind == "mean" and image == 0:
            assert torch.allclose(new[0], reference.means[stage, number]) and torch.equal(new[0], new[3])
        if kind == "zero" and image == 0:
            assert not new[[0, 3]].any()
    again = replacing(reference, kind, chosen, geometries, ["a", "b"], seed=1)
    other = replacing(reference, kind, chosen, geometries, ["a", "b"], seed=2)
    with torch.no_grad():
        output = encoded_images(model, inputs)
    place, states = (
        visual_places(model, inputs, output)[0],
        flatten_features(output.pooler_output)[: len(geometries[0])],
    )
    assert torch.equal(again(states, place), edit(states, place))
    assert torch.equal(other(states, place), edit(states, place)) == (kind not in ("resample", "other-image"))


def test_other_image_takes_the_token_at_the_same_place(family_pair):
    model, processor = family_pair("qwen2_vl")
    donor, wide = pictures([(64, 32)])[0], pictures([(64, 32)], seed=3)[0]
    reference = collect_reference(model, processor, [donor])
    geometry = token_geometry(processor, wide.image().size)
    tokens = np.array([1, 5])
    values = reference.values("other-image", ("connector", 0), tokens, geometry, np.random.default_rng(0))
    assert torch.equal(values, reference.donors[0].states["connector", 0][tokens])
    places = relative_places(geometry)
    assert places.shape == (len(geometry), 3) and places[:, :2].min() > 0 and places[:, :2].max() < 1


def test_running_mean_is_exact_in_parts_and_refuses_nothing():
    rows = torch.randn(101, 7) * 100 + 1e4
    mean = RunningMean()
    for part in rows.split(13):
        mean.add(part)
    assert torch.allclose(mean.value().double(), rows.double().mean(0), rtol=1e-7)
    with pytest.raises(ValueError, match="mean of nothing"):
        RunningMean().value()


def test_errors_say_what_is_accepted(family_pair, tmp_path):
    model, processor = family_pair("qwen2_vl")
    reference = collect_reference(model, processor, pictures([(64, 32), (32, 64)]))
    geometry = token_geometry(processor, (64, 32))
    ask = partial(reference.values, tokens=np.array([0]), geometry=geometry, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="replacement='noise' is unknown"):
        ask("noise", ("connector", 0))
    with pytest.raises(ValueError, match="was not collected"):
        ask("mean", ("depth", 1))
    with pytest.raises(ValueError, match="same grid"):
        ask("position-mean", ("connector", 0))
    with pytest.raises(ValueError, match="reference pictures are needed"):
        collect_reference(model, processor, [])
    save_file({"mean": torch.ones(3)}, tmp_path / "mean.safetensors")
    assert load_mean(tmp_path / "mean.safetensors").tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="has 3 numbers, the model's features have"):
        take_mean(reference, tmp_path / "mean.safetensors")
    own = torch.ones_like(reference.means["connector", 0])
    save_file({"mean": own}, tmp_path / "fits.safetensors")
    take_mean(reference, tmp_path / "fits.safetensors")
    assert torch.equal(reference.means["connector", 0], own)
    save_file({"mean": torch.ones(3, 2)}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="one axis"):
        load_mean(tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_mean(tmp_path / "absent.safetensors")
