"""Draws the toy data sets: pedestrians in the on-disk formats of Market1501 and MARS.

What identifies a person is spread over the clothes, the hair, the shoes and the bag, in colours of one small palette,
so that no single part tells people apart. The camera (scene, white balance, contrast, sharpness) and the moment (pose,
direction, position, light, shadow, occlusion) change every pixel of the same person.
"""

from toy.formats import draw_market1501, draw_mars

__all__ = ['draw_market1501', 'draw_mars']
