import itertools
from collections import Counter

import numpy as np
import pytest
import timm
import torch

from timm_resnas.nas.proxies import proxy_scores
from timm_resnas.nas.sampling import MultiArchSampler, SandwichSampler, SelectedSampler
from timm_resnas.nas.space import SearchSpace


@pytest.fixture(scope="module")
def space():
    return SearchSpace.preset("vit_resnas_tiny")


@pytest.mark.parametrize("num_archs", [1, 2, 4, 16])
@pytest.mark.parametrize("epoch", [0, 9, 20, 30, 100])
def test_counts_of_open_entries_differ_by_at_most_one(space, num_archs, epoch):
    sampler = MultiArchSampler(space, num_archs, seed=3)
    for step in range(20):
        picks = sampler.picks(epoch, step)
        for column, gene in zip(picks.T, space.searched, strict=True):
            n = sampler.num_open(len(gene.draws), epoch)
            counts = np.bincount(column, minlength=n)
            assert len(counts) == n and counts.max() - counts.min() <= 1


def test_warm_up_opens_entries_as_the_paper_does(space):
    sampler = MultiArchSampler(space, 4, warmup_epochs=30)

    def opening(n):
        return [next(e for e in range(31) if sampler.num_open(n, e) >= k) for k in range(2, n + 1)]

    assert opening(7) == [5, 10, 15, 20, 25, 30]
    assert opening(5) == [8, 15, 23, 30]
    assert opening(4) == [10, 20, 30]
    assert opening(3) == [15, 30]
    assert all(a == space.largest for a in sampler.archs(0, 7))
    assert MultiArchSampler(space, 4, warmup_epochs=0).num_open(7, 0) == 7


def test_every_rank_can_name_every_other(space):
    sampler = MultiArchSampler(space, 16, seed=1, warmup_epochs=0)
    whole = sampler.archs(2, 5)
    for world in (2, 4, 16):
        again = MultiArchSampler(space, 16, seed=1, warmup_epochs=0)
        dealt = [a for rank in range(world) for a in again.archs(2, 5, rank, world)]
        assert dealt == whole
    with pytest.raises(ValueError, match="evenly to 3 processes"):
        sampler.archs(0, 0, 0, 3)


def test_draws_change_with_step_epoch_and_seed(space):
    sampler = MultiArchSampler(space, 4, seed=1, warmup_epochs=0)
    seen = {tuple(map(str, sampler.archs(e, s))) for e in range(4) for s in range(50)}
    assert len(seen) == 200
    other = MultiArchSampler(space, 4, seed=2, warmup_epochs=0)
    assert other.archs(0, 0) != sampler.archs(0, 0)


def test_layers_are_independent_and_uniform(space):
    """Chi-square of one group's draws: each layer alone, and pairs of layers jointly."""
    sampler = MultiArchSampler(space, 4, seed=5, warmup_epochs=0)
    picks = np.stack([sampler.picks(0, step)[0] for step in range(4000)])
    sizes = [len(gene.draws) for gene in space.searched]
    for a, b in [(0, 1), (1, 2), (2, 3), (3, 8), (10, 40)]:
        joint = Counter(zip(picks[:, a], picks[:, b], strict=True))
        cells = sizes[a] * sizes[b]
        expected = len(picks) / cells
        chi2 = sum((joint[i, j] - expected) ** 2 / expected for i in range(sizes[a]) for j in range(sizes[b]))
        # mean cells - 1, standard deviation sqrt(2 (cells - 1)); five of those never happen by chance
        assert abs(chi2 - (cells - 1)) < 5 * np.sqrt(2 * (cells - 1))


def test_removable_blocks_are_absent_half_the_time(space):
    sampler = MultiArchSampler(space, 4, warmup_epochs=0)
    for step in range(10):
        for stage in range(3):
            for block in (1, 3, 5):
                present = [a.stages[stage][block].exists for a in sampler.archs(0, step)]
                assert sum(present) == 2


def test_bad_arguments(space):
    with pytest.raises(ValueError, match="num_archs"):
        MultiArchSampler(space, 0)
    with pytest.raises(ValueError, match="warmup_epochs"):
        MultiArchSampler(space, 4, warmup_epochs=-1)


def test_counts_hold_over_all_processes_together(space):
    sampler = MultiArchSampler(space, 8, seed=4, warmup_epochs=0)
    dealt = [a for rank in range(4) for a in sampler.archs(0, 3, rank, 4)]
    columns = [i for i, gene in enumerate(space.searched) if gene.name == "mlp_hidden"]
    for i, block in enumerate(space.largest.blocks):
        if hasattr(block, "mlp_hidden"):
            counts = Counter(sampler.picks(0, 3)[:, columns.pop(0)].tolist())
            hidden = Counter(a.blocks[i].mlp_hidden for a in dealt if a.blocks[i].exists)
            assert max(counts.values()) - min(counts.values()) <= 1 and len(counts) == 7
            assert max(hidden.values()) <= 2


@pytest.mark.parametrize("epoch", [0, 12, 30])
def test_sandwich(space, epoch):
    sampler = SandwichSampler(space, 6, seed=3)
    inner = [len(gene.draws) for gene in space.searched]
    for step in range(10):
        archs = sampler.archs(epoch, step)
        picks = sampler.picks(epoch, step)
        assert archs[0] == space.largest and not picks[0].any()
        assert picks[1].tolist() == [sampler.num_open(n, epoch) - 1 for n in inner]
        assert (picks <= picks[1]).all()
        for column, n in zip(picks[2:].T, picks[1] + 1, strict=True):
            counts = np.bincount(column, minlength=n)
            assert counts.max() - counts.min() <= 1
    if epoch == 30:
        assert archs[1] == space.smallest
        assert {tuple(map(str, sampler.archs(30, s)[2:])) for s in range(20)}.__len__() == 20
    else:
        assert archs[1] != space.smallest


def test_sandwich_is_dealt_to_processes(space):
    sampler = SandwichSampler(space, 4, seed=1, warmup_epochs=0)
    assert [a for rank in (0, 1) for a in sampler.archs(2, 5, rank, 2)] == sampler.archs(2, 5)
    two = SandwichSampler(space, 2, warmup_epochs=0).archs(0, 0)
    assert two == [space.largest, space.smallest]
    with pytest.raises(ValueError, match="num_archs 1 is under 2"):
        SandwichSampler(space, 1)
    with pytest.raises(ValueError, match="warmup_epochs"):
        SandwichSampler(space, 4, warmup_epochs=-1)


def test_few_selected_architectures_of_all_sizes():
    """Of each bin of sizes those of highest SynFlow; a step has one of each part that is open."""
    space = SearchSpace.preset("autoformer_micro")

    class Few(SelectedSampler):
        BINS, DRAWN, KEPT = 4, 6, 2

    sampler = Few(space, 4, seed=1, warmup_epochs=4)
    random = torch.get_rng_state()
    macs = [[space.costs(arch)["macs"] for arch in part] for part in sampler.pool]
    assert torch.equal(torch.get_rng_state(), random)
    assert [len(part) for part in macs] == [2] * 4
    assert all(min(a) >= max(b) for a, b in itertools.pairwise(macs))
    # by hand: all that were drawn, in each bin by score
    drawn = space.sample_many(24, np.random.default_rng([1, 77]))
    torch.manual_seed(1)
    net = timm.create_model(space.supernet, space=space.to_dict()).eval()
    by_size = sorted(drawn, key=lambda arch: -space.costs(arch)["macs"])
    for part, start in zip(sampler.pool, range(0, 24, 6), strict=True):
        scores = {
            arch.key(): proxy_scores(["synflow"], net, arch, torch.ones(1, 3, 32, 32))["synflow"]
            for arch in by_size[start : start + 6]
        }
        assert [arch.key() for arch in part] == sorted(scores, key=scores.get, reverse=True)[:2]

    def bins(epoch, step):
        return [next(b for b, part in enumerate(sampler.pool) if arch in part) for arch in sampler.archs(epoch, step)]

    assert sampler.archs(0, 3) == [space.largest] * 4
    assert all(set(bins(1, step)) == {0} for step in range(9))
    assert all(set(bins(2, step)) <= {0, 1} for step in range(9))
    assert all(bins(4, step) == [0, 1, 2, 3] == bins(9, step) for step in range(9))
    assert len({tuple(a.key() for a in sampler.archs(4, step)) for step in range(30)}) > 8
    # a function of its arguments, dealt to processes in slices
    again = Few(space, 4, seed=1, warmup_epochs=4)
    assert again.archs(4, 2, 1, 2) == sampler.archs(4, 2)[2:] and again.archs(0, 0, 0, 2) == [space.largest] * 2
    assert Few(space, 4, seed=2, warmup_epochs=4).pool != sampler.pool
    with pytest.raises(ValueError, match="cannot be dealt evenly to 3 processes"):
        sampler.archs(1, 0, 0, 3)
