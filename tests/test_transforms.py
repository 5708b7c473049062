"""The batch against the per-image pipeline of PIL and torchvision, given the same draws."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import transforms as T
from batches import resizing
from runtime.errors import UserError
from samplers import DRAWS

SIZES = [  # source -> target, (height, width)
    ((128, 64), (256, 128)),  # Market1501
    ((256, 128), (256, 128)),  # MARS
    ((128, 64), (96, 48)),
    ((300, 141), (96, 48)),
    ((60, 31), (256, 128)),
    ((450, 350), (64, 32)),
    ((17, 200), (256, 128)),
    ((1, 1), (32, 16)),
    ((257, 129), (256, 128)),
]
FILTERS = {'bilinear': Image.BILINEAR, 'bicubic': Image.BICUBIC}
NORMALISE = T.Normalize(T.IMAGENET_MEAN, T.IMAGENET_STD)


def noise(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """The hardest images to resize: every pixel for itself, many at the ends of the range."""
    pixels = np.random.default_rng(seed).integers(-60, 316, (count, height, width, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def group(pixels: np.ndarray) -> list:
    return [(torch.arange(len(pixels)), torch.from_numpy(pixels))]


def every_kind(count: int, seed: int = 0) -> torch.Tensor:
    """Draws (count, 4) among which are the four kinds of images and the corners of the range."""
    draws = np.random.default_rng(seed).random((count, 4))
    draws[:4, 0], draws[:4, 3] = [0.1, 0.1, 0.9, 0.9], [0.1, 0.9, 0.1, 0.9]
    draws[2:4, 1:3] = [[0, np.nextafter(1, 0)], [np.nextafter(1, 0), 0]]
    return torch.from_numpy(draws)


def resized(image: Image.Image, height: int, width: int, filter: int = Image.BILINEAR) -> Image.Image:
    """Pillow's resize with the horizontal pass first, as every Pillow before 12.3 does it."""
    return image.resize((width, image.height), filter).resize((width, height), filter)


def cubic(image: Image.Image, height: int, width: int) -> Image.Image:
    return resized(image, height, width, Image.BICUBIC)


def reference(pixels: np.ndarray, draws: torch.Tensor, height: int, width: int, resize=resized) -> torch.Tensor:
    """One image after the other, through PIL, ToTensor and Normalize."""
    out = []
    for image, (translate, down, right, mirror) in zip(map(Image.fromarray, pixels), draws.tolist(), strict=True):
        if translate < 0.5:
            image = resize(image, height, width)
        else:
            tall, wide = round(height * 1.125), round(width * 1.125)
            left, top = round(right * (wide - width)), round(down * (tall - height))
            image = resize(image, tall, wide).crop((left, top, left + width, top + height))
        if mirror < 0.5:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
        out.append(NORMALISE(T.ToTensor()(image)))
    return torch.stack(out)


def assert_same_pixels(batch: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(in_255ths(batch).round(), in_255ths(expected).round())
    assert torch.allclose(batch, expected, rtol=0, atol=1e-6)


def in_255ths(batch: torch.Tensor) -> torch.Tensor:
    """Before normalisation, in steps of the 8-bit range."""
    return (batch * torch.tensor(T.IMAGENET_STD)[:, None, None] + torch.tensor(T.IMAGENET_MEAN)[:, None, None]) * 255


@pytest.fixture(params=['on a CPU', 'as on a GPU'])
def augment(request, monkeypatch):
    """TrainTransform by either of its ways."""
    monkeypatch.setattr(T.TrainTransform, 'on_cpu', request.param == 'on a CPU', raising=False)
    if request.param == 'as on a GPU':
        monkeypatch.setattr(T.TrainTransform, '_on_cpu', T.TrainTransform._by_index)
    return T.TrainTransform


@pytest.mark.parametrize(('source', 'target'), SIZES)
def test_augmentation_is_close_to_the_per_image_pipeline(source, target, augment):
    pixels, draws = noise(8, *source), every_kind(8)
    batch = augment(*target)(group(pixels), draws)
    difference = (in_255ths(batch) - in_255ths(reference(pixels, draws, *target))).abs()
    assert difference.mean() < 0.1
    assert difference.max() < 2.01
    assert batch.shape == (8, 3, *target) and batch.dtype == torch.float32
    assert batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(('source', 'target'), SIZES)
def test_augmentation_of_a_gpu_is_the_per_image_pipeline_pixel_by_pixel(source, target, monkeypatch):
    monkeypatch.setattr(T.TrainTransform, '_on_cpu', T.TrainTransform._by_index)
    pixels, draws = noise(8, *source), every_kind(8)
    assert_same_pixels(T.TrainTransform(*target)(group(pixels), draws), reference(pixels, draws, *target))
    bicubic = T.TrainTransform(*target, interpolation='bicubic')(group(pixels), draws)
    assert_same_pixels(bicubic, reference(pixels, draws, *target, resize=cubic))


@pytest.mark.parametrize(('source', 'target'), SIZES)
def test_a_bicubic_augmentation_is_close_to_the_per_image_pipeline(source, target, augment):
    pixels, draws = noise(8, *source), every_kind(8)
    batch = augment(*target, interpolation='bicubic')(group(pixels), draws)
    difference = (in_255ths(batch) - in_255ths(reference(pixels, draws, *target, resize=cubic))).abs()
    assert difference.mean() < 0.1
    assert difference.max() < 2.01


@pytest.mark.parametrize('source', [(128, 64), (256, 128)])
def test_plain_images_of_the_data_sets_are_those_of_pillow_on_a_cpu_too(source):
    pixels, draws = noise(6, *source), torch.rand(6, 4).double() * 0.49
    assert_same_pixels(T.TrainTransform(256, 128)(group(pixels), draws), reference(pixels, draws, 256, 128))


@pytest.mark.parametrize(('source', 'target'), SIZES)
def test_preparation_is_the_per_image_pipeline_pixel_by_pixel(source, target):
    pixels, plain = noise(5, *source), torch.ones(5, 4) * torch.tensor([0, 0, 0, 0.9])
    batch = T.TestTransform(*target)(group(pixels))
    assert_same_pixels(batch, reference(pixels, plain, *target))
    bicubic = T.TestTransform(*target, interpolation='bicubic')(group(pixels))
    assert_same_pixels(bicubic, reference(pixels, plain, *target, resize=cubic))
    assert batch.shape == (5, 3, *target) and batch.dtype == torch.float32
    assert batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(('source', 'target'), SIZES)
def test_whatever_order_of_passes_the_installed_pillow_chooses_it_is_close(source, target, augment):
    def resize(image, height, width):
        return image.resize((width, height), Image.BILINEAR)

    pixels, draws = noise(8, *source), every_kind(8)
    expected = reference(pixels, draws, *target, resize=resize)
    difference = (in_255ths(augment(*target)(group(pixels), draws)) - in_255ths(expected)).abs()
    assert difference.mean() < 0.5
    assert difference.max() < 2.01
    draws = torch.ones(8, 4) * torch.tensor([0, 0, 0, 0.9])
    expected = reference(pixels, draws, *target, resize=resize)
    difference = (in_255ths(T.TestTransform(*target)(group(pixels))) - in_255ths(expected)).abs()
    assert difference.max() < 1.01


@pytest.mark.parametrize('transform', [lambda images: T.TrainTransform(64, 32)(images, None), T.TestTransform(64, 32)])
def test_prepared_images_have_the_size_of_the_network(transform):
    right, wrong = torch.rand(2, 64, 32, 3), torch.rand(2, 224, 224, 3)
    assert torch.equal(transform([(torch.arange(2), right)]), right.permute(0, 3, 1, 2))
    message = r'float images of 224 x 224 pixels, which are not resized: return 64 x 32, or give their size by --height'
    with pytest.raises(UserError, match=message):
        transform([(torch.arange(2), wrong)])


@pytest.mark.parametrize('source', [(128, 64), (256, 128), (64, 32)])
def test_for_the_proportions_of_the_data_sets_every_pillow_agrees(source):
    pixels = noise(4, *source)
    expected = [NORMALISE(T.ToTensor()(Image.fromarray(image).resize((128, 256), Image.BILINEAR))) for image in pixels]
    assert_same_pixels(T.TestTransform(256, 128)(group(pixels)), torch.stack(expected))


def test_a_batch_of_mixed_sizes_is_each_image_in_its_place(augment):
    sizes = [(128, 64), (50, 30), (128, 64), (300, 141), (50, 30), (128, 64)]
    images = [noise(1, *size, seed=index) for index, size in enumerate(sizes)]
    draws = every_kind(6, seed=1)
    groups = [
        (torch.tensor(places), torch.from_numpy(np.concatenate([images[place] for place in places])))
        for places in ([0, 2, 5], [1, 4], [3])
    ]
    augmented = augment(96, 48)(groups, draws)
    prepared = T.TestTransform(96, 48)(groups)
    for place, image in enumerate(images):
        assert torch.equal(augmented[place], augment(96, 48)(group(image), draws[place : place + 1])[0])
        assert torch.equal(prepared[place : place + 1], T.TestTransform(96, 48)(group(image)))
    assert augmented.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('at_once', [1, 3 * 32 * 16, 1 << 30])
def test_how_many_are_worked_on_at_once_changes_nothing(at_once, augment, monkeypatch):
    pixels, draws = noise(8, 40, 20), every_kind(8)
    expected = augment(32, 16)(group(pixels), draws)
    monkeypatch.setitem(resizing.AT_ONCE, 'cpu', at_once)
    assert torch.equal(augment(32, 16)(group(pixels), draws), expected)


MIXED = [(40, 20), (33, 25), (41, 21), (97, 9), (20, 60), (128, 64), (130, 60), (5, 5), (32, 16)]


@pytest.mark.parametrize('interpolation', resizing.KERNELS)
@pytest.mark.parametrize('at_once', [3 * 128 * 64, 1 << 30])
@pytest.mark.parametrize('padded', [1.0, 2.0, 1000.0])
def test_images_of_several_sizes_at_once_have_the_pixels_of_each(padded, at_once, interpolation, monkeypatch):
    """As on a GPU, where they are padded to a common size."""
    monkeypatch.setattr(T.TrainTransform, '_on_cpu', T.TrainTransform._by_index)
    places = torch.randperm(2 * len(MIXED))
    images = [(places[2 * n : 2 * n + 2], torch.from_numpy(noise(2, *size))) for n, size in enumerate(MIXED)]
    draws = every_kind(len(places))
    augment, prepare = (of(32, 16, interpolation=interpolation) for of in (T.TrainTransform, T.TestTransform))
    alone = {}
    for positions, pixels in images:
        for place, one in zip(positions.tolist(), pixels.numpy(), strict=True):
            alone[place] = augment(group(one[None]), draws[place][None])[0], prepare(group(one[None]))[0]
    monkeypatch.setitem(resizing.PADDED, 'cpu', padded)
    monkeypatch.setitem(resizing.AT_ONCE, 'cpu', at_once)
    augmented, prepared = augment(images, draws), prepare(images)
    for place, expected in alone.items():
        assert torch.equal(augmented[place], expected[0]) and torch.equal(prepared[place], expected[1])


def test_a_gpu_gets_few_operations_however_many_sizes_there_are(monkeypatch):
    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.number += not func.is_view
            return func(*args, **(kwargs or {}))

    monkeypatch.setitem(resizing.PADDED, 'cpu', resizing.PADDED['cuda'])
    monkeypatch.setitem(resizing.AT_ONCE, 'cpu', resizing.AT_ONCE['cuda'])
    numbers = []
    for sizes in (1, 16):
        images = [(torch.tensor([n]), torch.from_numpy(noise(1, 100 + n, 50 + n % sizes))) for n in range(16)]
        images = images if sizes > 1 else [(torch.arange(16), torch.from_numpy(noise(16, 100, 50)))]
        T.TestTransform(64, 32)(images)  # the coefficients are kept
        with Count() as count:
            T.TestTransform(64, 32)(images)
        numbers.append(count.number)
    assert numbers[1] <= numbers[0] + 2 * 16


def test_an_image_does_not_depend_on_its_batch(augment):
    pixels, draws = noise(8, 40, 20), every_kind(8)
    whole = augment(32, 16)(group(pixels), draws)
    for place in range(8):
        alone = augment(32, 16)(group(pixels[place : place + 1]), draws[place : place + 1])
        assert torch.equal(alone[0], whole[place])


def test_every_crop_can_come_and_half_of_the_images_are_translated_or_mirrored(augment):
    """Each pixel of the source says where it came from, and the enlarged image is the source itself."""
    source = np.zeros((1, 36, 18, 3), np.uint8)
    source[..., 0], source[..., 1] = np.arange(36)[:, None] * 7, np.arange(18) * 14
    draws = torch.from_numpy(np.random.default_rng(0).random((1000, 4)))
    batch = augment(32, 16)([(torch.arange(1000), torch.from_numpy(source).expand(1000, -1, -1, -1))], draws)
    batch = in_255ths(batch)
    mirrored = batch[:, 1, 0, 0] > batch[:, 1, 0, -1]
    assert torch.equal(mirrored, draws[:, 3] < 0.5)
    batch = torch.where(mirrored[:, None, None, None], batch.flip(3), batch)
    steps = batch[:, 0, 16, 0] - batch[:, 0, 15, 0]  # 7 in the enlarged image, 8 or so in the plain one
    translated = (steps - 7).abs() < 0.01
    assert torch.equal(translated, draws[:, 0] >= 0.5)
    top, left = batch[translated, 0, 0, 0] / 7, batch[translated, 1, 0, 0] / 14
    assert torch.equal(top.round(), (draws[translated, 1] * 4).round().float())
    assert torch.equal(left.round(), (draws[translated, 2] * 2).round().float())
    assert set(top.round().tolist()) == {0, 1, 2, 3, 4} and set(left.round().tolist()) == {0, 1, 2}


def test_constant_images_stay_constant(augment):
    for value in (0, 1, 127, 254, 255):
        pixels = np.full((4, 37, 23, 3), value, np.uint8)
        batch = in_255ths(augment(64, 32)(group(pixels), every_kind(4)))
        assert (batch - value).abs().max() < 1e-4


def test_neither_the_images_nor_the_draws_are_changed(augment):
    pixels, draws = noise(4, 40, 20), every_kind(4)
    images, kept = group(pixels), draws.clone()
    augment(32, 16)(images, draws)
    assert torch.equal(images[0][1], torch.from_numpy(noise(4, 40, 20))) and torch.equal(draws, kept)


def test_a_test_in_inference_mode_does_not_spoil_the_training_after_it(augment):
    resizing._taps.cache_clear()
    resizing.affine.cache_clear()
    pixels, draws = noise(4, 40, 20), every_kind(4)
    with torch.inference_mode():
        T.TestTransform(32, 16)(group(pixels))
        augment(32, 16)(group(pixels), draws)
    weight = torch.ones(1, requires_grad=True)
    (augment(32, 16)(group(pixels), draws) * weight).sum().backward()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize('interpolation', resizing.KERNELS)
@pytest.mark.parametrize('source', [1, 2, 31, 64, 141, 700])
def test_weights_add_up_and_stay_inside(source, interpolation):
    device = torch.device('cpu')
    for target in (16, 64, 128, 144):
        taps, weights = resizing._taps(source, (target,), interpolation, device)
        assert (weights >= 0).all() or interpolation == 'bicubic'
        assert ((taps >= 0) & (taps < source)).all()
        assert (weights.sum(0) - (1 << resizing.BITS)).abs().max() <= len(weights)  # each is rounded


def test_the_class_of_the_original_draws_in_the_order_of_the_original(monkeypatch):
    image = Image.fromarray(noise(1, 128, 64)[0])
    random.seed(4)
    draws = [(random.random(), random.random(), random.random()) for _ in range(12)]
    for translate, right, down in draws:
        numbers = iter([translate, right, down])
        monkeypatch.setattr(random, 'random', lambda numbers=numbers: next(numbers))
        monkeypatch.setattr(random, 'uniform', lambda low, high: low + (high - low) * random.random())
        augmented = np.asarray(T.Random2DTranslation(64, 32)(image))
        expected = reference(np.asarray(image)[None], torch.tensor([[translate, down, right, 0.9]]).double(), 64, 32)
        assert torch.equal(NORMALISE(T.ToTensor()(augmented.copy())), expected[0])


def test_the_class_of_the_original_takes_a_probability():
    image = Image.fromarray(noise(1, 40, 20)[0])
    plain = np.asarray(image.resize((16, 32), Image.BILINEAR))
    assert all((np.asarray(T.Random2DTranslation(32, 16, p=0)(image)) == plain).all() for _ in range(20))
    assert not any((np.asarray(T.Random2DTranslation(32, 16, p=1)(image)) == plain).all() for _ in range(20))
    nearest = T.Random2DTranslation(32, 16, 0, interpolation=Image.NEAREST)(image)
    assert (np.asarray(nearest) == np.asarray(image.resize((16, 32), Image.NEAREST))).all()


def test_the_classes_of_the_original_compose():
    pipeline = T.Compose([T.Random2DTranslation(32, 16), T.RandomHorizontalFlip(), T.ToTensor(), NORMALISE])
    assert pipeline(Image.fromarray(noise(1, 40, 20)[0])).shape == (3, 32, 16)


def padded(pixels: np.ndarray, draws: torch.Tensor, height: int, width: int, padding: int) -> torch.Tensor:
    """Resize, pad with black, crop, flip: one image after the other, with PIL."""
    out = []
    for image, (_, down, right, mirror) in zip(map(Image.fromarray, pixels), draws[:, :4].tolist(), strict=True):
        canvas = Image.new('RGB', (width + 2 * padding, height + 2 * padding))
        canvas.paste(resized(image, height, width), (padding, padding))
        top, left = int(down * (2 * padding + 1)), int(right * (2 * padding + 1))
        image = canvas.crop((left, top, left + width, top + height))
        out.append(NORMALISE(T.ToTensor()(image.transpose(Image.FLIP_LEFT_RIGHT) if mirror < 0.5 else image)))
    return torch.stack(out)


@pytest.mark.parametrize(('source', 'target'), SIZES)
def test_padding_is_the_per_image_pipeline(source, target, augment):
    pixels, draws = noise(8, *source), every_kind(8)
    batch = augment(*target, padding=5)(group(pixels), draws)
    difference = (in_255ths(batch) - in_255ths(padded(pixels, draws, *target, 5))).abs()
    assert difference.max() < (2.01 if augment.on_cpu else 0.01)
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_every_offset_of_a_padded_image_is_equally_likely(augment):
    pixels = np.full((3000, 8, 4, 3), 255, np.uint8)
    draws = torch.from_numpy(np.random.default_rng(0).random((3000, DRAWS)))
    white = in_255ths(augment(8, 4, padding=2)(group(pixels), draws))[:, 0] > 128  # (B, 8, 4)
    top, left = white.any(2).float().argmax(1), white.any(1).float().argmax(1)
    below, beside = white.any(2).sum(1), white.any(1).sum(1)
    rows = torch.bincount(torch.where(below == 8, 2, torch.where(top > 0, 2 + top, below - 6)))
    columns = torch.bincount(torch.where(beside == 4, 2, torch.where(left > 0, 2 + left, beside - 2)))
    assert len(rows) == len(columns) == 5
    assert (rows - 600).abs().max() < 110 and (columns - 600).abs().max() < 110  # five standard deviations


def textbook_erasing(draw: list[float], height: int, width: int, p: float) -> np.ndarray:
    """Zhong et al., algorithm 1, with the given random numbers."""
    mask = np.zeros((height, width), bool)
    erase, down, right, *tries = draw
    if erase >= p:
        return mask
    for area, aspect in zip(tries[::2], tries[1::2], strict=True):
        size = (0.02 + area * (0.4 - 0.02)) * height * width
        ratio = 0.3 + aspect * (1 / 0.3 - 0.3)
        tall, wide = round((size * ratio) ** 0.5), round((size / ratio) ** 0.5)
        if tall < height and wide < width:
            top, left = int(down * (height - tall + 1)), int(right * (width - wide + 1))
            mask[top : top + tall, left : left + wide] = True
            return mask
    return mask


@pytest.mark.parametrize('size', [(256, 128), (96, 48), (64, 64), (30, 90), (2, 2)])
def test_random_erasing_is_that_of_the_paper(size):
    draws = np.random.default_rng(3).random((400, T.DRAWS_OF_ERASING))
    expected = np.stack([textbook_erasing(draw, *size, 0.5) for draw in draws.tolist()])
    assert (T.erased(torch.from_numpy(draws), *size, 0.5).numpy() == expected).all()
    erased = expected.any((1, 2))
    assert 0.4 < erased.mean() < 0.6 or size == (2, 2)
    assert expected[erased].mean((1, 2)).min() > 0.015 and expected[erased].mean((1, 2)).max() < 0.45
    assert not T.erased(torch.from_numpy(draws), *size, 0.0).any()


def test_an_erased_pixel_is_the_mean_and_all_others_stay(augment):
    pixels, draws = noise(50, 40, 20), torch.from_numpy(np.random.default_rng(0).random((50, DRAWS)))
    plain = augment(32, 16)(group(pixels), draws)
    batch = augment(32, 16, random_erasing=0.5)(group(pixels), draws)
    mask = T.erased(draws[:, 4:], 32, 16, 0.5)[:, None]
    assert mask.any() and torch.equal(batch, torch.where(mask, 0.0, plain))
    assert batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize(('source', 'target'), SIZES)
def test_a_gpu_computes_the_same_pixels_without_waiting(source, target):
    pixels, draws = noise(8, *source), every_kind(8)
    images = [(positions, image.cuda()) for positions, image in group(pixels)]
    train, test, draws_there = T.TrainTransform(*target), T.TestTransform(*target), draws.cuda()
    train(images, draws_there), test(images)  # fills the tables
    torch.cuda.set_sync_debug_mode('error')
    try:
        augmented, prepared = train(images, draws_there), test(images)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert_same_pixels(augmented.cpu(), reference(pixels, draws, *target))
    assert_same_pixels(prepared.cpu(), test(group(pixels)))
    assert augmented.is_contiguous(memory_format=torch.channels_last)
