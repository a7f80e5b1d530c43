"""Search a vision transformer under a compute budget: train a supernet, evolve sub-networks, export the best.

    accelerate launch recipes/search.py                                          # digits on a CPU, minutes
    accelerate launch recipes/search.py --dataset imagefolder:photos --space mini --img-size 96 --budget macs=60M
    accelerate launch recipes/search.py --budget macs=8M,params=600K --iterations 20 --max-minutes 30
    accelerate launch recipes/search.py --search pareto --objectives macs,params
    accelerate launch recipes/search.py --latency-table latency.json --budget latency=40%   # of recipes/latency.py
    accelerate launch recipes/search.py --supernet runs/digits-micro/supernet --budget macs=30%    # nothing is trained

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
    results.json, report.md, pareto.png, progress.png, choices.png
    state/                 what going on after a kill needs

Budgets are upper limits; the first-named one has a lower band, too: candidates cost between 0.975 of it and it
(paper, released code). `macs=40%` is a share of the supernet's largest network, `none` is no limit. Latency comes from
a table that `recipes/latency.py` measured on this device; what is called best is measured end to end before.
`--search pareto` looks for the whole front instead of one network: accuracy against each of `--objectives`.

`--supernet` takes a folder or a Hub id of a supernet that was trained before, with its own space. Images that it was
trained on, or that are in the test part, by index or content, are not scored on (`--allow-leak` does, and the report
says so). Started again with the same command, a run goes on where it was; the same seed and supernet give the same
history, on any number of processes.

Errors: an unknown space or dataset, an image size that the total stride does not divide, a budget that the space
cannot meet, classes with too few images, a supernet of other classes; each is said before anything is trained.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import shlex
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
    RunError,
    add_run_options,
    dataset_name,
    format_minutes,
    main_guard,
    parse,
    shared_counter,
    start,
)
from report import report
from supernet import FIXED, Data, add_options, open_space, prepare, train
from training import HASHED_IMAGES, record_of

import timm_resnas
from timm_resnas import Arch
from timm_resnas.arch import ArchError
from timm_resnas.data import (
    EvalBatches,
    Splits,
    content_hashes,
    eval_batches,
    eval_transform,
    load_splits,
    repeated,
    split_search_val,
    trained_on,
)
from timm_resnas.hub import load, read_file, save_pretrained
from timm_resnas.nas.cost import Budget, format_cost
from timm_resnas.nas.evaluate import Evaluator, count_correct
from timm_resnas.nas.evolution import EvolutionSearch, RandomSearch, Search, plain, rank_key
from timm_resnas.nas.jsonl import write_jsonl
from timm_resnas.nas.latency import LatencyTable, measure_network
from timm_resnas.nas.pareto import ParetoSearch
from timm_resnas.nas.space import BudgetError, SearchSpace
from timm_resnas.nas.supernet import VitResNasSupernet

# Options that decide the history, beside those of the supernet.
SEARCH_FIXED = [
    *("budget", "search", "population", "iterations", "parents", "mutations", "crossovers", "mutation_prob"),
    *("num_random", "num_spread", "supernet", "objectives", "latency_table", "first_look", "allow_leak"),
]
FINALISTS = 10  # networks that are measured until one is within a latency budget
RECHECKED = 20  # candidates ended by a first look that are scored in full, for the report


def add_search_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search")
    group.add_argument("--supernet", metavar="WHERE", help="a trained supernet: its folder, or hf-hub:owner/name")
    group.add_argument(
        "--allow-pickle", action="store_true", help="read a supernet's pickled weights, too (weights_only)"
    )
    group.add_argument(
        "--allow-leak", action="store_true", help="score on images that the supernet was trained on, if need be"
    )
    group.add_argument(
        "--budget",
        help="limits, first the one with a band: macs=1.8G,params=40M; none (default: macs=20%%, for pareto none)",
    )
    group.add_argument("--latency-table", metavar="FILE", help="of recipes/latency.py, for latency budgets and fronts")
    group.add_argument(
        "--search", choices=["evolution", "random", "pareto"], default="evolution", help="how candidates are made"
    )
    group.add_argument(
        "--objectives", default="macs", help="what --search pareto sets against accuracy: macs,params,memory,latency"
    )
    group.add_argument("--population", type=int, default=100, help="random candidates of generation 1 (paper: 500)")
    group.add_argument("--iterations", type=int, default=6, help="generations, the first one included (paper: 20)")
    group.add_argument("--parents", type=int, default=25, help="best candidates that the next are made of (paper: 75)")
    group.add_argument("--mutations", type=int, default=20, help="mutated candidates per generation (paper: 75)")
    group.add_argument("--crossovers", type=int, default=20, help="crossed candidates per generation (paper: 75)")
    group.add_argument(
        "--mutation-prob",
        type=float,
        help="probability of each gene to mutate (default: the paper's 0.3; for pareto two genes on average)",
    )
    group.add_argument(
        "--first-look",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="score on this share of the images first, on the rest only what may still enter the parents; 0: off",
    )
    group.add_argument("--channels-last", action="store_true", help="memory format of the convolutions while scoring")
    group.add_argument("--num-random", type=int, default=20, help="random networks of the budget to compare with")
    group.add_argument("--num-spread", type=int, default=40, help="random networks of any cost, for the front")
    group.add_argument(
        "--max-minutes",
        type=float,
        metavar="N",
        help="end the search in good order after so many minutes, training included (never before generation 1)",
    )


# -- a supernet from elsewhere ----------------------------------------------------------------------------------------


def adopt(args: argparse.Namespace, run: Run) -> tuple[VitResNasSupernet, Data, str | None]:
    """Load ``--supernet`` and cut images for its search that it has not seen.

    Returns:
        The supernet, the data of its search, and what is to be said of leaks (None: checked, there are none).

    Raises:
        ValueError: No supernet is there, the data or the options do not fit it, or there are not enough images that
            it was not trained on.
    """
    net = load(args.supernet, allow_pickle=args.allow_pickle)
    if not isinstance(net, VitResNasSupernet):
        raise RunError(
            f"--supernet {args.supernet} is a {type(net).__name__}; expected a supernet, as recipes/supernet.py and "
            f"recipes/search.py save it (the folder 'supernet' of a run)"
        )
    space = net.space
    if args.space is not None:
        space = open_space(args.space)
        space = space.with_model_args(**{k: v for k, v in net.space.model_args.items() if k in space.model_args})
        try:
            net.check_arch(space.largest)
        except ArchError as e:
            raise RunError(f"--space {args.space} does not fit the supernet {args.supernet}: {e}") from None
    size = net.space.model_args["img_size"]
    if args.img_size is not None and tuple(args.img_size) * (3 - len(args.img_size)) != tuple(net.img_size):
        raise RunError(f"--img-size {args.img_size} is not that of the supernet, {size}; leave the option out")
    splits = load_splits(args.dataset)
    if splits.num_classes != net.num_classes:
        raise RunError(f"{args.dataset} has {splits.num_classes} classes, the supernet {net.num_classes}")
    record = record_of(str(args.supernet) if ":" in args.supernet else f"local-dir:{args.supernet}")
    cutting = functools.partial(cut_unseen, args, splits, record)
    train_indices, val, note = run.once("data.json", cutting)
    if len(train_indices) + len(val) != len(splits.train):
        raise RunError(f"{args.dataset} is not what {run.folder} was started with; give this run another --name")
    return net, Data(splits, space, train_indices, val, timm.data.resolve_model_data_config(net)), note


def cut_unseen(
    args: argparse.Namespace, splits: Splits, record: dict[str, Any] | None
) -> tuple[list[int], list[int], str | None]:
    """Training indices that are left, those to score on, and what is to be said of leaks."""
    small = len(splits.train) + len(splits.test) <= HASHED_IMAGES
    hashes, test_hashes = (content_hashes(s) if small else None for s in (splits.train, splits.test))
    tested = repeated(hashes, test_hashes) if small else [False] * len(splits.train)
    seen = [False] * len(splits.train) if record is None else trained_on(record, splits.train, hashes)
    sizes = {"per_class": args.val_per_class, "fraction": args.val_fraction, "seed": args.seed}
    try:
        avoid = [a or b for a, b in zip(tested, seen, strict=True)]
        train_indices, val = split_search_val(splits.train, **sizes, avoid=avoid)
    except ValueError as e:
        if not any(seen):
            raise
        if not args.allow_leak:
            raise RunError(
                f"{sum(seen)} of the {len(seen)} images of {args.dataset} were trained on by {args.supernet}: {e}. "
                f"Search with the --val-per-class and --val-fraction that it was trained with, or --allow-leak"
            ) from None
        train_indices, val = split_search_val(splits.train, **sizes, avoid=tested)
    leaked = sum(seen[i] for i in val)
    note = f"{leaked} of the {len(val)} images that candidates are scored on were trained on" if leaked else None
    if record is None:
        note = "the supernet does not say which images it was trained on, so a leak cannot be ruled out"
    elif not any(seen) and (hashes is None or record["hashes"] is None):  # other data, and too much to compare it
        note = "the supernet was trained on other data that was not compared by content, so a leak cannot be ruled out"
    known = set((record or {}).get("hashes") or ())
    if tests := sum(h[:16] in known for h in test_hashes or ()):
        seen_tests = f"the supernet was trained on {tests} of the {len(splits.test)} test images"
        note = f"{note}; {seen_tests}" if note else seen_tests
    return train_indices, val, note


# -- the search -------------------------------------------------------------------------------------------------------


def make_budget(args: argparse.Namespace, space: SearchSpace, table: LatencyTable | None) -> Budget | None:
    """The budget that the options name; shares are of the largest network."""
    text = args.budget
    if text == "none":
        return None
    if "latency" in text and table is None:
        raise RunError(
            f"--budget {text} needs --latency-table FILE; `python recipes/latency.py --help` says how one is measured "
            f"on this device"
        )
    return Budget.parse(text, share_of=space.costs(space.largest, table and table.costs))


def make_search(
    args: argparse.Namespace, space: SearchSpace, budget: Budget | None, table: LatencyTable | None, images: int
) -> Search:
    """The search that the options name; candidates are scored on so many images.

    Raises:
        BudgetError: The space cannot meet the budget; the message gives the reachable range.
        ValueError: Options are out of range or do not go together.
    """
    if not 0 <= args.first_look < 1:
        raise RunError(f"--first-look must be at least 0 and below 1, got {args.first_look:g}")
    if args.first_look and args.search != "evolution":
        raise RunError("--first-look needs --search evolution: it asks whether a candidate may still become a parent")
    if min(args.num_random, args.num_spread) < 0:
        raise RunError(f"--num-random and --num-spread must be at least 0, got {args.num_random}, {args.num_spread}")
    sizes = {k: getattr(args, k) for k in ("population", "iterations", "mutations", "crossovers")}
    sizes["extra_costs"] = table and table.costs
    if args.search == "random":
        return RandomSearch(space, budget, args.seed, **sizes)
    sizes["parents"] = args.parents
    if args.mutation_prob is not None:
        sizes["mutation_prob"] = args.mutation_prob
    if args.search == "pareto":
        return ParetoSearch(space, budget, args.seed, **sizes, objectives=objectives(args, table), max_score=images)
    return EvolutionSearch(space, budget, args.seed, **sizes)


def objectives(args: argparse.Namespace, table: LatencyTable | None) -> tuple[str, ...]:
    names = [name.strip() for name in args.objectives.split(",")]
    names = tuple("latency_ms" if name == "latency" else name for name in names)
    if "latency_ms" in names and table is None:
        raise RunError("--objectives latency needs --latency-table FILE, see `python recipes/latency.py --help`")
    return names


def val_parts(args: argparse.Namespace, data: Data, device: torch.device) -> tuple[EvalBatches | None, EvalBatches]:
    """Batches of the validation images: of a first look, which takes its share of each class, and of the others."""
    labels = np.asarray(data.splits.train["label"][:])[data.val]
    first = np.zeros(len(labels), dtype=bool)
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        steps = np.floor(np.arange(len(members) + 1) * args.first_look)
        first[members] = np.diff(steps) > 0
    if args.first_look and not 0 < first.sum() < len(first):
        raise RunError(f"--first-look {args.first_look:g} of {len(first)} validation images leaves a part empty")
    val = np.asarray(data.val)
    batches = [
        eval_batches(
            data.splits.train,
            eval_transform(data.config),
            indices=part.tolist(),
            device=device,
            num_workers=args.workers,
        )
        for part in (val[first], val[~first])
        if len(part)
    ]
    return (batches[0], batches[1]) if args.first_look else (None, batches[0])


def run_search(args: argparse.Namespace, search: Search, evaluator: Evaluator, run: Run, clock: Clock, images: int):
    """Ask, score and tell until the search is done or the time is up; history.jsonl grows by whole generations.

    Returns:
        Why the search ended early, or None.
    """
    pareto = isinstance(search, ParetoSearch)
    run.say(
        f"\n{'generation':>10} {'candidates':>10} {'best':>7} {'volume' if pareto else 'parents':>7} {'MACs':>8} "
        f"{'seconds':>7} {'left':>7}"
    )
    each = 0.0  # seconds per candidate, of the last generation
    while not search.done:
        batch = search.ask()
        late = [search.generation > 0 and clock.over(extra=each * len(batch))]
        if any(late if evaluator.world == 1 else evaluator.gather(late)):  # clocks differ, the answer must not
            done = f"{search.generation} of {search.generations} generations"
            return f"--max-minutes {args.max_minutes:g}: ended after {done}"
        begin = clock.seconds()
        at_least = None
        if args.first_look and len(search.history) >= args.parents:
            at_least = sorted(r["score"] for r in search.history)[-args.parents]
        with Progress(-(-len(batch) // evaluator.world), f"generation {search.generation + 1}", run.is_main) as bar:
            scores = evaluator.score(batch, report=bar, at_least=at_least)
        search.tell(zip(batch, scores, strict=True))
        spent = clock.seconds() - begin
        each = spent / len(batch)
        for record, arch in zip(search.history[-len(batch) :], batch, strict=True):
            scored = evaluator.record(arch, first_look=at_least is not None)
            record["seconds"] = scored["seconds"]
            if "looked" in scored:
                record["looked"], record["at_least"] = scored["looked"], at_least
        if run.is_main:
            write_jsonl(run / "history.jsonl", search.history)
        left = each * (search.generations - search.generation) * search.batch
        if pareto:
            middle = search.hypervolume()
        else:
            middle = np.mean(sorted((r["score"] for r in search.history), reverse=True)[: args.parents]) / images
        run.say(
            f"{search.generation:>10} {len(search.history):>10} {search.best['score'] / images:>7.4f} "
            f"{middle:>7.4f} {format_cost('macs', search.best['macs']):>8} {spent:>7.1f} {format_minutes(left):>7}"
        )
    return None


def first_look_effect(history: Sequence[dict[str, Any]], evaluator: Evaluator, images: int) -> dict[str, Any] | None:
    """What first looks saved, and how many of the best-looking candidates that they ended would have been parents."""
    ended = [r for r in history if "looked" in r]
    if not ended:
        return None
    ended.sort(key=lambda r: (r["score"] - r["at_least"], r["key"]), reverse=True)
    again = ended[:RECHECKED]
    scores = evaluator.score([Arch.from_network_def(r["network_def"]) for r in again])
    return {
        "ended": len(ended),
        "images_saved": sum(images - r["looked"] for r in ended) / (images * len(history)),
        "rechecked": len(again),
        "would_be_parents": sum(s >= r["at_least"] for s, r in zip(scores, again, strict=True)),
    }


def choose(search: Search, table: LatencyTable | None, run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The best network, and what was measured on the way: under a latency budget, the best that keeps it end to end.

    Where none of the first `FINALISTS` does, the fastest of them.
    """
    limits = dict(search.budget or ())
    ranked = sorted((r for r in search.history if "looked" not in r), key=rank_key)
    ranked = [r for r in ranked if all(r[name] <= limit for name, limit in limits.items())]
    limit = limits.get("latency_ms")
    if limit is None:
        return ranked[0], []
    measured: list[dict[str, Any]] = []
    for record in ranked[:FINALISTS]:
        got = measure_network(Arch.from_network_def(record["network_def"]), search.space, table)
        measured.append({"key": record["key"], "predicted_ms": record["latency_ms"], **got})
        run.say(f"finalist: {got['ms']:.4g} ms measured, {record['latency_ms']:.4g} predicted, limit {limit:g}")
        if got["ms"] <= limit:
            return record, measured
    fastest = min(range(len(measured)), key=lambda i: measured[i]["ms"])
    run.say(
        f"none of the {len(measured)} best networks keeps the limit when measured end to end: the machine is busy, or "
        f"the table is old. The fastest of them is kept as best/"
    )
    return ranked[fastest], measured


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


def export(
    net: VitResNasSupernet,
    record: dict[str, Any],
    folder: Path,
    args: argparse.Namespace,
    data: Data,
    seen: str | None,
) -> None:
    """One network with the supernet's weights, as a folder that timm loads; with the record of what they have seen."""
    info = {
        **{k: record[k] for k in ("macs", "params", "memory", "latency_ms") if k in record},
        "search_val": {"correct": record["score"], "images": len(data.val)},
        "searched": {k: getattr(args, k) for k in ("dataset", "budget", "search", "seed", "supernet")},
        "weights": "inherited from the supernet",
    }
    save_pretrained(
        net.extract(record["network_def"]),
        folder,
        info=info,
        label_names=data.splits.class_names,
        data_config=data.config,
        files={} if seen is None else {"training_data.json": seen},
    )


def finish(
    args: argparse.Namespace,
    accelerator: Accelerator,
    run: Run,
    data: Data,
    net: VitResNasSupernet,
    search: Search,
    evaluator: Evaluator,
    table: LatencyTable | None,
    facts: dict[str, Any],
) -> None:
    """Yardsticks, folders of the best and the front, test accuracies, report."""
    device = accelerator.device
    rng = np.random.default_rng([args.seed, 4])
    hook = search.extra_costs
    others = [data.space.largest]
    if args.num_random:
        with contextlib.suppress(BudgetError):  # random draws may miss a budget that the search did meet
            others += data.space.sample_many(args.num_random, rng, search.budget, hook)
    spread = [data.space.smallest, *data.space.sample_many(args.num_spread, rng)]
    within = "the budget" if search.budget else "the space"
    run.say(
        f"\nscoring {len(others) - 1} random networks of {within} and {args.num_spread} of any cost, to compare with"
    )
    facts["first_look"] = first_look_effect(search.history, evaluator, len(data.val))
    val_scores = evaluator.score(others)
    spread_scores = evaluator.score(spread)
    tester = Evaluator(
        net,
        eval_batches(data.splits.test, eval_transform(data.config), device=device),
        rank=evaluator.rank,
        world=evaluator.world,
        gather=evaluator.gather,
        take=evaluator.take and (lambda name: evaluator.take(f"test {name}")),
        dtype=evaluator.dtype,
    )
    test_scores = tester.score(others)
    if not run.is_main:
        return

    def record(arch: Arch, score: int, **more: int) -> dict[str, Any]:
        network_def = json.loads(arch.to_json())
        return {
            "network_def": network_def,
            "key": arch.key(),
            **plain(data.space.costs(arch, hook)),
            "score": score,
            **more,
        }

    best, measured = choose(search, table, run)
    seen = read_file(args.supernet or run / "supernet", "training_data.json")
    export(net, best, run / "best", args, data, seen)
    largest, *compared = [record(a, v, test=t) for a, v, t in zip(others, val_scores, test_scores, strict=True)]
    free = [record(a, v) for a, v in zip(spread, spread_scores, strict=True)]
    shutil.rmtree(run / "pareto", ignore_errors=True)
    if isinstance(search, ParetoSearch):
        points = search.front()
        facts["objectives"] = list(search.objectives)
        facts["hypervolumes"] = search.hypervolumes
    else:
        points = front([*(r for r in search.history if "looked" not in r), largest, *compared, *free])
    for k, point in enumerate(points, start=1):
        export(net, point, run / "pareto" / str(k), args, data, seen)
    correct, images = score_of(run / "best", data, device)
    shown = [k for k in ("key", "macs", "params", "memory", "latency_ms", "score") if k in best]
    run.write_json(
        "results.json",
        {
            **facts,
            "best": {**best, "test": correct},
            "finalists": measured,
            "largest": largest,
            "random": compared,
            "spread": free,
            "front": [{k: p[k] for k in shown} for p in points],
            "val_images": len(data.val),
            "test_images": images,
        },
    )
    run.say("\n" + report(run.folder))
    run.say(f"\nreport: {run / 'report.md'}, pictures beside it. The network, in any script:")
    run.say("    import timm, timm_resnas")
    run.say(f"    model = timm.create_model('local-dir:{run / 'best'}', pretrained=True)")


def fingerprint(net: VitResNasSupernet, val: Sequence[int], first_look: float) -> str:
    """Names the supernet's weights and the images that candidates are scored on."""
    digest = hashlib.sha256(json.dumps([list(val), first_look]).encode())
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_run_options(parser)
    add_options(parser)
    add_search_options(parser)
    parser.set_defaults(space=None)  # the supernet's own, or 'micro'
    return parser


def main(argv: list[str] | None = None) -> None:
    args = parse(make_parser(), argv)
    with main_guard("search.py"):
        clock = Clock(args.max_minutes)
        if args.supernet is None and args.space is None:
            args.space = "micro"
        if args.budget is None:
            args.budget = "none" if args.search == "pareto" else "macs=20%"
        accelerator = start(args)
        named = args.space or Path(args.supernet.rstrip("/")).name
        run = Run(args, accelerator, f"{dataset_name(args.dataset)}-{Path(named).stem}", FIXED + SEARCH_FIXED)
        note = None
        if args.supernet is None:
            data = prepare(args, run)
        else:
            net, data, note = adopt(args, run)
        table = None
        if args.latency_table is not None:
            table = LatencyTable.load(args.latency_table)
            table.check(data.space, device=table.setting.device)  # now, not when finalists are measured
        given = {
            "supernet": None if args.supernet is None else fingerprint(net, (), 0),
            "latency_table": None if table is None else hashlib.sha256(table.to_json().encode()).hexdigest()[:16],
        }
        for name, was in run.once("given.json", lambda: given).items():
            if was != given[name]:
                option = f"--{name.replace('_', '-')} {getattr(args, name)}"
                raise RunError(f"{option} has changed since {run.folder} was started; give this run another --name")
        budget = make_budget(args, data.space, table)
        search = make_search(args, data.space, budget, table, len(data.val))
        budget = search.budget  # a front's has no lower band
        first, batches = val_parts(args, data, accelerator.device)
        run.begin()
        run.say(
            f"{args.dataset}: {len(data.train)} images to train on, {len(data.val)} to score candidates on, "
            f"{len(data.splits.test)} to test; {data.splits.num_classes} classes; budget {budget or 'none'}"
        )
        if note:
            run.say(f"note: {note}")

        if args.supernet is None:
            net = train(args, accelerator, run, data)
        else:
            run.say(f"supernet: {args.supernet}, {data.space.size():.2g} sub-networks")
            net = net.to(accelerator.device)
        if args.channels_last:
            net = net.to(memory_format=torch.channels_last)
        trained = clock.seconds()
        evaluator = Evaluator(
            net,
            batches,
            first_look=first,
            folder=run.state,
            fingerprint=fingerprint(net, data.val, args.first_look),
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            gather=gather_object,
            take=shared_counter(accelerator),
            dtype={"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp],
        )
        ended = run_search(args, search, evaluator, run, clock, len(data.val))
        if ended:
            run.say(ended)
        facts = {
            "command": shlex.join(["accelerate", "launch", *sys.argv]),
            "dataset": args.dataset,
            "space": args.space or f"that of {args.supernet}",
            "space_size": float(data.space.size()),
            "budget": {"asked": args.budget, **(budget.to_dict() if budget else {})},
            "search": args.search,
            "parents": args.parents if args.search == "evolution" else None,
            "supernet": args.supernet,
            "leak": note,
            "seed": args.seed,
            "candidates": len(search.history),
            "ended_early": ended,
            "resumed": run.resumed,
            "seconds": {"training": round(trained, 1), "search": round(clock.seconds() - trained, 1)},
            "processes": accelerator.num_processes,
            "versions": {m.__name__: m.__version__ for m in (timm_resnas, timm, torch, accelerate)},
        }
        finish(args, accelerator, run, data, net, search, evaluator, table, facts)
        accelerator.end_training()


if __name__ == "__main__":
    main()
