"""identities.py: which folder of nested ones is the identity."""

import pytest

from fileio.identities import find_identities

PEOPLE = [f"{i:03d}" for i in range(6)]
CASES = {
    "one level": ([f"CASIA/{p}" for p in PEOPLE], PEOPLE, ""),
    "a single folder": (["CASIA/000"], ["000"], ""),
    "CFP": ([f"Data/Images/{p}/{k}" for p in PEOPLE for k in ("frontal", "profile")], PEOPLE, "6"),
    "YouTube Faces": ([f"ytf/{p}/{v}" for p in PEOPLE for v in range(3)], PEOPLE, "6"),
    "parts": ([f"{t}/{p}" for p in PEOPLE for t in ("train", "val")], PEOPLE, "6"),
    "two people": ([f"{t}/{p}" for p in PEOPLE[:2] for t in ("train", "test")], PEOPLE[:2], "2"),
    "parts of other people": (
        [f"{t}/{p}" for i, p in enumerate(PEOPLE) for t in (["train", "val"][i % 2],)],
        PEOPLE,
        "6",
    ),
    "three levels": ([f"{t}/{p}/{k}" for p in PEOPLE for t in ("train", "val") for k in "ab"],
                     PEOPLE, "6"),
    "cameras": ([f"cam{c}/{d}/{p}" for p in PEOPLE for c in range(3) for d in "ab"], PEOPLE, "6"),
    "images and folders": (PEOPLE + [f"{p}/{p}-{v}" for p in PEOPLE for v in range(3)],
                           PEOPLE, "6"),
    "one folder more": ([*PEOPLE, "003/more"], PEOPLE, "6"),
    "loose images": (["data", *(f"data/{p}" for p in PEOPLE)], [*PEOPLE, "data"], "7"),
    "videos": ([f"{p}/v{p}{v}" for p in PEOPLE for v in "ab"],
               [f"v{p}{v}" for p in PEOPLE for v in "ab"], "WARNING"),
    "a tie": (["x/001", "y/001", "y/002"], ["002", "x/001", "y/001"], "WARNING"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_identity_is_the_folder_that_repeats(case):
    folders, expected, notice = CASES[case]
    identities, said = find_identities(set(folders))
    assert sorted(set(identities.values())) == sorted(expected)
    for folder, identity in identities.items():
        assert identity in (folder, *folder.split("/"))
    if not notice:
        assert said == ""
        return
    assert said.startswith(f"{notice} identities; " if notice.isdigit() else "WARNING: it cannot")
    assert "--identity-level 1 (the image's own folder), 2 (" in said


def test_what_is_said():
    _, said = find_identities({f"Images/{p}/{k}" for p in PEOPLE for k in ("frontal", "profile")})
    assert said.startswith("6 identities; that of images in Images/000/frontal/ is 000. Another")


def test_a_level_that_is_chosen():
    folders = {f"s/{p}/{k}" for p in PEOPLE for k in "ab"} | {"s/000"}
    expected = {"1": {"a", "b", "000"}, "2": set(PEOPLE), "3": set(PEOPLE), "path": folders}
    for level, identities in expected.items():
        assert set(find_identities(folders, level)[0].values()) == identities
        assert find_identities(folders, level)[1] == ""
