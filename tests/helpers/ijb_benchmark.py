"""A small benchmark in the layout of IJB-B and IJB-C."""

import cv2
import numpy as np

from utils import TEMPLATE

IDENTITIES, IMAGES = 6, 30
SHIFT = np.array([20, 12])  # of the face in the image


def write_benchmark(folder, name="ijbc", galleries=("G1", "G2")):
    """30 images of 6 identities in 12 templates; 10 + i and 100 + i are of identity i."""
    rng = np.random.default_rng(0)
    (folder / "meta").mkdir(parents=True)
    (folder / "loose_crop").mkdir()
    tid, points = [], []
    for i in range(IMAGES):
        identity, second = i % IDENTITIES, i % (2 * IDENTITIES) >= IDENTITIES
        cells = np.random.default_rng(identity).integers(40, 216, (8, 8, 3))
        cells = np.clip(cells + rng.normal(0, 8, cells.shape), 0, 255).astype(np.uint8)
        image = cv2.resize(cells, (150, 140), interpolation=cv2.INTER_LINEAR)
        cv2.imwrite(str(folder / "loose_crop" / f"{i + 1}.jpg"), image)
        tid.append(f"{i + 1}.jpg {(100 if second else 10) + identity} {i // 3}")
        numbers = " ".join(f"{v:.3f}" for v in (TEMPLATE + SHIFT).ravel())
        points.append(f"{i + 1}.jpg {numbers} {0.9 + i / 1000:.6f}")
    pairs = [
        f"{10 + a} {100 + b} {int(a == b)}" for a in range(IDENTITIES) for b in range(IDENTITIES)
    ]
    for file, lines in (
        ("face_tid_mid", tid), ("name_5pts_score", points), ("template_pair_label", pairs)
    ):  # fmt: skip
        (folder / "meta" / f"{name}_{file}.txt").write_text("\n".join(lines) + "\n")
    for file, which in (
        (f"gallery_{galleries[0]}", range(3)),
        (f"gallery_{galleries[1]}", range(3, 6)),
        ("probe_mixed", range(6)),
    ):
        offset = 100 if file == "probe_mixed" else 10
        # Every image of a template has a line.
        rows = [f"{offset + p},{p},img/{k}.jpg,{k}" for p in which for k in range(2)]
        header = "TEMPLATE_ID,SUBJECT_ID,FILENAME,SIGHTING_ID\n"
        (folder / "meta" / f"{name}_1N_{file}.csv").write_text(header + "\n".join(rows) + "\n")
    return folder
