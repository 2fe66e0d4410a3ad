"""Batched augmentation equals a per-image reference, and depends on (seed, epoch, index) alone."""
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from nas.augment import (
    COLUMN,
    FLIP,
    HOLE_COLUMN,
    HOLE_ROW,
    ORDER,
    ROW,
    Augment,
    fold,
    mix,
    mix_number,
    noise,
    normalise,
    permutation,
    resize,
    seeded,
    signed,
    uniform,
)


def test_mix_is_splitmix64():
    # the first outputs of the reference generator (Vigna, splitmix64.c) from state 1234567
    golden, expected = 0x9E3779B97F4A7C15, [6457827717110365317, 3203168211198807973, 9817491932198370423]
    states = torch.tensor([signed(1234567 + k * golden) for k in range(3)])
    assert [value & (2**64 - 1) for value in mix(states).tolist()] == expected


def test_the_number_twin_equals_the_tensor_one():
    numbers = [0, 1, -1, 2**63 - 1, -(2**63), 123456789012345]
    assert mix(torch.tensor(numbers)).tolist() == [mix_number(n) for n in numbers]


def test_noise_is_flat_and_tells_its_arguments_apart():
    index = torch.arange(20000)
    base = noise(1, 2, index, ROW)
    assert int(base.min()) >= 0 and len(base.unique()) == len(base)
    counts = torch.bincount(base % 9)
    assert float((counts - 20000 / 9).abs().max()) < 5 * (20000 / 9) ** 0.5
    for other in (noise(s, e, index, p) for s, e, p in ((2, 2, ROW), (1, 3, ROW), (1, 2, COLUMN), (2, 1, ROW))):
        assert int((other == base).sum()) == 0
        assert abs(float(torch.corrcoef(torch.stack([uniform(base), uniform(other)]))[0, 1])) < 0.03
    assert abs(float(uniform(base).mean()) - 0.5) < 0.01 and float(uniform(base).max()) < 1
    assert torch.equal(noise(1, torch.full((20000,), 2), index, ROW), base)
    assert fold(1, 2) != fold(2, 1)


def reference(image: np.ndarray, augment: Augment, seed: int, epoch: int, index: int) -> np.ndarray:
    """One image (C, H, W), by hand."""

    def number(purpose: int) -> int:
        return int(noise(seed, epoch, torch.tensor([index]), purpose))

    height, width = image.shape[1:]
    if augment.pad:
        p = augment.pad
        padded = np.pad(image, ((0, 0), (p, p), (p, p)))
        top, left = number(ROW) % (2 * p + 1), number(COLUMN) % (2 * p + 1)
        image = padded[:, top : top + height, left : left + width]
    if augment.flip and number(FLIP) % 2:
        image = image[:, :, ::-1]
    return image


@pytest.mark.parametrize("augment", [Augment(2, True), Augment(3, False), Augment(0, True), Augment()])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 10)])
def test_batched_equals_per_image(augment, shape):
    images = torch.randint(1, 256, (40, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    index = torch.arange(100, 140)
    out = augment.pixels(images, 5, 6, index)
    assert out.dtype == torch.uint8
    for i in range(40):
        np.testing.assert_array_equal(out[i].numpy(), reference(images[i].numpy(), augment, 5, 6, int(index[i])))
    if augment.pad:
        assert not torch.equal(out, images)


def test_batched_equals_torchvision_on_pil():
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    index = torch.arange(6)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    ours = normalise(Augment(pad=2).pixels(images, 1, 0, index), mean, std)
    for i in range(6):
        top, left = (int(noise(1, 0, index[i : i + 1], purpose) % 5) for purpose in (ROW, COLUMN))
        padded = v2.functional.pad(Image.fromarray(images[i].permute(1, 2, 0).numpy()), 2)
        cropped = v2.functional.crop(padded, top, left, 8, 8)
        x = v2.functional.normalize(v2.functional.to_dtype(v2.functional.to_image(cropped), scale=True), mean, std)
        torch.testing.assert_close(ours[i], x, atol=2e-6, rtol=1e-6)


def test_an_image_does_not_depend_on_its_batch():
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment, index = Augment(2, True, 3), torch.arange(20)

    def view(x, index, epoch=4):
        return augment.holes(normalise(augment.pixels(x, 9, epoch, index), [0.5] * 3, [0.25] * 3), 9, epoch, index)

    whole, order = view(images, index), permutation(0, 0, 20)
    assert torch.equal(view(images[order], index[order]), whole[order])
    assert torch.equal(view(images[7:8], index[7:8]), whole[7:8])
    assert not torch.equal(view(images, index, 5), whole)


def test_cutout_zeroes_a_clipped_square():
    index = torch.arange(50)
    out = Augment(cutout=4).holes(torch.ones(50, 2, 8, 8), 3, 1, index)
    rows, columns = noise(3, 1, index, HOLE_ROW) % 8, noise(3, 1, index, HOLE_COLUMN) % 8
    for i in range(50):
        expected = torch.ones(2, 8, 8)
        top, left = int(rows[i]) - 2, int(columns[i]) - 2
        expected[:, max(0, top) : top + 4, max(0, left) : left + 4] = 0
        assert torch.equal(out[i], expected)


def test_permutation_is_one_and_changes_by_epoch():
    first, second = permutation(1, 0, 1000), permutation(1, 1, 1000)
    for order in (first, second):
        assert torch.equal(order.sort().values, torch.arange(1000))
    assert not torch.equal(first, second) and torch.equal(first, permutation(1, 0, 1000))


def test_resize():
    x = torch.arange(64.0).view(1, 1, 8, 8)
    assert resize(x, None) is x and resize(x, 8) is x
    small = resize(x, 4)
    assert small.shape == (1, 1, 4, 4) and float(small.mean()) == pytest.approx(31.5, abs=1e-4)
    assert resize(torch.full((1, 1, 8, 8), 3.0), 12).allclose(torch.tensor(3.0))


def test_normalise_floats_as_they_are():
    x = torch.full((1, 1, 2, 2), 3.0)
    assert normalise(x, [1.0], [4.0]).tolist() == [[[[0.5, 0.5], [0.5, 0.5]]]]
    assert float(normalise(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), [0.5], [0.25])) == pytest.approx(2.0)


def test_seeded_repeats_and_leaves_the_generators_alone():
    def numbers():
        return torch.rand(1).item(), random.random(), float(np.random.rand())

    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = numbers()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    with seeded(2**62 + 5):
        inside = numbers()
    assert numbers() == expected
    with seeded(2**62 + 5):
        assert numbers() == inside
    assert inside != expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_draws_the_same_numbers_and_pixels():
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    index, augment = torch.arange(20), Augment(2, True)
    assert torch.equal(permutation(1, 2, 500, "cuda").cpu(), permutation(1, 2, 500))
    assert torch.equal(noise(1, 2, index.cuda(), ORDER).cpu(), noise(1, 2, index, ORDER))
    assert torch.equal(augment.pixels(images.cuda(), 1, 2, index.cuda()).cpu(), augment.pixels(images, 1, 2, index))
