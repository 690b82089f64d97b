"""The files that travel to the Hub with a checkpoint must work there: one flat folder, this package not installed."""

import ast
import shutil
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_imports

import dualstream.modeling
import dualstream.processing

THIRD_PARTY = {"torch", "transformers", "numpy", "PIL", "safetensors", "tokenizers"}
FOLDERS = (Path(dualstream.modeling.__file__).parent, Path(dualstream.processing.__file__).parent)
ENTRY_POINTS = ("modeling_*.py", "configuration_*.py", "processing_*.py")


def sibling_imports(path: Path) -> set[str]:
    """Modules imported as ``from .name import x``; anything else relative is an error."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or not node.module or "." in node.module:
                raise ValueError(f"{path.name}:{node.lineno}: only `from .sibling import name` survives the copy")
            found.add(node.module)
    return found


def absolute_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


def shipped_files(folder: Path) -> list[Path]:
    """Entry points of a folder and everything they import, directly or not."""
    queue = [path for pattern in ENTRY_POINTS for path in sorted(folder.glob(pattern))]
    found = []
    while queue:
        path = queue.pop()
        if path not in found:
            found.append(path)
            queue += [path.with_name(f"{name}.py") for name in sibling_imports(path)] if path.is_file() else []
    return sorted(found)


def check(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path.name} is imported but absent")
    siblings = sibling_imports(path)
    if (grepped := set(get_relative_imports(path))) != siblings:
        # transformers finds imports by a regular expression, which also sees docstrings and misses odd forms.
        raise ValueError(f"{path.name}: transformers sees {sorted(grepped)}, Python sees {sorted(siblings)}")
    if foreign := absolute_imports(path) - set(sys.stdlib_module_names) - THIRD_PARTY:
        raise ValueError(f"{path.name} imports {sorted(foreign)}, which a user of the checkpoint may not have")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_shipped_files_are_self_contained(folder):
    for path in shipped_files(folder):
        check(path)


def test_every_family_ships_its_models():
    names = {path.name for path in shipped_files(FOLDERS[0])}
    scaled = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    assert names >= {"configuration_rope_scaled.py"} | {f"modeling_{name}_rope_scaled.py" for name in scaled}
    families = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
    assert names >= {"configuration_visual_decoder.py"} | {f"modeling_{name}_visual_decoder.py" for name in families}
    assert "auto.py" not in names, "auto.py names this package's folders and is not for the Hub"


def test_basenames_are_unique_across_folders():
    names = [path.name for folder in FOLDERS for path in shipped_files(folder)]
    assert len(names) == len(set(names)), "one of two files of the same name would overwrite the other"


@pytest.mark.parametrize(
    "line",
    [
        "from ..processing.images import load_image",
        "from . import visual_decoder",
        "from .sub.module import name",
        "from dualstream.modeling.visual_decoder import VisualDecoder",
        "def f():\n    import einops",
        '"""Docs.\n\nfrom .nothing import x\n"""',
        "from .absent import name",
    ],
)
def test_the_guard_sees_every_known_mistake(tmp_path, line):
    shutil.copy(FOLDERS[0] / "visual_decoder.py", tmp_path)
    (tmp_path / "modeling_bad.py").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ValueError):
        for path in shipped_files(tmp_path):
            check(path)
