import numpy as np
import pytest
import torch
from peer_prompts import TOYS, opened

from dualstream.benchmarks.peers import Depths, peers_of, run
from dualstream.benchmarks.peers.depth import VISION, BlockClock, Spent, at_full_depth
from dualstream.benchmarks.peers.published import first_pass_blocks
from dualstream.benchmarks.peers.task import task_of
from dualstream.benchmarks.prefill import FULL, LIMIT
from dualstream.benchmarks.report.pivots import peer_table
from dualstream.measuring import Clock, count_work
from dualstream.modeling.families import family_of

RATE = 0.4
BEFORE = (
    "compressed, pruned",
    "published, two passes",
    "published, decoder",
    "vision attention",
    "vision attention, eager tower",
    "token matching",
    "token matching, numpy",
    "neighbour merging, scipy",
    "strided cells",
)
INSIDE = ("drop inside", "drop inside, eager block", "drop inside, in stages")


def last_values(prefill, row):
    """What the last token of a row brings to the last block: it depends on all that was kept before it."""
    return prefill.cache.layers[-1].values[row, :, -1]


def traces_of(model):
    """Everything a peer could leave behind."""
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    ]
    configs = [(id(module.config), module.config._attn_implementation) for module in model.modules() if _has(module)]
    return type(model), hooks, configs, sorted(model.__dict__)


def _has(module):
    return hasattr(module, "config") and hasattr(module.config, "_attn_implementation")


@pytest.mark.parametrize("name", TOYS)
def test_all_peers_keep_as_many_tokens_as_ours(name):
    model, inputs = opened(name, batch=2, images=2, ragged=True)
    task, ways = task_of(model, inputs, RATE), peers_of(model, inputs, RATE, ("pruned",))
    assert set(ways) == {FULL, LIMIT, "random cells", *BEFORE, *INSIDE}
    whole, kept = task.cells * task.blocks_per_row, task.keep * task.blocks_per_row
    assert 0 < kept < whole
    full = ways[FULL]()
    per_column = full.kv_bytes // full.length
    for way in (LIMIT, "random cells", *BEFORE):
        prefill = ways[way]()
        assert prefill.length == full.length - (whole - kept), way
        assert prefill.kv_bytes == per_column * prefill.length, way
        if hasattr(prefill, "input_ids"):
            visual = prefill.input_ids == task.placeholder
            assert visual.sum(1).tolist() == [kept] * 2, way
    columns = [layer.keys.shape[2] for layer in ways["drop inside"]().cache.layers]
    assert columns == [full.length] * 2 + [full.length - whole + kept] * 2
    staged = [layer.keys.shape[2] - full.length + whole for layer in ways["drop inside, in stages"]().cache.layers]
    assert staged[0] == whole and sum(staged) == pytest.approx(4 * kept, abs=2)
    assert staged == sorted(staged, reverse=True) and staged[3] < kept < staged[1]


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen2.5-vl"])
def test_every_picture_keeps_its_share(name):
    model, inputs = opened(name, images=2)
    task = task_of(model, inputs, RATE)
    cells = torch.arange(task.blocks * task.cells).view(task.blocks, -1)
    for way in ("vision attention", "token matching", "random cells", "strided cells"):
        prefill = peers_of(model, inputs, RATE, ("pruned",), [way])[way]()
        positions = task.positions()[..., inputs["input_ids"][0] == task.placeholder]
        columns = [tuple(column) for column in positions.reshape(-1, cells.numel()).T.tolist()]
        kept = prefill.position_ids[..., prefill.input_ids[0] == task.placeholder]
        found = [columns.index(tuple(column)) for column in kept.reshape(-1, kept.shape[-1]).T.tolist()]
        assert found == sorted(set(found))
        assert [sum(cell in block for cell in found) for block in cells.tolist()] == [task.keep] * 2


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def test_a_batch_is_its_rows(name):
    model, inputs = opened(name, batch=2, ragged=True)
    ways = peers_of(model, inputs, RATE, ("pruned",))
    patches = len(inputs["pixel_values"]) // 2
    for row in range(2):
        start = int((inputs["attention_mask"][row] == 0).sum())
        alone = {
            key: value[row : row + 1, start:] if value.ndim == 2 and len(value) == 2 else value[row : row + 1]
            for key, value in inputs.items()
            if key != "pixel_values"
        }
        if "image_grid_thw" in inputs:
            alone["image_grid_thw"] = inputs["image_grid_thw"][row : row + 1]
        alone["pixel_values"] = inputs["pixel_values"][row * patches : (row + 1) * patches]
        single = peers_of(model, alone, RATE, ("pruned",))
        for way in (FULL, *BEFORE, *INSIDE):
            together, apart = ways[way](), single[way]()
            torch.testing.assert_close(last_values(together, row), last_values(apart, 0), atol=2e-4, rtol=2e-4)
            assert together.first_token[row] == apart.first_token[0], way


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen2.5-vl"])
@pytest.mark.parametrize("broken", ["nothing", "a block of the tower", "the head"])
def test_nothing_is_left_behind(name, broken):
    model, inputs = opened(name)
    family, ways = family_of(model), peers_of(model, inputs, RATE)
    parts = {"a block of the tower": family.vision_blocks(model)[-2], "the head": family.unembedding(model)}

    def fail(*_):
        raise RuntimeError("broken on purpose")

    handle = parts[broken].register_forward_pre_hook(fail) if broken in parts else None
    before = traces_of(model)
    for way in ways.values():
        if handle is None:
            way()
        else:
            with pytest.raises(RuntimeError, match="on purpose"):
                way()
        assert traces_of(model) == before


def test_rows_of_a_run():
    model, inputs = opened("tiny-qwen2.5-vl", batch=2)
    names, calls = ["compressed, pruned", "drop inside", "published, decoder"], []
    rows = run(model, inputs, [0.3, 0.5], 2, Clock(), lambda: calls.append(1), ("pruned",), names)
    assert [(row["way"], row["reduction"]) for row in rows] == [
        (name, rate) for rate in (0.3, 0.5) for name in (FULL, LIMIT, *names)
    ]
    assert len(calls) == 2 * 3 * 5  # rates, rounds with the warm-up, ways
    assert {row["suite"] for row in rows} == {"peers"} and {row["batch"] for row in rows} == {2}
    full, limit, ours, inside, published = rows[5:]
    assert full["kept_tokens"] == full["visual_tokens"] == 2 * 30
    assert [row["kept_tokens"] for row in rows[6:]] == [2 * 15] * 4
    assert limit["ratio"] == 1 and full["speedup"]["value"] == 1
    assert ours["ratio_low"] <= ours["ratio"] <= ours["ratio_high"] and ours["ratio_to"] == LIMIT
    assert ours["kv_bytes"] == limit["kv_bytes"] < inside["kv_bytes"] < full["kv_bytes"]
    assert min(row["peak_bytes"] for row in rows) > limit["kv_bytes"]
    assert published["waits"] >= ours["waits"] + 2 * 15  # at least one per cell of its loop


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen2.5-vl"])
def test_blocks_are_counted_by_what_they_see(name):
    model, inputs = opened(name, batch=2)
    task, clock = task_of(model, inputs, RATE), BlockClock(torch.device("cpu"))
    whole = inputs["input_ids"].shape[1]
    short, before = whole - task.cells + task.keep, traces_of(model)
    first = 4 if name != "tiny" else first_pass_blocks(model, 4)
    expected = {
        FULL: {whole: 4},
        "compressed, pruned": {short: 4},
        "drop inside": {whole: 2, short: 2},
        "published, two passes": {whole: first, short: 4},
    }
    for way, blocks in expected.items():
        with clock.marked(model):
            start = clock._now()
            peers_of(model, inputs, RATE, ("pruned",), [way])[way]()
            passed = clock._now() - start
        spent = clock.take()
        vision = spent.pop(VISION)
        assert vision.blocks % 3 == 0 and vision.seconds > 0
        assert {columns: part.blocks for columns, part in spent.items()} == blocks, way
        assert 0 < sum(part.seconds for part in spent.values()) < passed
    assert traces_of(model) == before and clock.take() == {}


def test_time_at_full_depth_by_hand():
    """Blocks of the tower take 1 s, of the language model 10 s on the whole prompt and 2 s on the short one."""
    depths = Depths(layers=4, full_layers=32, vision_layers=3, full_vision_layers=12)

    def projected(rest, whole=0, short=0, fixed=None):
        spent = {VISION: Spent(3, 3.0)}
        spent |= {600: Spent(whole, 10.0 * whole)} if whole else {}
        spent |= {300: Spent(short, 2.0 * short)} if short else {}
        total = rest + 3 + 10 * whole + 2 * short
        return at_full_depth(np.array([total, total]), [spent, spent], depths, fixed).tolist()

    assert projected(5, whole=4) == [5 + 12 + 320] * 2
    assert projected(5, short=4) == [5 + 12 + 64] * 2
    assert projected(5, whole=2, short=2, fixed=2) == [5 + 12 + 20 + 60] * 2  # two blocks in full, 30 short ones
    assert projected(5, whole=4, short=4, fixed=28) == [5 + 12 + 280 + 64] * 2  # a pass of its own, then a short one
    assert projected(5, whole=1, short=3) == [5 + 12 + 80 + 48] * 2  # in stages
    assert not Depths(4, 4, 3, 3).is_cut and Depths(4, 4, 3, 12).is_cut


def test_rows_of_a_model_that_was_cut():
    model, inputs = opened("tiny-qwen2.5-vl")
    depths = Depths(layers=4, full_layers=40, vision_layers=3, full_vision_layers=30)
    names = ["drop inside", "compressed, pruned"]
    full, limit, inside, ours = run(model, inputs, [0.5], 3, Clock(), None, ("pruned",), names, depths)
    for row in (full, limit, inside, ours):
        assert row["full_depth_ms"] > row["median_ms"]
        assert row["full_depth_ratio"]["low"] <= row["full_depth_ratio"]["value"] <= row["full_depth_ratio"]["high"]
    assert limit["full_depth_ratio"]["value"] == 1
    rows = run(model, inputs, [0.5], 2, Clock(), None, ("pruned",), ["drop inside"], Depths(4, 4, 3, 3))
    assert "full_depth_ms" not in rows[0]


def test_table_tells_of_the_whole_model(by_hand, make_record):
    row = by_hand.time("peers", "drop inside", 20.0, ratio=2.0, ratio_low=1.9, ratio_high=2.1)
    whole = {"full_depth_ms": 110.0, "full_depth_ratio": {"value": 1.1, "low": 1.0, "high": 1.25}}
    plain, cut = (peer_table(make_record([found])) for found in (row, {**row, **whole}))
    assert "20.0, 2.000 [1.900, 2.100] |" in plain and "whole model" not in plain
    assert "2.000 [1.900, 2.100] → 110, 1.100 [1.000, 1.250] |" in cut and "whole model, computed" in cut


def test_cheap_choices_add_no_waits_beyond_the_prompt():
    model, inputs = opened("tiny")
    names = ("strided cells", "random cells", "token matching", "vision attention", "drop inside")
    ways = peers_of(model, inputs, RATE, ("pruned",), names)
    waits = {name: count_work(way, flops=False).waits for name, way in ways.items()}
    assert len({waits[name] for name in names[:-1]}) == 1  # scores and merging never wait
    assert waits["drop inside"] <= waits["strided cells"]


def test_errors_name_the_argument():
    model, inputs = opened("tiny-qwen2.5-vl", batch=2)
    with pytest.raises(ValueError, match="names has nonsense; choose from uncompressed, native short"):
        peers_of(model, inputs, RATE, ("pruned",), ["nonsense"])
    with pytest.raises(ValueError, match=r"reduction=1.5 must lie within 0..1"):
        peers_of(model, inputs, 1.5, ("pruned",))
    with pytest.raises(ValueError, match="pictures of one size"):
        task_of(model, inputs, RATE, torch.tensor([[6, 5], [5, 6]]))
    flipped = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    flipped["attention_mask"][0, -1] = 0
    with pytest.raises(ValueError, match="padded on the left"):
        task_of(model, flipped, RATE)
    with pytest.raises(ValueError, match="out of reach"):
        peers_of(model, inputs, 0.9, ("pruned",), ["drop inside, in stages"])
    assert "drop inside, in stages" not in peers_of(model, inputs, 0.9, ("pruned",))
