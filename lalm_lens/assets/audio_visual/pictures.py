"""Pictures of animals, drawn with numpy: a few ellipses and triangles each, in colours of its own."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from numpy.random import Generator

SIDE = 64  # pixels
EDGE = 0.06  # half sizes of the animal over which its edges are blurred

Plane = Float[np.ndarray, "row column"]
Colour = tuple[float, float, float]  # red, green and blue, from 0 to 1

BLACK, COAL, WHITE, WOOL = (0.06, 0.06, 0.08), (0.2, 0.2, 0.24), (0.97, 0.97, 0.97), (0.93, 0.91, 0.86)
BROWN, BARK, BEIGE, GREY = (0.62, 0.4, 0.2), (0.36, 0.22, 0.1), (0.9, 0.76, 0.56), (0.4, 0.4, 0.4)
PINK, ROSE, RED, ORANGE, YELLOW = (
    (0.98, 0.68, 0.7),
    (0.88, 0.45, 0.52),
    (0.85, 0.1, 0.1),
    (0.85, 0.5, 0.2),
    (1.0, 0.8, 0.0),
)
GREEN, LEAF, TEAL, RUST = (0.35, 0.7, 0.25), (0.2, 0.5, 0.15), (0.05, 0.4, 0.4), (0.7, 0.3, 0.12)


@dataclass(frozen=True)
class Ellipse:
    """Around its middle, with half axes; the animal's own half size is 1, and y goes down."""

    x: float
    y: float
    across: float
    down: float
    colour: Colour

    def inside(self, x: Plane, y: Plane) -> Plane:
        """How far a point is within the edge, roughly."""
        radius = np.hypot((x - self.x) / self.across, (y - self.y) / self.down)
        return (1 - radius) * min(self.across, self.down)


@dataclass(frozen=True)
class Triangle:
    """Its corners, clockwise as they are seen."""

    corners: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
    colour: Colour

    def inside(self, x: Plane, y: Plane) -> Plane:
        ends = zip(self.corners, (*self.corners[1:], self.corners[0]), strict=True)
        sides = [
            ((bx - ax) * (y - ay) - (by - ay) * (x - ax)) / np.hypot(bx - ax, by - ay) for (ax, ay), (bx, by) in ends
        ]
        return np.min(sides, axis=0)


Shape = Ellipse | Triangle


def both(x: float, y: float, across: float, down: float, colour: Colour) -> tuple[Ellipse, Ellipse]:
    """An ellipse on the left, and one on the right."""
    return Ellipse(-x, y, across, down, colour), Ellipse(x, y, across, down, colour)


def peaks(near: float, far: float, base: float, top: float, colour: Colour) -> tuple[Triangle, Triangle]:
    """A triangle on the left, between two distances from the middle, and one on the right; they point outwards."""
    left = Triangle(((-far, top), (-near, base), (-far, base + 0.25)), colour)
    return left, Triangle(((far, top), (far, base + 0.25), (near, base)), colour)


PICTURES: dict[str, tuple[Shape, ...]] = {  # what is painted first is behind
    "dog": (
        Ellipse(0.0, 0.0, 0.6, 0.7, BROWN),
        *both(0.62, -0.05, 0.22, 0.55, BARK),
        Ellipse(0.0, 0.35, 0.33, 0.3, BEIGE),
        Ellipse(0.0, 0.2, 0.14, 0.1, BLACK),
        *both(0.25, -0.2, 0.09, 0.1, BLACK),
    ),
    "cat": (
        *peaks(0.1, 0.7, -0.45, -0.98, ORANGE),
        Ellipse(0.0, 0.1, 0.7, 0.62, ORANGE),
        *both(0.28, 0.0, 0.15, 0.11, GREEN),
        *both(0.28, 0.0, 0.05, 0.11, BLACK),
        Ellipse(0.0, 0.3, 0.08, 0.06, ROSE),
        *both(0.5, 0.36, 0.3, 0.03, WHITE),
    ),
    "pig": (
        *peaks(0.2, 0.65, -0.5, -0.85, ROSE),
        Ellipse(0.0, 0.05, 0.72, 0.68, PINK),
        Ellipse(0.0, 0.25, 0.34, 0.25, ROSE),
        *both(0.13, 0.25, 0.06, 0.11, BARK),
        *both(0.3, -0.15, 0.07, 0.08, BLACK),
    ),
    "cow": (
        *peaks(0.25, 0.5, -0.6, -1.0, BEIGE),
        *both(0.75, -0.35, 0.25, 0.13, BLACK),
        Ellipse(0.0, 0.0, 0.5, 0.85, WHITE),
        Ellipse(0.28, -0.25, 0.22, 0.35, BLACK),
        Ellipse(0.0, 0.55, 0.48, 0.32, PINK),
        *both(0.18, 0.5, 0.07, 0.09, BARK),
        Ellipse(-0.22, -0.2, 0.08, 0.1, BLACK),
        Ellipse(0.25, -0.2, 0.08, 0.1, WHITE),
    ),
    "frog": (
        *both(0.45, -0.4, 0.3, 0.3, GREEN),
        Ellipse(0.0, 0.15, 0.9, 0.6, GREEN),
        *both(0.45, -0.45, 0.19, 0.19, WHITE),
        *both(0.45, -0.45, 0.09, 0.12, BLACK),
        Ellipse(0.0, 0.35, 0.6, 0.07, LEAF),
    ),
    "hen": (
        Triangle(((-0.95, -0.35), (-0.35, 0.1), (-0.55, 0.5)), RUST),
        Ellipse(-0.05, 0.3, 0.65, 0.5, RUST),
        Ellipse(0.45, -0.3, 0.27, 0.4, RUST),
        Ellipse(0.42, -0.68, 0.16, 0.1, RED),
        Triangle(((0.68, -0.45), (0.98, -0.3), (0.68, -0.2)), YELLOW),
        Ellipse(0.52, -0.4, 0.06, 0.06, BLACK),
        Ellipse(-0.15, 0.3, 0.35, 0.22, BEIGE),
    ),
    "rooster": (
        Ellipse(-0.7, -0.35, 0.25, 0.6, TEAL),
        Ellipse(-0.5, -0.2, 0.2, 0.5, LEAF),
        Ellipse(0.0, 0.3, 0.55, 0.42, BARK),
        Ellipse(0.4, -0.15, 0.28, 0.5, ORANGE),
        Ellipse(0.35, -0.75, 0.3, 0.22, RED),
        Triangle(((0.65, -0.42), (0.98, -0.28), (0.65, -0.18)), YELLOW),
        Ellipse(0.6, 0.05, 0.1, 0.2, RED),
        Ellipse(0.5, -0.4, 0.06, 0.06, BLACK),
    ),
    "sheep": (
        *both(0.55, -0.1, 0.38, 0.38, WOOL),
        *both(0.35, 0.5, 0.4, 0.38, WOOL),
        *both(0.25, -0.55, 0.38, 0.36, WOOL),
        Ellipse(0.0, 0.1, 0.38, 0.5, COAL),
        *both(0.45, 0.0, 0.18, 0.09, COAL),
        *both(0.15, 0.0, 0.08, 0.08, WHITE),
    ),
    "crow": (
        Triangle(((-0.98, 0.55), (-0.3, 0.05), (-0.3, 0.6)), BLACK),
        Ellipse(-0.1, 0.2, 0.6, 0.4, BLACK),
        Ellipse(0.42, -0.25, 0.34, 0.32, BLACK),
        Triangle(((0.68, -0.4), (0.99, -0.12), (0.66, -0.08)), GREY),
        Ellipse(0.5, -0.32, 0.08, 0.08, WHITE),
        Ellipse(-0.2, 0.2, 0.38, 0.2, COAL),
    ),
}


def picture(rng: Generator, name: str) -> UInt8[np.ndarray, "row column 3"]:
    """A new picture of an animal, `SIDE` pixels in height and in width: somewhere, of some size, turned a little, in
    front of some colours, with noise."""
    pixels = background(rng)
    x, y = placed(rng)
    tint = rng.uniform(-0.08, 0.08, 3)
    for shape in PICTURES[name]:
        share = np.clip(shape.inside(x, y) / EDGE + 0.5, 0, 1)[..., None]
        pixels += share * (np.array(shape.colour) + tint - pixels)
    pixels += rng.normal(0, rng.uniform(0.01, 0.06), pixels.shape)
    return (255 * np.clip(pixels * rng.uniform(0.8, 1.1), 0, 1)).astype(np.uint8)


def background(rng: Generator) -> Float[np.ndarray, "row column 3"]:
    """One light colour above, another below."""
    above, below = rng.uniform(0.35, 1, (2, 3))
    share = np.linspace(0, 1, SIDE)[:, None, None]
    return np.broadcast_to((1 - share) * above + share * below, (SIDE, SIDE, 3)).copy()


def placed(rng: Generator) -> tuple[Plane, Plane]:
    """Where each pixel is, seen from the animal: it may look to the left or to the right."""
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    angle, size = rng.uniform(-0.25, 0.25), rng.uniform(0.6, 0.9)
    x, y = x - rng.uniform(-0.2, 0.2), y - rng.uniform(-0.2, 0.2)
    turned = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    return rng.choice((-1, 1)) * turned[0] / size, turned[1] / size


def film(pixels: UInt8[np.ndarray, "row column 3"], n_frames: int) -> UInt8[np.ndarray, "frame row column 3"]:
    """A picture while the camera turns, by a sixteenth of its width each frame."""
    return np.stack([np.roll(pixels, n * SIDE // 16, axis=1) for n in range(n_frames)])
