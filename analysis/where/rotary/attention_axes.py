"""E7: what two objects' patches say to each other in the vision tower, by axis, frequency, head and block."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dualstream.modeling import rope_scaled

from ..effects import corrected, effect, judged_above
from ..experiment import Experiment, Finding, ReportTable, above, below, pending
from ..items import REFERENCE, ROLES, SUBJECT
from .axis_contrasts import SCALED, STOCK, contrast_shares, frequency_shares, head_contrasts, odd_shares
from .rotary_algebra import pair_parts, rotated
from .vision_rotation import (
    VisionRotary,
    queries_and_keys,
    raster_places,
    rotation_problem,
    tower_positions,
    vision_rotary,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from dualstream.analysis.resumable_rows import ResumableRows

    from ..bench import Bench
    from ..items import WhereItem

SCALINGS = {STOCK: "poly:0", SCALED: "poly:99:8"}  # the second is the published default
DIRECTIONS = ((SUBJECT, REFERENCE), (REFERENCE, SUBJECT))
SHOWN_HEADS = 8
NEGLIGIBLE = 0.01  # of a share; a smaller gain counts as none


class AttentionAxes(Experiment):
    """Split the attention logits between the two objects of every picture."""

    name = "attention_axes"
    title = "Axes and frequencies of the vision tower's attention"
    question = (
        "Rotary attention adds a part that is even in the displacement of two patches, which cannot tell left from "
        "right, and an odd one, which can, for every frequency of either axis. Which parts change between opposite "
        "relations of the same two objects, and does scaling the frequencies (poly:99:8) enlarge the odd ones? The "
        "published measure (share of an axis in a softmax over both axes' logits) stands beside."
    )

    def settings(self) -> dict[str, Any]:
        """The scalings compared."""
        return {"scalings": SCALINGS}

    def reason_to_skip(self, bench: Bench) -> str | None:
        """No rotary positions in the tower."""
        return rotation_problem(bench.model)

    def run(self, bench: Bench, rows: ResumableRows) -> None:
        """One unit per scaling and batch of pictures."""
        batches = bench.batches(bench.items)
        units = {f"{name}-{number:04d}": (name, part) for name in SCALINGS for number, part in enumerate(batches)}
        for unit in pending(list(units), rows, self.title):
            name, part = units[unit]
            # A model that comes with a scaling of its own is measured with it instead of the stock frequencies.
            own = name == STOCK and getattr(bench.model.config, "vision_rope_scaling", None) is not None
            with ExitStack() as context:
                if not own:
                    context.enter_context(rope_scaled(bench.model, SCALINGS[name]))
                rows.write(unit, [{"scaling": name, **row} for row in logit_parts(bench, part)])

    def summarize(self, table: pa.Table) -> list[Finding]:
        """Statements about the stock tower, and about what scaling changes."""
        frame = table.to_pandas()
        stock, scaled = (contrast_shares(frame, name) for name in SCALINGS)
        axis, parity = (effect(stock[name], stock["pair_id"]).estimate for name in ("axis", "parity"))
        shares = {name: odd_shares(frame, name) for name in SCALINGS}
        odd = effect(shares[STOCK]["expected"], shares[STOCK]["pair_id"])
        other = effect(shares[STOCK]["other"], shares[STOCK]["pair_id"])
        gain = effect(shares[SCALED]["expected"] - shares[STOCK]["expected"], shares[STOCK]["pair_id"])
        tuned = effect(scaled["axis"], scaled["pair_id"]).estimate
        bands = frequency_shares(frame, STOCK)
        drowned = effect(bands["high"] - bands["low"], bands["pair_id"])
        return [
            Finding(
                "Between opposite relations, the odd part changes on the axis of the relation more than on the other",
                axis,
                above(axis, 0.5),
                "yes: share of the axis in the changes of both above 0.5; no: below",
                tuned,
                "with poly:99:8",
                "of the change",
            ),
            Finding(
                "On the axis of the relation, the odd part changes more than the even one",
                parity,
                above(parity, 0.5),
                "yes: share of the odd part in the changes of both above 0.5; no: below",
                None,
                "0.5",
                "of the change",
            ),
            Finding(
                "On the axis of the relation, the odd part is smaller than the even one",
                odd.estimate,
                below(odd.estimate, 0.5),
                "yes: share of the odd part (root mean square over patches) below 0.5; no: above",
                other.estimate,
                "the other axis",
                "of both",
            ),
            Finding(
                "Low frequencies tell less about the side than high ones",
                drowned.estimate,
                judged_above(drowned),
                "yes: odd share of the upper half of the frequencies minus that of the lower above 0; no: below",
                None,
                "0",
                "difference of shares",
            ),
            Finding(
                "Scaled frequencies (poly:99:8) enlarge the odd share on the axis of the relation",
                gain.estimate,
                judged_above(gain, NEGLIGIBLE),
                f"yes: paired difference to the stock frequencies above 0; no: a gain of {NEGLIGIBLE} excluded",
                odd.estimate,
                "share with stock frequencies",
                "difference of shares",
            ),
        ]

    def tables(self, table: pa.Table) -> list[ReportTable]:
        """The heads that tell the sides apart most reliably, and the published measure."""
        frame = table.to_pandas()
        found = corrected({key: effect(values, pairs) for key, (values, pairs) in head_contrasts(frame).items()})
        order = sorted(found, key=lambda key: (found[key].p_value, -abs(found[key].estimate.value)))
        lines: list[tuple[Any, ...]] = [
            (
                *key,
                found[key].estimate,
                found[key].corrected,
            )
            for key in order[:SHOWN_HEADS]
        ]
        expected = [key for key in found if (key[0] == "horizontal") == (key[1] == "w")]
        count = sum(found[key].corrected <= 0.05 for key in expected)
        others = sum(found[key].corrected <= 0.05 for key in found if key not in expected)
        note = (
            "Half the change of the odd part between the two relations of an axis. Of "
            f"{len(expected)} combinations of block, head and direction, {count} differ from 0 on the relation's own "
            f"axis and {others} of as many on the other one (Holm, 5 %, over all)."
        )
        heads = ReportTable(
            "Heads whose odd part tells opposite relations apart, in logits",
            ("relations", "axis", "block", "head", "from → to", "contrast", "Holm p"),
            lines,
            note,
        )
        return [heads, _published(frame)]

    def figures(self, table: pa.Table, folder: Path) -> list[Path]:
        """By block, and by frequency."""
        from .attention_axis_figures import draw_blocks, draw_frequencies

        frame = table.to_pandas()
        return [
            draw_blocks(frame, folder / f"{self.name}_blocks.png"),
            draw_frequencies(frame, folder / f"{self.name}_frequencies.png"),
        ]


@torch.no_grad()
def logit_parts(bench: Bench, items: Sequence[WhereItem]) -> list[dict[str, Any]]:
    """Parts of the logits between the two objects, for every picture, block, head and direction.

    No map of all patches is kept: the parts come from sums over the objects' patches, the published measure from the
    rows of one object's patches.

    Args:
        bench: with a rotary vision tower; of Qwen2.5-VL's, only the blocks with attention over the whole picture.
        items: pictures of one pass.

    Returns:
        Rows with ``even`` and ``odd``: mean parts of every frequency, the height's first; ``even_square`` and
        ``odd_square``: mean squares of the parts of either axis; ``published``: the share of the width in the
        published measure, the same for all heads of a block.
    """
    rotary = vision_rotary(bench.model)
    inputs = bench.inputs(items)
    images = {name: inputs[name] for name in bench.family.image_input_names if inputs.get(name) is not None}
    kept: list[torch.Tensor] = []
    rows: list[dict[str, Any]] = []

    def visit(block: int, queries: torch.Tensor, keys: torch.Tensor, sides: Any) -> None:
        if whole is not None and block not in whole:  # a block of windows: the objects do not meet
            return
        places = raster_places(kept[0])
        if not patches:
            patches.extend(_patches(bench, items, places))
        for number, item in enumerate(items):
            for query, key in DIRECTIONS:
                own, other = patches[number][query], patches[number][key]
                parts = pair_parts(queries[own], keys[other], _at(sides, own), _at(sides, other), columns, scaling)
                share = published_share(rotary, queries, keys, sides, own, other, places[number].flatten(), scaling)
                rows.extend(_rows(item, block, (query, key), parts, rotary, share))

    whole = getattr(bench.family.vision_tower(bench.model), "fullatt_block_indexes", None)
    patches: list[dict[str, torch.Tensor]] = []
    first: Any = rotary.attentions[0]
    scaling, columns = float(first.scaling), rotary.column
    with tower_positions(rotary, kept), queries_and_keys(rotary, visit):
        bench.model.model.get_image_features(**images, return_dict=True)
    return rows


def published_share(
    rotary: VisionRotary,
    queries: torch.Tensor,
    keys: torch.Tensor,
    sides: tuple[torch.Tensor, torch.Tensor],
    own: torch.Tensor,
    other: torch.Tensor,
    image: torch.Tensor,
    scaling: float,
) -> float:
    """The published measure, on the right patches: one softmax over the logits of both axes, averaged over heads.

    Returns:
        Share of the width in what the first object's patches give to the second's.
    """
    turned = [
        rotated(states[at], *(side[at][:, None] for side in sides)) for states, at in ((queries, own), (keys, image))
    ]
    parts = []
    for axis in ("h", "w"):
        chosen = torch.cat([rotary.column == rotary.axes.index(axis)] * 2)
        parts.append(scaling * torch.einsum("nhd,mhd->nm", *(x[..., chosen] for x in turned)) / keys.shape[1])
    weights = torch.cat(parts, dim=-1).softmax(-1)
    place = torch.full((int(image.max()) + 1,), -1, dtype=torch.long, device=image.device)
    place[image] = torch.arange(len(image), device=image.device)
    height, width = (half[:, place[other]].mean() for half in weights.split(len(image), dim=-1))
    return float(width / (height + width))


def _at(sides: tuple[torch.Tensor, torch.Tensor], places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return sides[0][places], sides[1][places]


def _patches(bench: Bench, items: Sequence[WhereItem], places: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Role -> places, in the tower's order, of the patches behind the object's visual tokens."""
    found = []
    for item, grid in zip(items, places, strict=True):
        rows, columns = bench.geometry(bench.size(item)).grids[0]
        merge = grid.shape[0] // rows
        blocks = grid.reshape(rows, merge, columns, merge).transpose(1, 2).reshape(rows * columns, -1)
        found.append({role: blocks[bench.tokens(item, role)].flatten() for role in ROLES})
    return found


def _rows(
    item: WhereItem, block: int, direction: tuple[str, str], parts: Any, rotary: VisionRotary, share: float
) -> list[dict[str, Any]]:
    order = torch.tensor([rotary.axes.index(axis) for axis in ("h", "w")])
    slots = torch.empty_like(rotary.frequencies, dtype=torch.long)  # (columns, F) -> pair of channels
    slots[rotary.column, rotary.entry] = torch.arange(len(rotary.column), device=slots.device)
    slots = slots[order].flatten()
    common = {
        "pair_id": item.pair_id,
        "item": item.name,
        "relation": item.relation,
        "axis": item.axis,
        "block": block,
        "direction": f"{direction[0]} → {direction[1]}",
        "published": share,
    }
    return [
        {
            **common,
            "head": head,
            "even": parts.even[head, slots].double().tolist(),
            "odd": parts.odd[head, slots].double().tolist(),
            "even_square": parts.even_square[head, order].double().tolist(),
            "odd_square": parts.odd_square[head, order].double().tolist(),
        }
        for head in range(len(parts.even))
    ]


def _published(frame: Any) -> ReportTable:
    lines = []
    for name in SCALINGS:
        rows = frame[(frame["scaling"] == name) & (frame["head"] == 0)]
        for relation in rows["relation"].unique():
            own = rows[rows["relation"] == relation]
            means = own.groupby("pair_id")["published"].mean()
            estimate = effect(means, means.index.to_series()).estimate
            lines.append((name, relation, estimate))
    note = (
        "Mean over blocks and both directions. It mixes what patches show with where they are, and one softmax over "
        "both axes favours the one whose logits vary more: 0.5 is no chance level. No statement above uses it."
    )
    return ReportTable(
        "The published measure, on the right patches", ("frequencies", "relation", "share of the width"), lines, note
    )
