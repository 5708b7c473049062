"""Draws the toy data sets: pedestrians in the on-disk formats of Market1501 and MARS.

Who somebody is lies in several parts of the clothing, in hair, shoes and what is carried, in colours of one small
palette, so that no single part tells people apart. The camera (scene, white balance, contrast, sharpness) and the
moment (pose, facing, position, light, shadow, what stands in front) change every pixel of the same person.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]  # RGB
Point = tuple[float, float]

BLACK, WHITE, GREY, RED = (40, 40, 46), (222, 220, 214), (126, 128, 132), (176, 46, 48)
BLUE, GREEN, SAND, PURPLE = (50, 76, 144), (60, 120, 78), (204, 166, 86), (126, 78, 142)
CLOTHES: list[Colour] = [BLACK, WHITE, GREY, RED, BLUE, GREEN, SAND, PURPLE]
SHOES: list[Colour] = [BLACK, WHITE, RED, (120, 84, 54)]
SKIN: list[Colour] = [(236, 196, 168), (204, 156, 120), (146, 100, 72), (96, 64, 48)]
HAIR: list[Colour] = [(34, 28, 26), (92, 60, 38), (196, 158, 92), (150, 146, 142)]

NUM_CAMERAS = 6
STOUT = 1.15  # breadth of the figures, so that 48 pixels show enough of them
OVERSAMPLING = 3  # pictures are drawn this much larger and averaged down
SCENE = 3  # a camera's scene is this many pictures wide


@dataclass(frozen=True)
class Person:
    """What is the same in every picture of a person. What does not show (a bald man's hair) holds a fixed value."""

    top: Colour
    second: Colour  # of the pattern, of contrasting sleeves, of the trousers' stripe
    pattern: str
    sleeves: str
    coat: str  # how far down the top reaches
    bottom: Colour
    legwear: str
    shoes: Colour
    skin: Colour
    hair: Colour
    haircut: str
    hat: str
    hat_colour: Colour
    bag: str
    bag_colour: Colour
    girth: float  # breadth of the body, 1 is usual


CHOICES = {  # of a person's attributes; what stands there twice is twice as frequent
    'top': CLOTHES,
    'second': CLOTHES,
    'pattern': ('plain', 'plain', 'hoops', 'stripes', 'yoke', 'checks', 'sash'),
    'sleeves': ('long', 'long', 'short', 'contrast'),
    'coat': ('waist', 'waist', 'hip', 'knee'),
    'bottom': CLOTHES,
    'legwear': ('trousers', 'trousers', 'striped', 'shorts', 'skirt', 'gown'),
    'shoes': SHOES,
    'skin': SKIN,
    'hair': HAIR,
    'haircut': ('short', 'short', 'long', 'bun', 'bald'),
    'hat': ('none', 'none', 'cap', 'beanie'),
    'hat_colour': CLOTHES,
    'bag': ('none', 'backpack', 'backpack', 'satchel', 'handbag'),
    'bag_colour': CLOTHES,
    'girth': (0.88, 1.0, 1.14),
}
LOOK_APART = 8  # any two persons differ in at least this many attributes
PATIENCE = 300  # persons that are refused in a row before fewer attributes must do


@dataclass(frozen=True)
class Camera:
    """What is the same in every picture of a camera."""

    scene: Image.Image  # RGB, SCENE pictures wide and one and a quarter high, oversampled
    gains: np.ndarray  # (3,) exposure and white balance
    gamma: float
    haze: float  # share of a grey veil
    blur: float  # radius in pixels
    noise: float  # standard deviation in grey levels
    quality: int  # of the JPEG


@dataclass(frozen=True)
class View:
    """One moment before a camera. Angles are radians; lengths are shares of the picture's height."""

    yaw: float  # 0 faces the camera, pi / 2 walks to the right, pi turns the back
    phase: float  # of the gait
    stride: float  # amplitude of the legs' swing
    lean: float
    x: float  # of the feet, from the middle
    y: float  # of the feet, from the lower edge, down is positive
    scale: float  # height of the body
    light: float
    warmth: float
    shade_x: float  # slope of the light across the picture
    shade_y: float
    scene_x: float  # 0..1, which part of the scene stands behind
    scene_y: float
    screen: float  # 0..1; above 1 - SCREENED something stands in front, and the value says what
    screen_x: float  # where it stands


SCREENED = 0.08


def draw_market1501(
    folder: str | os.PathLike,
    *,
    num_train: int = 96,
    num_test: int = 40,
    num_distractors: int = 20,
    num_images: int = 8,
    height: int = 96,
    width: int = 48,
    seed: int = 0,
) -> None:
    """Draw an image data set into `folder` in Market1501's format, if it is not there yet.

    Each of `num_train` persons has `num_images` pictures, two from a camera. Each of `num_test` other persons is seen
    by half as many cameras, once as a query and twice in the gallery. The gallery also holds `num_distractors`
    pictures of strangers (pid 0) and as many of junk (pid -1), bodies out of the frame.

    The folder is complete or absent: it is drawn under another name and renamed, so processes that draw it at once do
    no harm. Equal arguments give equal pictures. Raises OSError where it cannot write.
    """
    rng = np.random.default_rng([seed, 1501])
    counter = iter(range(1, 10**6))

    def draw(root: str) -> None:
        cameras = [_camera(kind, height, width, rng) for kind in range(NUM_CAMERAS)]
        for part in 'bounding_box_train', 'query', 'bounding_box_test':
            os.mkdir(os.path.join(root, part))

        def shoot(part: str, pid: int, person: Person, camera: int, view: View) -> None:
            name = f'-1_c{camera + 1}' if pid < 0 else f'{pid:04d}_c{camera + 1}'
            name = f'{name}s1_{25 * next(counter):06d}_{rng.integers(1, 5):02d}.jpg'
            _shoot(os.path.join(root, part, name), person, cameras[camera], view, height, width, rng)

        persons = _persons(num_train + num_test + 2 * num_distractors, rng)
        for index, person in enumerate(persons[: num_train + num_test]):
            pid = 2 * index + 2 - index % 3 // 2  # with gaps, as the real ones
            parts = ['bounding_box_train'] * 2 if index < num_train else ['query'] + ['bounding_box_test'] * 2
            for camera in _some_cameras(num_images // 2, rng):
                for part in parts:
                    shoot(part, pid, person, camera, _view(rng))
        for index, person in enumerate(persons[num_train + num_test :]):
            pid, view = -(index % 2), _view(rng)
            if pid == -1:
                view = replace(view, x=view.x + rng.choice([-0.3, 0.3]), y=view.y + rng.choice([-0.4, 0.4]))
            shoot('bounding_box_test', pid, person, int(rng.integers(NUM_CAMERAS)), view)

    _once(folder, draw)


def draw_mars(
    folder: str | os.PathLike,
    *,
    num_train: int = 48,
    num_test: int = 24,
    num_distractors: int = 8,
    num_frames: tuple[int, int] = (4, 12),
    height: int = 96,
    width: int = 48,
    seed: int = 0,
) -> None:
    """Draw a video data set into `folder` in MARS's format, name files and .mat tables included, if it is not there.

    Each of `num_train` persons has two to four tracklets in as many cameras. Each of `num_test` others is seen by
    three cameras, in two of them by two tracklets; the first one in a camera is a query. Two more persons are seen
    once in each of two cameras: with the queries taken out of the gallery, theirs have no match. The gallery also holds
    `num_distractors` tracklets of strangers (pid 0) and as many of junk (pid -1). A tracklet has between the two
    `num_frames` frames of a person in smooth motion.

    Complete or absent, and equal for equal arguments, as `draw_market1501`. Raises OSError where it cannot write.
    """
    rng = np.random.default_rng([seed, 1261])

    def draw(root: str) -> None:
        cameras = [_camera(kind, height, width, rng) for kind in range(NUM_CAMERAS)]
        persons = _persons(num_train + num_test + 2 + 2 * num_distractors, rng)
        os.mkdir(os.path.join(root, 'info'))

        def draw_subset(part: str, tracks: list[tuple[int, Person, int]]) -> tuple[list[str], list[list[int]]]:
            """Draw the tracklets (pid, person, camera), in the order given: the lines of names and of the table."""
            names, table = [], []
            numbers: dict[tuple[int, int], int] = {}  # how many tracklets a person has in a camera
            for pid, person, camera in tracks:
                begin = '00-1' if pid < 0 else f'{pid:04d}'
                numbers[pid, camera] = number = numbers.get((pid, camera), 0) + 1
                os.makedirs(os.path.join(root, part, begin), exist_ok=True)
                views = _walk(int(rng.integers(num_frames[0], num_frames[1] + 1)), rng)
                if pid < 0:
                    views = [replace(view, x=view.x + 0.3, y=view.y - 0.4) for view in views]
                first = len(names) + 1
                for frame, view in enumerate(views, start=1):
                    names.append(f'{begin}C{camera + 1}T{number:04d}F{frame:03d}.jpg')
                    path = os.path.join(root, part, begin, names[-1])
                    _shoot(path, person, cameras[camera], view, height, width, rng)
                table.append([first, len(names), pid, camera + 1])
            return names, table

        train = [
            (2 * index + 1, person, camera)
            for index, person in enumerate(persons[:num_train])
            for camera in _some_cameras(int(rng.integers(2, 5)), rng)
        ]
        strangers = persons[num_train + num_test + 2 :]
        test = [(-1, person, int(rng.integers(NUM_CAMERAS))) for person in strangers[:num_distractors]]
        test += [(0, person, int(rng.integers(NUM_CAMERAS))) for person in strangers[num_distractors:]]
        queries = []  # rows of the test table, from 1
        for index, person in enumerate(persons[num_train : num_train + num_test + 2]):
            tracklets = (2, 2, 1) if index < num_test else (1, 1)  # in each camera
            for camera, number in zip(_some_cameras(len(tracklets), rng), tracklets, strict=True):
                queries.append(len(test) + 1)
                test += [(2 * index + 2, person, camera)] * number

        for subset, tracks in ('train', train), ('test', test):
            names, table = draw_subset(f'bbox_{subset}', tracks)
            with open(os.path.join(root, 'info', f'{subset}_name.txt'), 'w', encoding='ascii') as file:
                file.write('\n'.join(names) + '\n')
            table = np.array(table, dtype=np.int32)  # (number of tracklets, 4)
            _save_table(os.path.join(root, 'info', f'tracks_{subset}_info.mat'), f'track_{subset}_info', table)
        query_idx = np.array([queries], dtype=np.uint16)  # (1, number of queries)
        _save_table(os.path.join(root, 'info', 'query_IDX.mat'), 'query_IDX', query_idx)

    _once(folder, draw)


def _once(folder: str | os.PathLike, draw: Callable[[str], None]) -> None:
    """Let `draw` fill `folder` if it does not exist; it does when it is complete."""
    folder = os.path.abspath(folder)
    if os.path.isdir(folder):
        return
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.toy-', dir=os.path.dirname(folder)) as parent:
        drawn = os.path.join(parent, os.path.basename(folder))
        os.mkdir(drawn)
        draw(drawn)
        try:
            os.rename(drawn, folder)
        except OSError:
            if not os.path.isdir(folder):  # else another process was first, with the same pictures
                raise


def _save_table(path: str, key: str, table: np.ndarray) -> None:
    """Write a .mat file of MATLAB 5 with one table."""
    from scipy.io import savemat  # slow to import, and only MARS needs it

    savemat(path, {key: table})
    with open(path, 'r+b') as file:
        file.write(b'MATLAB 5.0 MAT-file'.ljust(116))  # in place of the header's text, which holds the time of day


def _some_cameras(number: int, rng: Generator) -> list[int]:
    """Different cameras in ascending order."""
    return sorted(rng.choice(NUM_CAMERAS, size=number, replace=False).tolist())


# ---- who, where, when ----


def _persons(number: int, rng: Generator) -> list[Person]:
    """Persons of whom any two differ in LOOK_APART attributes or more; in a crowd of many hundreds, in fewer."""
    persons: list[Person] = []
    apart, refused = LOOK_APART, 0
    codes = np.empty((number, len(CHOICES)), dtype=np.int8)  # which of the choices each one has
    while len(persons) < number:
        looks = {key: values[rng.integers(len(values))] for key, values in CHOICES.items()}
        second_shows = looks['pattern'] != 'plain' or looks['sleeves'] == 'contrast' or looks['legwear'] == 'striped'
        if second_shows and looks['second'] in (looks['top'], looks['bottom']):
            continue
        looks['second'] = looks['second'] if second_shows else looks['top']
        looks['hair'] = HAIR[0] if looks['haircut'] == 'bald' else looks['hair']
        looks['hat_colour'] = BLACK if looks['hat'] == 'none' else looks['hat_colour']
        looks['bag_colour'] = BLACK if looks['bag'] == 'none' else looks['bag_colour']
        code = [CHOICES[key].index(value) for key, value in looks.items()]
        if ((codes[: len(persons)] != code).sum(axis=1) < apart).any():
            refused += 1
            if refused == PATIENCE:
                apart, refused = apart - 1, 0
            continue
        codes[len(persons)] = code
        persons.append(Person(**looks))
        refused = 0
    return persons


def _view(rng: Generator) -> View:
    """A moment that has nothing to do with any other."""
    return View(
        yaw=rng.uniform(0, 2 * math.pi),
        phase=rng.uniform(0, 2 * math.pi),
        stride=rng.uniform(0.1, 0.55),
        lean=rng.uniform(-0.06, 0.06),
        x=rng.uniform(-0.04, 0.04),
        y=rng.uniform(-0.02, 0.02),
        scale=rng.uniform(0.88, 0.98),
        light=rng.uniform(0.88, 1.12),
        warmth=rng.uniform(-0.04, 0.04),
        shade_x=rng.uniform(-0.2, 0.2),
        shade_y=rng.uniform(-0.2, 0.2),
        scene_x=rng.uniform(0, 1),
        scene_y=rng.uniform(0, 1),
        screen=rng.uniform(0, 1),
        screen_x=rng.uniform(-0.22, 0.22),
    )


def _walk(number: int, rng: Generator) -> list[View]:
    """Consecutive moments of a person that walks by: everything changes evenly."""
    start, other = _view(rng), _view(rng)
    span = number / 40  # how far to the other moment; the gait goes on at one cycle in twelve frames
    end = {key.name: (1 - span) * getattr(start, key.name) + span * getattr(other, key.name) for key in fields(View)}
    end |= {
        'phase': start.phase + 2 * math.pi * number / 12,
        'yaw': start.yaw + rng.normal(0, 0.03) * number,
        'screen': start.screen,
    }
    shares = np.linspace(0, 1, number)
    return [
        View(**{key: float((1 - share) * getattr(start, key) + share * value) for key, value in end.items()})
        for share in shares
    ]


# ---- pictures ----


def _shoot(path: str, person: Person, camera: Camera, view: View, height: int, width: int, rng: Generator) -> None:
    """Save the picture that `camera` takes of `person` at the moment `view`; noise alone is drawn from `rng`."""
    large_h, large_w = height * OVERSAMPLING, width * OVERSAMPLING
    left = round(view.scene_x * (camera.scene.width - large_w))
    upper = round(view.scene_y * (camera.scene.height - large_h))
    image = camera.scene.crop((left, upper, left + large_w, upper + large_h))
    _draw_figure(image, person, view)
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


def _darker(colour: Colour, factor: float = 0.78) -> Colour:
    return tuple(round(value * factor) for value in colour)


def _draw_figure(image: Image.Image, person: Person, view: View) -> None:
    """Draw a walking pedestrian. Body coordinates: x from the axis, y from the crown (0) to the soles (1)."""
    draw = ImageDraw.Draw(image)
    size = view.scale * image.height
    axis = image.width / 2 + view.x * image.height
    soles = image.height * (0.98 + view.y)
    front, side = math.cos(view.yaw), math.sin(view.yaw)  # towards the viewer, towards the right of the picture
    breadth = person.girth * math.hypot(front, 0.75 * side)  # a body is flatter than broad

    def at(x: float, y: float) -> Point:
        return axis + (STOUT * x + view.lean * (1 - y)) * size, soles - (1 - y) * size

    def fill(points: Iterable[Point], colour: Colour) -> None:
        draw.polygon([at(x, y) for x, y in points], fill=colour)

    def disc(x: float, y: float, radius_x: float, radius_y: float, colour: Colour) -> None:
        (x0, y0), (x1, y1) = at(x, y), (STOUT * radius_x * size, radius_y * size)
        draw.ellipse((x0 - x1, y0 - y1, x0 + x1, y0 + y1), fill=colour)

    def limb(points: list[Point], thickness: float, colour: Colour) -> None:
        draw.line(
            [at(x, y) for x, y in points], fill=colour, width=max(1, round(STOUT * thickness * size)), joint='curve'
        )
        for x, y in points[0], points[-1]:
            disc(x, y, thickness / 2, thickness / 2, colour)

    # The outline of the trunk, and bands of it: y from, y to, u from -1 (left edge) to 1 (right edge).
    hem = {'waist': 0.53, 'hip': 0.6, 'knee': 0.72}[person.coat]

    def edge(y: float) -> float:
        return breadth * float(np.interp(y, (0.16, 0.19, 0.4, 0.52, 0.72), (0.07, 0.118, 0.092, 0.1, 0.122)))

    def band(top: float, bottom: float, left: float, right: float, colour: Colour) -> None:
        levels = [top, *(y for y in (0.19, 0.4, 0.52) if top < y < bottom), bottom]
        fill([(left * edge(y), y) for y in levels] + [(right * edge(y), y) for y in reversed(levels)], colour)

    def back_bag() -> None:
        half, middle = math.hypot(0.08 * front, 0.05 * side), -0.11 * side
        colour = person.bag_colour
        limb([(middle - half * 0.5, 0.24), (middle + half * 0.5, 0.24)], half, colour)
        fill([(middle - half, 0.24), (middle + half, 0.24), (middle + half, 0.41), (middle - half, 0.41)], colour)
        pocket = [(middle - half * 0.7, 0.34), (middle + half * 0.7, 0.34)]
        fill(pocket + [(x, 0.39) for x, _ in reversed(pocket)], _darker(colour, 0.7))

    def hip_bag() -> None:
        middle = -0.125 * front * person.girth
        half = math.hypot(0.03 * front, 0.065 * side)
        corners = [(middle - half, 0.5), (middle + half, 0.5), (middle + half, 0.61), (middle - half, 0.61)]
        fill(corners, person.bag_colour)
        fill([(x, min(y, 0.53)) for x, y in corners], _darker(person.bag_colour, 0.7))

    def arm(which: int) -> None:
        far = which * side > 0.3
        swing = 0.75 * view.stride * math.sin(view.phase + (math.pi if which < 0 else 0))
        shoulder = (which * 0.1 * person.girth * front, 0.195)
        elbow = (shoulder[0] + which * 0.022 * front + 0.15 * math.sin(swing) * side, 0.195 + 0.155 * math.cos(swing))
        bent = swing + 0.35
        wrist = (elbow[0] + 0.14 * math.sin(bent) * side, elbow[1] + 0.14 * math.cos(bent))
        sleeve = person.second if person.sleeves == 'contrast' else person.top
        sleeve, skin = (_darker(sleeve), _darker(person.skin)) if far else (_darker(sleeve, 0.9), person.skin)
        if person.bag == 'handbag' and which > 0:
            corners = (-0.045, 0.05), (0.045, 0.05), (0.055, 0.14), (-0.055, 0.14)
            fill([(wrist[0] + x, wrist[1] + y) for x, y in corners], person.bag_colour)
            limb([(wrist[0] - 0.03, wrist[1] + 0.05), wrist, (wrist[0] + 0.03, wrist[1] + 0.05)], 0.012, BLACK)
        limb([shoulder, elbow, wrist], 0.042 if person.sleeves == 'short' else 0.05, skin)
        if person.sleeves == 'short':
            limb([shoulder, ((shoulder[0] + elbow[0]) / 2, (shoulder[1] + elbow[1]) / 2)], 0.056, sleeve)
        else:
            limb([shoulder, elbow, wrist], 0.054, sleeve)
        disc(*wrist, 0.022, 0.024, skin)

    def leg(which: int) -> None:
        far = which * side > 0.3
        swing = view.stride * math.sin(view.phase + (math.pi if which > 0 else 0))
        bend = view.stride * max(0.0, math.cos(view.phase + (math.pi if which > 0 else 0)))
        hip = (which * 0.046 * person.girth * front, 0.52)
        knee = (hip[0] + 0.22 * math.sin(swing) * side, 0.52 + 0.22 * math.cos(swing))
        shin = swing - bend
        ankle = (knee[0] + 0.225 * math.sin(shin) * side, knee[1] + 0.225 * math.cos(shin) - 0.02 * bend * abs(front))
        cloth, skin, shoe = person.bottom, person.skin, person.shoes
        if far:
            cloth, skin, shoe = _darker(cloth), _darker(skin), _darker(shoe)
        limb([(ankle[0] - 0.012 * side, ankle[1] + 0.012),
              (ankle[0] + 0.055 * side + 0.012 * which * front, ankle[1] + 0.02)], 0.042, shoe)  # fmt: skip
        if person.legwear in ('trousers', 'striped'):
            limb([hip, knee, ankle], 0.078 * person.girth, cloth)
            if person.legwear == 'striped':
                shift = 0.024 * which * front * person.girth
                limb([(x + shift, y) for x, y in (hip, knee, ankle)], 0.02, person.second)
            return
        limb([hip, knee, ankle], 0.058 * person.girth, skin)
        if person.legwear == 'shorts':
            limb([hip, (knee[0], knee[1] - 0.02)], 0.088 * person.girth, cloth)

    def trunk() -> None:
        band(0.16, hem, -1, 1, person.top)
        second = person.second
        if person.pattern in ('hoops', 'checks'):
            step = 0.085 if person.pattern == 'hoops' else 0.07
            for top in np.arange(0.22, hem - 0.02, step):
                band(top, min(hem, top + (0.042 if person.pattern == 'hoops' else 0.018)), -1, 1, second)
        if person.pattern in ('stripes', 'checks'):
            half = 0.11 if person.pattern == 'stripes' else 0.06
            for middle in (-0.66, -0.22, 0.22, 0.66):
                band(0.18, hem, middle - half, middle + half, second)
        if person.pattern == 'yoke':
            band(0.16, 0.31, -1, 1, second)
        if person.pattern == 'sash':
            turn = 1 if front > 0 else -1
            for middle in np.linspace(-0.9, 0.9, 31):
                y = 0.345 + 0.16 * middle
                band(y - 0.055, y + 0.055, turn * middle - 0.06, turn * middle + 0.06, second)
        shadow = 1 if side > 0 else -1  # the side away from the walking direction lies in the shade
        band(0.17, hem, -shadow * 1.0, -shadow * 0.93, _darker(person.top, 0.6))

    def head() -> None:
        capped = person.hat != 'none'
        limb([(0, 0.13), (0, 0.17)], 0.05, _darker(person.skin, 0.85))
        if person.haircut == 'long' and front > -0.2:
            limb([(-0.035 * side, 0.08), (-0.05 * side, 0.19)], 0.11, person.hair)
        if person.haircut == 'bun':
            disc(-0.062 * side, 0.035 if not capped else 0.085, 0.03, 0.028, person.hair)
        disc(0, 0.075, 0.056, 0.068, person.skin if person.haircut == 'bald' else person.hair)
        if front > -0.45:  # the face
            turned = 0.6 + 0.4 * max(0.0, front)
            disc(0.018 * side, 0.088, 0.048 * turned + 0.004, 0.055, person.skin)
        if person.haircut == 'long' and front <= -0.2:
            limb([(-0.03 * side, 0.08), (-0.045 * side, 0.17)], 0.115, person.hair)
        if capped:
            dome = [(0.062 * math.cos(angle), 0.058 - 0.062 * math.sin(angle)) for angle in np.linspace(0, math.pi, 9)]
            fill(dome, person.hat_colour)
            if person.hat == 'cap':
                limb([(0.02 * side, 0.06), (0.085 * side, 0.064)], 0.022, _darker(person.hat_colour, 0.7))
            else:
                limb([(-0.048, 0.06), (0.048, 0.06)], 0.026, _darker(person.hat_colour, 0.7))

    near = -1 if side > 0 else 1  # the side that is turned to the viewer
    if front > 0 and person.bag == 'backpack':
        back_bag()
    if person.bag == 'satchel' and near > 0:
        hip_bag()
    arm(-near)
    leg(-near)
    leg(near)
    if person.legwear in ('skirt', 'gown'):
        low, flare = (0.7, 0.135) if person.legwear == 'skirt' else (0.9, 0.15)
        wide = flare * person.girth * (0.8 + 0.2 * abs(front))
        fill([(-edge(0.5), 0.5), (edge(0.5), 0.5), (wide, low), (-wide, low)], person.bottom)
    else:
        band(0.5, 0.56, -0.95, 0.95, person.bottom)
    trunk()
    if person.bag == 'backpack':
        if front > 0:
            for middle in (-0.55, 0.55):
                middle = middle * front + 0.1 * side
                band(0.165, 0.4, middle - 0.1, middle + 0.1, person.bag_colour)
        else:
            back_bag()
    if person.bag == 'satchel':
        turn = 1 if front > 0 else -1
        limb([(0.075 * turn * breadth, 0.17), (-0.1 * turn * breadth, 0.52)], 0.022, _darker(person.bag_colour, 0.85))
    head()
    arm(near)
    if person.bag == 'satchel' and near < 0:
        hip_bag()


def _draw_screen(image: Image.Image, view: View) -> None:
    """Draw what hides a part of the figure: a post, a hedge, a sign or somebody who walks before it."""
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
            radius = height * rng.uniform(0.04, 0.08)
            draw.ellipse(
                (x - radius, top - radius, x + radius, top + radius), fill=(46, 84 + int(rng.integers(30)), 50)
            )
        draw.rectangle((0, top, width, height), fill=(46, 92, 50))
    elif kind == 2:
        top = height * rng.uniform(0.3, 0.6)
        draw.rectangle((middle - 2, top, middle + 2, height), fill=GREY)
        draw.rectangle((middle - 0.11 * height, top, middle + 0.11 * height, top + 0.14 * height), fill=tone)
    else:
        passer = _persons(1, rng)[0]
        away = math.copysign(rng.uniform(0.2, 0.26), view.screen_x) + view.screen_x * 0.3
        _draw_figure(image, passer, replace(_view(rng), x=away, y=0.05, scale=1.0))


def _camera(kind: int, height: int, width: int, rng: Generator) -> Camera:
    """One of NUM_CAMERAS cameras with a scene of its own."""
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


def _scene(kind: int, height: int, width: int, rng: Generator) -> Image.Image:
    """The surroundings of a camera: a backdrop (bricks, windows, trees, columns, hedge, sky line) and a ground."""
    unit = height * OVERSAMPLING  # a picture's height
    wide, high = SCENE * width * OVERSAMPLING, round(1.25 * unit)
    horizon = round(unit * rng.uniform(0.42, 0.62))
    wall = rng.integers(55, 230, size=3) // 2 + int(rng.integers(50, 90))
    ground = rng.integers(85, 165) + rng.integers(-30, 30, size=3)
    image = Image.new('RGB', (wide, high), tuple(ground.tolist()))
    draw = ImageDraw.Draw(image)

    def tone(colour: np.ndarray | Colour, spread: int = 14) -> Colour:
        return tuple(np.clip(np.asarray(colour) + rng.integers(-spread, spread + 1), 0, 255).tolist())

    draw.rectangle((0, 0, wide, horizon), fill=tuple(wall.tolist()))
    step = unit // 8
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
            y = rng.uniform(0, horizon * 0.7)
            draw.line((x, y, x, horizon), fill=(84, 66, 50), width=max(2, unit // 40))
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tone((74, 110, 66), 26))
    elif kind == 3:  # columns
        for x in range(0, wide, 2 * step):
            draw.rectangle((x, 0, x + step // 2, horizon), fill=tone(WHITE, 20))
            draw.rectangle((x + step // 2, 0, x + 2 * step // 3, horizon), fill=tone(GREY))
    elif kind == 4:  # hedge
        for _ in range(220):
            x, y, radius = rng.uniform(0, wide), rng.uniform(horizon * 0.3, horizon), unit * rng.uniform(0.02, 0.05)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tone((58, 96, 58), 24))
    else:  # houses before the sky
        draw.rectangle((0, 0, wide, horizon), fill=(172, 192, 212))
        for x in range(0, wide, step):
            top = horizon * rng.uniform(0.1, 0.7)
            draw.rectangle((x, top, x + step, horizon), fill=tone((136, 128, 122), 34))

    if kind % 3 == 0:  # tiles
        for y in range(horizon, high, step):
            draw.line((0, y, wide, y), fill=tone(ground - 22), width=3)
        for x in range(0, 2 * wide, step):
            draw.line((x, horizon, 2 * x - wide, high), fill=tone(ground - 22), width=3)
    elif kind % 3 == 1:  # kerb and marking of a road
        draw.rectangle((0, horizon, wide, horizon + step // 3), fill=tone(WHITE, 16))
        for x in range(0, wide, 4 * step):
            draw.rectangle((x, horizon + 3 * step, x + 2 * step, horizon + 3 * step + step // 4), fill=tone(WHITE, 8))
    else:  # grass
        draw.rectangle((0, horizon, wide, high), fill=(104, 132, 84))
        for _ in range(500):
            x, y = rng.uniform(0, wide), rng.uniform(horizon, high)
            draw.line((x, y, x + 2, y - unit / 40), fill=tone((96, 124, 76), 26), width=2)
    veil = Image.new('RGB', image.size, (136, 138, 136))
    return Image.blend(image.filter(ImageFilter.GaussianBlur(unit / 80)), veil, 0.2)  # far away, behind the person
