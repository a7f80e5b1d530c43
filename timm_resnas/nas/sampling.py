"""Which sub-networks a training step of a supernet trains.

Paper: "Searching for Efficient Multi-Stage Vision Transformers" - https://arxiv.org/abs/2109.00642, section 3.3
(multi-architectural sampling, progressive warm-up). The released code repeats one set of masks for a whole epoch where
nothing else draws from the generator; here each step has its own draws, and they are a function of their arguments
alone, so that any process can name any other's architectures and a resumed run draws what an unbroken one would.
"""

import functools

import numpy as np
import timm
import torch

from ..arch import Arch
from .proxies import proxy_scores
from .space import SearchSpace

__all__ = ["MultiArchSampler", "SandwichSampler", "SelectedSampler"]


class MultiArchSampler:
    """Balanced independent draws per gene, over the groups of all processes.

    With N groups and n entries open in a gene, each entry is drawn floor(N / n) times, the rest is a random subset,
    and the order is random, independently for each gene. Which entries are open grows from the largest only to all:
    ``clamp(1 + floor(epoch * (n - 1) / warmup_epochs), 1, n)``. An entry's multiplicity counts: ``[C, C, 0, 0]`` is
    four entries.

    Args:
        space: The search space.
        num_archs: Sub-networks per step, over all processes.
        seed: Seed of the draws.
        warmup_epochs: Epochs until every entry is open (the paper's 30); 0 opens all at once.

    Raises:
        ValueError: ``num_archs`` is not positive or ``warmup_epochs`` is negative.
    """

    def __init__(self, space: SearchSpace, num_archs: int, seed: int = 0, warmup_epochs: int = 30) -> None:
        if num_archs < 1:
            raise ValueError(f"num_archs must be at least 1, got {num_archs}")
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must not be negative, got {warmup_epochs}")
        self.space = space
        self.num_archs = num_archs
        self.seed = seed
        self.warmup_epochs = warmup_epochs

    def num_open(self, num_entries: int, epoch: int) -> int:
        """How many of a gene's entries, largest first, are open in an epoch."""
        if self.warmup_epochs == 0:
            return num_entries
        return min(max(1 + epoch * (num_entries - 1) // self.warmup_epochs, 1), num_entries)

    def archs(self, epoch: int, step: int, rank: int = 0, world: int = 1) -> list[Arch]:
        """The architectures of process ``rank`` in a step: its slice of the step's ``num_archs``.

        Raises:
            ValueError: The groups cannot be dealt evenly to the processes.
        """
        if self.num_archs % world:
            raise ValueError(f"{self.num_archs} architectures per step cannot be dealt evenly to {world} processes")
        share = self.num_archs // world
        return self.space.build(self.picks(epoch, step))[rank * share : (rank + 1) * share]

    def picks(self, epoch: int, step: int) -> np.ndarray:
        """Index into ``draws`` of each gene of ``space.searched`` for each group, [num_archs, num_genes]."""
        return self._balanced(epoch, step, self.num_archs)

    def _balanced(self, epoch: int, step: int, num_archs: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch, step])
        picks = np.empty((num_archs, len(self.space.searched)), np.int64)
        for i, gene in enumerate(self.space.searched):
            n = self.num_open(len(gene.draws), epoch)
            even = np.repeat(np.arange(n), num_archs // n)
            rest = rng.permutation(n)[: num_archs % n]
            picks[:, i] = rng.permutation(np.concatenate([even, rest]))
        return picks


class SandwichSampler(MultiArchSampler):
    """The sandwich rule: the largest network, the smallest of what is open, and balanced draws.

    Paper: "Universally Slimmable Networks and Improved Training Techniques" - https://arxiv.org/abs/1903.05134

    Args:
        space: As for `MultiArchSampler`, like the others.
        num_archs: At least 2: the first group's network is the largest, the second's the smallest.
        seed: Seed of the draws.
        warmup_epochs: Epochs until every entry is open.

    Raises:
        ValueError: ``num_archs`` is less than 2 or ``warmup_epochs`` is negative.
    """

    def __init__(self, space: SearchSpace, num_archs: int, seed: int = 0, warmup_epochs: int = 30) -> None:
        if num_archs < 2:
            raise ValueError(f"the sandwich rule trains the largest and the smallest: num_archs {num_archs} is under 2")
        super().__init__(space, num_archs, seed, warmup_epochs)

    def picks(self, epoch: int, step: int) -> np.ndarray:
        """See `MultiArchSampler.picks`."""
        largest = np.zeros(len(self.space.searched), np.int64)
        smallest = [self.num_open(len(gene.draws), epoch) - 1 for gene in self.space.searched]
        return np.vstack([largest, smallest, self._balanced(epoch, step, self.num_archs - 2)])


class SelectedSampler(MultiArchSampler):
    """Draws among few architectures that look good untrained, of all sizes, in place of all architectures.

    The idea of PreNAS (Wang et al., "PreNAS: Preferred One-Shot Learning Towards Efficient Neural Architecture Search",
    ICML 2023), simplified: random architectures are sorted by MACs and cut into `BINS` bins of `DRAWN`;
    in each the `KEPT` of highest SynFlow are kept, by the untrained weights of a supernet that the seed makes.
    The groups of a step are drawn from as many equal parts of the bins, so that every step has small and large ones.
    At first the largest network is trained alone; then bins open, the largest networks' first.

    Args:
        space: As for `MultiArchSampler`, like the others.
        num_archs: Sub-networks per step, over all processes.
        seed: Seed of the selection and of the draws.
        warmup_epochs: Epochs until every bin is open.

    Raises:
        ValueError: See `MultiArchSampler`.
    """

    BINS, DRAWN, KEPT = 16, 24, 4

    @functools.cached_property
    def pool(self) -> list[list[Arch]]:
        """The architectures of each bin, best first; the largest networks' bin is the first. Made when first needed."""
        archs = self.space.sample_many(self.BINS * self.DRAWN, np.random.default_rng([self.seed, 77]))
        order = np.argsort(-self.space.table("macs").cost(self.space.rows(archs)), kind="stable")
        args = self.space.model_args
        images = torch.zeros(1, args["in_chans"], *args["img_size"])  # their shape counts
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            net = timm.create_model(self.space.supernet, space=self.space.to_dict()).eval()
        bins = []
        for part in np.split(order, self.BINS):
            scores = [proxy_scores(["synflow"], net, archs[i], images)["synflow"] for i in part]
            bins.append([archs[part[i]] for i in np.argsort(-np.array(scores), kind="stable")[: self.KEPT]])
        return bins

    def archs(self, epoch: int, step: int, rank: int = 0, world: int = 1) -> list[Arch]:
        """See `MultiArchSampler.archs`."""
        if self.num_archs % world:
            raise ValueError(f"{self.num_archs} architectures per step cannot be dealt evenly to {world} processes")
        share = self.num_archs // world
        if self.warmup_epochs and epoch == 0:
            return [self.space.largest] * share
        rng = np.random.default_rng([self.seed, epoch, step])
        places = (np.arange(self.num_archs) + rng.random(self.num_archs)) / self.num_archs  # one in each part
        bins = (places * self.num_open(self.BINS, epoch)).astype(int)
        chosen = [self.pool[b][rng.integers(self.KEPT)] for b in bins]
        return chosen[rank * share : (rank + 1) * share]
