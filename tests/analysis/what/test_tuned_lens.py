"""The tuned lens: divergence against torch, a lens that can be found, files, and what it refuses."""

import pytest
import torch
from torch.nn import functional as F

from dualstream.analysis.what.lens_comparison import compare_lenses, divergence, pooled
from dualstream.analysis.what.scoring import Lenses
from dualstream.analysis.what.tuned_lens import Fit, TunedLens, fit_tuned_lens, readout_sha256
from dualstream.modeling.families import family_of


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_divergence_in_chunks_is_the_divergence(bias, chunk):
    generator = torch.Generator().manual_seed(0)
    teacher, student, matrix = (torch.randn(n, 16, generator=generator) for n in (9, 9, 64))
    offset = torch.randn(64, generator=generator) if bias else None
    wanted, given = (F.linear(rows, matrix, offset).log_softmax(-1) for rows in (teacher, student))
    expected = F.kl_div(given, wanted, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(divergence(teacher, student, matrix, offset, chunk), expected, rtol=1e-4, atol=1e-4)
    assert divergence(teacher, teacher, matrix, offset, chunk).abs().max() < 1e-5


@pytest.fixture
def states(new_tiny_model):
    """A model, and states of which depth 0 and 1 are a known affine map away from the last depth."""
    model = new_tiny_model("llava").model
    width = family_of(model).unembedding(model).weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]

    def make(count):
        last = torch.randn(count, width, generator=generator)
        return {0: last @ turn + 0.5, 1: last + 0.3 * torch.randn(count, width, generator=generator), 2: last}

    return model, make(1200), make(300)


def test_a_lens_learns_what_an_affine_map_can_undo(states):
    model, train, held_out = states
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lens, history = fit_tuned_lens(model, train, held_out, Fit(epochs=12, batch_size=100, learning_rate=1e-2))
    assert set(history) == {0, 1} and all(len(values) == 13 for values in history.values())
    assert min(history[0]) < 0.3 * history[0][0]
    rows = compare_lenses(Lenses(model, 3, tuned=lens), held_out, [100, 200])
    figures = {name: pooled(rows + rows, name) for name in ("agreement", "divergence")}
    assert all(len(values) == 4 for values in figures["agreement"].values())  # two pictures, twice
    assert figures["divergence"][0, "tuned"].mean() < 0.3 * figures["divergence"][0, "normed"].mean()
    assert figures["agreement"][0, "tuned"].mean() > figures["agreement"][0, "normed"].mean() + 0.3
    assert figures["divergence"][2, "normed"].max() < 1e-5 and figures["agreement"][2, "tuned"].min() == 1.0
    held = float(figures["divergence"][0, "tuned"][[0, 1]] @ [1 / 3, 2 / 3])
    assert held == pytest.approx(min(history[0]), rel=1e-3)  # the best epoch was kept
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_lens_that_cannot_get_better_stays_the_identity(states):
    model, train, held_out = states
    same = dict.fromkeys(range(3), held_out[2])
    lens, _ = fit_tuned_lens(model, dict.fromkeys(range(3), train[2]), same, Fit(epochs=2, learning_rate=0.1))
    assert not lens.weight.any() and not lens.bias.any()


def test_the_same_seed_gives_the_same_lens(states):
    model, train, held_out = states
    one, other = (fit_tuned_lens(model, train, held_out, Fit(epochs=1, seed=3))[0] for _ in range(2))
    assert torch.equal(one.weight, other.weight) and one.weight.any()


def test_a_lens_goes_to_a_file_and_back(states, tmp_path):
    model, train, held_out = states
    lens, _ = fit_tuned_lens(model, train, held_out, Fit(epochs=1), {"model": "tiny", "images": "12"})
    lens.save(tmp_path / "lens.safetensors")
    again = TunedLens.load(tmp_path / "lens.safetensors")
    again.check_compatible(model)
    assert again.facts == {"model": "tiny", "images": "12"} and again.readout == readout_sha256(model)
    assert torch.equal(again(train[0], 0), lens(train[0], 0))
    assert again(train[0].bfloat16(), 0).dtype == torch.bfloat16
    assert torch.equal(again(train[0], 2), train[0])


def test_wrong_files_models_and_depths_are_refused(states, new_tiny_model, tmp_path):
    from safetensors.torch import save_file

    model, train, held_out = states
    lens = TunedLens.for_model(model)
    with pytest.raises(ValueError, match=r"depth=3 must lie within 0\.\.2"):
        lens(train[0], 3)
    with pytest.raises(ValueError, match="fitted for another model"):
        lens.check_compatible(new_tiny_model("llava", seed=1).model)
    with pytest.raises(ValueError, match="is no file"):
        TunedLens.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(ValueError, match="is no safetensors file"):
        TunedLens.load(tmp_path / "text.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no tuned lens; it holds x"):
        TunedLens.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"\[1\] are missing"):
        fit_tuned_lens(model, {0: train[0], 2: train[2]}, held_out)
