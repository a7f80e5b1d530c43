"""Every source of randomness of a run: a function of the run's seed, a stream, and counters."""

from enum import IntEnum

import numpy as np

__all__ = ["Stream", "generator", "step_seed"]


class Stream(IntEnum):
    """What draws; the numbers decide histories and never change. The two mechanisms below share no draws."""

    WEIGHTS = 1  # initial weights (`step_seed`)
    REFERENCES = 2  # networks that a supernet's training is watched by (`generator`)
    DROP_PATH = 3  # inside a step (`step_seed`)
    MIX = 4  # of token labels inside a step (`step_seed`)
    BASELINES = 4  # random networks that a search is compared with (`generator`)
    CALIBRATION = 5  # images that units are ranked by (`generator`)


def step_seed(*numbers: int) -> int:
    """A seed that is a function of its numbers, for what draws from global generators inside a step."""
    value = 0x9E3779B97F4A7C15
    for n in numbers:
        value = ((value ^ (n + 0x7F4A7C15)) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % (1 << 64)
    return value >> 1


def generator(seed: int, stream: Stream) -> np.random.Generator:
    """NumPy's generator of a stream."""
    return np.random.default_rng([seed, int(stream)])
