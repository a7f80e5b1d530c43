"""Token-level mixing: its distribution, and targets that say what the pixels show."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from timm_resnas.data import MixedBatch, TokenMix
from timm_resnas.data.mix import draw_boxes

DRAWS = 20_000


def boxes(grid, count=DRAWS, seed=0, **options):
    """(top, left, height, width) of many draws."""
    return draw_boxes(np.random.RandomState(seed).random_sample((count, 4)), grid, **options)


def distribution(rows, columns):
    """Exact probability of each box size, drawn out step by step."""
    cells, chances = rows * columns, Counter()
    for area in range(cells):
        heights = range(1, max(1, min(rows, area) - 2) + 1)
        for height in heights:
            width = area // height
            size = (height, width) if width <= columns else (area // columns, columns)
            chances[size] += Fraction(1, cells * len(heights))
    return chances


def within_error(found, chances, count=DRAWS):
    """Whether counts agree with probabilities, to 5 standard deviations."""
    assert set(found) <= {k for k, p in chances.items() if p}
    for key, p in chances.items():
        p = float(p)
        assert abs(found[key] / count - p) <= 5 * (p * (1 - p) / count) ** 0.5, (key, found[key] / count, p)


def constant(values, size):
    """Images [B, 2, H, W], each of one colour: its value, and that plus 100."""
    values = torch.as_tensor(values, dtype=torch.float32)
    return torch.stack([values, values + 100], dim=1)[:, :, None, None].expand(-1, -1, *size).contiguous()


# -- boxes --------------------------------------------------------------------------------------------------------


def test_sizes_of_the_paper():
    """Shares of box sizes on the 4 x 4 grid, as measured on the released code over 20,000 draws."""
    measured = {(3, 4): 0.252, (2, 4): 0.244, (1, 4): 0.119, (1, 1): 0.066, (1, 3): 0.066, (2, 2): 0.065}
    measured.update({(1, 2): 0.064, (1, 0): 0.062, (2, 3): 0.061})
    found = Counter(map(tuple, boxes((4, 4))[:, 2:].tolist()))
    assert found.keys() == measured.keys()
    for size, share in measured.items():
        # both are samples
        assert found[size] / DRAWS == pytest.approx(share, abs=5 * (2 * share * (1 - share) / DRAWS) ** 0.5), size
    area = boxes((4, 4))[:, 2:].prod(axis=1)
    assert (1 - area / 16).mean() == pytest.approx(0.595, abs=0.01) and area.max() == 12
    within_error(found, distribution(4, 4))


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 1), (2, 2), (3, 7), (7, 3), (7, 7)])
def test_sizes_of_other_grids(grid):
    found = boxes(grid)
    within_error(Counter(map(tuple, found[:, 2:].tolist())), distribution(*grid))
    assert (found >= 0).all() and (found[:, :2] + found[:, 2:] <= grid).all()
    assert found[:, 2:].prod(axis=1).max() < max(2, np.prod(grid))


@pytest.mark.parametrize("fix_edges", [False, True])
def test_places_are_equally_likely(fix_edges):
    found = boxes((4, 6), fix_edges=fix_edges)
    np.testing.assert_array_equal(found[:, 2:], boxes((4, 6))[:, 2:])
    for axis, side in ((0, 4), (1, 6)):
        for length in range(side + 1):
            starts = Counter(found[found[:, 2 + axis] == length, axis].tolist())
            last = side - length if fix_edges or length == side else side - length - 1
            count = sum(starts.values())
            if count:
                within_error(starts, {k: Fraction(1, last + 1) for k in range(last + 1)}, count)


def test_edges():
    """Not fixed, the last row and column are never reached; fixed, as often as the first."""
    found = boxes((4, 4))
    free = found[(found[:, 2] < 4) & (found[:, 3] < 4) & (found[:, 3] > 0)]
    assert (free[:, :2] + free[:, 2:]).max() == 3
    fixed = boxes((4, 4), fix_edges=True)
    fixed = fixed[(fixed[:, 2] < 4) & (fixed[:, 3] < 4) & (fixed[:, 3] > 0)]
    for axis in (0, 1):
        touched = [(fixed[:, axis] == 0).mean(), (fixed[:, axis] + fixed[:, 2 + axis] == 4).mean()]
        assert touched[0] == pytest.approx(touched[1], abs=5 * (0.5 / len(fixed)) ** 0.5) and touched[1] > 0.25


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fix_edges", [False, True])
@pytest.mark.parametrize(("grid", "size"), [(4, (8, 8)), ((3, 5), (9, 10)), ((1, 2), (4, 4))])
@pytest.mark.parametrize(("batch", "groups"), [(1, 1), (2, 1), (7, 1), (8, 1), (12, 3), (9, 3), (4, 4)])
def test_pixels_agree_with_targets(grid, size, batch, groups, fix_edges):
    """Image i has class i and colour i: the colour of each cell says what its target must be."""
    mix = TokenMix(batch, grid, fix_edges=fix_edges)
    rows, columns = mix.grid_size
    images, labels = constant(range(batch), size), torch.arange(batch)
    each, seen = batch // groups, Counter()
    off, on = 0.1 / batch, 0.9 + 0.1 / batch
    for seed in range(8):
        out = mix(images, labels, seed, groups=groups)
        assert isinstance(out, MixedBatch)
        assert out.images.shape == images.shape and out.patch_targets.shape == (batch, rows * columns, batch)
        for targets in out[1:]:
            torch.testing.assert_close(targets.sum(dim=-1), torch.ones(targets.shape[:-1]), rtol=0, atol=1e-6)
        cells = out.images.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        cells = cells.flatten(1, 2)  # [B, N, channels x pixels of a cell]
        half = cells.shape[-1] // 2
        assert (cells[..., :1] == cells[..., :half]).all()  # a cell has one colour
        torch.testing.assert_close(cells[..., half:], cells[..., :half] + 100)
        colour, boxed = cells[..., 0], None
        for i in range(batch):
            if i % each < each // 2:  # CutMix: all of each cell is of one image, the class is the cells' mean
                shown = torch.nn.functional.one_hot(colour[i].long(), batch) * (on - off) + off
                torch.testing.assert_close(out.patch_targets[i], shown)
                torch.testing.assert_close(out.targets[i], shown.mean(dim=0))
                others = colour[i] != i
                if others.any():  # the box is the same in all images
                    boxed = others if boxed is None else boxed
                    assert torch.equal(others, boxed)
                    assert len(colour[i][others].unique()) == 1
                seen["cut"] += bool(others.any())
            else:  # Mixup: the mean colour is the mean class
                classes = (out.targets[i] - off) / (on - off)
                assert (classes > 1e-6).sum() <= 2 and classes[i] > 0
                torch.testing.assert_close(colour[i], (classes @ torch.arange(batch).float()).expand(rows * columns))
                torch.testing.assert_close(out.patch_targets[i], out.targets[i].expand(rows * columns, -1))
                seen["mixed"] += bool(classes[i] < 1 - 1e-6)
    assert seen["mixed"] > 0 or batch <= 2
    assert seen["cut"] > 0 or each <= 3
    assert torch.equal(images, constant(range(batch), size))  # the caller's images are left alone


def test_partners_of_a_half_are_a_permutation_over_all_groups():
    mix, first, pairs = TokenMix(8, 4), [0, 1, 4, 5], set()
    images = constant(range(8), (4, 4))
    for seed in range(100):
        out = mix(images, torch.arange(8), seed, groups=2)
        cut = out.images[first, 0].flatten(1).long().tolist()
        taken = [(own, other) for own, row in zip(first, cut, strict=True) for other in set(row) - {own}]
        assert len({other for _, other in taken}) == len(taken)  # nobody is taken twice
        pairs.update(taken)
    assert pairs == {(a, b) for a in first for b in first if a != b}  # any of all groups, none of Mixup's half


def test_mixup_shares_are_beta():
    """Mean and variance of Beta(0.8, 0.8); one share for the half."""
    mix, shares = TokenMix(2, 1, smoothing=0), []
    images, labels = constant([0, 1], (1, 1)).repeat(2, 1, 1, 1), torch.tensor([0, 1, 0, 1])
    for seed in range(2000):
        out = mix(images, labels, seed)
        own = out.images[2, 0, 0, 0].item()
        if 0 < own:  # its partner is the other
            shares.append(own)
            assert out.images[3, 0, 0, 0].item() == pytest.approx(1 - own, abs=1e-6)
    assert 850 < len(shares) < 1150
    assert np.mean(shares) == pytest.approx(0.5, abs=5 * (1 / 4 / 2.6 / len(shares)) ** 0.5)
    assert np.var(shares) == pytest.approx(1 / 4 / 2.6, rel=0.1)  # 1 / (4 (2 alpha + 1))


def test_a_function_of_its_arguments_alone():
    mix = TokenMix(5, 2, smoothing=0.2)
    images, labels = torch.randn(6, 3, 4, 4), torch.randint(5, (6,))
    seed = (1 << 62) + 7
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = mix(images, labels, seed)
    torch.manual_seed(99)
    np.random.seed(99)
    second = mix(images.clone(), labels, seed)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    others = [mix(images, labels, s).images for s in (7, seed + 1, seed + (1 << 32))]
    assert all(not torch.equal(first.images, other) for other in others)
    torch.set_rng_state(state[0])
    mix(images, labels, 3)
    assert torch.equal(torch.get_rng_state(), state[0])


def test_memory_format_and_dtype_of_images_stay():
    images = torch.randn(4, 3, 8, 8, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    out = TokenMix(3, 2)(images, torch.tensor([0, 1, 2, 0]), 0)
    assert out.images.dtype == torch.bfloat16 and out.images.is_contiguous(memory_format=torch.channels_last)
    assert out.targets.dtype == out.patch_targets.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(grid_size=0), "grid_size must be a side.*got 0"),
        (dict(grid_size=(2, 2, 2)), "grid_size must be a side"),
        (dict(num_classes=0), "num_classes must be at least 1"),
        (dict(smoothing=1.0), r"smoothing must lie in \[0, 1\)"),
        (dict(mixup_alpha=0.0), "mixup_alpha must be above 0"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        TokenMix(**dict(dict(num_classes=3, grid_size=2), **options))


@pytest.mark.parametrize(
    ("images", "labels", "groups", "message"),
    [
        (torch.zeros(2, 3, 8, 7), torch.tensor([0, 1]), 1, "images of 8x7 cannot be cut into 2x2 equal cells"),
        (torch.zeros(3, 3, 8, 8), torch.tensor([0, 1, 2]), 2, "3 images cannot be cut into 2 equal groups"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), 1, "normalised floats, got torch.uint8"),
        (
            torch.zeros(2, 3, 8, 8),
            torch.zeros(2, 3),
            1,
            r"2 class numbers \(int64\), got torch.float32",
        ),
    ],
)
def test_batches_that_do_not_fit(images, labels, groups, message):
    with pytest.raises(ValueError, match=message):
        TokenMix(3, 2)(images, labels, 0, groups=groups)
