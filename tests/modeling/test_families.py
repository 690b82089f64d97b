"""Every adapter finds the parts of its model, and the feature grids that the processor's placeholders imply."""

import pytest
import torch
from torch import nn
from transformers import BertConfig

from dualstream.modeling.families import FAMILIES, attribute_at, block_sizes, family_of, flatten_features

ROWS = ["ttitttt", "titittttt", "tt"]
MODELS = [*FAMILIES, "llava_phi"]


@pytest.mark.parametrize("name", MODELS)
def test_parts(name, tiny_model):
    model = tiny_model(name).model
    family = family_of(model)
    assert family.name == model.config.model_type
    assert isinstance(family.vision_blocks(model), nn.ModuleList)
    assert len(family.vision_blocks(model)) in (2, 3)
    assert len(family.llm_blocks(model)) == 2
    assert family.unembedding(model) is model.lm_head
    assert family.image_token_id(model.config) == 190
    assert "Norm" in type(family.final_norm(model)).__name__
    assert any(parameter is not None for parameter in family.connector(model).parameters())


@pytest.mark.parametrize("name", MODELS)
def test_connector_output_is_what_the_grids_describe(name, tiny_model):
    tiny = tiny_model(name)
    model, family, inputs = tiny.model, family_of(tiny.model), tiny.inputs(ROWS)
    image_inputs = {name: inputs[name] for name in family.image_input_names if name in inputs}
    with torch.no_grad():
        features = model.model.get_image_features(**image_inputs, return_dict=True).pooler_output
    grids = family.feature_blocks(model, image_inputs, features)
    assert grids.prod(-1).tolist() == block_sizes(features)
    flat = flatten_features(features)
    assert len(flat) == int((inputs["input_ids"] == 190).sum())
    images = family.image_of_block(model, image_inputs, grids, inputs["input_ids"])
    assert images.unique().tolist() == [0, 1, 2]
    if name == "internvl":
        assert images.tolist() == [0, 1, 1, 2, 2, 2]
        assert family.image_of_block(model, image_inputs, grids, None).tolist() == list(range(6))


def test_qwen_images_with_several_time_slices(tiny_model):
    model = tiny_model("qwen2_vl").model
    family, image_inputs = family_of(model), {"image_grid_thw": torch.tensor([[2, 4, 6], [1, 2, 2]])}
    grids = family.feature_blocks(model, image_inputs, None)
    assert grids.tolist() == [[2, 3], [2, 3], [1, 1]]
    assert family.image_of_block(model, image_inputs, grids, None).tolist() == [0, 0, 1]


def test_llava_grids_of_odd_inputs(tiny_model):
    model = tiny_model("llava").model
    family = family_of(model)
    wide = {"pixel_values": torch.zeros(1, 3, 16, 40)}
    assert family.feature_blocks(model, wide, torch.zeros(1, 10, 4)).tolist() == [[2, 5]]
    assert family.feature_blocks(model, wide, torch.zeros(1, 11, 4)).tolist() == [[1, 11]]  # class token kept
    sizes = {"image_sizes": torch.tensor([[16, 24], [8, 8]]), "pixel_values": torch.zeros(2, 3, 24, 24)}
    assert family.feature_blocks(model, sizes, [torch.zeros(6, 4), torch.zeros(1, 4)]).tolist() == [[2, 3], [1, 1]]


def test_our_model_types_and_unknown_ones(tiny_model):
    class OurConfig:
        model_type = "qwen3_vl_visual_decoder"

    assert family_of(OurConfig()) is FAMILIES["qwen3_vl"]
    with pytest.raises(ValueError, match=r"model type 'bert' .* supported are llava, qwen2_vl"):
        family_of(BertConfig())
    with pytest.raises(AttributeError, match=r"Linear has none of the attributes norm, layers\.0"):
        attribute_at(nn.Linear(1, 1), "norm", "layers.0")
