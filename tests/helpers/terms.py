"""Words that this project no longer uses, and the field's terms for them.

A newcomer searches for the terms of papers and libraries; these patterns find what is not one.
"""

import re

RETIRED = {
    r"\bstrangers?\b": "untrusted, third-party",
    r"\b(gone|goes|going|go) on with\b": "resume",
    r"\bpass(es|ed|ing)? over\b(?! (the|an?|all|them|it|memory))": "skip",
    # But for --picture of tools/compare.py and tools/search.py.
    r"(?<!--)(?<!cfg\.)\bpictures?\b(?!: str = setting)": "image",
    r"\bknobs?\b": "setting",
    r"\bdrawn (faces?|images?|people|sets?|archives?)\b": "synthetic",
    r"\bmismatched\b": "impostor",
    r"\bdamaged\b": "corrupt",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bby chance\b": "at random",
    r"\bwho is right\b": "number of correct predictions",
    r"\bnone of its own\b": "another",
}


def retired_words(text: str, more: dict[str, str] | None = None, allowed: str = "") -> list[str]:
    """What of RETIRED and of `more` a text has, with its line; `allowed` is a pattern of others."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        line = re.sub(allowed, "", line) if allowed else line
        for pattern, term in (RETIRED | (more or {})).items():
            if match := re.search(pattern, line, re.IGNORECASE):
                found.append(f"line {number}: {match[0]!r} is {term!r} here")
    return found
