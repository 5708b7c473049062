from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from runtime import tiles

MATMUL = torch.backends.cuda.matmul
NAME, TF32, FULL = (
    ('fp32_precision', 'tf32', 'ieee') if hasattr(MATMUL, 'fp32_precision') else ('allow_tf32', True, False)
)


@pytest.mark.parametrize('host', [True, False])
def test_settings_of_torch_are_left_as_they_were(host, monkeypatch):
    """While it works it has one thread on the CPU, and products in full where there is a GPU, as for re-ranking."""

    def settings():
        return torch.get_num_threads(), getattr(MATMUL, NAME)

    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: not host)
    torch.set_num_threads(3)
    cpu, seen, before = torch.device('cpu'), [], getattr(MATMUL, NAME)
    setattr(MATMUL, NAME, TF32)
    try:
        tiles.in_threads(lambda: seen.append(settings()), [()], cpu)
        with pytest.raises(ZeroDivisionError):
            tiles.in_threads(lambda: 1 / 0, [()] * 100, cpu)
        assert seen == [(1, TF32 if host else FULL)]
        assert settings() == (3, TF32)
        with ThreadPoolExecutor(1) as pool:  # a thread to come
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        setattr(MATMUL, NAME, before)


@pytest.mark.parametrize(('rows', 'columns'), [(1, 1), (3, 200), (200, 3), (64, 64)])
def test_products(rows, columns):
    """Of whole numbers: exact, and the same whichever side is copied."""
    rng = np.random.default_rng(0)
    left, right = (torch.from_numpy(rng.integers(-9, 10, (size, 33)).astype(np.float32)) for size in (rows, columns))
    assert torch.equal(tiles.products(left, right), left @ right.t())


def test_keys_sort_as_distance_and_place_do():
    distances = np.array([0.5, -0.25, 0.5, np.inf, 0.0, -1e-30, 3e38], np.float32)
    places = np.array([7, 2**32 - 1, 3, 1, 0, 5, 4])
    keys = tiles.keys_of(distances, places)
    assert np.argsort(keys).tolist() == np.lexsort((places, distances)).tolist()
    np.testing.assert_array_equal(tiles.distances_of(keys), distances)
    np.testing.assert_array_equal(keys & 0xFFFFFFFF, places)
    assert np.isnan(tiles.distances_of(np.array([tiles.NONE]))).all() and (keys < tiles.NONE).all()


@pytest.mark.parametrize(('height', 'width', 'tile'), [(10, 7, (4, 3)), (1, 1, (5, 5)), (0, 4, (2, 2)), (8, 8, (8, 8))])
def test_tiles_cover_everything_once(height, width, tile):
    seen = np.zeros((height, width), int)
    for rows, columns in tiles.tiles(height, width, tile):
        seen[rows, columns] += 1
        assert seen[rows, columns].shape <= tile
    assert (seen == 1).all()
