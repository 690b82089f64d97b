"""A table of factors as parameters: gradients, training, saving, freezing, several grid sizes."""

import copy

import pytest
import torch

from dualstream.modeling import (
    RopeScaling,
    apply_rope_scaling,
    freeze_rope_scaling,
    remove_rope_scaling,
    rope_scaled,
    rope_scaling_of,
)
from dualstream.modeling.rope_scaling import CONFIG_FIELD
from dualstream.modeling.rope_towers import vision_rotaries

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
START = "table:9:1"  # the tiny towers have the ratios 0 and 1/2: g = 1 and 5.5


def rotary(model):
    (module,) = vision_rotaries(model).values()
    return module


def image_batch(inputs):
    batch = inputs(["ii"])  # patch grids 4x6 and 6x4
    return {name: batch[name] for name in ("pixel_values", "image_grid_thw")}


def loss_of(model, batch):
    pooled = model.get_image_features(**batch).pooler_output
    features = torch.cat(list(pooled))
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)).to(features)
    return (features * weight).sum()


@pytest.mark.parametrize("axes", ["both", "h", "w"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_equals_finite_differences(family, axes, new_tiny_model):
    model, inputs = new_tiny_model(family)
    batch = image_batch(inputs)
    for block in model.model.visual.blocks:  # sharper attention, so that positions matter
        block.attn.qkv.weight.data *= 4
    apply_rope_scaling(model, RopeScaling("table", alpha=9, p=1, learned=True, axes=axes))
    parameter = rotary(model).log_scale
    assert parameter.shape == (1, 2 if axes == "both" else 1, 2)
    loss_of(model, batch).backward()
    slopes, step = torch.zeros_like(parameter), 1e-2
    for index in torch.cartesian_prod(*(torch.arange(size) for size in parameter.shape)):
        place = tuple(index)
        start = float(parameter[place])
        for shift, weight in ((-2, 1), (-1, -8), (1, 8), (2, -1)):  # error of fourth order
            with torch.no_grad():
                parameter[place] = start + shift * step
                slopes[place] += weight * float(loss_of(model, batch)) / (12 * step)
                parameter[place] = start
    largest = float(slopes.abs().max())
    torch.testing.assert_close(parameter.grad, slopes, rtol=0, atol=3e-3 * largest)
    assert largest > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_starts_where_the_formula_is_and_freezes_where_it_ends(family, new_tiny_model):
    model, inputs = new_tiny_model(family)
    batch = image_batch(inputs)
    with torch.no_grad(), rope_scaled(model, "poly:9:1"):
        fixed = loss_of(model, batch)
    apply_rope_scaling(model, START)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model, batch), fixed, rtol=1e-4, atol=1e-3)
        rotary(model).log_scale += torch.tensor([[[0.1, -0.4], [0.3, 0.2]]])
        learned = loss_of(model, batch)
    frozen = freeze_rope_scaling(model)
    expected = torch.tensor([[[1.0, 5.5], [1.0, 5.5]]]).double() * torch.tensor([[[0.1, -0.4], [0.3, 0.2]]]).exp()
    torch.testing.assert_close(torch.tensor(frozen.values).double(), expected, rtol=1e-5, atol=0)
    assert frozen == rope_scaling_of(model) == RopeScaling.from_any(getattr(model.config, CONFIG_FIELD))
    assert not any("log_scale" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model, batch), learned, rtol=1e-4, atol=1e-3)


def test_only_the_table_is_trained(new_tiny_model):
    """The tower learns back the factors of a model that it imitates."""
    model, inputs = new_tiny_model("qwen2_vl")
    batch = image_batch(inputs)
    with torch.no_grad(), rope_scaled(model, RopeScaling("table", values=((1.2, 4.0), (0.9, 7.0)))):
        target = torch.cat(list(model.get_image_features(**batch).pooler_output))
    apply_rope_scaling(model, START)
    model.requires_grad_(False)
    table = rotary(model).log_scale.requires_grad_(True)
    weights = {name: value.clone() for name, value in model.state_dict().items() if "log_scale" not in name}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        features = torch.cat(list(model.get_image_features(**batch).pooler_output))
        (features - target).square().mean().backward()
        optimizer.step()
    expected = torch.tensor([[[1.2, 4.0], [0.9, 7.0]]])
    torch.testing.assert_close(table.detach().exp(), expected, rtol=0.02, atol=0)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(family, reentrant, new_tiny_model):
    """Non-reentrant checkpoints carry the gradient; reentrant ones fail loudly, since blocks share the rotation."""
    model, inputs = new_tiny_model(family)
    batch = image_batch(inputs)
    apply_rope_scaling(model, START)
    loss_of(model.train(), batch).backward()
    expected = rotary(model).log_scale.grad.clone()
    rotary(model).log_scale.grad = None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        with pytest.raises(RuntimeError):
            loss_of(model, batch).backward()
        return
    loss_of(model, batch).backward()
    torch.testing.assert_close(rotary(model).log_scale.grad, expected)


def test_saved_in_the_state_dict_and_restored(new_tiny_model, tmp_path):
    model, inputs = new_tiny_model("qwen2_vl")
    batch = image_batch(inputs)
    apply_rope_scaling(model, START)
    with torch.no_grad():
        rotary(model).log_scale += 0.3
        learned = loss_of(model, batch)
    state = copy.deepcopy(model.state_dict())
    assert "model.visual.rotary_pos_emb.log_scale" in state
    other = new_tiny_model("qwen2_vl", seed=1).model
    apply_rope_scaling(other, getattr(model.config, CONFIG_FIELD))
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(loss_of(other, batch), learned)

    freeze_rope_scaling(model)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    apply_rope_scaling(loaded, getattr(loaded.config, CONFIG_FIELD))
    with torch.no_grad():
        torch.testing.assert_close(loss_of(loaded.eval(), batch), learned, rtol=1e-4, atol=1e-3)


def test_the_table_stays_float32_in_a_cast_model(new_tiny_model):
    model, inputs = new_tiny_model("qwen2_vl")
    batch = image_batch(inputs)
    apply_rope_scaling(model, "table:99:1")
    parameter = rotary(model).log_scale
    loss_of(model, batch).backward()
    values, gradient = parameter.detach().clone(), parameter.grad.clone()
    model.to(torch.bfloat16)
    assert rotary(model).log_scale is parameter and parameter.dtype == torch.float32
    assert torch.equal(parameter, values) and torch.equal(parameter.grad, gradient)
    parameter.grad = None
    loss_of(model, batch | {"pixel_values": batch["pixel_values"].bfloat16()}).backward()
    assert parameter.grad.dtype == torch.float32 and float(parameter.grad.abs().max()) > 0


def test_a_table_per_grid_size_learns_only_from_its_images(new_tiny_model):
    """Images of 4x6 and 6x4 patches: lengths 4 and 6 use different tables, the third one is never used."""
    model, inputs = new_tiny_model("qwen2_vl")
    batch = image_batch(inputs)
    apply_rope_scaling(model, RopeScaling("table", alpha=9, p=1, learned=True, grid_sizes=(4, 8, 16)))
    gradient = torch.autograd.grad(loss_of(model, batch), rotary(model).log_scale)[0]
    assert gradient.shape == (3, 2, 2)
    assert bool((gradient[:2].abs() > 1e-3).all()) and not gradient[2].any()
    one = {"pixel_values": batch["pixel_values"][:24], "image_grid_thw": batch["image_grid_thw"][:1]}
    gradient = torch.autograd.grad(loss_of(model, one), rotary(model).log_scale)[0]
    assert gradient[0, 0].any() and gradient[1, 1].any()  # h = 4, w = 6
    assert not gradient[0, 1].any() and not gradient[1, 0].any()


def test_packed_images_equal_single_images(new_tiny_model):
    model, inputs = new_tiny_model("qwen2_5_vl")
    batch = image_batch(inputs)
    values = [[[1.5, 4.0], [2.0, 3.0]], [[0.5, 9.0], [1.0, 6.0]]]
    apply_rope_scaling(model, RopeScaling("table", values=values, grid_sizes=(4, 8)))
    with torch.no_grad():
        together = model.get_image_features(**batch).pooler_output
        apply_rope_scaling(model, RopeScaling("table", values=(values[0][0], values[1][1])))  # 4 rows, 6 columns
        first = model.get_image_features(batch["pixel_values"][:24], batch["image_grid_thw"][:1]).pooler_output
        apply_rope_scaling(model, RopeScaling("table", values=(values[1][0], values[0][1])))  # 6 rows, 4 columns
        second = model.get_image_features(batch["pixel_values"][24:], batch["image_grid_thw"][1:]).pooler_output
    torch.testing.assert_close(together[0], first[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[1], second[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first[0], second[0])


def test_peft_trains_the_table_as_a_module_to_save(new_tiny_model, tmp_path):
    peft = pytest.importorskip("peft")
    model, inputs = new_tiny_model("qwen2_vl")
    batch = image_batch(inputs)
    base = copy.deepcopy(model)
    apply_rope_scaling(model, START)
    lora = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["rotary_pos_emb"])
    wrapped = peft.get_peft_model(model, lora)
    trained = {name for name, value in wrapped.named_parameters() if value.requires_grad and "lora" not in name}
    assert len(trained) == 1 and next(iter(trained)).endswith("modules_to_save.default.log_scale")
    parameter = dict(wrapped.named_parameters())[next(iter(trained))]
    loss_of(wrapped.base_model.model, batch).backward()
    assert float(parameter.grad.abs().max()) > 0
    with torch.no_grad():
        parameter += 0.2
        learned = loss_of(wrapped.base_model.model, batch)
    with pytest.raises(ValueError, match="scaled differently"):
        rope_scaling_of(wrapped)
    wrapped.save_pretrained(tmp_path)

    apply_rope_scaling(base, START)
    restored = peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(loss_of(restored, batch), learned, rtol=1e-5, atol=1e-3)
    assert freeze_rope_scaling(restored).values[0][0][1] == pytest.approx(5.5 * 2.718281828**0.2, rel=1e-5)


def test_freezing_a_fixed_or_stock_model_changes_nothing(new_tiny_model):
    model, _ = new_tiny_model("qwen2_vl")
    assert freeze_rope_scaling(model) is None
    apply_rope_scaling(model, "poly:9:1")
    assert str(freeze_rope_scaling(model)) == "poly:9:1"
    remove_rope_scaling(model)
