"""Imports run downwards only, by the one table below; and the root holds the card's files alone."""

import ast
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

# Each root module or folder: its level, and what it may not import though that is below it.
# A file imports what is at a lower level, and what is in its own folder.
LEVELS: dict[str, tuple[int, set[str]]] = {
    "config": (0, set()),
    "utils": (0, set()),
    "models": (0, set()),
    "focal_loss": (0, set()),
    "fileio": (1, set()),
    "distributed": (1, set()),
    "data_gen": (2, set()),
    "heads": (2, set()),
    "preprocessing": (2, set()),
    "evaluation": (3, {"preprocessing", "heads"}),
    "training": (4, {"preprocessing"}),
    "pre_process": (5, set()),
    "train": (5, set()),
    "lfw_eval": (5, set()),
    "tools": (5, set()),
    "bench": (6, set()),
}
CARD = ("config", "data_gen", "focal_loss", "lfw_eval", "models", "pre_process", "train", "utils")


def modules_of(root: Path) -> dict[str, Path]:
    """{dotted name: path} of every Python file that is neither a test nor in a hidden folder."""
    names = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if parts[0] not in ("tests", "demo") and not any(part.startswith(".") for part in parts):
            names[".".join(parts).removesuffix(".py").removesuffix(".__init__")] = path
    return names


def imports_of(path: Path, names: dict[str, Path]) -> set[str]:
    """The dotted names of our modules that a file imports, anywhere in it.

    `from fileio import recordio` imports fileio.recordio; `from fileio.recordio import HEADER` the
    same module, since HEADER is none.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in names else node.module for name in full}
    return found & set(names)


def violations(root: Path) -> list[str]:
    """What breaks the table, a sentence each."""
    names = modules_of(root)
    wrong = []
    graph = {}
    for name, path in names.items():
        top = name.split(".")[0]
        if top not in LEVELS:
            wrong.append(f"{name} is not in the table")
            continue
        level, forbidden = LEVELS[top]
        graph[name] = imports_of(path, names)
        for other in sorted(graph[name]):
            above = other.split(".")[0]
            if above == top or above not in LEVELS:
                continue
            if LEVELS[above][0] >= level or above in forbidden:
                wrong.append(f"{name} imports {other}")
    return wrong + circles(graph)


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The modules that import each other in a circle, in one sentence."""
    graph = {name: used - {name} for name, used in graph.items()}
    while graph:
        imported = set().union(*graph.values())
        # Neither what imports nothing of the rest nor what nothing of the rest imports is in one.
        rest = {n: used & set(graph) for n, used in graph.items() if used and n in imported}
        if rest == graph:
            return [f"a circle among {sorted(graph)}"]
        graph = rest
    return []


def test_imports_run_downwards_only():
    assert violations(ROOT) == []


def test_the_root_holds_the_card_and_nothing_else():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(CARD)


def test_each_folder_says_its_job_and_cannot_be_shadowed():
    """A folder without __init__.py gives way to any installed package of its name."""
    folders = {name for name in LEVELS if (ROOT / name).is_dir()}
    assert folders == {name for name in LEVELS if name not in CARD}
    for folder in (*folders, "evaluation/report"):
        (statement,) = ast.parse((ROOT / folder / "__init__.py").read_text("utf-8")).body
        assert ast.get_docstring(ast.Module([statement], []))
    assert not folders & set(sys.stdlib_module_names)
    assert not folders & {"mtcnn", "io", "data"}


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("models.py", "from fileio import recordio", "models imports fileio.recordio"),
        ("fileio/locks.py", "import data_gen", "fileio.locks imports data_gen"),
        ("heads/registry.py", "from evaluation.verification import roc", "heads.registry imports"),
        ("evaluation/tables.py", "from heads.registry import MARGINS", "evaluation.tables imports"),
        ("training/ema.py", "def f():\n    import preprocessing.detector", "training.ema imports"),
        ("tools/make_bin.py", "import train", "tools.make_bin imports train"),
        ("fileio/images.py", "from fileio import recordio", "a circle among ['fileio.images'"),
        ("helpers.py", "", "helpers is not in the table"),
        ("plugins/base.py", "", "plugins.base is not in the table"),
    ],
)
def test_a_broken_copy_is_noticed(file, line, complaint, tmp_path):
    for path in modules_of(ROOT).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    before = set(violations(tmp_path))
    target = tmp_path / file
    target.parent.mkdir(exist_ok=True)
    text = target.read_text("utf-8") if target.exists() else ""
    target.write_text(text.replace("from __future__ import annotations\n", "") + f"\n{line}\n")
    new = set(violations(tmp_path)) - before
    assert any(sentence.startswith(complaint) for sentence in new), new


def public_names(path: Path) -> set[str]:
    """The functions, classes and constants that a file defines at its top level."""
    names = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


def test_each_public_name_is_defined_once():
    """But for what each script has: its main, and each tool its Settings."""
    owners: dict[str, list[str]] = {}
    for module, path in modules_of(ROOT).items():
        if module.split(".")[0] != "bench":
            for name in public_names(path) - {"main", "Settings"}:
                owners.setdefault(name, []).append(module)
    assert {name: modules for name, modules in owners.items() if len(modules) > 1} == {}
