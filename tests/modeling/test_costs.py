"""What the product path may cost, as counts that no machine changes: operations, waits for the device, bytes, FLOPs.

``count_work`` sees on the CPU what would make the host wait for an accelerator (values read, masks as indices); where
that is not enough the path runs on fake tensors of a CUDA device, on which anything that depends on data raises.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dualstream.measuring import WAITING, count_work
from dualstream.modeling import compression_report, visual_compression
from dualstream.modeling.compression_context import compressing
from dualstream.modeling.compression_report import host_inputs
from dualstream.modeling.prompt_plan import plan_prompt
from dualstream.modeling.visual_compression import (
    METHODS,
    CompressionConfig,
    RunLengthPlan,
    merge_features,
    run_length_plan,
)
from dualstream.modeling.vocabulary_scores import best_tokens, top_k_tokens

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
IMAGE = 99
SIZES = (([(24, 24)], 576), ([(24, 24)] * 8, 4608), ([(32, 40)] * 8, 10240))


def plan_of(grids, cells, method="rle", readings=3):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, readings, (cells, 2), generator=generator)
    meaningless = torch.arange(readings) == 0
    return run_length_plan(ids, torch.tensor(grids), CompressionConfig(method), meaningless)


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_multiplies_once_and_never_holds_all_scores(dtype):
    cells, width, rows = 64, 32, 60_000
    features, weight = torch.randn(cells, width).to(dtype), torch.randn(rows, width).to(dtype)
    counts = count_work(lambda: best_tokens(features, weight))
    assert counts.by_name["mm"] >= 3 and counts.by_name["logsumexp"] == 0
    product = 2 * cells * width * rows
    assert product <= counts.flops <= 1.1 * product  # candidates of a few cells are scored again
    assert counts.peak_bytes < cells * rows * 4 / 3
    if dtype == torch.float32:
        assert counts.flops == product and counts.waits == 0 and counts.by_name["topk"] == 0
    with_scores = count_work(lambda: top_k_tokens(features, weight))
    assert with_scores.flops == product and with_scores.waits == 0
    assert with_scores.peak_bytes < cells * rows * 4 / 2


@pytest.mark.parametrize("method", METHODS)
def test_compression_reads_no_log_probabilities(method, tiny_model, coarse_decoder):
    tiny = tiny_model("llava")
    with compressing(tiny.model, method, coarse_decoder) as model:
        counts = count_work(lambda: model(**tiny.inputs(["titt", "itt"])))
    assert counts.by_name["logsumexp"] == counts.by_name["logaddexp"] == 0


# ---------------------------------------------------------------------- plan and pooling


@pytest.mark.parametrize(("method", "most"), [("none", 8), ("rle", 58), ("rle_drop_top1", 84), ("rle_drop_top2", 84)])
def test_plan_is_as_many_operations_for_any_batch(method, most):
    counts = [count_work(lambda g=grids, n=cells: plan_of(g, n, method)) for grids, cells in SIZES]
    assert max(found.operations for found in counts) - 3 <= most  # the three that make the example
    assert max(found.operations for found in counts) - min(found.operations for found in counts) <= 3
    assert {found.waits for found in counts} == {1}  # the sizes of the grids, which live on the CPU


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_pooling_is_as_many_operations_for_any_batch(pooling):
    found = set()
    for grids, cells in SIZES:
        plan, features = plan_of(grids, cells), torch.randn(cells, 8)
        counts = count_work(lambda f=features, p=plan: merge_features(f, p, pooling))
        assert counts.waits == 0
        found.add(counts.operations)
    assert len(found) == 1 and found.pop() <= 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_holds_no_second_copy_of_the_features(dtype, monkeypatch):
    plan, features = plan_of([(32, 40)], 1280), torch.randn(1280, 512).to(dtype)
    monkeypatch.setattr(visual_compression, "CAST_AT_ONCE", 1280 * 64)
    pooled = plan.num_kept * features.shape[1] * features.itemsize
    peak = count_work(lambda: merge_features(features, plan, "mean")).peak_bytes
    indices = 8 * 8 * 1280  # a few longs per cell
    assert peak <= 2 * pooled + 2 * 1280 * 64 * 4 + indices
    assert torch.equal(
        merge_features(features, plan, "mean"), merge_features(features.float(), plan, "mean").to(dtype)
    )


# ---------------------------------------------------------------------- on an accelerator


@pytest.fixture
def on_cuda():
    """Function (dtype, *shape) -> a fake CUDA tensor; operations whose result depends on data raise."""
    with FakeTensorMode():
        yield lambda dtype, *shape: torch.empty(*shape, dtype=dtype, device="cuda")


def test_what_depends_on_data_raises_on_fake_tensors(on_cuda):
    for waiting in (lambda x: x[x > 0], lambda x: int(x.sum()), lambda x: x.cpu().tolist()):
        with pytest.raises(Exception, match=r"aten\."):
            waiting(on_cuda(torch.long, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2])
def test_reading_never_waits(on_cuda, dtype, k):
    features, weight = on_cuda(dtype, 1280, 3584), on_cuda(dtype, 152_064, 3584)
    counts = count_work(lambda: best_tokens(features, weight, k))
    assert counts.waits == 0
    assert counts.by_name["mm"] == 19  # slices of 8,192
    assert counts.by_name["_to_copy"] == 0  # halves are not cast
    assert counts.peak_bytes < 3 * 1280 * 8192 * 4
    assert counts.flops == 2 * 1280 * 3584 * 152_064


@pytest.mark.parametrize("method", METHODS[1:])
def test_plan_waits_for_its_lengths_only(on_cuda, method):
    ids, meaningless = on_cuda(torch.long, 4608, 2), on_cuda(torch.bool, 100)
    grids, config = torch.tensor([(24, 24)] * 8), CompressionConfig(method)
    counts = count_work(lambda: visual_compression._plan_in_slots(ids, grids.cuda(), config, meaningless, None))
    assert counts.waits == 0 and counts.operations - counts.by_name["device"] <= 82
    with pytest.raises(DataDependentOutputException):  # the lengths themselves
        run_length_plan(ids, grids, config, meaningless)


def test_pooling_and_rewriting_never_wait(on_cuda):
    cells, kept, prompt = 4608, 300, on_cuda(torch.long, 8, 620)
    segment, anchor = on_cuda(torch.long, cells), on_cuda(torch.long, kept)
    plan = RunLengthPlan(segment, anchor, torch.full((8,), kept // 8), segment)
    features = on_cuda(torch.bfloat16, cells, 4096)
    assert count_work(lambda: merge_features(features, plan, "mean")).waits == 0
    assert merge_features(features, plan, "mean").shape == (kept, 4096)

    def rewrite(length):
        shortened = plan_prompt(prompt, prompt, IMAGE, anchor, cells, "left", length)
        return shortened.shorten({"input_ids": prompt}, 0), shortened.positions(prompt, "original")

    counts = count_work(lambda: rewrite(500))
    assert counts.waits == 0 and counts.operations - counts.by_name["device"] <= 30
    with pytest.raises(DataDependentOutputException):
        rewrite(None)


def test_the_host_learns_of_prompts_in_one_transfer(on_cuda):
    given = {"input_ids": on_cuda(torch.long, 8, 620), "attention_mask": on_cuda(torch.bool, 8, 620)}
    pictures = {"image_grid_thw": on_cuda(torch.long, 8, 3), "pixel_values": on_cuda(torch.float32, 8, 4)}
    counts = count_work(lambda: host_inputs(given, pictures))
    assert counts.waits == 1
    known = host_inputs(given, pictures)
    assert {name: (tuple(x.shape), x.device.type) for name, x in known.items()} == {
        "input_ids": ((8, 620), "cpu"),
        "attention_mask": ((8, 620), "cpu"),
        "image_grid_thw": ((8, 3), "cpu"),
    }


# ---------------------------------------------------------------------- the whole pass


class PretendedDevice(TorchDispatchMode):
    """Counts waits of a pass as if a model and its inputs lay on an accelerator, while all is on the CPU.

    What comes from them lies there too, until ``cpu``, ``tolist`` or a read of a value brings it to the host.
    """

    def __init__(self, monkeypatch, tensors):
        super().__init__()
        self.waits, self.storages = 0, {}
        for tensor in tensors:
            self._put(tensor)
        stock = {name: getattr(torch.Tensor, name) for name in ("cpu", "tolist")}
        monkeypatch.setattr(torch.Tensor, "cpu", lambda x: self._fetched(x) if self._there(x) else stock["cpu"](x))
        monkeypatch.setattr(
            torch.Tensor, "tolist", lambda x: stock["tolist"](self._fetched(x) if self._there(x) else x)
        )
        monkeypatch.setattr(compression_report, "on_host", self._fetch_together)

    def _put(self, tensor):
        self.storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()  # kept alive: keys stay unique

    def _there(self, tensor):
        return isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata in self.storages

    def _fetched(self, tensor):
        self.waits += 1
        return torch.from_numpy(tensor.detach().numpy().copy())  # unseen by the mode

    def _fetch_together(self, tensors):
        found = {name: self._fetched(tensor) for name, tensor in tensors.items()}
        self.waits -= len(found) - 1
        return found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if self._there(leaf)]
        name = func.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        selects = any(self._there(mask) and mask.dtype == torch.bool for mask in masks)
        self.waits += bool(given) and (name in WAITING or selects)
        for leaf in tree_leaves(result) if given else ():
            if isinstance(leaf, torch.Tensor):
                self._put(leaf)
        return result


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("rows", [["tiiit"], ["tiitt", "iit"]])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compressed_pass_waits_twice_more_than_a_stock_one(
    family, rows, call, tiny_model, coarse_decoder, monkeypatch
):
    tiny = tiny_model(family)
    inputs = tiny.inputs(rows)

    def waits(model):
        owned = [*model.parameters(), *model.buffers(), *coarse_decoder.parameters(), *coarse_decoder.buffers()]
        with monkeypatch.context() as patch, torch.no_grad():
            with PretendedDevice(patch, [*owned, *inputs.values()]) as counter:
                if call == "forward":
                    model(**inputs)
                else:
                    model.generate(**inputs, max_new_tokens=1, do_sample=False)
            return counter.waits

    stock = waits(tiny.model)
    with compressing(tiny.model, "rle", coarse_decoder) as model:
        compressed = waits(model)
        assert model.last_compression.kept_tokens < model.last_compression.visual_tokens
    assert compressed - stock == 2
