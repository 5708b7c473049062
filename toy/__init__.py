"""Draws the toy data sets: pedestrians in the on-disk formats of the published ones.

A person is identified by clothes, hair, shoes and bag together, in the colours of a small palette, so no single part is
sufficient. The camera (scene, white balance, contrast, sharpness) and the moment (pose, direction, position, light,
shadow, occlusion) change every pixel of the same person.
"""

from toy.formats import draw_cuhk03, draw_market1501, draw_mars, draw_msmt17

__all__ = ['draw_cuhk03', 'draw_market1501', 'draw_mars', 'draw_msmt17']
