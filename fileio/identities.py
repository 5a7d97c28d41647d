"""Which folder of an image's path is its identity: "auto", "path", or the level above the image.

    identities, notice = find_identities({"cfp/001/frontal", "cfp/001/profile"}, "auto")

Most sets have one folder per identity and nothing else. Where folders are nested, "auto" takes

    Images/001/frontal, Images/002/frontal   001, 002: there are more of them than names in them
    train/001, val/001, train/002, val/002   001, 002: the level with more names, across folders
    001, 001/more                            001: it has images of its own
    id10270/5r0dWxy17C8 (no name repeats)    5r0dWxy17C8, with a warning: it could be id10270
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Collection

# Folders that part a set; nobody's identity.
PART_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}
CHOICES = (
    "Another choice: --identity-level 1 (the image's own folder), 2 (the folder around that), or "
    "path (every folder by its whole path)."
)

_Path = tuple[str, ...]


def find_identities(folders: Collection[str], level: str = "auto") -> tuple[dict[str, str], str]:
    """The identity of each folder with images, and a notice of what was taken if it may be wrong.

    `level` is "path", for every folder its own identity, or a number, 1 for the image's own folder.
    """
    if level == "path":
        return {folder: folder for folder in folders}, ""
    paths = {folder: tuple(folder.split("/")) for folder in folders}
    # What all images lie in names nobody; each folder keeps one name at least.
    common = posixpath.commonpath(folders)
    shared = min(len(path) - 1 for path in paths.values())
    shared = min(shared, common.count("/") + 1 if common else 0)
    paths = {folder: path[shared:] for folder, path in paths.items()}
    if level != "auto":
        return {folder: path[-int(level) :][0] for folder, path in paths.items()}, ""
    if all(len(path) == 1 for path in paths.values()):
        return {folder: path[0] for folder, path in paths.items()}, ""
    return _choose(paths)


def own_folders(folders: Collection[str]) -> dict[str, str]:
    """Each folder by its own name, or by its whole path where several have that name."""
    count = Counter(folder.rpartition("/")[2] for folder in folders)
    names = ((folder, folder.rpartition("/")[2]) for folder in folders)
    return {folder: name if count[name] == 1 else folder for folder, name in names}


def _choose(paths: dict[str, _Path]) -> tuple[dict[str, str], str]:
    """`find_identities` for paths of several levels."""
    here = set(paths.values())
    count = Counter(map(len, here))
    depth = max(sorted(count), key=count.__getitem__)  # that of most folders, the outer if equal
    while True:
        level = {path[:depth] for path in here if len(path) >= depth}
        around = {path[:-1] for path in level}
        names, names_around = ({path[-1] for path in some if path} for some in (level, around))
        repeats = len(names) < len(level)
        parted = {name.lower() for name in names_around} <= PART_NAMES
        have_images = len(around) > 1 and 2 * len(around & here) > len(around)
        if depth == 1 or parted or not (
            have_images or (repeats and len(names_around) > len(names))
        ):  # fmt: skip
            break
        depth -= 1
    unclear = len(around) > 1 and not parted and (not repeats or len(names_around) == len(names))
    if unclear and repeats:
        identities = own_folders(paths)
    else:
        identities = {folder: path[:depth][-1] for folder, path in paths.items()}
    total = len(set(identities.values()))
    example = max(sorted(paths), key=lambda folder: len(paths[folder]))
    notice = f"{total:,} identities; that of images in {example}/ is {identities[example]}"
    if unclear:
        notice = f"WARNING: it cannot be told which folders are the identities; taken are {notice}"
    return identities, f"{notice}. {CHOICES}"
