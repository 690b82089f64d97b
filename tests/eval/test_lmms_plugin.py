"""The plugin's answers are those of a plain generate() loop, for stock models of all families and for ours."""

import importlib.util
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from dualstream.eval.lmms_model.arguments import ModelArguments
from dualstream.eval.lmms_model.generation import read_generation_settings
from dualstream.eval.lmms_model.runner import ModelRunner
from dualstream.eval.spatial_tasks import TASKS_DIR
from dualstream.modeling import VisualCompressionMixin, compressing, load_model

HAS_HARNESS = importlib.util.find_spec("lmms_eval") is not None
needs_harness = pytest.mark.skipif(not HAS_HARNESS, reason="lmms-eval is not installed (pip install dualstream[eval])")

PROCESSORS = {
    "llava": "LlavaProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "internvl": "InternVLProcessor",
}
SIZES = ((40, 60), (64, 64), (30, 90), (90, 33))
TASK = {"max_new_tokens": 5, "do_sample": False, "temperature": 0, "num_beams": 1, "until": []}
SETTINGS = read_generation_settings(TASK)


def picture(number):
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))
    return small.resize(SIZES[number % len(SIZES)], Image.Resampling.NEAREST)


# Eleven questions of different lengths, with one, no and two pictures.
DOCS = [
    {"prompt": " ".join(f"word{1 + (7 * n + k) % 180}" for k in range(1 + n % 4)), "images": n % 3, "number": n}
    for n in range(11)
]


def pictures(doc):
    return [picture(doc["number"] + 20 * k) for k in range((1, 0, 2)[doc["images"]])]


def messages(doc):
    content = [{"type": "image", "url": image} for image in pictures(doc)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc["prompt"]}]}]


@pytest.fixture(scope="module", params=PROCESSORS)
def stock_folder(request, tiny_model, publishing, tmp_path_factory):
    """A stock checkpoint of a family, as anyone would save it."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).model.save_pretrained(folder)
    publishing.make_processor(request.param, getattr(transformers, PROCESSORS[request.param])).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock(stock_folder):
    return load_model(stock_folder, device="cpu")


@pytest.fixture
def run(stock_folder):
    return ModelRunner.load(ModelArguments.read({"pretrained": stock_folder, "dtype": "float32"}), "cpu")


@pytest.fixture(autouse=True)
def leave_no_accelerator():
    """Accelerate keeps one state per process; a later test may want another."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def plain_answers(model, processor, docs, **compression):
    """One generate() call per document, by the processor's own chat call."""
    answers = []
    for doc in docs:
        content = [*({"type": "image", "image": image} for image in pictures(doc))]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": doc["prompt"]}]}],
            tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
        )  # fmt: skip
        output = model.generate(**{**inputs, **compression}, max_new_tokens=5, do_sample=False)
        answers.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def runner_answers(runner, docs, batch_size):
    from dualstream.eval.chat_inputs import user_turn

    found = []
    for start in range(0, len(docs), batch_size):
        batch = docs[start : start + batch_size]
        images = [pictures(doc) for doc in batch]
        turns = [user_turn(doc["prompt"], len(row)) for doc, row in zip(batch, images, strict=True)]
        found += runner.generate(turns, images, SETTINGS)
    return [text for text, _ in found], [cost for _, cost in found]


def test_answers_equal_a_plain_loop_at_every_batch_size(stock, run):
    model, processor = stock
    assert not isinstance(model, VisualCompressionMixin), "meant to be a stock model"
    expected = plain_answers(model, processor, DOCS)
    assert len(set(expected)) > 5, "the answers hardly depend on the question"
    for batch_size in (1, 3, 8):
        found, costs = runner_answers(run, DOCS, batch_size)
        assert found == expected
        for doc, cost in zip(DOCS, costs, strict=True):
            assert (cost.prompt.visual > 0) == (doc["images"] != 1) and cost.prompt.kept == cost.prompt.visual
            assert cost.new_tokens == 5 and cost.seconds > 0
    assert type(run.model) is type(model) and vars(run.model).keys() == vars(model).keys()


def test_compressed_answers_equal_a_plain_loop_under_compressing(stock, run):
    model, processor = stock
    for arm in ("rle", "rle:position_policy=compact"):
        run.use_arm(arm)
        with compressing(model, config=run.arm.config):
            expected = plain_answers(model, processor, DOCS)
        for batch_size in (1, 8):
            assert runner_answers(run, DOCS, batch_size)[0] == expected
    run.use_arm("stride@0.5")
    costs = runner_answers(run, DOCS, 4)[1]
    assert all(cost.prompt.kept < cost.prompt.visual for cost in costs if cost.prompt.visual)
    assert type(run.model) is type(model)


def test_cache_bytes_are_those_of_the_real_cache(stock, run):
    model, processor = stock
    doc = DOCS[2]
    text, cost = (part[0] for part in runner_answers(run, [doc], 1))
    content = [{"type": "image", "image": image} for image in pictures(doc)]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": doc["prompt"]}]}],
        tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    )  # fmt: skip
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    tokens = inputs["input_ids"].shape[1]
    assert cost.prompt.total == tokens and text
    assert cost.kv_bytes * tokens == held * (tokens + 5)


def instances(kind, docs, makers, repeats=1, **metadata):
    from lmms_eval.api.instance import Instance

    return [
        Instance(
            request_type=kind, arguments=(*make(doc), number, "task", "test"), idx=idx,
            metadata={"task": "task", "doc_id": number, "repeats": repeats, **metadata},
        )
        for number, doc in enumerate(docs) for idx, make in enumerate(makers)
    ]  # fmt: skip


def chat_requests(docs, settings=TASK, **metadata):
    return instances("generate_until", docs, [lambda doc: (doc["prompt"], messages, settings)], **metadata)


def option_requests(docs, options, **metadata):
    makers = [lambda doc, option=option: (doc["prompt"], option, pictures) for option in options]
    return instances("loglikelihood", docs, makers, **metadata)


def opened(**arguments):
    from dualstream.eval.lmms_model.model import DualStreamChat, DualStreamSimple

    chat = DualStreamChat(device="cpu", **arguments)
    simple = DualStreamSimple.sharing(chat)
    chat.task_dict = simple.task_dict = {"task": {"test": DOCS}}
    return chat, simple


@needs_harness
def test_requests_are_answered_in_their_order_and_recorded(stock, stock_folder):
    model, processor = stock
    expected = plain_answers(model, processor, DOCS)
    chat, simple = opened(pretrained=stock_folder, batch_size=4)
    assert [answer.text for answer in chat.generate_until(chat_requests(DOCS))] == expected
    assert sorted(row["doc_id"] for row in chat.records) == list(range(len(DOCS)))
    assert {row["request"] for row in chat.records} == {"generate"} and {row["arm"] for row in chat.records} == {
        "checkpoint"
    }
    counts = {row["doc_id"]: (row["prompt_tokens"], row["new_tokens"]) for row in chat.records}
    for number, answer in enumerate(chat.generate_until(chat_requests(DOCS[:3]))):
        assert (answer.token_counts.input_tokens, answer.token_counts.output_tokens) == counts[number]
    simple.clear_records()
    assert chat.records == []


@needs_harness
def test_losses_are_summed_and_in_the_order_of_the_requests(stock, stock_folder):
    from dualstream.eval.option_scores import option_log_likelihoods

    model, processor = stock
    options = ["word31 word32 word33", "word36", "word38 word39"]
    _, simple = opened(pretrained=stock_folder, batch_size=4)
    images, prompts = [pictures(doc) for doc in DOCS], [doc["prompt"] for doc in DOCS]
    for arm in ("none", "rle"):
        simple.use_arm(arm)
        simple.clear_records()
        found = [result.text for result in simple.loglikelihood(option_requests(DOCS, options))]
        expected = option_log_likelihoods(model, processor, images, prompts, [options] * len(DOCS), arm, 1)
        np.testing.assert_allclose([-loss for loss, _ in found], np.concatenate(expected), atol=3e-4)
        assert all(isinstance(greedy, bool) for _, greedy in found)
        assert sorted(row["doc_id"] for row in simple.records) == list(range(len(DOCS)))
        assert {row["new_tokens"] for row in simple.records} == {6} and {row["idx"] for row in simple.records} == {0}


@needs_harness
def test_repeats_are_told_apart_and_padding_is_not_recorded():
    chat, simple = opened(pretrained="tiny-llava", batch_size=3)
    twice = [request for request in chat_requests(DOCS[:2], repeats=2) for _ in range(2)]
    padding = chat_requests(DOCS[:1], __padding_only__=True)
    answers = chat.generate_until(twice + padding)
    assert len(answers) == 5 and answers[0].text == answers[1].text == answers[4].text
    assert sorted((row["doc_id"], row["repeat"]) for row in chat.records) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    chat.clear_records()
    requests = option_requests(DOCS[:2], ["yes", "no"])
    padding = option_requests(DOCS[1:2], ["yes"], __padding_only__=True)
    results = simple.loglikelihood(requests + padding)
    assert len(results) == 5 and sorted((row["doc_id"], row["repeat"]) for row in chat.records) == [(0, 0), (1, 0)]


@needs_harness
def test_an_error_inside_a_batch_is_an_error():
    chat, simple = opened(pretrained="tiny-llava", batch_size=4)

    def broken(doc):
        raise OSError(f"picture of document {doc['number']} is gone")

    requests = chat_requests(DOCS)
    requests[7].arguments = (requests[7].arguments[0], broken, *requests[7].arguments[2:])
    with pytest.raises(OSError, match="picture of document 7 is gone"):
        chat.generate_until(requests)
    requests = option_requests(DOCS, ["yes"])
    requests[3].arguments = (*requests[3].arguments[:2], broken, *requests[3].arguments[3:])
    with pytest.raises(OSError, match="picture of document 3 is gone"):
        simple.loglikelihood(requests)
    with pytest.raises(ValueError, match="max_tokens is no setting"):
        chat.generate_until(chat_requests(DOCS[:1], {"max_tokens": 3}))
    chat._world_size = 2
    requests = chat_requests(DOCS[:1])
    requests[0].arguments = (requests[0].arguments[0], broken, *requests[0].arguments[2:])
    with pytest.raises(SystemExit, match="process 0 failed: picture of document 0 is gone"):
        chat.generate_until(requests)  # ends the process, so that the others need not wait for it
    chat._world_size = 1
    video = [{"role": "user", "content": [{"type": "video", "url": "film.mp4"}]}]
    requests = chat_requests(DOCS[:1])
    requests[0].arguments = (requests[0].arguments[0], lambda doc: video, *requests[0].arguments[2:])
    with pytest.raises(ValueError, match="document 0 of task task brings video or sound"):
        chat.generate_until(requests)
    with pytest.raises(NotImplementedError, match="one round"):
        chat.generate_until_multi_round(chat_requests(DOCS[:1]))
    with pytest.raises(NotImplementedError, match="--force_simple"):
        chat.loglikelihood(option_requests(DOCS[:1], ["yes"]))


@needs_harness
def test_arguments_reach_the_model(tmp_path, monkeypatch):
    chat, _ = opened(pretrained="tiny-qwen2-vl", rope_scaling="poly:99:8", decoder="unembedding", dtype="bfloat16",
                     attn_implementation="eager", compression="rle", records=tmp_path / "records")  # fmt: skip
    config = chat.runner.model.config
    assert str(config.vision_rope_scaling) and config._attn_implementation == "eager"
    assert chat.runner.model.dtype == torch.bfloat16 and chat.runner.decoder.kind == "linear"
    assert str(chat.runner.arm) == "rle"
    chat.generate_until(chat_requests(DOCS[:1]))
    (file,) = (tmp_path / "records").iterdir()
    assert len(file.read_text().splitlines()) == 1
    with pytest.raises(ValueError, match="batchsize=3 is unknown"):
        opened(batchsize=3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched but accelerate sees 1"):
        opened(pretrained="tiny-llava")


@needs_harness
def test_a_checkpoint_that_compresses_by_itself_does_so_unless_told_otherwise(tmp_path):
    from dualstream.modeling import LlavaWithVisualDecoder, default_model_path
    from dualstream.processing import LlavaWithVisualDecoderProcessor

    source = default_model_path("tiny-llava")
    LlavaWithVisualDecoder.from_pretrained(source).save_pretrained(tmp_path)
    LlavaWithVisualDecoderProcessor.from_pretrained(source, compression="rle").save_pretrained(tmp_path)
    chat, _ = opened(pretrained=tmp_path, batch_size=4)
    model, processor = chat.runner.model, chat.runner.processor
    assert chat.runner.arm.config.method == "rle"
    assert [a.text for a in chat.generate_until(chat_requests(DOCS))] == plain_answers(model, processor, DOCS)
    assert sum(row["kept_tokens"] for row in chat.records) < sum(row["visual_tokens"] for row in chat.records)
    chat.clear_records()
    chat.use_arm("none")
    full = [a.text for a in chat.generate_until(chat_requests(DOCS))]
    assert full == plain_answers(model, processor, DOCS, compression="none")
    assert all(row["kept_tokens"] == row["visual_tokens"] for row in chat.records)


@needs_harness
def test_the_harness_runs_written_and_scored_tasks_on_one_loaded_model(stock_folder, monkeypatch):
    monkeypatch.setenv("DUALSTREAM_SCENES", "8")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("WARNING", include_path=[str(TASKS_DIR)], include_defaults=False, model_name="dualstream")
    chat, simple = opened(pretrained=stock_folder, batch_size=8)
    for model, task in (
        (chat, "scenes_relation_paper"),
        (simple, "scenes_relation_fair"),
        (simple, "scenes_count_fair"),
    ):
        model.clear_records()
        found = simple_evaluate(
            model=model, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True,
            cli_args=SimpleNamespace(process_with_media=True),
        )  # fmt: skip
        samples = found["samples"][task]
        assert 0 <= found["results"][task]["individual,none"] <= 1
        recorded = {row["doc_id"]: row for row in model.records}
        assert recorded.keys() == {sample["doc_id"] for sample in samples} and len(model.records) == len(samples)
        assert all(row["task"] == task and row["visual_tokens"] > 0 for row in model.records)


@needs_harness
def test_lmms_eval_finds_the_plugin_by_its_entry_point():
    from lmms_eval.models import MODEL_REGISTRY_V2

    for force_simple, name in ((False, "DualStreamChat"), (True, "DualStreamSimple")):
        found = MODEL_REGISTRY_V2.get_model_class("dualstream", force_simple=force_simple)
        assert found.__name__ == name and not inspect.isabstract(found)
