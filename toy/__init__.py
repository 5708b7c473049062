"""Draws the toy data sets: pedestrians in the on-disk formats of the published ones.

What identifies a person is spread over the clothes, the hair, the shoes and the bag, in colours of one small palette,
so that no single part tells people apart. The camera (scene, white balance, contrast, sharpness) and the moment (pose,
direction, position, light, shadow, occlusion) change every pixel of the same person.
"""

from toy.formats import draw_cuhk03, draw_market1501, draw_mars, draw_msmt17

__all__ = ['draw_cuhk03', 'draw_market1501', 'draw_mars', 'draw_msmt17']
