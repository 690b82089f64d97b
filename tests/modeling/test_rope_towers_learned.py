"""Every tower of the table with a learned table of frequencies, and with tables that grid sizes choose."""

import pytest
import torch
from rotary_towers import EVERY, IMAGE_TOWERS, MODELS, WITH_POSITIONS, run, tower

from dualstream.modeling import ROTARY_TOWERS, RopeScaling, apply_rope_scaling, remove_rope_scaling, rope_scaled
from dualstream.modeling.rope_modules import grid_lengths
from dualstream.modeling.rope_towers import stock_frequencies, vision_rotaries

torch.set_num_threads(1)


@EVERY
def test_learned_table_starts_at_its_poly_and_has_gradients(name):
    model = tower(name)
    if ROTARY_TOWERS[name].form == "coordinates":
        with pytest.raises(ValueError, match="one fixed scaling of both axes"):
            apply_rope_scaling(model, "table:99:4")
        return
    with rope_scaled(model, "poly:99:4"):
        fixed, _ = run(name)
    try:
        apply_rope_scaling(model, "table:99:4")
        torch.testing.assert_close(run(name)[0], fixed, rtol=1e-3, atol=1e-4)
        for module in vision_rotaries(model).values():
            frequencies = module.frequency_tables()
            (gradient,) = torch.autograd.grad(frequencies.sum(), module.log_scale)
            row = ROTARY_TOWERS[name]
            g = 1 + 99 * row.ratios(gradient.shape[-1]) ** 4
            expected = (stock_frequencies(module).double() * g).float().expand_as(gradient)
            torch.testing.assert_close(gradient, expected)
    finally:
        remove_rope_scaling(model)


PACKED = [name for name in WITH_POSITIONS if ROTARY_TOWERS[name].packed and MODELS[name][0] not in IMAGE_TOWERS]


@pytest.mark.parametrize("name", PACKED)
def test_grid_sizes_choose_a_table_per_image_and_axis(name):
    """Packed images of 4x6, 8x4 and 6x10 patches: each axis rotates by the table of its own length."""
    model, grids = tower(name), ((4, 6), (8, 4), (6, 10))
    factors = {4: 2.0, 8: 3.0, 99: 5.0}
    count = len(stock_frequencies(next(iter(vision_rotaries(model).values()))))
    values = [[[factor] * count] * 2 for factor in factors.values()]
    _, stock = run(name, grids)
    with rope_scaled(model, RopeScaling("table", values=values, grid_sizes=tuple(factors))):
        _, scaled = run(name, grids)
    sizes = torch.cat([torch.tensor([[h, w]] * (h * w)) for h, w in grids])
    stretch = lambda length: next(factor for size, factor in factors.items() if length <= size)
    scale = torch.tensor([[stretch(int(h)), stretch(int(w))] for h, w in sizes])
    for (module, (x, positions), _), (_, _, (cos, sin)) in zip(stock, scaled, strict=True):
        assert torch.equal(grid_lengths(positions), sizes)
        expected = module(x, positions.double() * scale)
        torch.testing.assert_close((cos, sin), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", [name for name, row in ROTARY_TOWERS.items() if not row.packed])
def test_towers_whose_positions_hide_the_grid_refuse_grid_sizes(name):
    with pytest.raises(ValueError, match=r"grid_sizes needs|one fixed scaling"):
        apply_rope_scaling(tower(name), RopeScaling("table", learned=True, grid_sizes=(8, 16)))
