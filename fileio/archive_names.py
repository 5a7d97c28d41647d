"""Names inside archives, which are data and never paths: their text, and what they may name."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

MAX_NAME = 4096  # characters: no file system has longer ones
MAX_DEPTH = 64  # folders in folders
JUNK_NAMES = {"thumbs.db", "desktop.ini", "__macosx"}
# What lies beside images in the usual archives; any other file is tried as an image.
JUNK_SUFFIXES = {
    *(".txt", ".csv", ".tsv", ".json", ".xml", ".yml", ".yaml", ".md", ".html", ".pdf", ".doc"),
    *(".lst", ".mat", ".npy", ".npz", ".pkl", ".db", ".ini", ".log", ".py", ".m", ".sh"),
    *(".zip", ".tar", ".gz", ".tgz", ".rar", ".7z", ".mp4", ".avi"),
}


def decode_name(raw: bytes) -> str:
    """A member's name as text: UTF-8, else GB 18030 (Chinese Windows), else cp437, part by part."""
    parts = []
    for part in raw.split(b"/"):
        for encoding in ("utf-8", "gb18030", "cp437"):
            try:
                parts.append(part.decode(encoding))
                break
            except UnicodeDecodeError:
                continue
    return "/".join(parts)


def clean_name(name: str) -> tuple[str, str]:
    """A name without `.` and empty parts, and why it is no image's ("" if it may be one)."""
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    parts = [p for p in name.split("/") if p not in ("", ".")]
    clean = "/".join(parts)
    if len(name) > MAX_NAME or len(parts) > MAX_DEPTH:
        return name[:MAX_NAME], "unsafe_name"
    absolute = name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name)
    if absolute or ".." in parts or "\0" in name:
        return name, "unsafe_name"
    if any(p.startswith(".") or p.lower() in JUNK_NAMES for p in parts):
        return clean, "system_file"
    if PurePosixPath(clean).suffix.lower() in JUNK_SUFFIXES and not name.endswith("/"):
        return clean, "not_a_picture"
    return clean, ""
