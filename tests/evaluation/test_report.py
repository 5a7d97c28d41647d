"""The report page: complete, well-formed, self-contained, and safe from hostile names."""

import base64
import io
import re
import tarfile
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
import torch
from markupsafe import Markup

from config import Config
from evaluation import robustness, verification
from evaluation.evaluate import set_statistics
from evaluation.pair_sets import PairSet, SetResult
from evaluation.report import blocks, set_sections
from evaluation.report import page as report_page
from fileio.checkpoint_file import save_checkpoint
from fileio.images import encode_jpeg
from tests.helpers.tiny import hostile_names
from utils import TEMPLATE

VOID = {"meta", "img", "br", "link", "hr"}
IDENTITIES = 24


@pytest.fixture(autouse=True)
def empty_plots(request, monkeypatch):
    """Plots cost seconds: a page has empty ones unless the test asks for real_plots."""
    if "real_plots" not in request.fixturenames:
        empty = Markup('<svg role="img" aria-label="plot"></svg>')
        for module in (report_page, set_sections):
            monkeypatch.setattr(module, "svg_plot", lambda *_, **__: empty)


@pytest.fixture
def real_plots():
    """Requested by tests that need the plots."""


class Page(HTMLParser):
    """The elements of a page; fails unless every tag is closed in the right order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.seen, self.words, self.ids = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.seen if name == tag]


def make_result(tmp_path, names=None, *, folder=True, noise=0.9, name="lfw"):
    """A set of random faces with errors of both kinds, and a few faces that were missed."""
    rng = np.random.default_rng(3)
    identity = np.repeat(np.arange(IDENTITIES), 2)
    names = names or [f"Ann_{p}/Ann_{p}_{i % 2 + 1:04d}" for i, p in enumerate(identity)]
    if not folder:
        names = [f"{name}/{i}" for i in range(len(identity))]
    images = torch.from_numpy(rng.integers(0, 256, (len(names), 112, 112, 3), np.uint8))
    centres = rng.normal(size=(IDENTITIES, 8))
    embeddings = centres[identity] + noise * rng.normal(size=(len(names), 8))
    embeddings = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype("float32")
    first = np.tile(np.arange(0, len(names), 2), 2)
    second = np.concatenate([first[:IDENTITIES] + 1, (first[:IDENTITIES] + 7) % len(names)])
    same = np.arange(2 * IDENTITIES) < IDENTITIES
    folds = np.tile(np.arange(4), IDENTITIES // 2)
    pairs = verification.Pairs(names, first, second, same, folds)
    status = ["ok"] * len(names)
    status[3] = status[9] = "central_crop"
    points = TEMPLATE + rng.normal(0, 2, (len(names), 5, 2))
    points[[3, 9]] = np.nan
    known = {"faces_status": status, "points": points.astype(np.float32)} if folder else {}
    if folder:
        known["identity"] = [name.rpartition("/")[0] for name in names]
    test_set = PairSet(tmp_path, name, images, pairs, 2 if folder else 0, **known)
    scores = verification.pair_scores(embeddings, first, second)
    report = verification.verify(scores, same, folds) | {"protocol_in_words": "cosine"}
    return SetResult(test_set, scores, report, embeddings)


def write(tmp_path, results, about=None, training=None, **options):
    path = tmp_path / "new" / "report.html"
    about = about or {"checkpoint": "a.pt"}
    report_page.write_page(path, results, about, training or {}, **options)
    text = path.read_text("utf-8")
    return text, Page(text)


def test_the_page_has_all_sections(tmp_path, real_plots):
    result = make_result(tmp_path)
    row = {"accuracy": 0.9, "standard_error": 0.01, "accuracy_as_set": 0.8, "eer": 0.1,
             "tar_at_far": {"1e-3": 0.5, "1e-2": 0.6}, "matched_cosine": 0.25}  # fmt: skip
    result.metrics["robustness"] = dict.fromkeys(("clean", *robustness.CORRUPTIONS), row)
    result.metrics.update(set_statistics(result, seed=0))
    point = {"wanted": "1e-1", "threshold": 0.4321, "degrees": 64.4, "far": 0.1, "frr": 0.2}
    result.metrics["operating_points"] = [point]
    other = result.metrics | {"comparison": {"verdict": "No statistically significant difference."}}
    compared = [{"checkpoint": "<last>.pt", "sets": {"lfw": other}}]
    history = {"train": [(0, 4, 9.0, 0.1, 4), (0, 8, 5.0, 0.4, 4)], "valid": [(1, 4.0, 0.5)],
               "lfw": [(1, 0.8, 0.3)]}  # fmt: skip
    training = {"config": vars(Config()), "history": history, "steps": 8, "best": {}}
    text, page = write(tmp_path, [result], training=training, compared=compared)
    headings = " ".join(word for word in page.words if word.strip())
    for title in ("Summary", "Curves", "False positives", "False negatives", "missed", "Training",
                  "Nearest confusions", "Accuracy by image quality", "Robustness", "checksums",
                  "Accuracy by fold", "Configuration of the run", "margin_m",
                  "Comparison with other models", "<last>.pt", "No statistically significant",
                  "0.4321", "FAR 1e-4 is not shown",
                  "bootstrap over identities, 1,000 resamples", "P(same identity)",
                  "show aligned faces"):  # fmt: skip
        assert title in headings
    assert "lfw_identities" not in headings  # no setting of train.py
    assert f"{100 * result.metrics['accuracy']:.3f} %" in headings
    # 4 curves, folds, reliability, 5 measures, robustness, and 3 of training
    assert len(page.of("svg")) == 4 + 1 + 1 + 5 + 1 + 3
    wrong = (result.scores >= result.metrics["best_threshold"]) != result.test_set.pairs.same
    assert wrong.sum() > 3
    for pair in np.flatnonzero(wrong):
        assert f"score {result.scores[pair]:.4f}" in headings
    cards = wrong.sum() + 2 * set_sections.CONFUSIONS // 2
    assert len(page.of("img")) == 2 * cards + 2  # aligned faces only: there is no archive
    assert len(page.ids) == len(set(page.ids))
    links = [a["href"] for a in page.of("a")]
    assert all(link[0] == "#" and link[1:] in page.ids for link in links)
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)
    check_accessibility(page)
    check_self_contained(text, page)


def check_accessibility(page):
    assert page.of("html")[0]["lang"] == "en"
    assert page.of("title")
    assert len(page.of("h1")) == len(page.of("main")) == 1
    for image in page.of("img"):
        assert image["alt"]
        assert image["src"].startswith("data:image/webp")
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in page.of("svg"))
    assert len(page.of("caption")) == len(page.of("table"))
    assert all(cell["scope"] for cell in page.of("th"))
    scrolled = [part for part in page.of("section") if part.get("class") == "scroll"]
    assert all(part["tabindex"] == "0" and part["aria-label"] for part in scrolled)


def check_self_contained(text, page):
    policy = page.of("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert "default-src 'none'" in policy["content"]
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.seen}
    assert not re.search(r"@import|url\((?!#)", text)


def test_hostile_names_stay_text(tmp_path):
    names = hostile_names(2 * IDENTITIES)
    result = make_result(tmp_path, names, noise=3)
    text, page = write(tmp_path, [result], {"checkpoint": names[0], "<b>": names[1]})
    tags = {tag for tag, _ in page.seen}
    assert not {"script", "b", "a2", "iframe"} & tags
    assert not any(key.startswith("on") for _, attributes in page.seen for key in attributes)
    assert "<script" not in text.lower()
    assert not any(char in text for char in "\x00\x1b\u202e")
    assert "alert(1)" in "".join(page.words)  # shown, not run


def test_originals_are_beside_the_aligned_faces(tmp_path):
    result = make_result(tmp_path)
    archive = tmp_path / "lfw.tgz"
    level = {name: 3 * i for i, name in enumerate(result.test_set.pairs.names)}
    with tarfile.open(archive, "w:gz") as tar:
        for name, grey in level.items():
            data = encode_jpeg(np.full((250, 250, 3), grey, np.uint8))
            member = tarfile.TarInfo(f"lfw/{name}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    _, page = write(tmp_path, [result], source=str(archive))
    assert "show aligned faces" not in " ".join(page.words)
    shown = {image["alt"]: image["src"] for image in page.of("img")}
    originals = {alt: src for alt, src in shown.items() if alt.endswith(", original image")}
    assert len(originals) == len(shown) / 2
    for alt, src in originals.items():
        pixels = cv2.imdecode(np.frombuffer(base64.b64decode(src.split(",")[1]), np.uint8), 1)
        assert pixels.shape == (224, 224, 3)
        assert abs(pixels.mean() - level[alt.removesuffix(", original image")]) < 3


def test_a_bin_set_says_what_is_not_known(tmp_path):
    _, page = write(tmp_path, [make_result(tmp_path, folder=False, name="cfp_fp")])
    words = " ".join(page.words)
    assert "pose and resolution are not known" in words
    assert "does not name the identities of its images" in words
    assert "missed faces are not known" in words
    assert "does not come from train.py" in words
    assert len(page.of("svg")) == 4 + 1 + 2


def test_landmarks_of_several_sets_have_different_names(tmp_path):
    results = [make_result(tmp_path, name=name) for name in ("one", "two")]
    _, page = write(tmp_path, results)
    named = [part.get("aria-label") or part.get("aria-labelledby") for part in page.of("section")]
    named = [name for name in named if name]
    assert len(named) == len(set(named)) > 10
    assert len(page.ids) == len(set(page.ids))


def test_a_perfect_model_has_empty_galleries(tmp_path):
    _, page = write(tmp_path, [make_result(tmp_path, noise=0)])
    assert " ".join(page.words).count("None.") == 2


@pytest.mark.parametrize(
    "history", [None, {}, {"train": 3}, {"train": [(1,)], "valid": [], "lfw": []},
                {"train": [("a", "b", "c", "d")], "valid": [], "lfw": []}],
)  # fmt: skip
def test_an_invalid_history_gives_a_notice(tmp_path, history):
    training = {"config": {"<i>": "<u>"}, "history": history, "steps": None}
    _, page = write(tmp_path, [make_result(tmp_path)], training=training)
    assert "has no training curves" in " ".join(page.words)
    assert not page.of("i")


def test_pages_of_many_sets_stay_below_eight_megabytes(tmp_path):
    # WebP compresses noise worst.
    results = [make_result(tmp_path, noise=3, name=f"set{i}") for i in range(5)]
    text, _ = write(tmp_path, results)
    assert len(text.encode()) < 8e6
    rng = np.random.default_rng(0)
    largest = blocks.inline_image(rng.integers(0, 256, (900, 1200, 3), np.uint8), "noise")
    assert len(largest) < 4 / 3 * blocks.IMAGE_BYTES + 200


def test_training_is_read_from_the_checkpoint(tmp_path):
    path = tmp_path / "best.pt"
    history = {"train": [(0, 1, 2.0, 0.5, 1)], "valid": [], "lfw": []}
    save_checkpoint(path, {"config": {"lr": 1}, "history": history, "steps": 3, "model": {}})
    assert report_page.read_training(path) == {"config": {"lr": 1}, "history": history, "steps": 3}


def test_provenance_holds_checksums(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"abc")
    (tmp_path / "train.rec").write_bytes(b"")
    model = {"versions": {"torch": "2"}, "seed": 4, "checkpoint": str(tmp_path / "m.onnx")}
    about = report_page.provenance(model, [make_result(tmp_path)])
    assert about["checkpoint, SHA-256"].startswith("ba7816bf8f01cfea414140de5dae2223")
    assert about["test set lfw, SHA-256"].startswith("e3b0c44298fc1c149afbf4c8996fb924")
    assert (about["seed"], about["torch"], about["protocol"]) == (4, "2", "cosine")
