"""Scoring candidates on a fixed set of images: how many each sub-network classifies correctly, or a finer score.

Scores are integers, cached by `Arch.key`, and a function of weights and images alone, so that a search has the same
history on any number of processes. Every score is appended at once to a file of its process; a killed search that is
started again computes none of them twice. Processes take the next candidates from a common counter, so that a slow one
holds none up.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from ..arch import Arch
from .jsonl import append_jsonl, read_jsonl
from .supernet import Supernet

__all__ = ["SCORES", "Evaluator", "below", "count_correct", "in_answers", "score_unit"]

# Room for what all sub-networks compute alike (`Supernet.shared`), over the whole evaluation set.
SHARED_CACHE_BYTES = 512 << 20
# Where it does not fit: candidates that share a pass over the images, and with it decoding and the shared part.
TOGETHER = 8
# One of a finer score: it is a sum of fixed-point numbers, so that it is the same however images are dealt out.
FIXED_POINT = 1 << 16
LEAST_LOG = -20.0  # of a probability, so that no image decides alone
# Pre-screening stops a candidate whose estimate stays this many standard errors below what the parents need.
PRESCREEN_ERRORS = 2.0


@torch.inference_mode()
def count_correct(model: Callable[[torch.Tensor], torch.Tensor], batches: Iterable) -> tuple[int, int]:
    """(correct answers, images) of a classifier over batches of (images, labels)."""
    correct, images = 0, 0
    for x, y in batches:
        correct = correct + (model(x).argmax(dim=-1) == y).sum()  # stays on the device: no wait per batch
        images += len(y)
    return int(correct), images


def _correct(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.argmax(dim=-1) == labels


def _likelihood(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logs = logits.double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    return (logs.clamp_min(LEAST_LOG) * FIXED_POINT).round().long()


def _agreement(logits: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    full, logs = full.double().log_softmax(-1), logits.double().log_softmax(-1)
    divergence = (full.exp() * (full - logs)).sum(-1)
    return (divergence.clamp_max(-LEAST_LOG) * -FIXED_POINT).round().long()


def _cosine(outputs: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    nearness = torch.cosine_similarity(outputs.double(), full.double(), dim=-1)
    return ((nearness - 1) * FIXED_POINT).round().long()


# Score of each image, an integer, from a sub-network's logits and the label, or the full network's logits
SCORES = {"accuracy": _correct, "likelihood": _likelihood, "agreement": _agreement, "cosine": _cosine}


def in_answers(record: dict[str, Any]) -> dict[str, Any]:
    """A record of a finer score with correct answers as its ``score``, for tables and pictures; others as they are."""
    return {**record, "score": record["correct"], "ranked_by": record["score"]} if "correct" in record else record


def score_unit(score: str) -> int:
    """What an image's score is divided by: 1 for a correct answer, 65,536 for nats."""
    return 1 if score == "accuracy" else FIXED_POINT


class Evaluator:
    """Scores sub-networks of a supernet on fixed batches.

    Args:
        net: The supernet, on the device of the batches; it is put in eval mode.
        batches: Re-iterable (images, labels), the same at every pass.
        prescreen: More batches, disjoint from ``batches``, that are scored first: see `score`.
        folder: Where score files are kept; None keeps scores in memory only.
        fingerprint: Names the weights and images that the scores belong to; scores under another name are left alone.
        rank: This process.
        world: Number of processes.
        gather: Joins the processes' lists, called once here and once per `score`; needed when ``world`` > 1.
        next_index: An atomic counter that all processes share: the number of earlier calls with this name. Needed when
            ``world`` > 1.
        dtype: Run the network under autocast to this type.
        score: ``"accuracy"``: correct answers; ``"likelihood"``: logarithm of the label's probability;
            ``"agreement"``: the negative Kullback-Leibler divergence from the full network's probabilities, which needs
            no labels; ``"cosine"``: the same of networks without a classifier, cosine with the full one's outputs, less
            1. All but the first in units of `score_unit` and at most 0; their records have ``correct`` as well.

    Attributes:
        num_computed: Candidates that this process has scored itself.

    Raises:
        ValueError: Several processes without ``gather`` and ``next_index``; a score file that is damaged.
    """

    def __init__(
        self,
        net: Supernet,
        batches: Iterable,
        *,
        prescreen: Iterable | None = None,
        folder: str | Path | None = None,
        fingerprint: str = "",
        rank: int = 0,
        world: int = 1,
        gather: Callable[[list], list] | None = None,
        next_index: Callable[[str], int] | None = None,
        dtype: torch.dtype | None = None,
        score: str = "accuracy",
    ) -> None:
        if prescreen is not None and score != "accuracy":
            raise ValueError("pre-screening estimates correct answers; it needs the score accuracy")
        if world > 1 and (gather is None or next_index is None):
            raise ValueError(
                "several processes need to join their scores and to share a counter; pass gather and next_index"
            )
        self.net = net.eval()
        self.parts = [batches] if prescreen is None else [prescreen, batches]
        self.rank, self.world = rank, world
        self.gather, self.next_index = cast(Callable, gather), cast(Callable, next_index)  # called where world > 1
        self.dtype = dtype
        self.measure, self.fine = SCORES[score], score != "accuracy"
        self._full: list[torch.Tensor] = []  # see _full_logits
        self._needs_full = score in ("agreement", "cosine")
        self.fingerprint = fingerprint if score == "accuracy" else f"{fingerprint} {score}"
        self.num_computed = 0
        self._sizes: list[int] | None = None  # images of each part
        self._records: dict[str, dict[str, Any]] = {}
        self._stopped: dict[str, dict[str, Any]] = {}  # by pre-screening
        self._shared: list[list[tuple[torch.Tensor, torch.Tensor]]] | None = None
        self._rounds = 0
        self._file: Path | None = None
        known: list[dict[str, Any]] = []
        if folder is not None:
            folder = Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self._file = folder / f"scores-{rank}.jsonl"
            read_jsonl(self._file, mend=True)
            for file in sorted(folder.glob("scores-*.jsonl")):
                known += [_checked(r, file) for r in read_jsonl(file) if r.get("fingerprint") == self.fingerprint]
        # processes may see different files (a disk each), but must agree on what is left to score
        self._remember(known if world == 1 else self.gather(known))

    def score(
        self, archs: Sequence[Arch], report: Callable[[int], None] | None = None, at_least: int | None = None
    ) -> list[int]:
        """Correct answers of each architecture; every process must call it with the same arguments.

        With ``at_least`` and ``prescreen``, a candidate is scored on those images alone when their share of correct
        answers, carried over to all images, stays two standard errors below ``at_least``. Its score is that estimate,
        always below ``at_least``; its record has ``prescreened``, the number of images seen.

        Args:
            archs: Candidates.
            report: Called with the number of candidates that this process has scored, after each pass.
            at_least: The score that a candidate must reach to be of use; None scores all images.
        """
        at_least = at_least if len(self.parts) > 1 else None
        known = self._records if at_least is None else {**self._records, **self._stopped}
        todo = {arch.key(): arch for arch in archs if arch.key() not in known}
        # the most expensive first: processes then finish together
        args = self.net.space.model_args  # a sub-network need not be of the supernet's own space
        queue = sorted(todo.values(), key=lambda a: (-a.costs(**args)["macs"], a.key()))
        mine: list[dict[str, Any]] = []
        for chunk in self._chunks(queue):
            start = time.perf_counter()
            records = self._count(chunk, at_least)
            seconds = round((time.perf_counter() - start) / len(chunk), 6)
            records = [{**r, "fingerprint": self.fingerprint, "seconds": seconds} for r in records]
            mine += records
            self.num_computed += len(chunk)
            if self._file is not None:
                append_jsonl(self._file, records)
            if report is not None:
                report(len(mine))
        self._remember(mine if self.world == 1 else self.gather(mine))
        return [self.record(arch, at_least is not None)["score"] for arch in archs]

    def record(self, arch: Arch, prescreened: bool = False) -> dict[str, Any]:
        """What is known of a scored architecture: ``score``, ``seconds`` and, if it was stopped, ``prescreened``."""
        key = arch.key()
        return self._stopped[key] if prescreened and key in self._stopped else self._records[key]

    def _chunks(self, queue: list[Arch]) -> Iterator[list[Arch]]:
        """Candidates for this process to score, those together that share a pass over the images."""
        if queue and self._shared is None:
            self._cache_shared()
        size = 1 if self._shared else max(1, min(TOGETHER, len(queue) // self.world))
        self._rounds += 1
        number = 0
        while True:
            begin = size * (number if self.world == 1 else self.next_index(f"round {self._rounds}"))
            if begin >= len(queue):
                return
            yield queue[begin : begin + size]
            number += 1

    def _remember(self, records: Iterable[dict[str, Any]]) -> None:
        for record in records:
            (self._stopped if "prescreened" in record else self._records).setdefault(record["key"], record)

    @torch.inference_mode()
    def _count(self, archs: list[Arch], at_least: int | None) -> list[dict[str, Any]]:
        """Score records of architectures that share each pass over the images."""
        net, previous = self.net, self.net.active
        totals, correct = [0] * len(archs), [0] * len(archs)
        stopped: dict[int, int] = {}
        try:
            with self._autocast():
                seen = 0
                for part in range(len(self.parts)):
                    left = [i for i in range(len(archs)) if i not in stopped]
                    counts: dict[int, Any] = dict.fromkeys(left, 0)
                    right: dict[int, Any] = dict.fromkeys(left, 0)
                    images = 0
                    for batch, (shared, labels) in enumerate(self._batches(part) if left else ()):
                        images += len(labels)
                        targets = self._full_logits(batch, shared) if self._needs_full else labels
                        for i in left:
                            net.set_arch(archs[i])
                            logits = net.forward_shared(shared)
                            counts[i] = counts[i] + self.measure(logits, targets).sum()
                            if self.fine:
                                right[i] = right[i] + _correct(logits, labels).sum()
                    seen += images
                    for i in left:
                        totals[i] += int(counts[i])
                        correct[i] += int(right[i])
                    if at_least is not None and part == 0:
                        total = sum(self._part_sizes())
                        stopped = {
                            i: estimate
                            for i in left
                            if (estimate := below(totals[i], seen, total, at_least)) is not None
                        }
        finally:
            net.set_arch(previous)
        seen = self._part_sizes()[0] if stopped else 0
        return [
            {"key": a.key(), "score": stopped[i], "prescreened": seen}
            if i in stopped
            else {"key": a.key(), "score": totals[i], **({"correct": correct[i]} if self.fine else {})}
            for i, a in enumerate(archs)
        ]

    def _full_logits(self, batch: int, shared: torch.Tensor) -> torch.Tensor:
        """Of the full network on a batch of the only part, kept once computed."""
        if batch == len(self._full):
            self.net.set_arch(None)
            self._full.append(self.net.forward_shared(shared).clone())
        return self._full[batch]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(next(self.net.parameters()).device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def _part_sizes(self) -> list[int]:
        if self._sizes is None:
            self._sizes = [sum(len(y) for _, y in part) for part in self.parts]
        return self._sizes

    def _batches(self, part: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        if self._shared:
            return self._shared[part]
        return ((self.net.shared(x), y) for x, y in self.parts[part])

    @torch.inference_mode()
    def _cache_shared(self) -> None:
        """Keep what sub-networks share for all images, if there is room; an empty list where there is none."""
        kept: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        used = 0
        self._shared = []
        with self._autocast():
            for part in self.parts:
                kept.append([])
                for x, y in part:
                    shared = self.net.shared(x)
                    used += shared.nbytes
                    if used > SHARED_CACHE_BYTES:
                        return
                    kept[-1].append((shared, y))
        self._shared = kept


def _checked(record: dict[str, Any], file: Path) -> dict[str, Any]:
    """A record that was read back, if it can be one of ours."""
    score, seconds = record.get("score"), record.get("seconds")
    number = isinstance(seconds, int | float) and math.isfinite(seconds) and seconds >= 0
    least = -math.inf if record.keys() & {"correct", "value"} else 0
    if not (isinstance(record.get("key"), str) and type(score) is int and score >= least and number):
        raise ValueError(f"{file} is damaged: {str(record)[:80]} is not a score; remove the file to score again")
    return record


def below(correct: int, images: int, total: int, at_least: int) -> int | None:
    """The estimated score out of ``total``, if it is clear enough that it stays below ``at_least``."""
    share = correct / images
    # of a share seen on part of a finite set
    error = math.sqrt(share * (1 - share) / images * (total - images) / max(1, total - 1))
    if (share + PRESCREEN_ERRORS * error) * total >= at_least:
        return None
    return math.floor(share * total)
