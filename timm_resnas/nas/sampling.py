"""Which sub-networks a training step of a supernet trains.

Paper: "Searching for Efficient Multi-Stage Vision Transformers" - https://arxiv.org/abs/2109.00642, section 3.3
(multi-architectural sampling, progressive warm-up). The released code repeats one set of masks for a whole epoch where
nothing else draws from the generator; here each step has its own draws, and they are a function of their arguments
alone, so that any process can name any other's architectures and a resumed run draws what an unbroken one would.
"""

import numpy as np

from ..arch import Arch
from .space import SearchSpace

__all__ = ["MultiArchSampler", "SandwichSampler"]


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
