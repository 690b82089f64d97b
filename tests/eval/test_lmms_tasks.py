"""The task files: complete and sound without the harness; found, built and scored by it where it is installed."""

import importlib.util
import math
import os
from pathlib import Path

import pytest
import yaml

from dualstream.eval.spatial_tasks import SOURCES, TASKS, TASKS_DIR

PROTOCOLS = ("paper", "fair")
HAS_HARNESS = importlib.util.find_spec("lmms_eval") is not None
needs_harness = pytest.mark.skipif(not HAS_HARNESS, reason="lmms-eval is not installed (pip install dualstream[eval])")

REAL = Path(os.environ.get("DUALSTREAM_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
needs_data = pytest.mark.skipif(
    not (REAL / "vsr").is_dir(), reason="no annotation files: set DUALSTREAM_DATA or put them in ../shared/data"
)


def load_utils():
    spec = importlib.util.spec_from_file_location("task_utils", TASKS_DIR / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> dict:
    """A task file with its includes, `!function x` as the object that the harness would find."""
    utils = load_utils()

    class Loader(yaml.SafeLoader):
        pass

    def function(loader, node):
        module, name = loader.construct_scalar(node).split(".")
        assert module == "utils"
        return getattr(utils, name)

    Loader.add_constructor("!function", function)
    config = yaml.load(path.read_text(), Loader)
    base = config.pop("include", None)
    return {**(read(path.parent / base) if base else {}), **config}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setenv("DUALSTREAM_SCENES", "8")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_every_task_has_a_file_for_every_protocol_and_every_group_names_tasks_that_exist():
    configs = {path.stem: read(path) for path in TASKS_DIR.glob("*.yaml")}
    tasks = {name for name, config in configs.items() if isinstance(config["task"], str)}
    assert tasks == {f"{task}_{protocol}" for task in TASKS for protocol in PROTOCOLS}
    built_in = {"dualstream_table1", "dualstream_more"}
    for name, config in configs.items():
        if name in tasks:
            assert config["task"] == name
            assert config["output_type"] == ("generate_until" if name.endswith("paper") else "multiple_choice")
            assert ("set" in {row["metric"] for row in config["metric_list"]}) == TASKS[name.rpartition("_")[0]].sets
        else:
            assert config["group"] == name
            assert name in built_in or set(config["task"]) <= set(configs)
    assert {*built_in, "dualstream_table2", "dualstream_table2_fair"} <= set(configs)


@pytest.mark.parametrize("task", ["scenes_relation", "scenes_whatsup"])
def test_task_functions_score_a_perfect_and_a_constant_answerer(task, small):
    from datasets import Dataset

    seed = Dataset.from_list([{"seed": 0}])
    paper = read(TASKS_DIR / f"{task}_paper.yaml")
    docs = paper["process_docs"](seed)
    assert len(docs) == 8 and paper["doc_to_visual"](docs[0])[0].mode == "RGB"
    payloads = [paper["process_results"](doc, [doc["target"]]) for doc in docs]
    figures = {m["metric"]: m["aggregation"]([p[m["metric"]] for p in payloads]) for m in paper["metric_list"]}
    assert figures["individual"] == figures["tolerant"] == 1 and figures["invalid"] == 0

    fair = read(TASKS_DIR / f"{task}_fair.yaml")
    docs = fair["process_docs"](seed)
    payloads = [
        fair["process_results"](
            doc, [(float(i != fair["doc_to_target"](doc)), i == 0) for i in range(len(doc["choices"]))]
        )
        for doc in docs
    ]
    figures = {m["metric"]: m["aggregation"]([p[m["metric"]] for p in payloads]) for m in fair["metric_list"]}
    assert figures["individual"] == figures["circular"] == 1 and figures["invalid"] == 0
    if task == "scenes_whatsup":
        assert figures["pair"] == figures["set"] == figures["flip"] == 1
        constant = [fair["process_results"](doc, [(float(i), True) for i in range(4)]) for doc in docs]
        assert fair["metric_list"][0]["aggregation"]([p["individual"] for p in constant]) == 0.25


def test_missing_data_stops_the_run_at_once_with_the_list(monkeypatch):
    monkeypatch.delenv("DUALSTREAM_DATA", raising=False)
    with pytest.raises(SystemExit, match="dualstream: No data folder: set DUALSTREAM_DATA"):
        read(TASKS_DIR / "whatsup_a_paper.yaml")["process_docs"](None)


@pytest.fixture(scope="module")
def harness():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import lmms_eval.evaluator
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("WARNING", include_path=[str(TASKS_DIR)], include_defaults=False, model_name="dualstream")
    return lmms_eval.evaluator, manager


@needs_harness
@pytest.mark.parametrize("kind", ["simple", "chat"])
def test_the_harness_builds_every_scene_task(harness, kind, small):
    _, manager = harness
    for task in (name for name, task in TASKS.items() if task.scenes is not None):
        for protocol in PROTOCOLS:
            name = f"{task}_{protocol}"
            (built,) = manager.load_task_or_group([name], kind).values()
            if (kind, protocol) == ("chat", "fair"):
                continue  # the harness gives chat models no option likelihoods
            built.build_all_requests(limit=None, rank=0, world_size=1)
            prompts = {doc["prompt"] for doc in built.test_docs()}
            assert {instance.arguments[0] for instance in built.instances} == prompts


@needs_harness
@needs_data
def test_the_harness_builds_every_benchmark_from_its_annotations(harness, monkeypatch):
    _, manager = harness
    monkeypatch.setenv("DUALSTREAM_DATA", str(REAL))
    monkeypatch.setenv("DUALSTREAM_STAND_IN_IMAGES", "1")
    for group in ("dualstream_table2", "dualstream_table2_fair"):
        built = leaves(manager.load_task_or_group([group], "simple"))
        assert len(built) == 8
        for name, task in built.items():
            items = {doc["item"] for doc in task.test_docs()}
            assert len(items) == SOURCES[name.rpartition("_")[0]].count
            task.build_all_requests(limit=4, rank=0, world_size=1)
            assert task.doc_to_visual(task.test_docs()[0])[0].mode == "RGB"


def leaves(tree: dict) -> dict:
    found = {}
    for name, node in tree.items():
        found |= leaves(node) if isinstance(node, dict) else {name: node}
    return found


@needs_harness
def test_groups_of_built_in_tasks_name_tasks_that_the_harness_has(harness):
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("WARNING", include_path=[str(TASKS_DIR)])
    for group in ("dualstream_table1", "dualstream_more"):
        assert set(read(TASKS_DIR / f"{group}.yaml")["task"]) <= set(manager.all_tasks)
    ours = {path.stem for path in TASKS_DIR.glob("*.yaml")}
    assert all(str(TASKS_DIR) in manager.task_index[name]["yaml_path"] for name in ours), "the built-in one wins"


@needs_harness
def test_the_harness_scores_known_answerers(harness, small):
    evaluator, manager = harness
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms

    class Known(lmms):
        """Gives the right answer, or always the first choice."""

        is_simple = True

        def __init__(self, constant):
            super().__init__()
            self.constant = constant

        def generate_until(self, requests):
            return ["yes" if self.constant else self.doc(r.args)["target"] for r in requests]

        def doc(self, args):
            *_, number, task, split = args
            return self.task_dict[task][split][number]

        def loglikelihood(self, requests):
            out = []
            for request in requests:
                doc = self.doc(request.args)
                place = doc["choices"].index(request.args[1])
                good = place == (0 if self.constant else doc["shown"].index(doc["answer"]))
                out.append(GenerationResult(text=(0.0 if good else 1.0, good), token_counts=TokenCounts()))
            return out

        def generate_until_multi_round(self, requests):
            raise NotImplementedError

    names = ["dualstream_scenes_paper", "dualstream_scenes_fair"]
    for constant in (False, True):
        results = evaluator.simple_evaluate(
            model=Known(constant), tasks=list(names), task_manager=manager, bootstrap_iters=0, log_samples=True
        )["results"]
        figures = {
            name: row for name, row in results.items() if name in {f"{t}_{p}" for t in TASKS for p in PROTOCOLS}
        }
        assert len(figures) == 2 * sum(task.scenes is not None for task in TASKS.values())
        if not constant:
            assert all(row["individual,none"] == 1 for row in figures.values())
        else:
            assert figures["scenes_whatsup_fair"]["individual,none"] == 0.25
            assert figures["scenes_whatsup_fair"]["set,none"] == pytest.approx(0.25**4)
            assert figures["scenes_whatsup_paper"]["invalid,none"] == 1
        assert not any(math.isnan(row["individual,none"]) for row in figures.values())
