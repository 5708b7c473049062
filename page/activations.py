"""Activation maps: the parts of an image to which a network responds."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from files.writing import write_whole
from page.runs import shown
from runtime.errors import UserError


def activations(
    checkpoint: str | Path,
    images: Sequence[str | Path],
    arch: str | None = None,
    assume: str = '',
    height: int | None = None,
    width: int | None = None,
    out: str | Path = 'activations.png',
) -> Path:
    """Write a grid of images, each next to a copy overlaid with its activation map, and return its path.

    The map is the sum of the squared channels of the network's last stage, scaled to the range of each image, as in
    torchreid's tools; after Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928.

    Args:
        arch: architecture of the checkpoint; None to recognise it by the weights.
        assume: NAME=VALUE, separated by commas: replaces assumptions about what the file does not record.
        height, width: size of the network's input in pixels; None for the size of the training, or 256 x 128 if the
            file does not record one.

    Raises:
        UserError: the checkpoint or an image cannot be read, the checkpoint does not fit the architecture or size, the
        network has no maps, or `out` cannot be written.
    """
    import torch  # not needed for pages, which the command also writes
    from matplotlib import colormaps
    from torch.nn import functional as F

    from dataset_loader import read_image
    from extraction.source import source_of
    from transforms import TestTransform

    source = source_of(checkpoint, arch, assume, height, width)
    for note in source.notes:
        print(note)
    if source.sealed:
        raise UserError(f'{checkpoint}: an ONNX file has no maps that can be shown; give the weights')
    model, (height, width, interpolation, *_) = source.model, source.usage
    outputs: list[torch.Tensor] = []
    pool = model.pool

    def pooled(maps: torch.Tensor) -> torch.Tensor:
        outputs.append(maps)
        return pool(maps)

    if isinstance(pool, torch.nn.Module):  # otherwise it cannot be replaced by a function
        del model.pool
    model.pool = pooled
    prepare = TestTransform(height, width, model.normalisation, interpolation)
    colours, cells = colormaps['inferno'], []
    for path in images:
        image = read_image(path)
        pixels = torch.from_numpy(np.array(image))[None]  # (1, H, W, 3)
        with torch.inference_mode():
            model(prepare([(torch.tensor([0]), pixels)]))
            if not outputs:
                raise UserError(f'{checkpoint}: the network pools its maps itself, so that they cannot be shown')
            heat = outputs[-1].square().sum(1, keepdim=True)  # (1, 1, h, w), of the last stage
            outputs.clear()
            heat = F.interpolate(heat, (height, width), mode='bilinear')[0, 0]  # (height, width)
        heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=torch.finfo(heat.dtype).tiny)
        picture = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)) / 255  # (height, width, 3)
        cells.append((shown(Path(path).name), picture, 0.4 * picture + 0.6 * colours(heat.numpy())[..., :3]))
    return _write_grid(cells, height / width, Path(out))


def _write_grid(cells: Sequence[tuple[str, np.ndarray, np.ndarray]], shape: float, path: Path) -> Path:
    """Write the cells (name, image (H, W, 3) in 0..1, the same with its map) as one PNG. `shape` is H / W."""
    from matplotlib import rc_context
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    rows = math.ceil(len(cells) / 6)
    columns = math.ceil(len(cells) / rows)
    with rc_context({'font.size': 8, 'text.parse_math': False}):
        figure = Figure(figsize=(2 * columns, rows * (shape + 0.3) + 0.6), dpi=150, layout='constrained')
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, (name, picture, mapped) in zip(grid.flat, cells, strict=False):
            gap = np.ones((len(picture), max(1, len(picture) // 40), 3))
            axes.imshow(np.hstack([picture, gap, mapped]))
            axes.set_title(name if len(name) <= 28 else f'...{name[-25:]}', fontsize=7)
        bar = figure.colorbar(
            ScalarMappable(cmap='inferno'), ax=grid, location='bottom', shrink=min(1, 2 / columns), aspect=30,
            ticks=[0, 1], label='sum of squared channels, scaled per image',
        )  # fmt: skip
        bar.ax.set_xticklabels(['minimum', 'maximum'])
        bar.outline.set_visible(False)
        try:
            write_whole(path, lambda file: figure.savefig(file, format='png', bbox_inches='tight'))
        except OSError as problem:
            raise UserError(f'{path} cannot be written ({problem.strerror}); choose another --out') from problem
    return path
