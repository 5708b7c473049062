"""The persons in the images: choosing them so that they look different, and drawing them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, get_type_hints

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from toy.views import View

Colour = tuple[int, int, int]  # RGB
Point = tuple[float, float]

BLACK, WHITE, GREY, RED = (40, 40, 46), (222, 220, 214), (126, 128, 132), (176, 46, 48)
BLUE, GREEN, SAND, PURPLE = (50, 76, 144), (60, 120, 78), (204, 166, 86), (126, 78, 142)
CLOTHES = (BLACK, WHITE, GREY, RED, BLUE, GREEN, SAND, PURPLE)
SHOES = (BLACK, WHITE, RED, (120, 84, 54))
SKIN = ((236, 196, 168), (204, 156, 120), (146, 100, 72), (96, 64, 48))
HAIR = ((34, 28, 26), (92, 60, 38), (196, 158, 92), (150, 146, 142))

STOUT = 1.15  # figures are wider than real people by this factor, to be visible in 48 pixels
LOOK_APART = 8  # any two persons differ in at least this many attributes
PATIENCE = 300  # consecutive rejected persons before the required number is lowered by one


@dataclass(frozen=True)
class Person:
    """The attributes that all images of a person share, each with its choices.

    A choice listed twice is twice as frequent. An invisible attribute (a bald person's hair) is fixed.
    """

    top: Annotated[Colour, CLOTHES]
    second: Annotated[Colour, CLOTHES]  # of the pattern, of contrasting sleeves, of the stripe on the trousers
    pattern: Annotated[str, ('plain', 'plain', 'hoops', 'stripes', 'yoke', 'checks', 'sash')]
    sleeves: Annotated[str, ('long', 'long', 'short', 'contrast')]
    coat: Annotated[str, ('waist', 'waist', 'hip', 'knee')]  # how far down the top reaches
    bottom: Annotated[Colour, CLOTHES]
    legwear: Annotated[str, ('trousers', 'trousers', 'striped', 'shorts', 'skirt', 'gown')]
    shoes: Annotated[Colour, SHOES]
    skin: Annotated[Colour, SKIN]
    hair: Annotated[Colour, HAIR]
    haircut: Annotated[str, ('short', 'short', 'long', 'bun', 'bald')]
    hat: Annotated[str, ('none', 'none', 'cap', 'beanie')]
    hat_colour: Annotated[Colour, CLOTHES]
    bag: Annotated[str, ('none', 'backpack', 'backpack', 'satchel', 'handbag')]
    bag_colour: Annotated[Colour, CLOTHES]
    girth: Annotated[float, (0.88, 1.0, 1.14)]  # width of the body; 1 is average


CHOICES = {name: hint.__metadata__[0] for name, hint in get_type_hints(Person, include_extras=True).items()}


def random_persons(number: int, rng: Generator) -> list[Person]:
    """`number` persons, any two of whom differ in at least LOOK_APART attributes, or fewer among many hundreds."""
    persons: list[Person] = []
    apart, rejected = LOOK_APART, 0
    codes = np.empty((number, len(CHOICES)), dtype=np.int8)  # the index of each person's choices
    while len(persons) < number:
        looks = {name: choices[rng.integers(len(choices))] for name, choices in CHOICES.items()}
        second_shows = looks['pattern'] != 'plain' or looks['sleeves'] == 'contrast' or looks['legwear'] == 'striped'
        if second_shows and looks['second'] in (looks['top'], looks['bottom']):
            continue
        looks['second'] = looks['second'] if second_shows else looks['top']
        looks['hair'] = HAIR[0] if looks['haircut'] == 'bald' else looks['hair']
        looks['hat_colour'] = BLACK if looks['hat'] == 'none' else looks['hat_colour']
        looks['bag_colour'] = BLACK if looks['bag'] == 'none' else looks['bag_colour']
        code = [CHOICES[name].index(value) for name, value in looks.items()]
        if ((codes[: len(persons)] != code).sum(axis=1) < apart).any():
            rejected += 1
            if rejected == PATIENCE:
                apart, rejected = apart - 1, 0
            continue
        codes[len(persons)] = code
        persons.append(Person(**looks))
        rejected = 0
    return persons


def _darker(colour: Colour, factor: float = 0.78) -> Colour:
    red, green, blue = colour
    return round(red * factor), round(green * factor), round(blue * factor)


def draw_figure(image: Image.Image, person: Person, view: View) -> None:
    """Draw a walking pedestrian. Body coordinates: x from the axis, y from the top of the head (0) to the soles (1)."""
    draw = ImageDraw.Draw(image)
    size = view.scale * image.height
    axis = image.width / 2 + view.x * image.height
    soles = image.height * (0.98 + view.y)
    front, side = math.cos(view.yaw), math.sin(view.yaw)  # towards the viewer, towards the right of the image
    turn = 1 if front > 0 else -1  # seen from behind, left and right are swapped
    near = -1 if side > 0 else 1  # the side of the body that is closer to the viewer
    breadth = person.girth * math.hypot(front, 0.75 * side)  # a body is wider than it is deep
    hem = {'waist': 0.53, 'hip': 0.6, 'knee': 0.72}[person.coat]

    def at(x: float, y: float) -> Point:
        return axis + (STOUT * x + view.lean * (1 - y)) * size, soles - (1 - y) * size

    def fill(points: Iterable[Point], colour: Colour) -> None:
        draw.polygon([at(x, y) for x, y in points], fill=colour)

    def box(x: float, half: float, top: float, bottom: float, colour: Colour) -> None:
        fill([(x - half, top), (x + half, top), (x + half, bottom), (x - half, bottom)], colour)

    def disc(x: float, y: float, radius_x: float, radius_y: float, colour: Colour) -> None:
        (x0, y0), (x1, y1) = at(x, y), (STOUT * radius_x * size, radius_y * size)
        draw.ellipse((x0 - x1, y0 - y1, x0 + x1, y0 + y1), fill=colour)

    def limb(points: list[Point], thickness: float, colour: Colour) -> None:
        pixels = max(1, round(STOUT * thickness * size))
        draw.line([at(x, y) for x, y in points], fill=colour, width=pixels, joint='curve')
        for x, y in points[0], points[-1]:
            disc(x, y, thickness / 2, thickness / 2, colour)

    def edge(y: float) -> float:
        """Half the width of the trunk at `y`."""
        return breadth * float(np.interp(y, (0.16, 0.19, 0.4, 0.52, 0.72), (0.07, 0.118, 0.092, 0.1, 0.122)))

    def band(top: float, bottom: float, left: float, right: float, colour: Colour) -> None:
        """Fill part of the trunk; `left` and `right` run from -1, its left edge, to 1, its right edge."""
        levels = [top, *(y for y in (0.19, 0.4, 0.52) if top < y < bottom), bottom]
        fill([(left * edge(y), y) for y in levels] + [(right * edge(y), y) for y in reversed(levels)], colour)

    def backpack() -> None:
        half, middle = math.hypot(0.08 * front, 0.05 * side), -0.11 * side
        limb([(middle - half * 0.5, 0.24), (middle + half * 0.5, 0.24)], half, person.bag_colour)
        box(middle, half, 0.24, 0.41, person.bag_colour)
        box(middle, half * 0.7, 0.34, 0.39, _darker(person.bag_colour, 0.7))

    def satchel() -> None:
        half, middle = math.hypot(0.03 * front, 0.065 * side), -0.125 * front * person.girth
        box(middle, half, 0.5, 0.61, person.bag_colour)
        box(middle, half, 0.5, 0.53, _darker(person.bag_colour, 0.7))

    def arm(which: int) -> None:
        far = which * side > 0.3
        swing = 0.75 * view.stride * math.sin(view.phase + (math.pi if which < 0 else 0))
        bent = swing + 0.35
        shoulder = (which * 0.1 * person.girth * front, 0.195)
        elbow = (shoulder[0] + which * 0.022 * front + 0.15 * math.sin(swing) * side, 0.195 + 0.155 * math.cos(swing))
        wrist = (elbow[0] + 0.14 * math.sin(bent) * side, elbow[1] + 0.14 * math.cos(bent))
        sleeve = _darker(person.second if person.sleeves == 'contrast' else person.top, 0.78 if far else 0.9)
        skin = _darker(person.skin) if far else person.skin
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
        phase = view.phase + (math.pi if which > 0 else 0)
        swing, bend = view.stride * math.sin(phase), view.stride * max(0.0, math.cos(phase))
        shin = swing - bend
        hip = (which * 0.046 * person.girth * front, 0.52)
        knee = (hip[0] + 0.22 * math.sin(swing) * side, 0.52 + 0.22 * math.cos(swing))
        ankle = (knee[0] + 0.225 * math.sin(shin) * side, knee[1] + 0.225 * math.cos(shin) - 0.02 * bend * abs(front))
        heel = (ankle[0] - 0.012 * side, ankle[1] + 0.012)
        toe = (ankle[0] + 0.055 * side + 0.012 * which * front, ankle[1] + 0.02)
        cloth, skin, shoe = person.bottom, person.skin, person.shoes
        if which * side > 0.3:  # the far one
            cloth, skin, shoe = _darker(cloth), _darker(skin), _darker(shoe)
        limb([heel, toe], 0.042, shoe)
        if person.legwear in ('trousers', 'striped'):
            limb([hip, knee, ankle], 0.078 * person.girth, cloth)
        else:
            limb([hip, knee, ankle], 0.058 * person.girth, skin)
        if person.legwear == 'striped':
            shift = 0.024 * which * front * person.girth
            limb([(x + shift, y) for x, y in (hip, knee, ankle)], 0.02, person.second)
        if person.legwear == 'shorts':
            limb([hip, (knee[0], knee[1] - 0.02)], 0.088 * person.girth, cloth)

    def trunk() -> None:
        band(0.16, hem, -1, 1, person.top)
        second = person.second
        if person.pattern in ('hoops', 'checks'):
            step, thickness = (0.085, 0.042) if person.pattern == 'hoops' else (0.07, 0.018)
            for top in np.arange(0.22, hem - 0.02, step):
                band(top, min(hem, top + thickness), -1, 1, second)
        if person.pattern in ('stripes', 'checks'):
            half = 0.11 if person.pattern == 'stripes' else 0.06
            for middle in (-0.66, -0.22, 0.22, 0.66):
                band(0.18, hem, middle - half, middle + half, second)
        if person.pattern == 'yoke':
            band(0.16, 0.31, -1, 1, second)
        if person.pattern == 'sash':
            for middle in np.linspace(-0.9, 0.9, 31):
                y = 0.345 + 0.16 * middle
                band(y - 0.055, y + 0.055, turn * middle - 0.06, turn * middle + 0.06, second)
        band(0.17, hem, near, near * 0.93, _darker(person.top, 0.6))  # in shadow at the edge

    def head() -> None:
        limb([(0, 0.13), (0, 0.17)], 0.05, _darker(person.skin, 0.85))
        if person.haircut == 'long' and front > -0.2:
            limb([(-0.035 * side, 0.08), (-0.05 * side, 0.19)], 0.11, person.hair)
        if person.haircut == 'bun':
            disc(-0.062 * side, 0.035 if person.hat == 'none' else 0.085, 0.03, 0.028, person.hair)
        disc(0, 0.075, 0.056, 0.068, person.skin if person.haircut == 'bald' else person.hair)
        if front > -0.45:  # the face
            turned = 0.6 + 0.4 * max(0.0, front)
            disc(0.018 * side, 0.088, 0.048 * turned + 0.004, 0.055, person.skin)
        if person.haircut == 'long' and front <= -0.2:
            limb([(-0.03 * side, 0.08), (-0.045 * side, 0.17)], 0.115, person.hair)
        if person.hat != 'none':
            dome = [(0.062 * math.cos(angle), 0.058 - 0.062 * math.sin(angle)) for angle in np.linspace(0, math.pi, 9)]
            fill(dome, person.hat_colour)
        if person.hat == 'cap':
            limb([(0.02 * side, 0.06), (0.085 * side, 0.064)], 0.022, _darker(person.hat_colour, 0.7))
        if person.hat == 'beanie':
            limb([(-0.048, 0.06), (0.048, 0.06)], 0.026, _darker(person.hat_colour, 0.7))

    # From the farthest to the nearest.
    if person.bag == 'backpack' and front > 0:
        backpack()
    if person.bag == 'satchel' and near > 0:
        satchel()
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
    if person.bag == 'backpack' and front > 0:
        for middle in (-0.55 * front + 0.1 * side, 0.55 * front + 0.1 * side):  # straps
            band(0.165, 0.4, middle - 0.1, middle + 0.1, person.bag_colour)
    elif person.bag == 'backpack':
        backpack()
    if person.bag == 'satchel':
        limb([(0.075 * turn * breadth, 0.17), (-0.1 * turn * breadth, 0.52)], 0.022, _darker(person.bag_colour, 0.85))
    head()
    arm(near)
    if person.bag == 'satchel' and near < 0:
        satchel()
