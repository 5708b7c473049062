"""Differences between two images of a person from the same camera: pose, position, light and occlusion."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, get_type_hints

import numpy as np
from numpy.random import Generator

SCREENED = 0.08  # fraction of the images in which something hides part of the person


@dataclass(frozen=True)
class View:
    """One moment in front of a camera, each value with its range. Angles in radians, lengths in image heights."""

    yaw: Annotated[float, 0, 2 * math.pi]  # 0 faces the camera, pi / 2 walks to the right, pi faces away
    phase: Annotated[float, 0, 2 * math.pi]  # of the gait
    stride: Annotated[float, 0.1, 0.55]  # amplitude of the legs' swing
    lean: Annotated[float, -0.06, 0.06]
    x: Annotated[float, -0.04, 0.04]  # of the feet, from the middle
    y: Annotated[float, -0.02, 0.02]  # of the feet, from the lower edge, positive downwards
    scale: Annotated[float, 0.88, 0.98]  # height of the body
    light: Annotated[float, 0.88, 1.12]
    warmth: Annotated[float, -0.04, 0.04]
    shade_x: Annotated[float, -0.2, 0.2]  # slope of the light across the image
    shade_y: Annotated[float, -0.2, 0.2]
    scene_x: Annotated[float, 0, 1]  # which part of the camera's scene is the background
    scene_y: Annotated[float, 0, 1]
    screen: Annotated[float, 0, 1]  # above 1 - SCREENED something hides part of the person; the value decides what
    screen_x: Annotated[float, -0.22, 0.22]  # position of the hiding object, from the middle


RANGES = {name: hint.__metadata__ for name, hint in get_type_hints(View, include_extras=True).items()}


def random_view(rng: Generator) -> View:
    """A random moment, independent of all others."""
    return View(**{name: rng.uniform(low, high) for name, (low, high) in RANGES.items()})


def harder(view: View) -> View:
    """The same moment in a hard setting: occlusion in half of the images instead of 8%, and more changes of light."""
    return replace(
        view,
        screen=1 - (1 - view.screen) * SCREENED / 0.5,
        light=1 + 3 * (view.light - 1),
        warmth=3 * view.warmth,
        shade_x=2 * view.shade_x,
        shade_y=2 * view.shade_y,
    )


def walk(number: int, rng: Generator) -> list[View]:
    """`number` consecutive frames of a person walking past: every value changes at a constant rate."""
    start, other = vars(random_view(rng)), vars(random_view(rng))
    span = number / 40  # how much of the way to the other moment is covered
    end = {name: (1 - span) * start[name] + span * other[name] for name in start}
    end['phase'] = start['phase'] + 2 * math.pi * number / 12  # twelve frames to a cycle of the gait
    end['yaw'] = start['yaw'] + rng.normal(0, 0.03) * number
    end['screen'] = start['screen']
    shares = np.linspace(0, 1, number).tolist()
    return [View(**{name: (1 - share) * start[name] + share * end[name] for name in start}) for share in shares]
