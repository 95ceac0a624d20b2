"""Renders golf-ball.jpg, the picture of the README: nobody's photograph, so it may travel with the code.

    python docs/golf_ball.py docs/golf-ball.jpg
"""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image, ImageFilter

WIDTH, HEIGHT, RADIUS, DIMPLES = 640, 480, 150, 340
CENTRE = (330, 255)


def grass(rng: np.random.Generator) -> Image.Image:
    """Blades as streaks: noise smeared upwards at two scales, sharper towards the viewer."""
    total = np.zeros((HEIGHT, WIDTH))
    for smear, weight in ((9, 1.0), (25, 1.6)):
        noise = rng.normal(0, 1, (HEIGHT + smear, WIDTH))
        total += weight * sum(noise[i : i + HEIGHT] for i in range(smear)) / np.sqrt(smear)
    light = np.clip(0.55 + 0.12 * total, 0, 1.2)[..., None]
    fade = np.linspace(0.75, 1.05, HEIGHT)[:, None, None]
    colour = np.array([92, 150, 48]) * light * fade + np.array([10, 18, 6])
    picture = Image.fromarray(colour.clip(0, 255).astype(np.uint8))
    far = picture.filter(ImageFilter.GaussianBlur(5))
    near = np.clip(np.linspace(-0.6, 1.4, HEIGHT), 0, 1)
    mask = Image.fromarray((255 * np.repeat(near[:, None], WIDTH, 1)).astype(np.uint8))
    return Image.composite(picture, far, mask)


def ball() -> tuple[np.ndarray, np.ndarray]:
    """Shading [H, W] in 0..1 and coverage [H, W]: a sphere with dimples on a Fibonacci lattice."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    nx, ny = (x - CENTRE[0]) / RADIUS, (y - CENTRE[1]) / RADIUS
    squared = nx**2 + ny**2
    normal = np.dstack([nx, ny, np.sqrt(np.clip(1 - squared, 0, 1))])
    index = np.arange(DIMPLES) + 0.5
    polar, turn = np.arccos(1 - 2 * index / DIMPLES), np.pi * (1 + 5**0.5) * index
    lattice = np.stack([np.cos(turn) * np.sin(polar), np.sin(turn) * np.sin(polar), np.cos(polar)], 1)
    nearness = normal.reshape(-1, 3) @ lattice.T
    nearest = nearness.argmax(1)
    distance = np.arccos(nearness.max(1).clip(-1, 1)).reshape(HEIGHT, WIDTH)
    reach = 1.7 / np.sqrt(DIMPLES)
    depth = np.where(distance < reach, distance / reach, 0)[..., None]
    bent = normal + 0.55 * depth * (lattice[nearest].reshape(HEIGHT, WIDTH, 3) - normal) / reach
    bent /= np.linalg.norm(bent, axis=2, keepdims=True)
    sun = np.array([-0.45, -0.7, 0.55]) / np.linalg.norm([-0.45, -0.7, 0.55])
    diffuse = (bent @ sun).clip(0)
    halfway = sun + np.array([0, 0, 1])
    shine = (bent @ (halfway / np.linalg.norm(halfway))).clip(0) ** 40
    return 0.3 + 0.62 * diffuse + 0.35 * shine, np.clip((1 - np.sqrt(squared)) * RADIUS, 0, 1)


def main() -> None:
    rng = np.random.default_rng(7)
    ground = np.asarray(grass(rng)).astype(float)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    shadow = np.exp(-(((x - CENTRE[0] - 50) / 190) ** 2 + ((y - CENTRE[1] - 140) / 50) ** 2))
    ground *= 1 - 0.65 * shadow[..., None]
    shading, coverage = ball()
    white = shading[..., None] * np.array([250, 250, 244])
    green = np.array([150, 190, 110]) * np.clip((y - CENTRE[1]) / RADIUS, 0, 1)[..., None] * 0.25
    picture = ground * (1 - coverage[..., None]) + (white + green) * coverage[..., None]
    picture += rng.normal(0, 3, picture.shape)
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(sys.argv[1], quality=88)


if __name__ == "__main__":
    main()
