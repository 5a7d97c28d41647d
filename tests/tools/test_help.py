"""--help of every script and tool: what it says, what it loads, and that it writes nothing."""

import re
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

SCRIPTS = [["pre_process.py"], ["train.py"], ["lfw_eval.py"]]
# Every file in tools/ with a command line.
TOOLS = [
    ["-m", f"tools.{path.stem}"]
    for path in sorted((ROOT / "tools").glob("*.py"))
    if '__name__ == "__main__"' in path.read_text("utf-8")
]
COMMANDS = SCRIPTS + TOOLS
HEAVY = {"torch", "torchvision", "sklearn", "scipy", "matplotlib", "tensorboard", "onnxruntime"}


def run(arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_tool_is_in_the_readme_or_the_docs():
    names = {command[-1] for command in TOOLS}
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text("utf-8") for page in pages)
    assert {name for name in names if f"python -m {name}" not in text} == set()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_help_answers_at_once_and_in_full(command, tmp_path):
    script = [str(ROOT / command[0])] if command[0].endswith(".py") else command
    done = run(["-X", "importtime", *script, "--help"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # Half a second and more of imports: they come after the flags are parsed.
    imported = set(re.findall(r"\| +(\w+)$", done.stderr, re.MULTILINE))
    assert "argparse" in imported
    assert not imported & HEAVY
    usage, _, rest = done.stdout.partition("\n\n")
    assert usage.startswith(f"usage: python {' '.join(command)} ")
    description, _, flags = rest.partition("\n\noptions:\n")
    assert re.match(r"[A-Z][^\n]+[.:]", description)  # a sentence first
    assert f"    python {' '.join(command)}" in description  # then an example
    assert re.findall(r"^(\S.*):$", flags, re.MULTILINE)  # groups
    assert "default: " in flags
    assert not re.search(r"\{,|,\}|,,", flags)  # no empty choice
    assert list(tmp_path.iterdir()) == []  # it writes nothing


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_an_unknown_flag_is_a_message(command, tmp_path):
    script = [str(ROOT / command[0])] if command[0].endswith(".py") else command
    # More than any tool wants to be given, lest it asks for that first.
    done = run([*script, "--no-such-flag", "a", "b"], cwd=tmp_path)
    assert done.returncode == 2
    assert "unrecognized arguments: --no-such-flag" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
