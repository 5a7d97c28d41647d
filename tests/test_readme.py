"""README and docs: links and anchors exist, both languages agree, commands and flags are real."""

import functools
import re
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.terms import retired_words

READMES = ("README.md", "README.zh-CN.md")
DOCS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))
PAGES = (*READMES, *DOCS)
MOST_LINES = 250

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
# A script or module that a command runs, and the rest of the command.
COMMAND = re.compile(r"\b(?:python|torchrun\b.*?) (?:-m ((?:tools|bench)\.\w+)|(\w+\.py))(.*)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
# What is documented and is no flag of ours: torchrun's, sbatch's, scontrol's and pip's.
FOREIGN = ("--nproc-per-node", "--nnodes", "--rdzv-", "--nodes", "--ntasks", "--gpus", "--cpus")
FOREIGN += ("--array", "--wrap", "--logdir", "--help", "--no-deps", "--no-index", "--find-links")

# What pages must not say besides the words of tests/helpers/terms.py.
RETIRED_IN_PAGES = {
    r"\bdrawn\b": "synthetic",
    r"\bmatched\b": "genuine",
    "校准": "对齐",
    "准确度": "准确率",
    r"批量 ?\d": "批大小",
}


def read(name):
    """The text of a page."""
    return (ROOT / name).read_text("utf-8")


def anchors(text):
    """The anchors that GitHub gives a page's headings: lower case, hyphens, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in words}


def code_lines(text):
    """The commands of a page's bash blocks: continuations joined, comments and blanks left out."""
    blocks = [body for language, body in FENCE.findall(text) if language == "bash"]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"(^|\s)#.*", "", line) for line in lines]
    return [" ".join(line.split()) for line in lines if line.strip()]


def commands(text):
    """(file or module, rest of the command) of every command of ours in code blocks and spans."""
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    matches = [COMMAND.search(line) for line in (*code_lines(text), *spans)]
    return [(match[1] or match[2], match[3]) for match in matches if match]


def path_of(target):
    """The file of `train.py` or `tools.held_out`."""
    return ROOT / (target if target.endswith(".py") else target.replace(".", "/") + ".py")


@functools.cache
def flags_of(target):
    """The flags that a script or tool offers, by its --help; of a benchmark by its source."""
    if target.startswith("bench."):
        names = re.findall(r'"(?:--)?([a-z][a-z0-9_-]*)"', path_of(target).read_text("utf-8"))
        return {f"--{name.replace('_', '-')}" for name in names}
    command = [sys.executable, target] if target.endswith(".py") else [sys.executable, "-m", target]
    process = subprocess.run(
        [*command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    # An option's line: "  --amp, --no-amp   its meaning, which may speak of other flags".
    options = re.findall(r"^ +(-.*?)(?:  .*)?$", process.stdout, re.MULTILINE)
    return set(FLAG.findall("\n".join(options)))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = read(page)
    for target in LINK.findall(FENCE.sub("", text)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path.read_text("utf-8")), f"{page}: {target}"


@pytest.mark.parametrize("page", READMES)
def test_a_readme_is_short_and_its_contents_name_every_section(page):
    text = read(page)
    assert text.count("\n") < MOST_LINES
    sections = re.findall(r"^## (.*)$", FENCE.sub("", text), re.MULTILINE)
    linked = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert anchors("\n".join(f"## {section}" for section in sections)) <= linked


def test_both_readmes_say_the_same():
    english, chinese = map(read, READMES)
    assert code_lines(english) == code_lines(chinese)
    # Blocks of other kinds are what a command prints, word for word; the last is the folder tree.
    printed = [[b for lang, b in FENCE.findall(text) if not lang] for text in (english, chinese)]
    assert printed[0][:-1] == printed[1][:-1]
    assert len(printed[0]) == len(printed[1])
    for mark in (r"^#+ ", r"^\|", r"!\[[^]]*\]\(([^)]+)\)", r"\]\((https?://[^)]+)\)"):
        assert sorted(re.findall(mark, english, re.MULTILINE)) == sorted(
            re.findall(mark, chinese, re.MULTILINE)
        )


def test_both_readmes_have_the_same_numbers():
    def numbers(page):
        """The numbers of a page's prose and tables, above those that English writes as words."""
        text = LINK.sub("]", FENCE.sub("", read(page))).replace("1.14 亿", "114 M")
        values = [value.strip(",.") for value in re.findall(r"\d[\d,]*\.?\d*", text)]
        return {value for value in values if float(value.replace(",", "")) > 16}

    english, chinese = map(numbers, READMES)
    assert english == chinese


def test_the_first_screen_has_the_commands_and_the_result():
    for page in READMES:
        screen = "\n".join(read(page).splitlines()[:32])
        for words in ("make demo", "make test", "python pre_process.py", "python train.py"):
            assert words in screen
        for words in ("tensorboard --logdir=runs", "python lfw_eval.py", "99.37 %", "± 0.09"):
            assert words in screen


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_flags_exist(page):
    for target, rest in commands(read(page)):
        assert path_of(target).is_file(), f"{page}: {target}"
        unknown = set(FLAG.findall(rest)) - flags_of(target) - {"--help"}
        assert not unknown, f"{page}: {target} {unknown}"


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_stand_alone_belong_to_some_script(page):
    scripts = ["pre_process.py", "train.py", "lfw_eval.py"]
    paths = [path for path in ROOT.glob("tools/*.py") if "__main__" in path.read_text("utf-8")]
    tools = [f"tools.{path.stem}" for path in paths]
    benches = [f"bench.{path.stem}" for path in ROOT.glob("bench/*.py")]
    known = set().union(*map(flags_of, [*scripts, *tools, *benches]))
    used = {flag for flag in FLAG.findall(read(page)) if not flag.startswith(FOREIGN)}
    assert used <= known, f"{page}: {sorted(used - known)}"


def test_every_tool_is_documented():
    paths = [path for path in ROOT.glob("tools/*.py") if "__main__" in path.read_text("utf-8")]
    table = read("docs/code.md")
    assert [path.stem for path in paths if f"tools.{path.stem}`" not in table] == []


@pytest.mark.parametrize("page", PAGES)
def test_no_file_that_is_named_is_missing(page):
    """`evaluation/verification.py` in a code span is a file of ours; so is `tests/helpers/`."""
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir())
    for name in re.findall(rf"`((?:{folders})/[\w/.-]*)`", read(page)):
        if not name.startswith(("data/", "runs/", "demo/")):
            assert (ROOT / name).exists(), f"{page}: {name}"


@pytest.mark.parametrize("page", PAGES)
def test_pages_use_the_terms_of_the_field(page):
    assert retired_words(read(page), more=RETIRED_IN_PAGES) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python train.py --lr 0.1", [("train.py", " --lr 0.1")]),
        ("torchrun --nproc-per-node=4 train.py --resume", [("train.py", " --resume")]),
        ("python -m tools.held_out", [("tools.held_out", "")]),
        ("tensorboard --logdir=runs", []),
    ],
)
def test_how_a_command_is_read(line, expected):
    assert commands(f"```bash\n{line}  # a comment\n```\n") == expected


def test_how_an_anchor_is_made():
    text = "## IJB-B and IJB-C\n\n### 1. Training: `python train.py`\n\n## 多块 GPU\n"
    assert anchors(text) == {"ijb-b-and-ijb-c", "1-training-python-trainpy", "多块-gpu"}
