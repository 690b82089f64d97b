"""The house itself: import cost, import directions, what a wheel contains, and that no folder leaks a bare name."""

import ast
import importlib.metadata
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import dualstream
from dualstream import cli

ROOT = Path(__file__).resolve().parents[1]
# A folder may import itself and the folders before it.
ORDER = ("modeling", "processing", "data_builders", "eval", "train", "analysis", "hub_cards", "benchmarks")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout


def test_import_is_fast_and_loads_no_torch():
    code = "import sys, json, dualstream.modeling, dualstream.processing; print(json.dumps(sorted(sys.modules)))"
    start = time.perf_counter()
    run_python("pass")
    bare = time.perf_counter() - start
    start = time.perf_counter()
    modules = set(json.loads(run_python(code)))
    assert time.perf_counter() - start - bare < 0.5
    assert not modules & {"torch", "transformers", "numpy", "PIL"}
    assert not modules & set(ORDER), "a folder was imported under its bare name"


def test_the_version_is_looked_up_when_it_is_asked_for(capsys):
    name = "importlib.metadata"  # takes longer to import than everything else of the top level
    code = f"import sys; before = {name!r} in sys.modules; import dualstream; print(before, {name!r} in sys.modules)"
    before, after = run_python(code).split()
    assert before == after
    assert dualstream.__version__ == importlib.metadata.version("dualstream")
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"dualstream {dualstream.__version__}\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_sort'"):
        _ = dualstream.nothing_of_the_sort


def test_no_help_waits_for_a_heavy_library():
    code = """
import importlib, json, sys
from dualstream import cli
found = {}
for name in cli.COMMANDS:
    before = set(sys.modules)
    cli.build_parser(name)
    found[name] = sorted(set(sys.modules) - before)
print(json.dumps(found))
"""
    imported = json.loads(run_python(code))
    heavy = {"torch", "transformers", "datasets", "scipy", "pandas", "pyarrow", "matplotlib", "accelerate", "peft"}
    assert {name: found for name, modules in imported.items() if (found := heavy & set(modules))} == {}
    assert any("dualstream.eval.statistics" in modules for modules in imported.values()), "nothing was imported"


def imported_folders(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 or path.parent.parent != ROOT, f"{path}: relative import leaves its folder"
            continue
        else:
            continue
        found |= {name.split(".")[1] for name in names if name and name.startswith("dualstream.")}
    return found & set(ORDER)


@pytest.mark.parametrize("folder", ORDER)
def test_imports_go_one_way(folder):
    allowed = set(ORDER[: ORDER.index(folder) + 1])
    for path in (ROOT / folder).rglob("*.py"):
        assert imported_folders(path) <= allowed, path


def test_what_every_folder_may_import_imports_no_folder():
    assert imported_folders(ROOT / "src" / "dualstream" / "measuring.py") == set()


@pytest.mark.slow
def test_wheel_contains_every_folder_and_the_checkpoints(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    copy = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    subprocess.run([*command, str(copy)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert tops == {"dualstream"}
    for folder in ORDER:
        assert f"dualstream/{folder}/__init__.py" in names
    for model in ("tiny-llava", "tiny-qwen2-vl"):
        assert f"dualstream/modeling/checkpoints/{model}/model.safetensors" in names
    assert {"dualstream/py.typed", "dualstream/measuring.py"} <= set(names)
    for name in ("tasks/utils.py", "tasks/seed.jsonl", "tasks/_fair_yaml", "tasks/whatsup_a_paper.yaml"):
        assert f"dualstream/eval/{name}" in names


def test_overview_help_lists_every_command(capsys):
    from dualstream.cli import COMMANDS, GROUPS, main

    def listed(*group: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main([*group, "--help"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    shown = {"": listed(), **{group: listed(group) for group in GROUPS}}
    for name in COMMANDS:
        group, _, word = name.rpartition(" ")
        assert word in shown[group] and group in shown[""], name
