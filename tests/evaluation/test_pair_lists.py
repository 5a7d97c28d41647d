"""pair_lists.py: one list of pairs in the forms in which people keep theirs, and what is none."""

import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest

from evaluation.face_folders import FaceFolder
from evaluation.pair_lists import read_pairs
from utils import UserError

FOLDS, EACH, SHOTS = 10, 3, 4


def lfw_rows(names):
    """LFW's rows: in each fold three genuine pairs of its two identities, three impostor pairs."""
    rows = []
    for fold in range(FOLDS):
        a, b = names[2 * fold : 2 * fold + 2]
        rows += [[a, "1", "2"], [b, "4", "3"], [a, "2", "3"]]
        rows += [[a, "1", b, "1"], [b, "4", a, "3"], [a, "2", b, "2"]]
    return rows


def folder_of(names, root="lfw_funneled/", suffix=".jpg"):
    """A prepared set of them, without its images."""
    paths = [f"{root}{n}/{n}_{i:04d}{suffix}" for n in names for i in range(1, SHOTS + 1)]
    identities = [name for name in names for _ in range(SHOTS)]
    return FaceFolder(SimpleNamespace(path="the set"), paths, identities, np.arange(len(paths)))


NAMES = [f"{('Ann', '李_娜', 'Zoë', 'O_Neil.Jr')[i % 4]}_{i}" for i in range(2 * FOLDS)]
SPACED = [f"{name.replace('_', ' ')[:-1]}{'abcdefghij'[int(name[-1])]}" for name in NAMES]
SPACED = [name.replace("1", "B") for name in SPACED]
ROWS = lfw_rows(NAMES)
HEADER = f"{FOLDS}\t{EACH}"


def as_list(rows=ROWS):
    """Rows as (path, path, "1" or "0")."""
    listed = []
    for row in rows:
        a, i, b, j = row if len(row) == 4 else (row[0], row[1], row[0], row[2])
        paths = [f"{name}/{name}_{int(number):04d}.jpg" for name, number in ((a, i), (b, j))]
        listed.append((*paths, str(int(len(row) == 3))))
    return listed


def lfw(rows=ROWS, separator="\t", header=HEADER, end="\n"):
    return end.join([header, *(separator.join(row) for row in rows)]) + end


def lines(form, rows=ROWS, first="", end="\n"):
    """One line per pair; in `form` a and b are the paths, s the label."""
    return first + end.join(form.format(a=a, b=b, s=s) for a, b, s in as_list(rows)) + end


def words(true, false, form="{a} {b} {s}"):
    pairs = [(a, b, true if s == "1" else false) for a, b, s in as_list()]
    return "\n".join(form.format(a=a, b=b, s=s) for a, b, s in pairs)


def two_lines(fold):
    """CALFW's: a line per image; `fold` gives the number of the i-th pair."""
    text = ""
    for i, (a, b, s) in enumerate(as_list()):
        number = fold(i) if s == "1" else 0
        text += "".join(f"{path.split('/')[1]} {number}\n" for path in (a, b))
    return text


SPACED_ROWS = lfw_rows(SPACED)
FORMS = {
    "lfw": lfw(),
    "lfw, spaces": lfw(separator=" "),
    "lfw, two tabs": lfw(separator="\t\t"),
    "lfw, tab at the end": lfw(end="\t\n"),
    "lfw, CRLF and byte-order mark": "\ufeff" + lfw(end="\r\n"),
    "lfw, CR": lfw(end="\r"),
    "lfw, UTF-16": lfw().encode("utf-16"),
    "lfw, UTF-16 without mark": lfw().encode("utf-16-be"),
    "lfw, blank lines": "\n" + lfw(end="\n\n") + " \n",
    "lfw, comments": "# my pairs\n" + lfw(end="\n# fold\n"),
    "lfw, no header": lfw().split("\n", 1)[1],
    "lfw, header of the count only": lfw(header=str(EACH * FOLDS)),
    "lfw, one fold": lfw(header=f"1\t{EACH * FOLDS}"),
    "lfw, zeros before numbers": lfw([[w.zfill(4) if w in "1234" else w for w in r] for r in ROWS]),
    "lfw, GBK": lfw().encode("gb18030"),
    "lfw, decomposed (NFD)": unicodedata.normalize("NFD", lfw()),
    "Kaggle's pairs.csv": "name,imagenum1,imagenum2,\n" + lfw(separator=",").split("\n", 1)[1],
    "semicolons": lfw(separator=";"),
    "CALFW": two_lines(lambda i: i // (2 * EACH) + 1),
    "CPLFW": two_lines(lambda i: 1),
    "list": lines("{a} {b} {s}"),
    "list, tabs": lines("{a}\t{b}\t{s}"),
    "list, commas": lines("{a},{b},{s}"),
    "list, commas and spaces": lines("{a}, {b}, {s}"),
    "list, semicolons": lines("{a};{b};{s}"),
    "list, mixed separators": lines("{a},{b} {s}"),
    "list, quoted": lines('"{a}","{b}","{s}"'),
    "list, header": lines("{a} {b} {s}", first="file1 file2 issame\n"),
    "list, header that is a label": lines("{a},{b},{s}", first="left,right,same\n"),
    "list, pandas' index": "".join(
        f"{i},{line}\n"
        for i, line in enumerate(lines("{a},{b},{s}", first="a,b,label\n").splitlines(), -1)
    ).replace("-1,", ",", 1),
    "list, label first": lines("{s} {a} {b}"),
    "list, label in the middle": lines("{a} {s} {b}"),
    "list, 1 and -1": words("1", "-1"),
    "list, 1.0 and 0.0": words("1.0", "0.0"),
    "list, True and False": words("True", "False"),
    "list, TRUE and FALSE": words("TRUE", "FALSE", "{s},{a},{b}"),
    "list, same and different": words("same", "different"),
    "list, UTF-16 and CRLF": lines("{a} {b} {s}", end="\r\n").encode("utf-16"),
    "list, GBK": lines("{a} {b} {s}").encode("gb18030"),
    "list, NFD": unicodedata.normalize("NFD", lines("{a} {b} {s}")),
    "list, another root": lines("lfw-112X96/{a} lfw-112X96/{b} {s}"),
    "list, absolute": lines("/home/me/data/lfw/{a} /home/me/data/lfw/{b} {s}"),
    "list, Windows": lines("D:\\data\\lfw\\{a} D:\\data\\lfw\\{b} {s}").replace("/", "\\"),
    "list, backslashes": lines("{a} {b} {s}").replace("/", "\\"),
    "list, ./": lines("./{a} ./{b} {s}"),
    "list, two roots": lines("/probe/{a} /gallery/day/1/{b} {s}"),
    "list, files only": "\n".join(
        f"{a.split('/')[1]} {b.split('/')[1]} {s}" for a, b, s in as_list()
    ),
    "list, .JPG": lines("{a} {b} {s}").replace(".jpg", ".JPG"),
    "list, .png": lines("{a} {b} {s}").replace(".jpg", ".png"),
    "list, .heic": lines("{a} {b} {s}").replace(".jpg", ".heic"),
    "list, no suffix": lines("{a} {b} {s}").replace(".jpg", ""),
    "list, a fold column": "a,b,same,fold\n"
    + "\n".join(",".join([*pair, str(i // 6)]) for i, pair in enumerate(as_list())),
    "genuine first": "\n".join(
        " ".join(pair) for pair in sorted(as_list(), key=lambda pair: pair[2] == "0")
    ),
}
SPACED_FORMS = {
    "lfw": lfw(SPACED_ROWS),
    "lfw, spaces": lfw(SPACED_ROWS, separator=" "),
    "list, tabs": lines("{a}\t{b}\t{s}", SPACED_ROWS),
    "list, tabs, no suffix": lines("{a}\t{b}\t{s}", SPACED_ROWS).replace(".jpg", ""),
    "list, commas": lines("{a},{b},{s}", SPACED_ROWS),
    "list, quoted": lines('"{a}" "{b}" {s}', SPACED_ROWS),
    "list, spaces": lines("{a} {b} {s}", SPACED_ROWS),
    "list, spaces, label first": lines("{s} {a} {b}", SPACED_ROWS),
}
ALL_FORMS = [(NAMES, name, text) for name, text in FORMS.items()]
ALL_FORMS += [(SPACED, f"spaces in names, {name}", text) for name, text in SPACED_FORMS.items()]


def check_is_the_list(pairs, names):
    """The pairs are those of ROWS in their order, in LFW's folds."""
    expected = [
        (f"{a}/{a}_{int(i):04d}", f"{b}/{b}_{int(j):04d}", len(row) == 3, n // (2 * EACH))
        for n, row in enumerate(lfw_rows(names))
        for a, i, b, j in [row if len(row) == 4 else (row[0], row[1], row[0], row[2])]
    ]
    ends = ([pairs.names[i] for i in side] for side in (pairs.first, pairs.second))
    assert list(zip(*ends, pairs.same, pairs.folds, strict=True)) == expected
    assert list(dict.fromkeys(n for pair in expected for n in pair[:2])) == pairs.names


@pytest.mark.parametrize(("names", "form", "text"), ALL_FORMS, ids=[form[1] for form in ALL_FORMS])
def test_every_form_of_a_list_is_the_same_list(names, form, text, tmp_path):
    (tmp_path / "p.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    pairs, used = read_pairs(tmp_path / "p.txt", folder_of(names))
    check_is_the_list(pairs, names)
    assert [folder_of(names).names[i].split("/", 1)[1] for i in used] == [
        f"{name}.jpg" for name in pairs.names
    ]


@pytest.mark.parametrize("form", ["lfw", "list", "list, NFD", "CALFW", "list, GBK"])
@pytest.mark.parametrize(
    "change",
    [
        lambda name: unicodedata.normalize("NFD", name),
        # As Python reads names in GBK bytes from a disk or a tar.
        lambda name: name.encode("gb18030").decode("utf-8", "surrogateescape"),
        lambda name: name.replace("/", "/cam1/", 1),
        lambda name: name.split("/")[-1],
    ],
    ids=["NFD", "GBK", "deeper", "flat"],
)
def test_the_set_may_write_its_names_in_another_way(form, change, tmp_path):
    folder = folder_of(NAMES)
    folder = FaceFolder(
        folder.reader, [*map(change, folder.names)], folder.identities, folder.positions
    )
    text = FORMS[form]
    (tmp_path / "p.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    pairs, used = read_pairs(tmp_path / "p.txt", folder)
    expected, expected_used = read_pairs(tmp_path / "p.txt", folder_of(NAMES))
    assert used.tolist() == expected_used.tolist()
    for field in ("first", "second", "same", "folds"):
        assert (getattr(pairs, field) == getattr(expected, field)).all()


def test_latin_1_and_numbers_without_zeros_are_read(tmp_path):
    names = [f"Zoë_{i}" for i in range(2 * FOLDS)]
    (tmp_path / "p.txt").write_bytes(lfw(lfw_rows(names)).encode("latin-1"))
    check_is_the_list(read_pairs(tmp_path / "p.txt", folder_of(names))[0], names)
    folder = folder_of(names)
    folder = FaceFolder(
        folder.reader, [n.replace("_000", "_") for n in folder.names], folder.identities,
        folder.positions,
    )  # fmt: skip
    _, used = read_pairs(tmp_path / "p.txt", folder)
    assert used.tolist() == read_pairs(tmp_path / "p.txt", folder_of(names))[1].tolist()


# ------------------------------------------------------------------------------ refused

LIST = FORMS["list"]
W = "is not a pair"
BROKEN = {
    "empty": ("", "fewer than two lines"),
    "one line": ("Ann_0/Ann_0_0001.jpg Ann_0/Ann_0_0002.jpg 1\n", "fewer than two lines"),
    "not text": (b"\xff\xfe\x00", "fewer than two lines"),
    "no label": (LIST.replace(" 1\n", "\n").replace(" 0\n", "\n"), f"line 1 {W}: 'Ann_0/"),
    "a label is missing": (LIST.replace(" 0\n", "\n", 1), f"line 4 {W}: 'Ann_0/Ann_0_0001"),
    "the first label is missing": (LIST.replace(" 1\n", "\n", 1), f"line [12] {W}: 'Ann_0/"),
    "labels 1 and 2": (LIST.replace(" 0\n", " 2\n"), "line 4 .* 2' .*its label is not 1 or 0"),
    "labels maybe": (LIST.replace(" 1\n", " maybe\n", 1), "line 1 .* maybe' .*its label is not"),
    "two labels": (LIST.replace(" 1\n", " 1 0\n").replace(".jpg 0\n", ".jpg 0 1\n"),
                   "line 1 is not a pair.*2 of labels"),
    "three paths": ("\n".join(f"{a} {b} {a} {s}" for a, b, s in as_list()),
                    "line 1 is not a pair.*3 columns of paths"),
    "0 for genuine": (words("0", "1"), "genuine and the reverse: Ann_0/Ann_0_0001.* impostor"),
    "cut short": (lfw(ROWS[:-1]), "line 60 is the last of 59 pairs, but .* 10 x 2 x 3"),
    "cut within a line": (lfw().rstrip()[:-2], r"line 61 .*'Zoë_18\\t2\\tO_Neil"),
    "no number": (lfw([*ROWS[:7], ["Zoë_2", "x", "2"], *ROWS[8:]]), r"line 9 .*'Zoë_2\\tx\\t2'"),
    "one image of two": (FORMS["CALFW"] + "Ann_0_0001.jpg 0\n", "line 121 .* second image"),
    "two numbers": (FORMS["CALFW"].replace(" 1\n", " 2\n", 1), "line 2 .* line before it"),
    "a huge number": (lfw([["Ann_0", "9" * 5000, "1"], *ROWS[1:]]), "line 2 has 5,008 char"),
    "another's images": (LIST.replace("Zoë", "Bob"), r"names 15 of 70 images that the set does not "
                         r"have \(Bob_2/Bob_2_0001.jpg, Bob_2/.*prepare the archive"),
    "a wrong folder": (LIST.replace("Ann_0/", "Ann_4/", 1), r"names 1 of 71 .*\(Ann_4/Ann_0_0001"),
}  # fmt: skip


@pytest.mark.parametrize("form", BROKEN)
def test_what_is_ambiguous_or_broken_gets_a_sentence_with_its_line(form, tmp_path):
    text, complaint = BROKEN[form]
    (tmp_path / "p.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"p\.txt.*{complaint}") as raised:
        read_pairs(tmp_path / "p.txt", folder_of(NAMES))
    assert "\n" not in str(raised.value)


def test_no_image_is_taken_for_one_of_another_identity(tmp_path):
    """Bea/0007.jpg is missing; the only 0007.jpg of the set is Ann's."""
    names = [f"{name}/{i:04d}.jpg" for name in ("Ann", "Bea") for i in range(1, 7)]
    names.append("Ann/0007.jpg")
    folder = FaceFolder(
        SimpleNamespace(path="the set"), names, [n[:3] for n in names], np.arange(len(names))
    )
    text = "Ann/0001.jpg Ann/0002.jpg 1\nBea/0001.jpg Bea/0007.jpg 1\nAnn/0003.jpg Bea/0003.jpg 0\n"
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(UserError, match=r"names 1 of 6 .*\(Bea/0007\.jpg\)"):
        read_pairs(tmp_path / "p.txt", folder)
    (tmp_path / "p.txt").write_text(text.replace("Bea/0007", "Bea/0006"))
    assert len(read_pairs(tmp_path / "p.txt", folder)[1]) == 6


@pytest.mark.parametrize(
    ("statuses", "complaint"),
    [
        (["no_face"], r"names 1 images in which no face was found .*Zoë_2_0001.*--missed crop"),
        (["no_face", "unreadable"], r"names 2 images .* skipped \(no_face 1, unreadable 1: "),
    ],
)
def test_skipped_images_say_why(statuses, complaint, tmp_path):
    (tmp_path / "p.txt").write_text(LIST, "utf-8")
    folder = folder_of(NAMES)
    gone = [i for i, name in enumerate(folder.names) if "Zoë_2_" in name][: len(statuses)]
    kept = [i for i in range(len(folder.names)) if i not in gone]
    folder = FaceFolder(
        folder.reader,
        [folder.names[i] for i in kept],
        [folder.identities[i] for i in kept],
        np.arange(len(kept)),
        skipped={folder.names[i]: status for i, status in zip(gone, statuses, strict=True)},
    )
    with pytest.raises(UserError, match=complaint):
        read_pairs(tmp_path / "p.txt", folder)


# ------------------------------------------------------------------------------ folds


def random_list(seed=0, genuine=700, impostors=284):
    """Random pairs of 50 identities of 30 images, in random order: folds cannot share none."""
    rng = np.random.default_rng(seed)
    chosen = {}
    while len(chosen) < genuine + impostors:
        a = rng.integers(50)
        b = a if len(chosen) < genuine else (a + rng.integers(1, 50)) % 50
        i, j = rng.choice(30, 2, replace=False) + 1
        key = frozenset([(int(a), int(i)), (int(b), int(j))])
        chosen.setdefault(key, f"p{a}/p{a}_{i:04d}.jpg p{b}/p{b}_{j:04d}.jpg {int(a == b)}")
    return rng.permutation([*chosen.values()]).tolist()


def read_lines(lines, tmp_path, identities=50):
    names = [f"lfw/p{a}/p{a}_{i:04d}.jpg" for a in range(identities) for i in range(1, 31)]
    identities = [name.split("/")[1] for name in names]
    folder = FaceFolder(SimpleNamespace(path="set"), names, identities, np.arange(len(names)))
    (tmp_path / "p.txt").write_text("\n".join(lines))
    return read_pairs(tmp_path / "p.txt", folder)


@pytest.mark.parametrize("genuine", [700, 284, 10, 7])
def test_the_order_of_a_list_changes_nothing(genuine, tmp_path):
    mixed = random_list(genuine=genuine, impostors=984 - genuine)
    expected, expected_used = read_lines(mixed, tmp_path)
    for other in (sorted(mixed, key=lambda line: line[-1]), mixed[::-1], sorted(mixed)):
        pairs, used = read_lines(other, tmp_path)
        assert used.tolist() == expected_used.tolist() and pairs.names == expected.names
        for field in ("first", "second", "same", "folds"):
            assert getattr(pairs, field).tolist() == getattr(expected, field).tolist()
    folds = min(10, genuine)
    sizes = np.bincount(expected.folds)
    assert len(sizes) == folds and sizes.max() - sizes.min() <= 1
    in_fold = np.bincount(expected.folds, weights=expected.same)
    assert np.abs(in_fold - sizes * genuine / 984).max() <= 1
    assert (np.diff(expected.folds) >= 0).all()  # so that a .bin's tenths are these folds
    assert in_fold.min() > 0 and (in_fold < sizes).all()


def test_nor_does_it_where_each_identity_is_in_one_pair(tmp_path):
    lines = [f"p{i}/p{i}_0001.jpg p{i}/p{i}_0002.jpg 1" for i in range(50)]
    lines += [f"p{i}/p{i}_0001.jpg p{i + 1}/p{i + 1}_0001.jpg 0" for i in range(50, 150, 2)]
    expected, _ = read_lines(lines, tmp_path, 150)
    for seed in range(3):
        mixed = np.random.default_rng(seed).permutation(lines)
        pairs, _ = read_lines(mixed, tmp_path, 150)
        assert all(map(np.array_equal, pairs, expected))


def test_real_pairs_and_the_same_list_sorted_by_label(real_faces, tmp_path):
    rows = [line.split("\t") for line in (real_faces / "pairs.txt").read_text("utf-8").splitlines()]
    names = dict.fromkeys(word for row in rows[1:] for word in row if not word.isdecimal())
    paths = [f"lfw/{name}/{name}_{i:04d}.jpg" for name in names for i in range(1, 531)]
    identities = [path.split("/")[1] for path in paths]
    folder = FaceFolder(SimpleNamespace(path="lfw"), paths, identities, np.arange(len(paths)))
    pairs, _ = read_pairs(real_faces / "pairs.txt", folder)
    assert (len(pairs.same), pairs.same.sum(), len(pairs.names)) == (6000, 3000, 7701)
    assert np.bincount(pairs.folds).tolist() == [600] * 10
    assert np.bincount(pairs.folds, weights=pairs.same).tolist() == [300] * 10
    ends = [[pairs.names[i].split("/")[0] for i in side] for side in (pairs.first, pairs.second)]
    assert [a == b for a, b in zip(*ends, strict=True)] == pairs.same.tolist()
    # Its folds share no identity, by which a list without folds shows that these are its folds.
    listed = sorted(as_list(rows[1:]), key=lambda pair: pair[2] == "0")
    (tmp_path / "p.csv").write_text("\n".join(map(",".join, listed)), "utf-8")
    by_label, _ = read_pairs(tmp_path / "p.csv", folder)
    for field in ("first", "second", "same", "folds"):
        assert (getattr(by_label, field) == getattr(pairs, field)).all()
