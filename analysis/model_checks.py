"""Checks of a checkpoint that are really run: prompts, geometry, lens, compression, ablation, attention knockout.

Every check takes the model, its processor and prepared inputs, and returns whether it holds and the numbers behind it.
A check that the architecture rules out raises ``NotPossible`` with the reason; that is a limit and no failure.
"""

from __future__ import annotations

from typing import Any

LOGIT_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}  # relative to the largest logit
# Sizes (width, height) that no patch or tile divides, long and flat ones among them.
ODD_SIZES = ((317, 211), (211, 317), (97, 53), (640, 90), (75, 410), (224, 224))
Verdict = tuple[bool, str]


class NotPossible(Exception):
    """What a check asks for does not exist in this architecture or with this kernel; the message says why."""


def probe_image(inverted: bool = False):
    """A picture with different content left and right, neither square nor a multiple of any patch size."""
    from PIL import Image, ImageDraw, ImageOps

    image = Image.new("RGB", (317, 211), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 30, 130, 140), fill="crimson")
    draw.rectangle((180, 60, 290, 190), fill="royalblue")
    return ImageOps.invert(image) if inverted else image


def probe_inputs(model, processor, images=None):
    """Inputs of one prompt per picture (default: the probe picture), left-padded, without a compression setting."""
    from dualstream.processing import build_inputs

    images = images or [probe_image()]
    inputs = build_inputs(processor, images, ["What is in this image?"] * len(images)).to(model.device)
    inputs.pop("compression", None)
    return inputs


def _feature_count(model, inputs) -> tuple[int, list[tuple[int, int]]]:
    from dualstream.modeling import read_visual_tokens

    reading = read_visual_tokens(model, inputs)
    return reading.ids.shape[0], [tuple(grid) for grid in reading.grids.tolist()]


def check_spans(model, processor, inputs) -> Verdict:
    """As many placeholders in the prompt as the connector makes features."""
    from dualstream.modeling import family_of

    placeholders = int((inputs["input_ids"] == family_of(model).image_token_id(model.config)).sum())
    features, _ = _feature_count(model, inputs)
    return placeholders == features, f"{placeholders} placeholders, {features} features"


def check_grid(model, processor, inputs) -> Verdict:
    """The processor's geometry and the model's features agree on every block's rows and columns."""
    from dualstream.processing import token_geometry

    _, grids = _feature_count(model, inputs)
    expected = [tuple(grid) for grid in token_geometry(processor, probe_image().size).grids]
    described = ", ".join(f"{rows}x{columns}" for rows, columns in grids)
    return grids == expected, f"{described} cells" if grids == expected else f"{described}, geometry says {expected}"


def check_lens(model, processor, inputs) -> Verdict:
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


def check_identity(model, processor, inputs) -> Verdict:
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


def check_compression(model, processor, inputs) -> Verdict:
    """Run-length compression shortens the prompt and still answers."""
    from dualstream.processing import answer_questions

    (answer,) = answer_questions(
        model, processor, [probe_image()], ["What is in this image?"], compression="rle", max_new_tokens=8
    )
    return answer.kept_tokens > 0, f"{answer.kept_tokens} of {answer.visual_tokens} visual tokens kept"


def check_sizes(model, processor, inputs) -> Verdict:
    """Pictures of odd sizes in one batch: as many placeholders for each as the geometry has tokens."""
    from PIL import Image

    from dualstream.modeling import family_of
    from dualstream.processing import token_geometry

    made = probe_inputs(model, processor, [Image.new("RGB", size, "grey") for size in ODD_SIZES])
    placeholders = (made["input_ids"] == family_of(model).image_token_id(model.config)).sum(1).tolist()
    expected = [len(token_geometry(processor, size)) for size in ODD_SIZES]
    wrong = [f"{w}x{h}: {a} for {b}" for (w, h), a, b in zip(ODD_SIZES, placeholders, expected, strict=True) if a != b]
    return not wrong, "; ".join(wrong) or f"{len(ODD_SIZES)} sizes, {min(expected)} to {max(expected)} tokens"


def check_lens_entries(model, processor, inputs) -> Verdict:
    """The lens at depth 0 reads what enters the language model: the connector's output, image by image."""
    import torch

    from dualstream.modeling import visual_features
    from dualstream.modeling.lens import image_hidden_states

    entry = image_hidden_states(model, inputs, 0).float()
    features = torch.cat(visual_features(model, inputs)).float()
    scale = features.norm(dim=-1).clamp(min=1e-6)
    ratio = entry.norm(dim=-1) / scale  # families may scale embeddings by a constant
    gap = float((entry - features * ratio.median()).abs().max() / features.abs().max())
    return gap < 1e-3, f"{len(entry)} tokens, largest relative gap {gap:.1e}"


def check_ablation_of_nothing(model, processor, inputs) -> Verdict:
    """An edit that changes nothing leaves every logit as it is, bit for bit."""
    import torch

    from dualstream.analysis.interventions import edited_features

    stock = _logits(model, inputs)
    with edited_features(model, lambda states, place: states):
        edited = _logits(model, inputs)
    equal = torch.equal(stock, edited)
    return equal, "identical logits" if equal else f"logits differ by {float((stock - edited).abs().max()):.1e}"


def check_ablation_of_all(model, processor, inputs) -> Verdict:
    """With all visual tokens replaced the answer does not depend on the pixels any more, and before it did."""
    import torch

    from dualstream.analysis.interventions import edited_features, encoded_images

    other = probe_inputs(model, processor, [probe_image(inverted=True)])
    before = _gap(_logits(model, inputs)[:, -1], _logits(model, other)[:, -1])

    def erased(deepstack: bool) -> float:
        with edited_features(model, lambda states, place: torch.zeros_like(states), deepstack):
            return _gap(_logits(model, inputs)[:, -1], _logits(model, other)[:, -1])

    with torch.no_grad():
        layers = len(getattr(encoded_images(_inner(model), inputs), "deepstack_features", None) or [])
    after = erased(True)
    detail = f"pixels moved the answer by {before:.1e}, now by {after:.1e}"
    if layers:
        detail += f"; {layers} deepstack layers replaced too, without them {erased(False):.1e}"
    return before > 0 and after == 0, detail


def check_knockout(model, processor, inputs) -> Verdict:
    """Text that may read no visual token, in any layer, gives an answer that does not depend on the pixels.

    The weights on the cut edges are measured to be exactly 0 on the way.
    """
    import torch

    from dualstream.analysis.causality.knockouts.knockout import Block, knockout, knockout_support
    from dualstream.modeling import family_of

    support = knockout_support(model)
    if support.problem:
        raise NotPossible(support.problem)
    visual = (inputs["input_ids"][0] == family_of(model).image_token_id(model.config)).nonzero().flatten().cpu()
    after = torch.arange(int(visual[-1]) + 1, inputs["input_ids"].shape[1])
    other = probe_inputs(model, processor, [probe_image(inverted=True)])
    before = _gap(_logits(model, inputs)[:, -1], _logits(model, other)[:, -1])
    between = torch.arange(int(visual[0]), int(visual[-1]) + 1)  # with separators, which read the visual tokens
    with knockout(model, [Block(0, between, after)]) as report:
        gap = _gap(_logits(model, inputs)[:, -1], _logits(model, other)[:, -1])
    detail = f"largest blocked weight {report.largest_blocked_weight:g}; pixels moved the answer by {before:.1e}, "
    detail += f"now by {gap:.1e}"
    if support.reasons:
        kinds = ", ".join(sorted(set(support.reasons.values())))
        raise NotPossible(f"{len(support.reasons)} of {support.layers} blocks cannot be cut ({kinds}); {detail}")
    tolerance = LOGIT_TOLERANCE[str(model.dtype).removeprefix("torch.")]
    return report.largest_blocked_weight == 0 and before > 0 and gap <= tolerance * before, detail


def check_knockout_of_nothing(model, processor, inputs) -> Verdict:
    """No edge cut: identical logits; one edge cut: nothing before its destination changes."""
    import torch

    from dualstream.analysis.causality.knockouts.knockout import Block, knockout, knockout_support
    from dualstream.modeling import family_of

    support = knockout_support(model)
    if support.problem:
        raise NotPossible(support.problem)
    stock = _logits(model, inputs)
    with knockout(model, []):
        same = torch.equal(stock, _logits(model, inputs))
    visual = (inputs["input_ids"][0] == family_of(model).image_token_id(model.config)).nonzero().flatten().cpu()
    to = inputs["input_ids"].shape[1] - 1
    with knockout(model, [Block(0, visual, torch.tensor([to]), support.cuttable)]):
        cut = _logits(model, inputs)
    scale = LOGIT_TOLERANCE[str(model.dtype).removeprefix("torch.")] * max(1.0, float(stock.abs().max()))
    before, at = _gap(stock[:, :to], cut[:, :to]), _gap(stock[:, to], cut[:, to])
    return same and before <= scale and at > 0, f"before the destination {before:.1e}, at it {at:.1e}"


def check_scorers(model, processor, inputs) -> Verdict:
    """The scorers of answers pass their list of texts that careless ones get wrong."""
    from dualstream.analysis.causality.scorers import TRAPS, self_test

    fallen = self_test()
    return not fallen, f"{len(TRAPS)} texts" if not fallen else f"wrong on {fallen[0].text!r}: {fallen[0].why}"


def _inner(model):
    from dualstream.modeling.lens import unwrapped

    return unwrapped(model)


def _logits(model, inputs):
    import torch

    from dualstream.analysis.causality.settings import uncompressed

    with torch.no_grad():
        return model(**inputs, **uncompressed(_inner(model))).logits


def _gap(one, other) -> float:
    return float((one.float() - other.float()).abs().max())


def describe(model, processor, inputs) -> dict[str, Any]:
    """What the model is made of, as far as reading it and intervening in it go."""
    import torch

    from dualstream.analysis.causality.knockouts.knockout import knockout_support
    from dualstream.analysis.interventions import encoded_images
    from dualstream.modeling import family_of

    inner, family = _inner(model), family_of(model)
    support = knockout_support(model)
    with torch.no_grad():
        deepstack = len(getattr(encoded_images(inner, inputs), "deepstack_features", None) or [])
    _, grids = _feature_count(model, inputs)
    return {
        "family": family.name,
        "model_type": inner.config.model_type,
        "class": type(inner).__name__,
        "parameters": sum(parameter.numel() for parameter in inner.parameters()),
        "dtype": str(inner.dtype).removeprefix("torch."),
        "vision blocks": len(family.vision_blocks(inner)),
        "language blocks": len(family.llm_blocks(inner)),
        "vocabulary": len(family.unembedding(inner).weight),
        "grid of the probe picture": " + ".join(f"{rows}x{columns}" for rows, columns in grids),
        "deepstack layers": deepstack,
        "attention kernel": support.kernel,
        "blocks that can be cut": len(support.cuttable),
        "sliding-window blocks": len(support.sliding),
        "image tokens read forwards": support.bidirectional,
        "limits": limits(support, grids, deepstack),
    }


def limits(support, grids, deepstack: int) -> list[str]:
    """What this model cannot do, or does otherwise than a plain one, and why."""
    found = []
    if support.problem:
        found.append(f"no attention knockout: {support.problem}")
    for reason in sorted(set(support.reasons.values())):
        blocks = [number for number, why in support.reasons.items() if why == reason]
        found.append(f"knockout leaves out blocks {blocks}: {reason}")
    if support.sliding:
        found.append(f"{len(support.sliding)} blocks see a window only: edges beyond it do not exist")
    if support.bidirectional:
        found.append("image tokens read each other forwards: a cut can change positions before its destination")
    if deepstack:
        found.append(
            f"visual features enter {deepstack} more times after early blocks; ablations replace them there too"
        )
    if len(grids) > 1:
        found.append(f"{len(grids)} feature blocks per picture (tiles, thumbnail): the public code's one square grid "
                     "does not exist")  # fmt: skip
    elif grids[0][0] != grids[0][1]:
        found.append("grids follow the picture's shape: the public code's one square grid needs square pictures")
    return found
