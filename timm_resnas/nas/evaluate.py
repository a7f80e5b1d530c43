"""Scoring candidates: how many images of a fixed set each sub-network classifies correctly.

Scores are integers, cached by `Arch.key`, and a function of weights and images alone, so that a search has the same
history on any number of processes. Every score is appended at once to a file of its process; a killed search that is
started again computes none of them anew.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from ..arch import Arch
from .jsonl import append_jsonl, read_jsonl
from .supernet import VitResNasSupernet

__all__ = ["Evaluator", "count_correct"]

# Room for the stem's output of the whole evaluation set: the stem is common to all sub-networks.
STEM_CACHE_BYTES = 512 << 20


@torch.inference_mode()
def count_correct(model: Callable[[torch.Tensor], torch.Tensor], batches: Iterable) -> tuple[int, int]:
    """(correct answers, images) of a classifier over batches of (images, labels)."""
    correct = images = 0
    for x, y in batches:
        correct += int((model(x).argmax(dim=-1) == y).sum())
        images += len(y)
    return correct, images


class Evaluator:
    """Scores sub-networks of a supernet on fixed batches.

    Args:
        net: The supernet, on the device of the batches; it is put in eval mode.
        batches: Re-iterable (images, labels), the same at every pass.
        folder: Where score files are kept; None keeps scores in memory only.
        fingerprint: Names the weights and images that the scores belong to; scores under another name are left alone.
        rank: This process.
        world: Number of processes; each scores every ``world``-th new candidate.
        gather: Joins the processes' lists, called once per `score`; needed when ``world`` > 1.
        dtype: Run the network under autocast to this type.

    Attributes:
        num_computed: Candidates that this process has scored itself.
    """

    def __init__(
        self,
        net: VitResNasSupernet,
        batches: Iterable,
        *,
        folder: str | Path | None = None,
        fingerprint: str = "",
        rank: int = 0,
        world: int = 1,
        gather: Callable[[list], list] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if world > 1 and gather is None:
            raise ValueError("several processes need a way to join their scores; pass gather")
        self.net = net.eval()
        self.batches = batches
        self.rank, self.world, self.gather = rank, world, gather
        self.dtype = dtype
        self.fingerprint = fingerprint
        self.num_computed = 0
        self._records: dict[str, dict] = {}
        self._stems: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self._too_large = False
        self._file: Path | None = None
        if folder is not None:
            folder = Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self._file = folder / f"scores-{rank}.jsonl"
            read_jsonl(self._file, mend=True)
            for file in sorted(folder.glob("scores-*.jsonl")):
                self._remember(read_jsonl(file))

    def score(self, archs: Sequence[Arch], report: Callable[[int], None] | None = None) -> list[int]:
        """Correct answers of each architecture; every process must call it with the same list.

        Args:
            archs: Candidates.
            report: Called after each candidate that this process has scored with the number of those so far.
        """
        todo: dict[str, Arch] = {}
        for arch in archs:
            if arch.key() not in self._records:
                todo.setdefault(arch.key(), arch)
        mine = []
        for arch in list(todo.values())[self.rank :: self.world]:
            start = time.perf_counter()
            record = {"key": arch.key(), "score": self._count(arch), "fingerprint": self.fingerprint}
            record["seconds"] = round(time.perf_counter() - start, 6)
            self.num_computed += 1
            mine.append(record)
            if self._file is not None:
                append_jsonl(self._file, [record])
            if report is not None:
                report(len(mine))
        self._remember(mine if self.world == 1 else self.gather(mine))
        return [self._records[arch.key()]["score"] for arch in archs]

    def seconds(self, arch: Arch) -> float:
        """How long scoring this architecture took."""
        return self._records[arch.key()]["seconds"]

    def _remember(self, records: Iterable[dict]) -> None:
        for record in records:
            if record.get("fingerprint") == self.fingerprint:
                self._records.setdefault(record["key"], record)

    @torch.inference_mode()
    def _count(self, arch: Arch) -> int:
        net = self.net
        previous = net.active
        net.set_arch(arch)
        try:
            with torch.autocast(net.cls_token.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                if self._stems is None and not self._too_large:
                    self._cache_stems()
                if self._stems is not None:
                    return count_correct(net.forward_from_stem, self._stems)[0]
                return count_correct(net, self.batches)[0]
        finally:
            net.set_arch(previous)

    def _cache_stems(self) -> None:
        stems, used = [], 0
        for x, y in self.batches:
            stem = self.net.patch_embed.stem(x)
            used += stem.nbytes
            if used > STEM_CACHE_BYTES:
                self._too_large = True
                return
            stems.append((stem, y))
        self._stems = stems
