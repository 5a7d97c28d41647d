"""Code, help and messages use the terms of the field (README and docs: test_readme.py)."""

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.terms import retired_words

# Names in files that earlier versions wrote, which today's write and read as well.
PERSISTED = (
    r"[\"']pictures[\"']|not_pictures|not_a_picture|(mis)?matched_pairs|[\"'](mis)?matched[\"']"
    r"|damaged-|pictures: int"
)
FILES = sorted(
    path.relative_to(ROOT)
    for path in (*ROOT.rglob("*.py"), ROOT / "Makefile")
    if not {"demo", ".venv"} & set(path.relative_to(ROOT).parts)
    if path.name not in ("terms.py", "test_words.py", "test_readme.py")
)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_use_the_terms_of_the_field(path):
    assert retired_words((ROOT / path).read_text("utf-8"), allowed=PERSISTED) == []


def test_what_is_found():
    assert retired_words("a knob\nfine") == ["line 1: 'knob' is 'setting' here"]
    assert retired_words("gone on with") and retired_words("It mends that.")
    assert not retired_words("one pass over the archive; recommended")
    assert not retired_words('report["not_pictures"]', allowed=PERSISTED)
