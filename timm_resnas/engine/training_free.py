"""A search that trains nothing: candidates are scored by what their untrained weights, or their costs, say of them."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

import timm_resnas

from ..arch import Arch
from ..data import eval_batches, eval_transform
from ..hub import save_pretrained
from ..nas.cost import Budget
from ..nas.evaluate import FIXED_POINT
from ..nas.latency import LatencyTable
from ..nas.pareto import ParetoSearch
from ..nas.proxies import ProxyEvaluator, proxy_score
from ..nas.slimming import Slimming
from ..nas.space import BudgetError
from ..nas.supernet import Supernet
from .processes import shared_counter
from .run import Deadline, Run, format_minutes
from .search import choose, comparable, family, fingerprint, make_search, print_notes, run_search
from .seeds import Stream, generator
from .settings import SearchOptions
from .supernet import SearchData, create_supernet
from .training_free_report import report, train_command

__all__ = ["search_training_free"]

IMAGES = 64  # training images that snip and naswot look at


def search_training_free(
    options: SearchOptions,
    accelerator: Accelerator,
    run: Run,
    data: SearchData,
    budget: Budget | None,
    table: LatencyTable | None,
    clock: Deadline,
) -> None:
    """Search, then the folders ``best/`` and ``pareto/<k>/``, with untrained weights, and the report.

    Args:
        options: The resolved options.
        accelerator: Its device computes the scores.
        run: The run.
        data: What the network is for.
        budget: What a network may cost.
        table: Of measured latencies, where the budget needs them.
        clock: Started with the program.

    Raises:
        ValueError: Options do not fit each other.
    """
    device, space = accelerator.device, data.space
    search = make_search(options, space, budget, 1)  # its errors first
    run.begin()
    net = create_supernet(options, data).to(device)
    chosen = generator(options.seed, Stream.CALIBRATION).permutation(np.asarray(data.train))[:IMAGES].tolist()
    batches = eval_batches(data.splits.train, eval_transform(data.config), indices=chosen, device=device)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    evaluator = ProxyEvaluator(
        net,
        options.score,
        images,
        labels,
        folder=run.state,
        fingerprint=fingerprint(net, chosen, 0.0),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        gather=gather_object,
        next_index=shared_counter(accelerator),
    )
    if isinstance(search, ParetoSearch):  # what its volume is measured by
        search.max_score = max(1, *evaluator.score([space.largest]))
    run.print(
        f"{options.dataset}: {data.splits.num_classes} classes, images of {data.config['input_size']}; budget "
        f"{search.budget or 'none'}; score {options.score}, of {space.size():.2g} networks, none of which is trained"
    )
    print_notes(run, data, search.budget, None)
    begin = time.perf_counter()
    proxy_score(options.score, net, space.largest, images, labels)
    each, count = time.perf_counter() - begin, search.planned
    at_most = "about" if isinstance(search, Slimming) else "up to"
    run.print(f"plan: score {at_most} {count} candidates, at most {format_minutes(each * count / run.num_processes)}")
    ended = run_search(options, search, evaluator, run, clock, FIXED_POINT)
    if ended:
        run.print(ended)

    randoms: list[Arch] = []
    if options.num_random:
        try:
            rng = generator(options.seed, Stream.BASELINES)
            randoms = space.sample_many(options.num_random, rng, comparable(search))
        except BudgetError:  # random draws may miss a budget that the search did meet
            run.print("no random networks of the budget were found to compare with")
    evaluator.score([space.largest, *randoms])
    if not run.is_main:
        return

    def record(arch: Arch) -> dict[str, Any]:
        value = evaluator.record(arch)["value"]
        return {**arch.record(), "key": arch.key(), **space.costs(arch), "value": value}

    best, measured = choose(search, table, run)
    export(net, best, run / "best", options, data)
    shutil.rmtree(run / "pareto", ignore_errors=True)
    points = family(search)
    for k, point in enumerate(points, start=1):
        export(net, point, run / "pareto" / str(k), options, data)
    results = {
        "training_free": options.score,
        "command": shlex.join(["accelerate", "launch", *sys.argv]),
        "dataset": options.dataset,
        "space": options.space,
        "space_size": float(space.size()),
        "space_dict": space.to_dict(),
        "budget": {"asked": options.budget, **(search.budget.to_dict() if search.budget else {})},
        "search": options.search,
        "parents": options.parents if options.search == "evolution" else None,
        "seed": options.seed,
        "candidates": len(search.history),
        "ended_early": ended,
        "best": {k: v for k, v in best.items() if k != "seconds"},
        "finalists": measured,
        "largest": record(space.largest),
        "random": [record(arch) for arch in randoms],
        "front": [{k: p[k] for k in ("key", *space.cost_names, "value")} for p in points],
        "seconds": round(clock.seconds(), 1),
        "processes": accelerator.num_processes,
        "versions": {m.__name__: m.__version__ for m in (timm_resnas, timm, torch, accelerate)},
    }
    run.write_json("results.json", results)
    run.print("\n" + report(run.folder))
    run.print(f"\nreport: {run / 'report.md'}. The network is not trained; this trains it:")
    run.print(f"    {train_command(run.folder, options.dataset)}")


def export(net: Supernet, record: dict[str, Any], folder: Path, options: SearchOptions, data: SearchData) -> None:
    """One network with its initial weights, as a folder that timm loads."""
    info = {
        **{name: record[name] for name in data.space.cost_names},
        "searched": {k: getattr(options, k) for k in ("dataset", "budget", "search", "seed", "score")},
        "weights": "untrained",
    }
    model = net.extract(Arch.from_record(record))
    save_pretrained(model, folder, info=info, label_names=data.splits.class_names, data_config=data.config)
