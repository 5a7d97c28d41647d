"""Draw one head and its shoulders: shapes from a person's traits, pose and face from an image's.

Imported by synthetic.py, which invents the people and the images.  Everything is painted with one
tool, `Sketch.paint`: antialiased polygons in head coordinates, blurred where they are to be soft.
Head coordinates are in half heads: the chin is at y = 1, the crown at y = -1, x grows to the right
of the image, z towards the viewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import cv2
import numpy as np

SIZE = 250  # pixels, as in CASIA-WebFace and LFW
CIRCLE = np.stack([f(np.linspace(0, 2 * np.pi, 20, endpoint=False)) for f in (np.cos, np.sin)], 1)
STEPS = np.linspace(0, 1, 6, endpoint=False)[None, :, None]  # of a spline between two points


def smooth(points: Sequence, closed: bool = True) -> np.ndarray:
    """Run a Catmull-Rom spline through control points (n, 2): (6 n, 2), 6 fewer if open."""
    p = np.asarray(points, np.float64)
    p = np.concatenate([p[-1:], p, p[:2]] if closed else [p[:1], p, p[-1:]])
    a, b, c, d = (p[i : len(p) - 3 + i, None] for i in range(4))
    bend = 2 * a - 5 * b + 4 * c - d + STEPS * (3 * (b - c) + d - a)
    curve = (b + STEPS * (c - a + STEPS * bend) / 2).reshape(-1, 2)
    return curve if closed else np.concatenate([curve, p[-1:]])


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> np.ndarray:
    """Points (20, 2) of an ellipse turned by `angle` radians."""
    c, s = np.cos(angle), np.sin(angle)
    return CIRCLE @ np.array([[rx * c, rx * s], [-ry * s, ry * c]]) + (x, y)


def both(shape: np.ndarray) -> list[np.ndarray]:
    """A shape and its mirror image on the other side of the face."""
    return [np.asarray(shape), np.asarray(shape) * (-1, 1)]


def arc(points: Sequence) -> np.ndarray:
    """A closed shape, symmetrical, from the control points of its right half, top to bottom."""
    half = np.asarray(points)
    return smooth(np.concatenate([half, half[::-1] * (-1, 1)]))


def fill(shapes: list[np.ndarray], size: tuple[int, int], width: float = 0.0) -> np.ndarray:
    """Antialiased mask (h, w) uint8 of polygons, or of open lines `width` wide; all in pixels."""
    mask = np.zeros(size, np.uint8)
    fixed = [np.rint(shape * 16).astype(np.int32) for shape in shapes]  # 4 fractional bits
    if not width:
        cv2.fillPoly(mask, fixed, 255, cv2.LINE_AA, 4)
    else:  # OpenCV's lines are at least a pixel wide: a thinner one is drawn fainter
        shade = int(255 * min(1.0, width))
        cv2.polylines(mask, fixed, False, shade, max(1, round(width)), cv2.LINE_AA, 4)
    return mask


def soften(mask: np.ndarray, sigma: float) -> np.ndarray:
    """Blur like a Gaussian of `sigma` pixels: two box filters, ten times as fast."""
    side = 2 * int(np.sqrt(6 * sigma * sigma + 1) / 2) + 1
    return mask if side == 1 else cv2.blur(cv2.blur(mask, (side, side)), (side, side))


def blend(region: np.ndarray, mask: np.ndarray, colour: np.ndarray, alpha: float = 1.0) -> None:
    """Mix a colour into a canvas region (h, w, 4) in place, where the mask (h, w) uint8 says."""
    weight = cv2.merge([mask * np.float32(alpha / 255)] * 4)
    region += weight * (np.array([*colour, 255], np.float32) - region)


class Sketch:
    """One head being drawn: turns head coordinates into pixels and paints soft polygons there."""

    def __init__(self, canvas: np.ndarray, person: SimpleNamespace, shot: SimpleNamespace):
        """`canvas`: (SIZE, SIZE, 4) float32, RGB in 0 … 255 and how much of a pixel is person."""
        self.canvas, self.person, self.shot = canvas, person, shot
        (cy, sy), (cp, sp), (cr, sr) = (
            (np.cos(angle), np.sin(angle)) for angle in (shot.yaw, shot.pitch, shot.roll)
        )
        yaw = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        pitch = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
        roll = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
        self.rotation, self.cos_yaw = roll @ pitch @ yaw, cy

    def place(self, points: np.ndarray, depth: float | None = 0.0) -> np.ndarray:
        """Project (n, 2) head coordinates to pixels: on the face's surface raised by `depth`.

        None: points of the head's outline, which a turn of the head does not make narrower.
        """
        x, y = points[:, 0], points[:, 1]
        if depth is None:
            x, z = x / self.cos_yaw, 0.25 * np.minimum(np.maximum(y, -0.2), 1)
        else:
            bulge = 1 - 0.9 * (x / self.person.width) ** 2 - 0.55 * y * y
            z = depth + 0.62 * np.sqrt(np.maximum(bulge, 0.02))
        x, y, z = self.rotation @ np.array([x, y, z])
        near = self.shot.scale * (1 + 0.1 * z)
        return np.array([near * x + self.shot.centre[0], near * y + self.shot.centre[1]]).T

    def paint(
        self, shapes, colour, alpha=1.0, blur=0.0, width=0.0, depth=0.0, clip=None, grain=0.0
    ):
        """Blend polygons (or, with `width`, lines) in; lengths are in half heads.

        shapes: one (n, 2) or several.  clip: polygons outside which nothing is painted.
        grain: share that is left out in specks.
        """
        shapes = shapes if isinstance(shapes, list) else [shapes]
        scale = self.shot.scale
        ends = np.cumsum([len(shape) for shape in shapes])[:-1]
        pixels = self.place(np.concatenate(shapes), depth)
        margin = int(3 * blur * scale + width * scale + 2)
        x0, y0 = np.maximum(pixels.min(0).astype(int) - margin, 0)
        x1, y1 = np.minimum(pixels.max(0).astype(int) + margin, SIZE)
        if x0 >= x1 or y0 >= y1:
            return
        mask = fill(np.split(pixels - (x0, y0), ends), (y1 - y0, x1 - x0), width * scale)
        if grain:
            specks = np.random.default_rng(0).random(mask.shape, np.float32) > grain
            mask *= specks
        mask = soften(mask, blur * scale)
        if clip is not None:
            inside = [self.place(shape, depth) - (x0, y0) for shape in clip]
            mask = cv2.multiply(mask, fill(inside, mask.shape), scale=1 / 255)
        blend(self.canvas[y0:y1, x0:x1], mask, colour, alpha)


def head_outline(p: SimpleNamespace) -> np.ndarray:
    """Outline (n, 2) of skull, cheeks, jaw and chin."""
    right = [(0.40, -0.99), (0.76, -0.78), (0.97, -0.40), (1.0, -0.05), (p.cheek, 0.25)]
    right += [(p.jaw, 0.66), (0.8 * p.chin / p.width, 0.94), (0.25 * p.chin / p.width, 1.0)]
    return arc(np.array(right) * (p.width, 1))


def draw_person(canvas: np.ndarray, person: SimpleNamespace, shot: SimpleNamespace) -> None:
    """Draw head and shoulders, from back to front, and mark their pixels in the fourth channel."""
    sketch = Sketch(canvas, person, shot)
    canvas[:, :, 3] = 0
    draw_body(sketch)
    draw_skin(sketch)
    draw_beard(sketch)
    draw_nose(sketch)
    draw_mouth(sketch)
    draw_eyes(sketch)
    draw_hair(sketch)
    draw_brows(sketch)
    if person.glasses > 0.8 and shot.glasses > 0.15:
        draw_glasses(sketch)


def draw_body(s: Sketch) -> None:
    """Hair behind the neck, neck, shoulders and collar, ears."""
    p, shot = s.person, s.shot
    dark = p.skin_rgb * 0.72
    if p.length > 0 and p.bald > 0.1:
        w, low = p.width + 0.6 * p.volume + 0.06, 0.55 + 0.8 * p.length
        back = [
            (0.4 * w, -0.9),
            (w, -0.4),
            (1.05 * w, 0.4 * low),
            (0.95 * w, low),
            (0.4 * w, 1.1 * low),
        ]
        s.paint(arc(back), p.hair_rgb * 0.7, depth=None)
    neck = 0.74 * p.width * p.jaw
    s.paint(arc([(neck, 0.4), (neck, 1.0), (1.2 * neck, 1.4), (neck, 1.8)]), dark, depth=None)
    body = arc([(0.4, 1.30), (0.8, 1.42), (1.5, 1.62), (1.9, 2.6)])
    s.paint(body, shot.clothes, depth=None)
    collar = [(0.37, 1.26), (0.3, 1.42), (0.04, shot.collar)]
    s.paint(arc([(0.3, 1.1), *collar]), dark, depth=None)
    edge = smooth([*collar, (-0.04, shot.collar)], False)
    s.paint(both(edge), shot.clothes * 0.65, width=0.05, depth=None)
    if shot.jacket < 0.4:
        lapel = np.array([(0.36, 1.28), (0.66, 1.38), (0.75, 1.75), (0.2, 2.6), (0.1, 2.6)])
        s.paint(both(lapel), shot.clothes * 0.45, depth=None)
    ear = ellipse(p.width + 0.015, 0.12, 0.085, p.ear + 0.06, 0.15)
    s.paint(both(ear), p.skin_rgb * 0.92, depth=None)
    inner = ellipse(p.width + 0.03, 0.12, 0.04, p.ear, 0.15)
    s.paint(both(inner), dark, 0.6, 0.02, depth=None)


def draw_skin(s: Sketch) -> None:
    """The face itself: its round form, cheeks, eye sockets, wrinkles, freckles, a mole."""
    p, outline = s.person, head_outline(s.person)
    dark, red = p.skin_rgb * 0.5, p.skin_rgb * (0.98, 0.68, 0.64)
    bright = np.minimum(p.skin_rgb * 1.1 + 4, 255)
    s.paint(outline * (0.9, 1) + (0, 0.14), dark, 0.6, 0.06, depth=None)  # shadow on the neck
    s.paint(outline, p.skin_rgb, depth=None)
    s.paint(np.concatenate([outline, outline[:1]]), dark, 0.5, 0.07, 0.1, None, [outline])
    s.paint(ellipse(0, -0.42, 0.34, 0.18), bright, 0.5, 0.1)
    s.paint(both(ellipse(0.42, p.nose_y, 0.13, 0.11)), red, p.cheek_red, 0.07)
    s.paint(both(ellipse(0.39, p.nose_y - 0.1, 0.1, 0.06)), bright, 0.5, 0.06)
    s.paint(both(ellipse(p.eye_x - 0.03, p.eye_y - 0.05, 0.17, 0.09)), dark, 0.35, 0.05)
    x, y = p.eye_x, p.eye_y
    bag = [(x - 0.12, y + 0.08), (x, y + 0.14), (x + 0.12, y + 0.09)]
    s.paint(both(smooth(bag, False)), dark, p.eye_bags, 0.012, 0.02)
    if p.wrinkles > 0:
        line = smooth([(-0.3, 0), (-0.1, -0.03), (0.1, -0.02), (0.3, 0)], False)
        s.paint([line - (0, 0.40 + 0.08 * row) for row in range(3)], dark, p.wrinkles, 0.008, 0.014)
    if p.freckles > 0.85:
        spots = np.random.default_rng(p.number).normal((0, p.nose_y - 0.1), (0.28, 0.09), (22, 2))
        s.paint([ellipse(x, y, 0.011, 0.010) for x, y in spots], dark, 0.55)
    if p.mole > 0.3:
        s.paint(ellipse(p.mole_x, p.mole_y, 0.02, 0.02), dark * 0.5, 0.9)


def draw_beard(s: Sketch) -> None:
    """Stubble or beard on the jaw, moustache above the lip, under the mouth that follows."""
    p, mouth_y = s.person, s.person.nose_y + s.person.mouth_gap
    jaw, colour = p.width * p.jaw, 0.9 * p.hair_rgb
    if p.beard > 0.75:
        right = [(0.12, mouth_y + 0.14), (0.28, mouth_y + 0.04), (0.85 * jaw, 0.5)]
        right += [(0.97 * p.width * p.cheek, 0.2), (jaw, 0.66), (0.75 * p.chin, 0.99), (0.2, 1.05)]
        alpha = 0.35 + 2.2 * (p.beard - 0.75)
        s.paint(arc(right), colour, alpha, 0.025, depth=None, grain=0.15)
    if p.moustache > 0.82:
        y, w = p.nose_y + 0.09, 0.95 * p.mouth_w
        right = [(0.2 * w, y), (0.7 * w, y + 0.04), (w, mouth_y + 0.03), (0.4 * w, mouth_y - 0.03)]
        s.paint(arc(right), colour, 0.85, 0.012, grain=0.15)


def draw_nose(s: Sketch) -> None:
    """Shade beside the bridge, wings, nostrils, light on the tip."""
    p, y, w = s.person, s.person.nose_y, s.person.nose_w
    dark, bright = p.skin_rgb * 0.5, np.minimum(p.skin_rgb * 1.15 + 8, 255)
    away = -1 if s.shot.light[0] > 0 else 1
    side = [(p.bridge, p.eye_y - 0.02), (p.bridge + 0.02, y - 0.14), (w, y - 0.01), (0.4 * w, y)]
    s.paint(smooth(side) * (away, 1), dark, 0.4, 0.025, depth=0.06)
    s.paint(ellipse(0, y + 0.055, 0.8 * w, 0.03), dark, 0.45, 0.025, depth=0.02)
    s.paint(np.array([(0, p.eye_y), (0, y - 0.1)]), bright, 0.5, 0.02, 0.8 * p.bridge, depth=0.1)
    s.paint(ellipse(0, y - 0.05, p.nose_tip, 0.8 * p.nose_tip), bright, 0.5, 0.025, depth=0.14)
    wing = [(0.86, y - 0.09), (1, y - 0.01), (0.86, y + 0.045), (0.62, y + 0.03)]
    s.paint(both(smooth(wing, False) * (w, 1)), dark, 0.7, 0.007, 0.022, depth=0.06)
    nostril = ellipse(0.48 * w, y + 0.025, 0.24 * w, 0.02, -0.25)
    s.paint(both(nostril), dark * 0.45, 0.85, depth=0.1)


def draw_mouth(s: Sketch) -> None:
    """Lips with the line between them, teeth where open, the folds of a smile."""
    p, shot = s.person, s.shot
    y, w = p.nose_y + p.mouth_gap, p.mouth_w * (1 + 0.14 * shot.smile)
    lift, gap = 0.055 * shot.smile, shot.mouth_open
    red = p.skin_rgb * (1 - p.lip_red * np.array([0.16, 0.46, 0.42]))
    dark = p.skin_rgb * (0.32, 0.2, 0.18)
    left, right = (-w, y - lift), (w, y - lift)
    line = [(-0.5 * w, y - 0.1 * lift), (0, y + 0.1 * lift), (0.5 * w, y - 0.1 * lift)]
    edge = [(x, v + gap) for x, v in line]  # of the lower lip
    shoulder, bow = y - 0.65 * p.upper_lip - 0.4 * lift, p.upper_lip * (1 - 0.5 * p.bow)
    top = [(-0.55 * w, shoulder), (-0.2 * w, y - p.upper_lip), (0, y - bow)]
    top += [(0.2 * w, y - p.upper_lip), (0.55 * w, shoulder)]
    low, full = y + gap + 0.75 * p.lower_lip, y + gap + p.lower_lip
    bottom = [(0.5 * w, low), (0, full), (-0.5 * w, low)]
    s.paint(ellipse(0, full + 0.05, 0.5 * w, 0.025), p.skin_rgb * 0.5, 0.4, 0.025)
    s.paint(smooth([left, *top, right, *bottom]), 0.9 * red)
    s.paint(smooth([left, *edge, right, *bottom]), np.minimum(1.08 * red, 255))
    s.paint(ellipse(0, (y + gap + full) / 2, 0.3 * w, 0.014), (255, 235, 230), 0.3, 0.014)
    if gap > 0.01:
        inside, below = smooth([left, *line, right, *edge[::-1]]), y + 0.6 * gap + 0.01
        s.paint(inside, dark)
        teeth = np.array([(-w, y - 0.1), (w, y - 0.1), (w, below), (-w, below)])
        s.paint(teeth, (238, 232, 222), 0.95, clip=[inside])
    s.paint(smooth([left, *line, right], False), dark, 0.85, 0.0, 0.018)
    s.paint([ellipse(x, v, 0.018, 0.014) for x, v in (left, right)], dark, 0.6, 0.01)
    fold = [(1.15 * p.nose_w, p.nose_y), (w + 0.04, y - 0.12), (w + 0.07, y)]
    alpha = 0.5 * max(0.0, shot.smile) + 0.25 * max(0.0, p.wrinkles)
    s.paint(both(smooth(fold, False)), p.skin_rgb * 0.5, alpha, 0.014, 0.018)


def draw_eyes(s: Sketch) -> None:
    """White, iris, pupil, highlight, lids and lashes."""
    p, shot = s.person, s.shot
    x, y, w, r = p.eye_x, p.eye_y, p.eye_w, p.iris_r
    h, lift = p.eye_h * shot.eye_open * (1 - 0.2 * max(0.0, shot.smile)), p.eye_tilt * p.eye_w
    inner, outer = (x - w, y + 0.5 * lift), (x + w, y - 0.5 * lift)
    upper = [inner, (x - 0.45 * w, y - 0.85 * h), (x + 0.3 * w, y - h - 0.2 * lift), outer]
    lower = [outer, (x + 0.35 * w, y + 0.75 * h), (x - 0.4 * w, y + 0.7 * h), inner]
    almonds, lid = both(smooth(upper + lower[1:3])), both(smooth(upper, False))
    dark, (gx, gy) = p.skin_rgb * 0.3, shot.gaze
    centres = [(x + gx, y + gy - 0.012), (gx - x, y + gy - 0.012)]
    s.paint(almonds, (236, 231, 226))
    for share, colour in ((1.0, 0.55 * p.iris_rgb), (0.8, p.iris_rgb), (0.42, (12, 10, 10))):
        s.paint([ellipse(*c, share * r, share * r) for c in centres], colour, clip=almonds)
    s.paint([np.add(line, (0, 0.012)) for line in lid], dark, 0.45, 0.012, 0.03, clip=almonds)
    glint = 0.02 if shot.light[0] > 0 else -0.02
    s.paint([ellipse(a + glint, b - 0.02, 0.015, 0.015) for a, b in centres], (255, 255, 255), 0.9)
    s.paint(lid, 0.6 * dark, 0.95, 0.0, 0.026)
    s.paint([np.subtract(line, (0, 0.045)) for line in lid], dark, 0.5, 0.008, 0.014)
    s.paint(both(smooth(lower, False)), dark, 0.45, 0.0, 0.012)


def draw_brows(s: Sketch) -> None:
    """Brows: thick near the nose, thin outside."""
    p = s.person
    x, y = p.eye_x + p.brow_x, p.eye_y - p.brow_gap - s.shot.brow_up
    w, h, tilt = p.brow_w, 0.5 * p.brow_h, p.brow_tilt * p.brow_w
    ridge = [(x - w, y + 0.4 * tilt), (x - 0.2 * w, y - 0.6 * p.brow_arch)]
    ridge = np.array([*ridge, (x + 0.4 * w, y - p.brow_arch)])
    end = (x + w, y - 0.4 * tilt + 0.02)
    shape = [*np.subtract(ridge, (0, h)), end, *np.add(ridge, (0, h))[::-1]]
    colour = np.minimum(0.75 * p.hair_rgb + 0.08 * p.skin_rgb, 190)
    s.paint(both(smooth(shape)), colour, 0.9, 0.008, depth=0.03)


def draw_hair(s: Sketch) -> None:
    """Hair between the outline of the head and the hairline, combed from the parting."""
    p, w, line = s.person, s.person.width, s.person.hairline
    if p.bald < 0.1:
        return
    t = np.linspace(0, np.pi, 40)
    bumps = 1 + max(0.0, p.curl) * np.sin(1.9 * np.arange(40)) + 0.3 * s.shot.tousle[:40]
    x = (w * (1.04 + 0.5 * p.volume) + 0.01) * np.sign(np.cos(t)) * np.abs(np.cos(t)) ** 0.85
    dome = np.stack([x, -0.25 - (0.82 + p.volume) * np.sin(t) ** 0.85], 1) * bumps[:, None]
    outer = np.concatenate([[(w + 0.02, p.sides)], dome, [(-w - 0.02, p.sides)]])
    fringe = max(0.0, p.fringe)
    corner, middle = (p.temple * w, 0.78 * line + 0.6 * fringe), (0.4 * w, line - 0.03 + fringe)
    half = np.array([(0.99 * w, p.sides), (0.94 * w, min(p.sides, -0.2) - 0.06), corner, middle])
    peak = (0.6 * p.part * w, line - 0.05 + p.peak + 0.8 * fringe)
    inner = smooth(np.concatenate([half * (-1, 1), [peak], half[::-1]]), False)
    comb(s, np.concatenate([s.place(outer, None), s.place(inner)]))


def comb(s: Sketch, pixels: np.ndarray) -> None:
    """Fill the hair's outline (n, 2), in pixels, with strands lighter and darker than it."""
    p, hair = s.person, s.person.hair_rgb
    x0, y0 = np.maximum(pixels.min(0).astype(int) - 2, 0)
    x1, y1 = np.minimum(pixels.max(0).astype(int) + 3, SIZE)
    region, pixels = s.canvas[y0:y1, x0:x1], pixels - (x0, y0)
    mask = fill([pixels], region.shape[:2])
    blend(region, mask, hair)
    root, t = 0.6 * p.part * p.width, np.linspace(0, 1, 10)[:, None]
    ends = np.sin(np.pi / 2 * (np.linspace(-1, 1, 48) + s.shot.tousle))
    x = root + (1.12 * ends * p.width - root) * t**0.8 + max(0.0, p.curl) * np.sin(20 * t)
    y = -1.08 - p.volume + (1.1 + 0.25 * np.abs(ends)) * t**2
    lines = s.place(np.stack([x, y], 2).reshape(-1, 2), 0.12).reshape(10, 48, 2) - (x0, y0)
    for k, shade in enumerate((np.minimum(1.3 * hair + 12, 255), 0.6 * hair)):
        strands = soften(fill(list(lines[:, k::2].transpose(1, 0, 2)), mask.shape, 1.0), 0.8)
        blend(region, cv2.multiply(strands, mask, scale=1 / 255), shade, 0.6)


def draw_glasses(s: Sketch) -> None:
    """A frame around each eye, the bridge and the temples."""
    p, y = s.person, s.person.eye_y + 0.02
    colour = (15 + p.number * 37 % 60,) * 3
    rim = ellipse(p.eye_x, y, p.frame_w, p.frame_h)
    s.paint(both(rim), (235, 240, 245), 0.10, depth=0.06)
    arm = np.array([(p.eye_x + p.frame_w, y - 0.03), (p.width, y - 0.05)])
    lines = [*both(np.concatenate([rim, rim[:1]])), *both(arm)]
    inner = p.eye_x - p.frame_w
    lines.append(smooth([(-inner, y), (0, y - 0.04), (inner, y)], False))
    s.paint(lines, colour, 0.95, 0.0, 0.03, depth=0.06)
