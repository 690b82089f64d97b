"""Readings of the embedded models: against full forwards, singles, other prompts; exact probabilities, memory."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dualstream.analysis.annotated_images import open_annotated
from dualstream.analysis.what.depth_maps import DepthMaps, Step, load_depth_maps, read_vocabulary, write_vocabulary
from dualstream.analysis.what.flow import FIGURES, flow_figures, norm_factors
from dualstream.analysis.what.reading import make_steps, read_batch, read_depth_maps, visit_steps
from dualstream.analysis.what.scoring import Lenses
from dualstream.analysis.what.throughput import measure, peak_memory
from dualstream.analysis.what.tuned_lens import TunedLens
from dualstream.cli import open_model
from dualstream.modeling.auto import EMBEDDED_MODELS
from dualstream.modeling.families import family_of
from dualstream.processing import build_inputs, read_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module", params=EMBEDDED_MODELS)
def loaded(request):
    return open_model(SimpleNamespace(model=request.param, device="cpu", dtype="float32", rope_scaling=None))


@pytest.fixture(scope="module")
def images():
    sources = ("scenes:test:2:96", "scenes:test:1:150")
    pictures = [image.image() for source in sources for image in open_annotated(source)]
    pictures[1] = pictures[1].resize((140, 80))  # not square
    return pictures


def tracked(processor):
    vocabulary = processor.tokenizer.get_vocab()
    return {"circle": [vocabulary["Ġcircle"], vocabulary["circle"]], "red": [vocabulary["Ġred"]]}


def stock(model, processor, image):
    """Log-probabilities (N, V) of the stock forward at the image tokens, and its hidden states there."""
    inputs = build_inputs(processor, [image], ["Is there a red circle?"])
    inputs.pop("compression", None)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    at = inputs["input_ids"] == family_of(model).image_token_id(model.config)
    return output.logits[at].log_softmax(-1), [states[at] for states in output.hidden_states]


def test_the_last_depth_with_norm_is_the_model_s_own_prediction(loaded, images):
    model, processor = loaded
    maps = read_depth_maps(model, processor, images[1], words=tracked(processor))
    log_probs, hidden = stock(model, processor, images[1])
    layers = len(family_of(model).llm_blocks(model))
    last = maps.position(Step(maps.native_vision_depth, layers))
    best = log_probs.topk(5)
    assert np.array_equal(maps.ids[last], best.indices.numpy())
    np.testing.assert_allclose(maps.log_probs[last], best.values, atol=1e-4)
    circle = log_probs[:, tracked(processor)["circle"]].logsumexp(-1)
    np.testing.assert_allclose(maps.tracked[last, :, 0], circle, atol=1e-4)
    for depth in range(layers):  # early exits: the hidden states of the full forward, read by norm and output matrix
        head = family_of(model).unembedding(model)
        expected = head(family_of(model).final_norm(model)(hidden[depth])).log_softmax(-1)
        step = maps.position(Step(maps.native_vision_depth, depth))
        assert np.array_equal(maps.ids[step, :, 0], expected.argmax(-1).numpy())
        np.testing.assert_allclose(
            maps.tracked[step, :, 1], expected[:, tracked(processor)["red"][0]].detach(), atol=1e-4
        )


def test_the_connector_reads_as_elsewhere_in_the_package(loaded, images):
    model, processor = loaded
    maps = read_depth_maps(model, processor, images[0], None, [None], top_k=3)
    native = maps.position(Step(maps.native_vision_depth, None, "decoder"))
    elsewhere = read_image(model, processor, images[0], top_k=3)
    assert np.array_equal(maps.ids[native], elsewhere.ids)
    np.testing.assert_allclose(maps.log_probs[native], elsewhere.scores, atol=1e-5)


def test_a_batch_of_sizes_reads_as_its_pictures_do(loaded, images):
    model, processor = loaded
    steps = make_steps(model, llm_depths=[None, 0, 2, 5])
    lenses = Lenses(model, 3, tracked(processor))
    together = read_batch(lenses, processor, images, steps, ["a", "b", "c"])
    for maps, image, name in zip(together, images, "abc", strict=True):
        (alone,) = read_batch(lenses, processor, [image], steps, [name], prompt="What is it?")  # another prompt, too
        assert maps.image == name and maps.geometry.image_size == image.size
        assert (maps.ids[..., 0] == alone.ids[..., 0]).mean() > 0.999  # near ties may turn by rounding
        np.testing.assert_allclose(maps.tracked, alone.tracked, atol=2e-3)


def test_the_prompt_changes_nothing(loaded, images):
    model, processor = loaded
    steps, lenses = make_steps(model, llm_depths=[None, 3]), Lenses(model, 3)
    first, second = (
        read_batch(lenses, processor, images[:1], steps, ["a"], prompt=prompt)[0]
        for prompt in ("Describe the image.", "How many red circles are there above the star, and why?")
    )
    assert np.array_equal(first.ids, second.ids) and np.array_equal(first.log_probs, second.log_probs)


def test_steps_that_need_something_say_so(loaded, images):
    model, processor = loaded
    with pytest.raises(ValueError, match="lens='normed' does not go with llm_depth=None"):
        Step(0, None)
    with pytest.raises(ValueError, match="lens='best' does not go"):
        Step(0, 1, "best")
    for step, message in (
        (Step(0, 1, "tuned"), "needs a tuned lens"),
        (Step(2, 1, norm_matched=True), r"factors lack the vision depths \[2\]"),
        (Step(99, 1), "within 0.."),
        (Step(0, 99), "within 0.."),
    ):
        with pytest.raises(ValueError, match=message):
            read_batch(Lenses(model), processor, images[:1], [step], ["a"])
    with pytest.raises(ValueError, match="steps must differ"):
        read_batch(Lenses(model), processor, images[:1], [Step(0, 1)] * 2, ["a"])
    with pytest.raises(ValueError, match="tracked words without a vocabulary id: zebra"):
        Lenses(model, 3, {"zebra": []})


def test_matched_norms_are_those_of_the_native_depth(loaded, images):
    model, processor = loaded
    figures = flow_figures(model, processor, [images[:1], images[1:2]])
    assert set(figures) == set(FIGURES) and figures["state_cosine"].shape[0] == 2
    factors = norm_factors({"feature_norm_ratio": figures["feature_norm_ratio"][:1]})
    native = read_depth_maps(model, processor, images[0], [0], [0]).native_vision_depth
    assert factors[native] == pytest.approx(1) and figures["feature_cosine"][0, native] == pytest.approx(1, abs=1e-5)
    seen = {}
    inputs = build_inputs(processor, images[:1], ["x"])
    inputs.pop("compression", None)
    steps = [Step(0, 0), Step(0, 0, norm_matched=True), Step(native, 0)]
    visit_steps(model, inputs, steps, lambda step, states: seen.__setitem__(step, states.norm(dim=-1).mean()), factors)
    assert float(seen[steps[1]]) == pytest.approx(float(seen[steps[2]]), rel=1e-3)
    assert float(seen[steps[0]]) != pytest.approx(float(seen[steps[2]]), rel=1e-2)


def test_readings_survive_their_file(loaded, images, tmp_path):
    import pyarrow.parquet as pq

    model, processor = loaded
    maps = read_depth_maps(model, processor, images[1], [0, 2], [None, 1], top_k=2, words=tracked(processor), name="x")
    pq.write_table(maps.to_table(), tmp_path / "x.parquet")
    write_vocabulary(tmp_path, [maps.pieces.get(number, "") for number in range(700)])
    again = load_depth_maps(tmp_path / "x.parquet", read_vocabulary(tmp_path))
    assert (again.image, again.steps, again.words, again.geometry) == (
        maps.image,
        maps.steps,
        maps.words,
        maps.geometry,
    )
    assert again.native_vision_depth == maps.native_vision_depth
    for name in ("ids", "log_probs", "tracked"):
        assert np.array_equal(getattr(again, name), getattr(maps, name))
    assert all(again.pieces[number] == text for number, text in maps.pieces.items())
    with pytest.raises(ValueError, match=r"was not read at Step\(vision_depth=1"):
        maps.position(Step(1, 1))
    with pytest.raises(ValueError, match="ids and log_probs must be"):
        DepthMaps("x", maps.geometry, maps.steps[:1], 1, maps.ids, maps.log_probs, {})
    with pytest.raises(ValueError, match="holds no vocabulary"):
        read_vocabulary(tmp_path / "rows")


def test_memory_does_not_grow_with_the_depths_and_both_ways_agree(loaded, images):
    model, processor = loaded
    found = measure(Lenses(model, 3), processor, images[:2], batch_size=2, rounds=1)
    assert found["same_words"] > 0.999
    peaks = [row["peak_mib"] for row in found["memory"]]
    assert peaks[-1] < 1.05 * peaks[0]
    assert all(way["seconds"].value > 0 and way["speedup"].value > 0 for way in found["ways"].values())


def test_the_memory_figure_sees_what_is_kept(loaded, images):
    """Control of the figure itself: keeping all states must show."""
    model, processor = loaded
    inputs = build_inputs(processor, images[:1], ["x"])
    inputs.pop("compression", None)
    lenses, kept = Lenses(model, 3), []
    plain = peak_memory(lenses, inputs, [0, 1, 2], 1)

    class Hoarder(Lenses):
        def read(self, states, step):
            kept.append(states.repeat(50, 1))
            return super().read(states, step)

    assert peak_memory(Hoarder(model, 3), inputs, [0, 1, 2], 1) > plain + sum(x.nbytes for x in kept) * 0.9


def test_the_identity_lens_is_the_normed_one(loaded, images):
    model, processor = loaded
    steps = [Step(2, 3), Step(2, 3, "tuned"), Step(2, 5), Step(2, 5, "tuned"), Step(2, 3, "plain")]
    (maps,) = read_batch(Lenses(model, 2, tuned=TunedLens.for_model(model)), processor, images[:1], steps, ["a"])
    for depth in (3, 5):
        normed, tuned = maps.position(Step(2, depth)), maps.position(Step(2, depth, "tuned"))
        np.testing.assert_allclose(maps.log_probs[normed], maps.log_probs[tuned], atol=1e-6)
    assert not np.allclose(
        maps.log_probs[maps.position(Step(2, 3, "plain"))], maps.log_probs[maps.position(Step(2, 3))]
    )
