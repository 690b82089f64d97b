"""`lmms-eval --model dualstream` as a user types it, in one process and in two, offline, on an embedded model."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dualstream.eval.spatial_tasks import TASKS_DIR

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lmms_eval") is None,
        reason="lmms-eval is not installed (pip install dualstream[eval])",
    ),
]
TASK = "scenes_relation_fair"
LAUNCHERS = {
    1: [str(Path(sys.executable).with_name("lmms-eval"))],
    2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "lmms_eval"],
}


def lmms_eval(folder, processes, *options, **changes):
    """Run the harness in a folder; return the finished process. Its exit status says little: failures give 0 too."""
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "DUALSTREAM_SCENES": "12",
        "ACCELERATE_USE_CPU": "true",
    }
    given = {
        "--model": "dualstream",
        "--model_args": "pretrained=tiny-llava,compression=rle",
        "--tasks": TASK,
        "--include_path": str(TASKS_DIR),
        "--batch_size": "8",
        "--output_path": "OUT",
        **changes,
    }
    words = [word for pair in given.items() for word in pair]
    return subprocess.run(
        [*LAUNCHERS[processes], *words, "--log_samples", "--force_simple", *options],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module", params=[1, 2])
def finished(request, tmp_path_factory):
    """Number of processes, results, samples by document, and records."""
    folder = tmp_path_factory.mktemp(f"processes{request.param}")
    process = lmms_eval(folder, request.param)
    results = list(folder.glob("OUT/*/*_results.json"))
    assert process.returncode == 0 and len(results) == 1, process.stdout[-3000:] + process.stderr[-3000:]
    (samples,) = folder.glob(f"OUT/*/*_samples_{TASK}.jsonl")
    records = [row for path in folder.glob("OUT/records/*.jsonl") for row in read_lines(path)]
    by_document = {sample["doc_id"]: sample for sample in read_lines(samples)}
    return request.param, json.loads(results[0].read_text()), by_document, records


@pytest.fixture(scope="module")
def expected():
    """Likelihoods of the same documents by `option_scores`, one by one, without the harness."""
    from dualstream.eval.option_scores import option_log_likelihoods
    from dualstream.eval.spatial_tasks import make_docs, open_image
    from dualstream.modeling import load_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DUALSTREAM_SCENES", "12")
        docs = make_docs("scenes_relation", "fair")
    model, processor = load_model("tiny-llava", device="cpu")
    images = [[open_image(doc["image"])] for doc in docs]
    prompts, choices = [doc["prompt"] for doc in docs], [doc["choices"] for doc in docs]
    return docs, option_log_likelihoods(model, processor, images, prompts, choices, "rle", batch_size=1)


def test_one_and_two_processes_give_the_scores_of_the_model(finished, expected):
    _, results, samples, _ = finished
    docs, likelihoods = expected
    assert samples.keys() == set(range(len(docs)))
    for number, sample in samples.items():
        losses = [float(loss) for loss, _ in sample["filtered_resps"]]
        np.testing.assert_allclose(losses, -likelihoods[number], atol=1e-3)
    figures = results["results"][TASK]
    assert figures["individual,none"] >= 0.9 and figures["chance,none"] == 0.5
    right = [
        np.argmax(values) == doc["shown"].index(doc["answer"]) for doc, values in zip(docs, likelihoods, strict=True)
    ]
    assert figures["order_mean,none"] == pytest.approx(order_mean(docs, right))


def order_mean(docs, right):
    """Accuracy over the orders of each item, then over items."""
    items = {}
    for doc, hit in zip(docs, right, strict=True):
        items.setdefault(doc["item"], []).append(hit)
    return np.mean([np.mean(hits) for hits in items.values()])


def test_all_processes_ran_and_every_document_is_recorded_once(finished, expected):
    processes, _, _, records = finished
    shares = [sum(row["rank"] == rank for row in records) for rank in range(processes)]
    assert len(records) == len(expected[0]) == sum(shares) and max(shares) - min(shares) <= 1
    assert sorted(row["doc_id"] for row in records) == list(range(len(expected[0])))
    assert all(row["arm"] == "rle" and row["kept_tokens"] < row["visual_tokens"] == 64 for row in records)
    assert all(row["seconds"] > 0 and row["kv_bytes"] > 0 and row["new_tokens"] >= 2 for row in records)


def test_an_unknown_argument_stops_the_run(tmp_path):
    changes = {"--model_args": "pretrained=tiny-llava,compresion=rle"}
    process = lmms_eval(tmp_path, 1, "--verbosity", "DEBUG", **changes)
    assert process.returncode == 1 and not list(tmp_path.glob("OUT/**/*.json"))
    assert "compresion='rle' is unknown" in process.stderr and "Did you mean compression?" in process.stderr
