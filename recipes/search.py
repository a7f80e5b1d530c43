"""Search a vision transformer under a compute budget: train a supernet, evolve sub-networks, export the best.

    accelerate launch recipes/search.py                                          # digits on a CPU, minutes
    accelerate launch recipes/search.py --dataset imagefolder:photos --space mini --img-size 96 --budget macs=60M
    accelerate launch recipes/search.py --budget macs=8M,params=600K --iterations 20 --max-minutes 30

Three sets of images are kept apart: training, the search's own validation (cut from the training set, recorded in
`state/data.json`) and test. Candidates are scored on the validation images with the supernet's weights; the test
images are used once, for the last table.

A run's folder:

    config.yaml            the options
    supernet/              the trained supernet
    training.jsonl         its accuracy while it trained
    history.jsonl          every candidate: network_def, costs, score (correct answers), generation, origin, seconds
    best/                  timm.create_model('local-dir:<run>/best', pretrained=True)
    pareto/<k>/            the same for each point of the front of accuracy against MACs, cheapest first
    results.json, report.md, pareto.png, progress.png
    state/                 what going on after a kill needs

Budgets are upper limits; the first-named one has a lower band, too: candidates cost between 0.975 of it and it
(paper, released code). `macs=40%` is a share of the supernet's largest network. Started again with the same command,
a run goes on where it was; the same seed gives the same history.

Errors: an unknown space or dataset, an image size that the total stride does not divide, a budget that the space
cannot meet, classes with too few images; each is said before anything is trained.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from common import (
    Clock,
    HelpFormatter,
    Progress,
    Run,
    add_run_options,
    dataset_name,
    format_minutes,
    main_guard,
    parse,
    start,
)
from report import report
from supernet import FIXED, Data, add_options, prepare, train, val_batches

import timm_resnas
from timm_resnas import Arch
from timm_resnas.data import eval_batches, eval_transform
from timm_resnas.hub import save_pretrained
from timm_resnas.nas.cost import Budget, format_cost
from timm_resnas.nas.evaluate import Evaluator, count_correct
from timm_resnas.nas.evolution import EvolutionSearch, RandomSearch, Search
from timm_resnas.nas.jsonl import write_jsonl
from timm_resnas.nas.space import SearchSpace
from timm_resnas.nas.supernet import VitResNasSupernet

# Options that decide the history, beside those of the supernet.
SEARCH_FIXED = [
    *("budget", "search", "population", "iterations", "parents", "mutations", "crossovers", "mutation_prob"),
    *("num_random", "num_spread"),
]


def add_search_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search")
    group.add_argument("--budget", default="macs=20%", help="limits, first the one with a band: macs=1.8G,params=40M")
    group.add_argument("--search", choices=["evolution", "random"], default="evolution", help="how candidates are made")
    group.add_argument("--population", type=int, default=100, help="random candidates of generation 1 (paper: 500)")
    group.add_argument("--iterations", type=int, default=6, help="generations, the first one included (paper: 20)")
    group.add_argument("--parents", type=int, default=25, help="best candidates that the next are made of (paper: 75)")
    group.add_argument("--mutations", type=int, default=20, help="mutated candidates per generation (paper: 75)")
    group.add_argument("--crossovers", type=int, default=20, help="crossed candidates per generation (paper: 75)")
    group.add_argument("--mutation-prob", type=float, default=0.3, help="probability of each gene to mutate")
    group.add_argument("--num-random", type=int, default=20, help="random networks of the budget to compare with")
    group.add_argument("--num-spread", type=int, default=40, help="random networks of any cost, for the front")
    group.add_argument(
        "--max-minutes",
        type=float,
        metavar="N",
        help="end the search in good order after so many minutes, training included (never before generation 1)",
    )


def make_search(args: argparse.Namespace, space: SearchSpace, budget: Budget) -> Search:
    """The search that the options name.

    Raises:
        BudgetError: The space cannot meet the budget; the message gives the reachable range.
    """
    sizes = {k: getattr(args, k) for k in ("population", "iterations", "mutations", "crossovers")}
    if args.search == "random":
        return RandomSearch(space, budget, args.seed, **sizes)
    return EvolutionSearch(space, budget, args.seed, **sizes, parents=args.parents, mutation_prob=args.mutation_prob)


def run_search(args: argparse.Namespace, search: Search, evaluator: Evaluator, run: Run, clock: Clock, images: int):
    """Ask, score and tell until the search is done or the time is up; history.jsonl grows by whole generations.

    Returns:
        Why the search ended early, or None.
    """
    run.say(
        f"\n{'generation':>10} {'candidates':>10} {'best':>7} {'parents':>7} {'MACs':>8} {'seconds':>7} {'left':>7}"
    )
    each = 0.0  # seconds per candidate, of the last generation
    while not search.done:
        batch = search.ask()
        if search.generation and clock.over(extra=each * len(batch)):
            done = f"{search.generation} of {search.generations} generations"
            return f"--max-minutes {args.max_minutes:g}: ended after {done}"
        begin = clock.seconds()
        with Progress(-(-len(batch) // evaluator.world), f"generation {search.generation + 1}", run.is_main) as bar:
            scores = evaluator.score(batch, report=bar)
        search.tell(zip(batch, scores, strict=True))
        spent = clock.seconds() - begin
        each = spent / len(batch)
        for record, arch in zip(search.history[-len(batch) :], batch, strict=True):
            record["seconds"] = evaluator.seconds(arch)
        if run.is_main:
            write_jsonl(run / "history.jsonl", search.history)
        left = each * (search.generations - search.generation) * (args.mutations + args.crossovers)
        top = sorted((r["score"] for r in search.history), reverse=True)[: args.parents]
        run.say(
            f"{search.generation:>10} {len(search.history):>10} {search.best['score'] / images:>7.4f} "
            f"{np.mean(top) / images:>7.4f} {format_cost('macs', search.best['macs']):>8} {spent:>7.1f} "
            f"{format_minutes(left):>7}"
        )
    return None


def front(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records that no other beats in score and MACs, cheapest first."""
    points, best = [], -1
    for record in sorted(records, key=lambda r: (r["macs"], -r["score"], r["key"])):
        if record["score"] > best:
            points.append(record)
            best = record["score"]
    return points


def score_of(folder: Path, data: Data, device: torch.device) -> tuple[int, int]:
    """Correct answers on the test images of a model's folder, loaded and fed the way a user would."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).to(device).eval()
    transform = eval_transform(timm.data.resolve_model_data_config(model))
    return count_correct(model, eval_batches(data.splits.test, transform, device=device))


def export(net: VitResNasSupernet, record: dict[str, Any], folder: Path, args: argparse.Namespace, data: Data) -> None:
    """One network with the supernet's weights, as a folder that timm loads."""
    info = {
        **{k: record[k] for k in ("macs", "params", "memory")},
        "search_val": {"correct": record["score"], "images": len(data.val)},
        "searched": {k: getattr(args, k) for k in ("dataset", "budget", "search", "seed")},
        "weights": "inherited from the supernet",
    }
    save_pretrained(net.extract(record["network_def"]), folder, info=info, label_names=data.splits.class_names)


def finish(
    args: argparse.Namespace,
    accelerator: Accelerator,
    run: Run,
    data: Data,
    net: VitResNasSupernet,
    search: Search,
    evaluator: Evaluator,
    facts: dict[str, Any],
) -> None:
    """Yardsticks, folders of the best and the front, test accuracies, report."""
    device = accelerator.device
    rng = np.random.default_rng([args.seed, 4])
    others = [data.space.largest, *data.space.sample_many(args.num_random, rng, search.budget)]
    spread = [data.space.smallest, *data.space.sample_many(args.num_spread, rng)]
    run.say(
        f"\nscoring {args.num_random} random networks of the budget and {args.num_spread} of any cost, to compare with"
    )
    val_scores = evaluator.score(others)
    spread_scores = evaluator.score(spread)
    tester = Evaluator(
        net,
        eval_batches(data.splits.test, eval_transform(data.config), device=device),
        rank=evaluator.rank,
        world=evaluator.world,
        gather=evaluator.gather,
        dtype=evaluator.dtype,
    )
    test_scores = tester.score(others)
    if not run.is_main:
        return

    def record(arch: Arch, score: int, **more: int) -> dict[str, Any]:
        network_def = json.loads(arch.to_json())
        return {"network_def": network_def, "key": arch.key(), **data.space.costs(arch), "score": score, **more}

    best = search.best
    export(net, best, run / "best", args, data)
    largest, *compared = [record(a, v, test=t) for a, v, t in zip(others, val_scores, test_scores, strict=True)]
    free = [record(a, v) for a, v in zip(spread, spread_scores, strict=True)]
    shutil.rmtree(run / "pareto", ignore_errors=True)
    points = front([*search.history, largest, *compared, *free])
    for k, point in enumerate(points, start=1):
        export(net, point, run / "pareto" / str(k), args, data)
    correct, images = score_of(run / "best", data, device)
    run.write_json(
        "results.json",
        {
            **facts,
            "best": {**best, "test": correct},
            "largest": largest,
            "random": compared,
            "spread": free,
            "front": [{k: p[k] for k in ("key", "macs", "params", "score")} for p in points],
            "val_images": len(data.val),
            "test_images": images,
        },
    )
    run.say("\n" + report(run.folder))
    run.say(f"\nreport: {run / 'report.md'}, pictures beside it. The network, in any script:")
    run.say("    import timm, timm_resnas")
    run.say(f"    model = timm.create_model('local-dir:{run / 'best'}', pretrained=True)")


def fingerprint(folder: Path, val: Sequence[int]) -> str:
    """Names the supernet's weights and the images that candidates are scored on."""
    digest = hashlib.sha256(json.dumps(list(val)).encode())
    with (folder / "model.safetensors").open("rb") as f:
        while chunk := f.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_run_options(parser)
    add_options(parser)
    add_search_options(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = parse(make_parser(), argv)
    with main_guard("search.py"):
        clock = Clock(args.max_minutes)
        accelerator = start(args)
        run = Run(args, accelerator, f"{dataset_name(args.dataset)}-{args.space}", FIXED + SEARCH_FIXED)
        data = prepare(args, run)
        budget = Budget.parse(args.budget, share_of=data.space.costs(data.space.largest))
        search = make_search(args, data.space, budget)
        run.begin()
        run.say(
            f"{args.dataset}: {len(data.train)} images to train on, {len(data.val)} to score candidates on, "
            f"{len(data.splits.test)} to test; {data.splits.num_classes} classes; budget {budget}"
        )

        net = train(args, accelerator, run, data)
        trained = clock.seconds()
        evaluator = Evaluator(
            net,
            val_batches(data, accelerator.device, args.workers),
            folder=run.state,
            fingerprint=fingerprint(run / "supernet", data.val),
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            gather=gather_object,
            dtype={"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp],
        )
        ended = run_search(args, search, evaluator, run, clock, len(data.val))
        if ended:
            run.say(ended)
        facts = {
            "command": " ".join(["accelerate", "launch", *sys.argv]),
            "dataset": args.dataset,
            "space": args.space,
            "space_size": float(data.space.size()),
            "budget": {"asked": args.budget, **budget.to_dict()},
            "seed": args.seed,
            "candidates": len(search.history),
            "ended_early": ended,
            "seconds": {"training": round(trained, 1), "search": round(clock.seconds() - trained, 1)},
            "processes": accelerator.num_processes,
            "versions": {m.__name__: m.__version__ for m in (timm_resnas, timm, torch, accelerate)},
        }
        finish(args, accelerator, run, data, net, search, evaluator, facts)
        accelerator.end_training()


if __name__ == "__main__":
    main()
