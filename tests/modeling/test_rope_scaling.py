"""A scaled model: stock when unset, reversible, float32, saved, copied, compiled, wrapped, at no cost."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dualstream.modeling import (
    RopeScaling,
    apply_rope_scaling,
    frequency_ratios,
    remove_rope_scaling,
    rope_scaled,
    rope_scaling_of,
)
from dualstream.modeling.rope_modules import scale_rotary
from dualstream.modeling.rope_scaling import CONFIG_FIELD
from dualstream.modeling.rope_towers import vision_rotaries

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SCALING = "poly:99:1"  # the tiny towers have the ratios 0 and 1/2: g = 1 and 50.5
EVERY = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def rotary(model):
    (module,) = vision_rotaries(model).values()
    return module


def trace(model):
    """Everything a forgotten scaling could leave behind."""
    return {
        "classes": [type(module) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "parameters": [name for name, _ in model.named_parameters()],
        "state": {name: value.tolist() for name, value in rotary(model).named_buffers()},
        "tensors": [id(value) for value in rotary(model).buffers()],
        "hidden": sorted(rotary(model)._non_persistent_buffers_set),
        "config": model.config.to_json_string(use_diff=False),
    }


@EVERY
def test_alpha_zero_or_nothing_is_stock_bit_for_bit(family, new_tiny_model):
    model, inputs = new_tiny_model(family)
    batch, before = inputs(["titt", "tti"]), trace(model)
    stock = logits(model, batch)
    for nothing in (None, "poly:0", "linear:0:h", {"type": "exp", "gamma": 1}, RopeScaling("table", values=(1, 1))):
        apply_rope_scaling(model, nothing)
        assert trace(model) == before
        assert torch.equal(logits(model, batch), stock)


@EVERY
def test_scaling_moves_vision_and_leaves_the_language_model_alone(family, new_tiny_model):
    model, inputs = new_tiny_model(family)
    batch, text_only = inputs(["titt"]), inputs(["ttt"])
    seen = []
    model.model.language_model.rotary_emb.register_forward_hook(
        lambda module, arguments, keywords, output: seen.append((arguments[1:], keywords, output)), with_kwargs=True
    )
    stock, stock_text = logits(model, batch), logits(model, text_only)
    with rope_scaled(model, SCALING):
        assert float((logits(model, batch) - stock).abs().max()) > 1e-3
        assert torch.equal(logits(model, text_only), stock_text)
    for first, second in zip(seen[:2], seen[2:], strict=True):
        assert torch.equal(first[2][0], second[2][0]) and torch.equal(first[2][1], second[2][1])


@EVERY
def test_remove_undoes_apply(family, new_tiny_model):
    model, inputs = new_tiny_model(family)
    batch, before = inputs(["titt"]), trace(model)
    stock = logits(model, batch)
    names = apply_rope_scaling(model, SCALING)
    assert names == ["model.visual.rotary_pos_emb"]
    assert "poly:99:1" in repr(model)
    apply_rope_scaling(model, "poly:9:2:w")
    assert str(rope_scaling_of(model)) == "poly:9:2:w"
    remove_rope_scaling(model)
    assert trace(model) == before and rope_scaling_of(model) is None
    assert torch.equal(logits(model, batch), stock)


def test_applying_again_replaces(new_tiny_model):
    model, _ = new_tiny_model("qwen2_vl")
    apply_rope_scaling(model, "poly:9:2:h")
    apply_rope_scaling(model, SCALING)
    once = rotary(model).inv_freq.clone()
    remove_rope_scaling(model)
    apply_rope_scaling(model, SCALING)
    assert torch.equal(rotary(model).inv_freq, once)


def test_context_leaves_no_trace_even_after_an_exception(new_tiny_model):
    model, _ = new_tiny_model("qwen2_vl")
    before = trace(model)
    with pytest.raises(RuntimeError, match="inside"), rope_scaled(model, SCALING) as same:
        assert same is model
        raise RuntimeError("inside")
    assert trace(model) == before
    for wrong in ("poly:99:8:9", RopeScaling("table", values=(1, 2, 3))):
        with pytest.raises(ValueError), rope_scaled(model, wrong):
            pytest.fail("must not get here")
        assert trace(model) == before


@pytest.mark.parametrize("outer", [SCALING, "table:9:2", "poly:9:2:h"])
def test_contexts_nest_and_the_inner_one_wins(outer, new_tiny_model):
    model, _ = new_tiny_model("qwen2_vl")
    apply_rope_scaling(model, outer)
    parameter = rotary(model)._parameters.get("log_scale")
    if parameter is not None:
        parameter.data += 0.25
    table, held, config = rotary(model).inv_freq.clone(), rope_scaling_of(model), model.config.to_dict()
    for inner in ("exp:3", "table:49:2", None):
        with rope_scaled(model, inner):
            assert rope_scaling_of(model) != held
            with rope_scaled(model, "linear:2"):
                assert str(rope_scaling_of(model)) == "linear:2"
            assert (rope_scaling_of(model) is None) == (inner is None)
        assert rope_scaling_of(model) == held and torch.equal(rotary(model).inv_freq, table)
        assert rotary(model)._parameters.get("log_scale") is parameter
        assert model.config.to_dict() == config


def test_a_failing_apply_changes_nothing(new_tiny_model):
    model, _ = new_tiny_model("qwen2_vl")
    apply_rope_scaling(model, SCALING)
    before = trace(model)
    with pytest.raises(ValueError, match="values has 3 frequencies, but the tower has 2"):
        apply_rope_scaling(model, RopeScaling("table", values=(1, 2, 3)))
    assert trace(model) == before


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_towers_without_a_rotary_table_are_refused(family, tiny_model):
    model, _ = tiny_model(family)
    words = r"no vision tower with an axial rotary table.*Qwen2-VL.*CLIP"
    with pytest.raises(ValueError, match=words):
        apply_rope_scaling(model, SCALING)
    with pytest.raises(ValueError, match=words), rope_scaled(model, SCALING):
        pass
    with pytest.raises(ValueError, match="no vision tower"):
        remove_rope_scaling(model)
    assert not hasattr(model.config, CONFIG_FIELD)


def test_one_axis_leaves_the_other_one_stock(tiny_model):
    module = copy.deepcopy(rotary(tiny_model("qwen2_vl").model))
    positions = torch.tensor([[3, 5], [7, 2]])
    stock = module(torch.empty(0), positions)
    for axis, column in (("h", 0), ("w", 1)):
        with rope_scaled(module, f"{SCALING}:{axis}"):
            pressed = positions.clone()
            pressed[:, column] = 0
            for scaled, plain in zip(module(torch.empty(0), pressed), module(torch.empty(0), pressed), strict=True):
                assert torch.equal(scaled, plain)
            cos, _ = module(torch.empty(0), positions)
        width = cos.shape[-1] // 4
        same = [block % 2 != column for block in range(4)]
        for block, kept in enumerate(same):
            part = slice(block * width, (block + 1) * width)
            assert torch.equal(cos[:, part], stock[0][:, part]) == kept


@pytest.mark.parametrize("moment", ["before", "after", "from_pretrained"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_stay_float32(moment, dtype, new_tiny_model, tmp_path):
    model, inputs = new_tiny_model("qwen2_vl")
    apply_rope_scaling(model, f"{SCALING}:w")
    exact = rotary(model).inv_freq.clone()
    if moment == "before":
        model.to(dtype)
    elif moment == "after":
        remove_rope_scaling(model)
        model.to(dtype)
        apply_rope_scaling(model, f"{SCALING}:w")
    else:
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path, dtype=dtype)
        apply_rope_scaling(model, getattr(model.config, CONFIG_FIELD))
    assert next(model.parameters()).dtype == dtype
    assert rotary(model).inv_freq.dtype == torch.float32
    assert torch.equal(rotary(model).inv_freq, exact)
    assert logits(model, inputs(["tit"])).dtype == dtype


def test_removing_gives_what_the_cast_would_have_given(new_tiny_model):
    scaled, stock = new_tiny_model("qwen2_vl").model, new_tiny_model("qwen2_vl").model
    apply_rope_scaling(scaled, SCALING)
    scaled.to(torch.bfloat16).float()
    stock.to(torch.bfloat16).float()
    remove_rope_scaling(scaled)
    assert rotary(scaled).inv_freq.dtype == rotary(stock).inv_freq.dtype
    assert torch.equal(rotary(scaled).inv_freq, rotary(stock).inv_freq)


@EVERY
def test_saved_with_the_model_and_applied_after_loading(family, new_tiny_model, tmp_path):
    model, inputs = new_tiny_model(family)
    batch = inputs(["titt"])
    apply_rope_scaling(model, f"{SCALING}:h")
    scaled = logits(model, batch)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    noted = getattr(loaded.config, CONFIG_FIELD)
    assert RopeScaling.from_any(noted) == rope_scaling_of(model) and rope_scaling_of(loaded) is None
    apply_rope_scaling(loaded, noted)
    assert torch.equal(logits(loaded.eval(), batch), scaled)


def test_meta_device(new_tiny_model):
    model, _ = new_tiny_model("qwen2_vl")
    apply_rope_scaling(model, SCALING)
    exact = rotary(model).inv_freq.clone()
    with torch.device("meta"):
        empty = type(model)(model.config)
        apply_rope_scaling(empty, SCALING)
    assert rotary(empty).inv_freq.is_meta and rotary(empty).inv_freq.shape == exact.shape
    empty.to_empty(device="cpu")
    rotary(empty).refresh()
    assert torch.equal(rotary(empty).inv_freq, exact)


@pytest.mark.parametrize("text", [SCALING, f"{SCALING}:h", "table:99:1"])
def test_copies_are_scaled_and_independent(text, new_tiny_model):
    model, inputs = new_tiny_model("qwen2_vl")
    batch = inputs(["tit"])
    stock = logits(model, batch)
    apply_rope_scaling(model, text)
    scaled = logits(model, batch)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        remove_rope_scaling(model)
        assert torch.equal(logits(copied, batch), scaled)
        assert rope_scaling_of(copied) is not None and getattr(copied.config, CONFIG_FIELD)
        remove_rope_scaling(copied)
        assert torch.equal(logits(copied, batch), stock)
        apply_rope_scaling(model, text)


class Operations(TorchDispatchMode):
    """Records the name of every operation."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(str(function))
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("axes", ["both", "h"])
@EVERY
def test_a_fixed_scaling_adds_no_operation(family, axes, tiny_model):
    model, inputs = tiny_model(family)
    batch = inputs(["titt"])
    counted = []
    for scaling in (None, RopeScaling("poly", axes=axes)):
        with rope_scaled(model, scaling), Operations() as operations:
            logits(model, batch)
        counted.append(operations.names)
    assert counted[0] == counted[1] and len(counted[0]) > 100


def compiled(module, arguments, graphs):
    """Output of the module compiled as one graph; the graph's operations are appended to `graphs`."""

    def backend(graph, example_inputs):
        graphs.append([(node.op, str(node.target)) for node in graph.graph.nodes if node.op != "placeholder"])
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(module, backend=backend, fullgraph=True)(*arguments)


@pytest.mark.parametrize("text", [SCALING, f"{SCALING}:w"])
def test_compiles_to_the_stock_graph(text, tiny_model):
    """One graph without a break, the same as the stock one (the graph is run as it is: no kernels are generated)."""
    module, graphs = copy.deepcopy(rotary(tiny_model("qwen2_vl").model)), []
    arguments = torch.empty(0), torch.tensor([[3, 5], [7, 2]])
    compiled(module, arguments, graphs)
    with rope_scaled(module, text):
        assert all(map(torch.equal, compiled(module, arguments, graphs), module(*arguments)))
    assert len(graphs) == 2 and graphs[0] == graphs[1]


@pytest.mark.parametrize("settings", [{}, {"grid_sizes": (4, 8)}])
def test_a_learned_table_compiles_to_one_graph(settings, tiny_model):
    module, graphs = copy.deepcopy(rotary(tiny_model("qwen2_vl").model)), []
    arguments = torch.empty(0), torch.cartesian_prod(torch.arange(3), torch.arange(6))
    with rope_scaled(module, RopeScaling("table", learned=True, **settings)):
        torch.testing.assert_close(compiled(module, arguments, graphs), module(*arguments))
    assert len(graphs) == 1


def test_a_compiled_model_notices_the_scaling(tiny_model):
    torch._dynamo.reset()
    module = copy.deepcopy(rotary(tiny_model("qwen2_vl").model))
    fast = torch.compile(module, backend="eager")
    arguments = torch.empty(0), torch.tensor([[3, 5], [7, 2]])
    stock = [part.clone() for part in fast(*arguments)]
    for text in (SCALING, f"{SCALING}:h", "table:99:1"):
        with rope_scaled(fast, text):
            expected = module(*arguments)
            torch.testing.assert_close(fast(*arguments), expected)
            assert not torch.equal(expected[0], stock[0])
        assert all(map(torch.equal, fast(*arguments), stock))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, new_tiny_model):
    model, inputs = new_tiny_model("qwen2_vl")
    batch = inputs(["titt"])
    apply_rope_scaling(model, SCALING)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train().zero_grad()
        model(**batch).logits.square().mean().backward()
        gradients.append(model.model.visual.blocks[0].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert float(gradients[0].abs().max()) > 0


@pytest.mark.parametrize("first", ["scaling", "peft"])
def test_peft(first, new_tiny_model):
    peft = pytest.importorskip("peft")
    model, inputs = new_tiny_model("qwen2_vl")
    batch = inputs(["titt"])
    with rope_scaled(model, SCALING):
        scaled = logits(model, batch)
    lora = peft.LoraConfig(r=2, target_modules=["qkv", "q_proj"])
    if first == "scaling":
        apply_rope_scaling(model, SCALING)
    wrapped = peft.get_peft_model(model, lora)
    if first == "peft":
        apply_rope_scaling(wrapped, SCALING)
    assert torch.equal(logits(wrapped, batch), scaled)  # LoRA starts at zero
    assert getattr(wrapped.config, CONFIG_FIELD) == RopeScaling.from_any(SCALING).to_dict()
    merged = wrapped.merge_and_unload()
    assert torch.equal(logits(merged, batch), scaled)
    remove_rope_scaling(merged)
    assert not torch.equal(logits(merged, batch), scaled)


def test_a_hooked_module_refuses_frequencies_that_move(new_tiny_model):
    """Device hooks keep the bound forward of the stock class; a new one would silently not run."""
    module = rotary(new_tiny_model("qwen2_vl").model)
    module.forward = module.forward
    scale_rotary(module, RopeScaling.from_any(SCALING))
    with pytest.raises(ValueError, match="forward is hooked"):
        scale_rotary(module, RopeScaling("table", learned=True))


def test_ratios_are_those_the_formula_uses(tiny_model):
    model, _ = tiny_model("qwen2_vl")
    ratios = frequency_ratios(model)
    assert ratios.tolist() == [0.0, 0.5]
    plain = RopeScaling.from_any(SCALING)
    with rope_scaled(model, plain):
        table = rotary(model).inv_freq.clone()
    with rope_scaled(model, RopeScaling("table", values=plain.factors(ratios)[0, 0])):
        assert torch.equal(rotary(model).inv_freq, table)
