"""The run-length plan against a brute-force loop, the worked example of the specification, and the options."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dualstream.modeling.visual_compression import (
    DROP_SCOPES,
    METHODS,
    POOLINGS,
    CompressionConfig,
    RunLengthPlan,
    merge_features,
    run_length_plan,
)

VOCAB = 6


@st.composite
def cases(draw):
    grids = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4))
    cells = sum(height * width for height, width in grids)
    reading = st.integers(0, VOCAB - 1)
    ids = draw(st.lists(st.tuples(reading, reading), min_size=cells, max_size=cells))
    options = {
        "method": draw(st.sampled_from(METHODS)),
        "wrap_rows": draw(st.booleans()),
        "drop_scope": draw(st.sampled_from(DROP_SCOPES)),
        "min_keep": draw(st.integers(0, 4)),
    }
    meaningless = draw(st.lists(st.booleans(), min_size=VOCAB, max_size=VOCAB))
    text_class = draw(st.none() | st.lists(reading, min_size=VOCAB, max_size=VOCAB))
    return ids, grids, options, meaningless, text_class


def make_plan(ids, grids, options, meaningless=None, text_class=None, **more):
    config = CompressionConfig(**options, **more, compare="text" if text_class else "id")
    tables = {
        "meaningless": None if meaningless is None else torch.tensor(meaningless),
        "text_class": None if text_class is None else torch.tensor(text_class),
    }
    return run_length_plan(torch.tensor(ids).reshape(-1, len(ids[0])), torch.tensor(grids), config, **tables), config


@settings(max_examples=400, deadline=None)
@given(cases(), st.sampled_from(POOLINGS), st.integers(0, 10_000))
def test_plan_equals_brute_force(reference, case, pooling, seed):
    ids, grids, options, meaningless, text_class = case
    plan, config = make_plan(ids, grids, options, meaningless, text_class, pooling=pooling, seed=seed)
    blocks = reference.plan_by_loop(ids, grids, **options, meaningless=meaningless, text_class=text_class)
    kept = [run for block in blocks for run in block]
    segment = [-1] * len(ids)
    for index, run in enumerate(kept):
        for cell in run:
            segment[cell] = index
    assert plan.segment.tolist() == segment
    assert plan.kept_per_block.tolist() == [len(block) for block in blocks]
    assert (plan.num_cells, plan.num_kept) == (len(ids), len(kept))
    assert plan.dropped.tolist() == [index < 0 for index in segment]
    assert all(anchor in run for anchor, run in zip(plan.anchor.tolist(), kept, strict=True))
    if pooling != "random":
        middle = {"mean": lambda run: run[(len(run) - 1) // 2], "first": lambda run: run[0]}[pooling]
        assert plan.anchor.tolist() == [middle(run) for run in kept]
    assert plan.anchor.tolist() == sorted(plan.anchor.tolist())
    assert plan.runs[:, 1].sum() == len(ids)
    assert all(int(run) in plan.runs[:, 0] for run in [r[0] for r in kept])

    features = torch.randn(len(ids), 3, generator=torch.Generator().manual_seed(seed))
    merged = merge_features(features, plan, config.pooling)
    for index, run in enumerate(kept):
        chosen = features[run].mean(0) if pooling == "mean" else features[plan.anchor[index]]
        assert torch.allclose(merged[index], chosen, atol=1e-6)
        if len(run) == 1:
            assert torch.equal(merged[index], features[run[0]])


# sky sky , dog / dog dog , .  with sky=0 dog=1 comma=2 full stop=3
EXAMPLE = [0, 0, 2, 1, 1, 1, 2, 3]
PUNCTUATION = [False, False, True, True]


@pytest.mark.parametrize(
    ("options", "second", "kept"),
    [
        ({"method": "rle", "wrap_rows": True}, [0] * 8, 5),
        ({"method": "rle", "wrap_rows": False}, [0] * 8, 6),
        ({"method": "rle_drop_top1", "wrap_rows": True}, [0] * 8, 2),
        ({"method": "rle_drop_top2", "wrap_rows": True}, [0] * 7 + [2], 4),
        ({"method": "none"}, [0] * 8, 8),
    ],
)
def test_worked_example_of_the_specification(options, second, kept):
    plan, _ = make_plan(list(zip(EXAMPLE, second, strict=True)), [(2, 4)], options, PUNCTUATION)
    assert plan.num_kept == kept


@pytest.mark.parametrize("grid", [(1, 7), (7, 1), (3, 5)])
def test_all_equal_and_all_distinct(grid):
    cells = grid[0] * grid[1]
    equal, _ = make_plan([[4]] * cells, [grid], {"method": "rle"})
    assert equal.num_kept == grid[0]  # one run per grid row
    wrapped, _ = make_plan([[4]] * cells, [grid], {"method": "rle", "wrap_rows": True})
    assert wrapped.num_kept == 1
    distinct, _ = make_plan([[cell] for cell in range(cells)], [grid], {"method": "rle"})
    assert distinct.is_identity
    features = torch.randn(cells, 4)
    assert torch.equal(merge_features(features, distinct, "mean"), features)


def test_runs_never_cross_blocks():
    plan, _ = make_plan([[4]] * 12, [(1, 5), (1, 3), (2, 2)], {"method": "rle", "wrap_rows": True})
    assert plan.kept_per_block.tolist() == [1, 1, 1]
    assert plan.runs.tolist() == [[0, 5], [5, 3], [8, 4]]


def test_min_keep_brings_back_the_first_runs():
    ids = [[0], [1], [0], [1], [0], [1]]
    plan, _ = make_plan(ids, [(1, 6)], {"method": "rle_drop_top1", "min_keep": 2}, [True] * VOCAB)
    assert plan.anchor.tolist() == [0, 1]
    plan, _ = make_plan(ids, [(1, 6)], {"method": "rle_drop_top1", "min_keep": 0}, [True] * VOCAB)
    assert plan.num_kept == 0
    assert merge_features(torch.randn(6, 2), plan, "mean").shape == (0, 2)
    few, _ = make_plan([[0]] * 3, [(1, 3)], {"method": "rle_drop_top1", "min_keep": 5}, [True] * VOCAB)
    assert few.num_kept == 1  # a block cannot keep more runs than it has


def test_no_images():
    empty = torch.empty(0, 1, dtype=torch.long)
    for method in ("none", "rle"):
        plan = run_length_plan(empty, torch.empty(0, 2, dtype=torch.long), CompressionConfig(method=method))
        assert (plan.num_cells, plan.num_kept) == (0, 0)


class OperationCounter(TorchDispatchMode):
    """Counts tensor operations and reads of single values by the host."""

    def __init__(self):
        super().__init__()
        self.operations, self.host_reads = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        self.host_reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_work_is_the_same_number_of_operations_for_any_number_of_cells(method):
    operations, host_reads = [], set()
    for grids in ([(1, 3)], [(24, 24)] * 8, [(1, 1)] * 500):
        cells = sum(height * width for height, width in grids)
        ids = torch.randint(0, VOCAB, (cells, 2))
        meaningless = torch.rand(VOCAB) < 0.5
        with OperationCounter() as counter:
            plan = run_length_plan(ids, torch.tensor(grids), CompressionConfig(method=method), meaningless)
            merge_features(torch.randn(cells, 4), plan, "first")
        operations.append(counter.operations)
        host_reads.add(counter.host_reads)
    assert max(operations) - min(operations) <= 3  # broadcasting differs a little for a single block
    assert host_reads == {1}  # the check that the grids, which live on the CPU, cover the cells


def test_drop_scope_looks_at_the_first_cell_or_at_all():
    ids, meaningless = [[0, 0], [0, 1], [0, 0]], [True, False] + [False] * 4
    options = {"method": "rle_drop_top2", "min_keep": 0}
    assert make_plan(ids, [(1, 3)], {**options, "drop_scope": "first"}, meaningless)[0].num_kept == 0
    assert make_plan(ids, [(1, 3)], {**options, "drop_scope": "run"}, meaningless)[0].num_kept == 1


def test_random_pooling_is_seeded_uniform_and_independent_of_the_batch():
    def anchors(seed, blocks=1):
        config = CompressionConfig(pooling="random", seed=seed)
        ids = torch.full((blocks * 40, 1), 3)
        return run_length_plan(ids, torch.tensor([(5, 8)] * blocks), config).anchor

    assert torch.equal(anchors(1), anchors(1))
    assert not torch.equal(anchors(1), anchors(2))
    assert torch.equal(anchors(1, blocks=3)[5:10] - 40, anchors(1))
    offsets = torch.cat([anchors(seed) % 8 for seed in range(400)])
    counts = torch.bincount(offsets, minlength=8).double() / len(offsets)
    assert (counts - 1 / 8).abs().max() < 0.03  # 2000 draws, standard error 0.007


def test_mean_is_computed_in_float32():
    plan, _ = make_plan([[1]] * 300, [(1, 300)], {"method": "rle"})
    features = torch.full((300, 1), 1.0, dtype=torch.bfloat16)
    features[::2] = 1.0078125
    merged = merge_features(features, plan, "mean")
    assert merged.dtype == torch.bfloat16
    assert merged.item() == features.float().mean().bfloat16().item()


def test_gradient_of_the_mean_is_spread_over_the_run():
    plan, _ = make_plan([[1], [1], [2], [1]], [(1, 4)], {"method": "rle"})
    features = torch.randn(4, 2, requires_grad=True)
    merge_features(features, plan, "mean").sum().backward()
    assert features.grad[:, 0].tolist() == [0.5, 0.5, 1, 1]


def test_config_reads_every_form_and_round_trips():
    assert CompressionConfig.from_any(None).method == "none"
    assert CompressionConfig.from_any("rle_drop_top2").top_k == 2
    config = CompressionConfig(method="rle", min_keep=3)
    assert CompressionConfig.from_any(config) == config
    assert CompressionConfig.from_any(config.to_dict()) == config
    paper = CompressionConfig.from_any("paper:rle_drop_top1")
    assert paper == CompressionConfig.paper("rle_drop_top1")
    assert (paper.compare, paper.wrap_rows, paper.position_policy) == ("text", True, "compact")
    assert (paper.pooling, paper.drop_scope) == ("random", "first")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("zip", "method='zip' is unknown; choose one of none, rle"),
        ("paper:zip", "method='zip'"),
        ({"method": "rle", "speed": 3}, "unknown options .'speed'"),
        ({"pooling": "median"}, "pooling='median'"),
        ({"position_policy": "new"}, "position_policy='new'"),
        ({"compare": "font"}, "compare='font'"),
        ({"drop_scope": "some"}, "drop_scope='some'"),
        ({"min_keep": -1}, "min_keep=-1"),
        ({"wrap_rows": "yes"}, "wrap_rows='yes'"),
        (7, "type int is not understood"),
    ],
)
def test_config_errors_name_the_value(value, message):
    with pytest.raises(ValueError, match=message):
        CompressionConfig.from_any(value)


def test_plan_errors():
    ids, grids = torch.zeros(6, 1, dtype=torch.long), torch.tensor([(2, 3)])
    with pytest.raises(ValueError, match="grids cover 4 cells but ids has 6 rows"):
        run_length_plan(ids, torch.tensor([(2, 2)]), CompressionConfig())
    with pytest.raises(ValueError, match="ids must have shape"):
        run_length_plan(ids[:, 0], grids, CompressionConfig())
    with pytest.raises(ValueError, match="grids must have shape"):
        run_length_plan(ids, grids[0], CompressionConfig())
    with pytest.raises(ValueError, match="needs 2 readings"):
        run_length_plan(ids, grids, CompressionConfig(method="rle_drop_top2"), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="table `meaningless`"):
        run_length_plan(ids, grids, CompressionConfig(method="rle_drop_top1"))
    with pytest.raises(ValueError, match="table `text_class`"):
        run_length_plan(ids, grids, CompressionConfig(compare="text"))
    plan = run_length_plan(ids, grids, CompressionConfig())
    with pytest.raises(ValueError, match="features has 5 rows"):
        merge_features(torch.zeros(5, 2), plan, "mean")
    with pytest.raises(ValueError, match="pooling='median'"):
        merge_features(torch.zeros(6, 2), plan, "median")
    assert isinstance(plan.cpu(), RunLengthPlan)
