"""The cameras: the scene behind the person, objects in front of the person, and the saved image."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from toy.people import GREY, WHITE, Colour, Person, draw_figure, random_persons
from toy.views import SCREENED, View, random_view

TOY_CAMERAS = 6
OVERSAMPLING = 3  # images are drawn this many times larger and averaged down
SCENE = 3  # width of a camera's scene, in images


@dataclass(frozen=True)
class Camera:
    """The properties that all images of a camera share."""

    scene: Image.Image  # RGB, oversampled; SCENE images wide and 1.25 images high
    gains: np.ndarray  # (3,) exposure and white balance
    gamma: float
    haze: float  # fraction of grey veil
    blur: float  # radius in pixels, in an image 96 pixels high
    noise: float  # standard deviation in grey levels
    quality: int  # of the JPEG


def random_camera(kind: int, height: int, width: int, rng: Generator) -> Camera:
    """A camera for images of `height` x `width` pixels; `kind`, 0 to TOY_CAMERAS - 1, selects its scene."""
    gains = rng.uniform(0.9, 1.1) * (1 + rng.uniform(-0.07, 0.07, size=3))
    return Camera(
        scene=_scene(kind, height, width, rng),
        gains=gains.astype(np.float32),
        gamma=rng.uniform(0.88, 1.14),
        haze=rng.uniform(0, 0.08),
        blur=rng.uniform(0, 0.7),
        noise=rng.uniform(1, 3.5),
        quality=int(rng.integers(70, 93)),
    )


def photograph(path: Path, person: Person, camera: Camera, view: View, height: int, width: int, rng: Generator) -> None:
    """Save the image that `camera` takes of `person` at the moment `view`; `rng` is used for the noise only."""
    large_h, large_w = height * OVERSAMPLING, width * OVERSAMPLING
    left = round(view.scene_x * (camera.scene.width - large_w))
    upper = round(view.scene_y * (camera.scene.height - large_h))
    image = camera.scene.crop((left, upper, left + large_w, upper + large_h))
    draw_figure(image, person, view)
    if view.screen > 1 - SCREENED:
        _draw_screen(image, view)
    image = image.reduce(OVERSAMPLING)
    if camera.blur:
        image = image.filter(ImageFilter.GaussianBlur(camera.blur * height / 96))

    pixels = np.asarray(image, dtype=np.float32) / 255  # (H, W, 3)
    across = np.linspace(-0.5, 0.5, width, dtype=np.float32)[:, None]  # (W, 1)
    down = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None, None]  # (H, 1, 1)
    warm = np.array([1 + view.warmth, 1, 1 - view.warmth], dtype=np.float32)
    light = (view.light + view.shade_x * across + view.shade_y * down) * (camera.gains * warm)  # (H, W, 3)
    pixels = np.clip(pixels * light, 0, 1) ** camera.gamma
    pixels = (1 - camera.haze) * pixels + camera.haze * 0.6
    pixels = pixels * 255 + camera.noise * rng.standard_normal(pixels.shape, dtype=np.float32)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=camera.quality)


def _circle(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: Colour) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _draw_screen(image: Image.Image, view: View) -> None:
    """Draw an object that hides part of the person: a post, a hedge, a sign or a passer-by."""
    draw = ImageDraw.Draw(image)
    width, height = image.size
    rng = np.random.default_rng(int(view.screen * 2**32))
    middle = width / 2 + view.screen_x * height
    kind = rng.integers(4)
    tone = tuple(rng.integers(50, 150, size=3).tolist())
    if kind == 0:
        draw.rectangle((middle - 0.028 * height, 0, middle + 0.028 * height, height), fill=tone)
    elif kind == 1:
        top = height * rng.uniform(0.76, 0.88)
        for x in np.linspace(0, width, 12):
            _circle(draw, x, top, height * rng.uniform(0.04, 0.08), (46, 84 + int(rng.integers(30)), 50))
        draw.rectangle((0, top, width, height), fill=(46, 92, 50))
    elif kind == 2:
        top = height * rng.uniform(0.3, 0.6)
        draw.rectangle((middle - 2, top, middle + 2, height), fill=GREY)
        draw.rectangle((middle - 0.11 * height, top, middle + 0.11 * height, top + 0.14 * height), fill=tone)
    else:
        passer_by = random_persons(1, rng)[0]
        x = math.copysign(rng.uniform(0.2, 0.26), view.screen_x) + view.screen_x * 0.3
        draw_figure(image, passer_by, replace(random_view(rng), x=x, y=0.05, scale=1.0))


def _scene(kind: int, height: int, width: int, rng: Generator) -> Image.Image:
    """The surroundings of a camera: a backdrop down to the horizon, and the ground below."""
    unit = height * OVERSAMPLING  # height of an image
    step = unit // 8
    wide, high = SCENE * width * OVERSAMPLING, round(1.25 * unit)
    horizon = round(unit * rng.uniform(0.42, 0.62))
    wall = rng.integers(55, 230, size=3) // 2 + int(rng.integers(50, 90))
    ground = rng.integers(85, 165) + rng.integers(-30, 30, size=3)
    image = Image.new('RGB', (wide, high), tuple(ground.tolist()))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, wide, horizon), fill=tuple(wall.tolist()))
    x: float  # in some scenes on a grid, in others anywhere

    def tone(colour: np.ndarray | Colour, spread: int = 14) -> Colour:
        return tuple(np.clip(np.asarray(colour) + rng.integers(-spread, spread + 1), 0, 255).tolist())

    if kind == 0:  # bricks
        for row, y in enumerate(range(0, horizon, step // 2)):
            for x in range(-step + row % 2 * step // 2, wide, step):
                draw.rectangle((x, y, x + step - 3, min(y + step // 2 - 3, horizon)), fill=tone((150, 96, 80)))
    elif kind == 1:  # windows
        for x in range(step // 2, wide, 2 * step):
            draw.rectangle((x, step, x + 3 * step // 2, horizon - step // 2), fill=tone((70, 90, 110), 30))
            draw.line((x + 3 * step // 4, step, x + 3 * step // 4, horizon - step // 2), fill=WHITE, width=3)
    elif kind == 2:  # trees
        for _ in range(26):
            x, radius = rng.uniform(0, wide), unit * rng.uniform(0.07, 0.18)
            crown = rng.uniform(0, horizon * 0.7)
            draw.line((x, crown, x, horizon), fill=(84, 66, 50), width=max(2, unit // 40))
            _circle(draw, x, crown, radius, tone((74, 110, 66), 26))
    elif kind == 3:  # columns
        for x in range(0, wide, 2 * step):
            draw.rectangle((x, 0, x + step // 2, horizon), fill=tone(WHITE, 20))
            draw.rectangle((x + step // 2, 0, x + 2 * step // 3, horizon), fill=tone(GREY))
    elif kind == 4:  # a hedge
        for _ in range(220):
            x, leaf = rng.uniform(0, wide), rng.uniform(horizon * 0.3, horizon)
            _circle(draw, x, leaf, unit * rng.uniform(0.02, 0.05), tone((58, 96, 58), 24))
    else:  # houses against the sky
        draw.rectangle((0, 0, wide, horizon), fill=(172, 192, 212))
        for x in range(0, wide, step):
            draw.rectangle((x, horizon * rng.uniform(0.1, 0.7), x + step, horizon), fill=tone((136, 128, 122), 34))

    if kind % 3 == 0:  # tiles
        for y in range(horizon, high, step):
            draw.line((0, y, wide, y), fill=tone(ground - 22), width=3)
        for x in range(0, 2 * wide, step):
            draw.line((x, horizon, 2 * x - wide, high), fill=tone(ground - 22), width=3)
    elif kind % 3 == 1:  # the kerb and the markings of a road
        draw.rectangle((0, horizon, wide, horizon + step // 3), fill=tone(WHITE, 16))
        for x in range(0, wide, 4 * step):
            draw.rectangle((x, horizon + 3 * step, x + 2 * step, horizon + 3 * step + step // 4), fill=tone(WHITE, 8))
    else:  # grass
        draw.rectangle((0, horizon, wide, high), fill=(104, 132, 84))
        for _ in range(500):
            x, root = rng.uniform(0, wide), rng.uniform(horizon, high)
            draw.line((x, root, x + 2, root - unit / 40), fill=tone((96, 124, 76), 26), width=2)
    veil = Image.new('RGB', image.size, (136, 138, 136))
    return Image.blend(image.filter(ImageFilter.GaussianBlur(unit / 80)), veil, 0.2)  # far behind the person
