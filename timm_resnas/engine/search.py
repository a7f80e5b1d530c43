"""A search: supernet and data, budget, scoring, finalists, folders of what was found."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator

from ..arch import Arch, ArchError
from ..data import (
    EvalBatches,
    Splits,
    content_hashes,
    eval_batches,
    eval_transform,
    repeated,
    split_search_val,
    trained_on,
)
from ..hub import load, read_file, save_pretrained
from ..nas.cost import Budget, format_cost
from ..nas.evaluate import Evaluator, count_correct, in_answers
from ..nas.evolution import EvolutionSearch, RandomSearch, Search, rank_key
from ..nas.jsonl import write_jsonl
from ..nas.latency import LatencyTable, measure_network
from ..nas.pareto import ParetoSearch
from ..nas.slimming import Slimming
from ..nas.space import BudgetError, SearchSpace
from ..nas.supernet import Supernet
from .baseline import score_baseline
from .data import HASHED_IMAGES, cached_parts, image_pair, open_splits
from .models import align_classes, record_of
from .report import report, train_command
from .run import Deadline, Progress, Run, RunError, format_minutes
from .seeds import Stream, generator
from .settings import TRAINING_FREE, UNSCORED, SearchOptions, SupernetOptions
from .supernet import SearchData, networks_per_image, open_space

__all__ = [
    "candidates",
    "check_options",
    "comparable",
    "family",
    "finish",
    "fingerprint",
    "front_cost",
    "load_supernet",
    "make_budget",
    "make_search",
    "print_notes",
    "print_plan",
    "run_search",
    "val_parts",
]

OF_STEPS = (  # options
    *("step", "sampler", "mode", "token_labeling", "teacher", "teacher_path", "temperature"),
    *("clip_others", "project_epoch", "path_noise", "path_temperature", "switchable_scale"),
)
OF_GENERATIONS = ("population", "iterations", "parents", "mutations", "crossovers", "mutation_prob")
OF_SLIMMING = ("gain", "slim_step", "together")
OF_MASKS = ("mask_epochs", "mask_attention", "mask_prices", "mask_tokens", "mask_lr")
FINALISTS = 10  # networks that are measured until one is within a latency budget
NEAR = 0.02  # points of a front whose costs are this near are one network to a user
RECHECKED = 20  # candidates stopped by pre-screening that are scored in full, for the report


def check_options(options: SearchOptions) -> None:
    """Whether options fit each other.

    Raises:
        RunError: They do not.
    """
    default, kinds = SearchOptions(), {"slimming": OF_SLIMMING, "slim-masks": OF_MASKS, "uniform": ()}
    for kind, names in {"evolution": OF_GENERATIONS, **kinds}.items():
        own = kind == options.search or kind == "evolution" and options.search not in kinds
        for name in () if own else names:
            if getattr(options, name) != getattr(default, name):
                option = f"--{name.replace('_', '-')}"
                raise RunError(f"{option} is of --search {kind}; it does not go with --search {options.search}")
    if options.search in UNSCORED:
        if options.model is None:
            raise RunError(f"--search {options.search} cuts a trained vision transformer; name it by --model")
        if options.keep_ratios:
            raise RunError(
                f"--keep-ratios is of searches that score candidates; --search {options.search} keeps all tokens"
            )
        if options.elastic_epochs:
            raise RunError(
                f"--elastic-epochs is of searches that score candidates; --search {options.search} scores none"
            )
    trained = next((f"--{n}" for n in ("model", "supernet") if getattr(options, n) is not None), None)
    if trained is None and options.score in TRAINING_FREE:
        trained = f"--score {options.score}"
    if trained is not None:
        defaults = SupernetOptions()
        for name in OF_STEPS:
            if getattr(options, name) != getattr(defaults, name):
                raise RunError(f"--{name.replace('_', '-')} is for training a supernet; with {trained} none is trained")
    if options.model is not None:
        if options.score in TRAINING_FREE:
            raise RunError(f"--score {options.score} is of networks that are not trained; with --model take agreement")
        return
    if options.elastic_epochs:
        raise RunError("--elastic-epochs is for --model; a supernet from scratch is trained for --epochs")
    if options.keep_ratios:
        raise RunError("--keep-ratios is for --model: patches that matter little are told by trained attention")
    if options.score in TRAINING_FREE:
        if options.supernet is not None or options.prescreen:
            other = "--prescreen" if options.prescreen else "--supernet: it needs no trained weights"
            raise RunError(f"--score {options.score} does not go with {other}")
        return
    if options.epochs < 1:
        raise RunError("--epochs 0 is for --model; a supernet from scratch needs at least 1")
    if options.score == "agreement":
        raise RunError("--score agreement is for --model, whose full network is trained; take accuracy or likelihood")
    if options.score != "accuracy" and (options.search == "pareto" or options.prescreen):
        raise RunError(f"--score {options.score} goes neither with --search pareto nor with --prescreen")


def load_supernet(options: SearchOptions, run: Run) -> tuple[Supernet, SearchData, str | None]:
    """Load ``--supernet`` and cut images for its search that it has not seen.

    Returns:
        The supernet, the data of its search, and what is to be said of leaks (None: checked, there are none).

    Raises:
        ValueError: No supernet is there, the data or the options do not fit it, or there are not enough images that
            it was not trained on.
    """
    net = load(options.supernet, allow_pickle=options.allow_pickle)
    if not isinstance(net, Supernet):
        raise RunError(
            f"--supernet {options.supernet} is a {type(net).__name__}; expected a supernet, as recipes/supernet.py and "
            f"recipes/search.py save it (the folder 'supernet' of a run)"
        )
    space = net.space
    if options.space is not None:
        space = open_space(options.space)
        space = space.at(**{k: v for k, v in net.space.model_args.items() if k in space.model_args})
        try:
            net.check_arch(space.largest)
        except ArchError as e:
            raise RunError(f"--space {options.space} does not fit the supernet {options.supernet}: {e}") from None
    size = tuple(net.space.model_args["img_size"])
    if options.img_size is not None and image_pair(options.img_size) != size:
        raise RunError(f"--img-size {options.img_size} is not that of the supernet, {size}; leave the option out")
    splits = open_splits(options)
    unnamed = align_classes(net, splits.class_names, f"the supernet {options.supernet}", options.dataset)
    record = record_of(str(options.supernet) if ":" in options.supernet else f"local-dir:{options.supernet}")
    cut = functools.partial(split_unseen, options, splits, record)
    train_indices, val, (note,) = cached_parts(run, splits, cut)
    note = "; ".join(n for n in (unnamed, note) if n) or None
    config = {**timm.data.resolve_model_data_config(net), "background": splits.background}
    return net, SearchData(splits, space, train_indices, val, config), note


def split_unseen(
    options: SearchOptions, splits: Splits, record: dict[str, Any] | None
) -> tuple[list[int], list[int], str | None]:
    """Training indices that are left, those to score on, and what is to be said of leaks."""
    small = len(splits.train) + len(splits.test) <= HASHED_IMAGES
    hashes, test_hashes = (content_hashes(s) if small else None for s in (splits.train, splits.test))
    tested = repeated(hashes, test_hashes) if small else [False] * len(splits.train)
    seen = [False] * len(splits.train) if record is None else trained_on(record, splits.train, hashes)
    sizes = {"per_class": options.val_per_class, "fraction": options.val_fraction, "seed": options.seed}
    try:
        avoid = [a or b for a, b in zip(tested, seen, strict=True)]
        train_indices, val = split_search_val(splits.train, **sizes, avoid=avoid)
    except ValueError as e:
        if not any(seen):
            raise
        if not options.allow_leak:
            raise RunError(
                f"{sum(seen)} of the {len(seen)} images of {options.dataset} were trained on by {options.supernet}: "
                f"{e}. Search with the --val-per-class and --val-fraction that it was trained with, or --allow-leak"
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


def make_budget(options: SearchOptions, space: SearchSpace) -> Budget | None:
    """The budget that the options name; shares are of the largest network."""
    text = options.budget
    if text == "none":
        return None
    if "latency" in text and "latency_ms" not in space.cost_names:
        raise RunError(
            f"--budget {text} needs --latency-table FILE; `python recipes/latency.py --help` says how one is measured "
            f"on this device"
        )
    return Budget.parse(text, share_of=space.costs(space.largest))


def make_search(
    options: SearchOptions, space: SearchSpace, budget: Budget | None, images: int, start: Sequence[Arch] = ()
) -> Search:
    """The search that the options name; candidates are scored on ``images`` images, evolution begins with ``start``.

    Raises:
        BudgetError: The space cannot meet the budget; the message gives the reachable range.
        ValueError: Options do not go together.
    """
    if options.prescreen and options.search != "evolution":
        raise RunError("--prescreen needs --search evolution: it asks whether a candidate may still become a parent")
    if options.search == "slimming":
        gain = {"latency": "latency_ms"}.get(options.gain, options.gain)
        if gain in ("latency_ms", "mes") and "latency_ms" not in space.cost_names:
            raise RunError(f"--gain {options.gain} needs --latency-table FILE, see `python recipes/latency.py --help`")
        return Slimming(space, budget, options.seed, gain=gain, step=options.slim_step, together=options.together)
    sizes = {k: getattr(options, k) for k in ("population", "iterations", "mutations", "crossovers")}
    if options.search == "random":
        return RandomSearch(space, budget, options.seed, **sizes)
    sizes["parents"] = options.parents
    if options.mutation_prob is not None:
        sizes["mutation_prob"] = options.mutation_prob
    if options.search == "pareto":
        names = objectives(options, space)
        return ParetoSearch(space, budget, options.seed, **sizes, objectives=names, max_score=images)
    return EvolutionSearch(space, budget, options.seed, **sizes, start=start)


def objectives(options: SearchOptions, space: SearchSpace) -> tuple[str, ...]:
    names = [name.strip() for name in options.objectives.split(",")]
    names = tuple("latency_ms" if name == "latency" else name for name in names)
    if "latency_ms" in names and "latency_ms" not in space.cost_names:
        raise RunError("--objectives latency needs --latency-table FILE, see `python recipes/latency.py --help`")
    return names


def print_notes(run: Run, data: SearchData, budget: Budget | None, leak: str | None) -> None:
    """What a user should know before the work starts."""
    for text in (leak, *data.splits.notes):
        if text:
            run.print(f"note: {text}")
    for name, value in data.space.idle_limits(budget).items() if budget else ():
        run.print(
            f"note: all networks of the space have {name} {format_cost(name, value)} (the stem decides it): a limit on "
            f"it chooses nothing"
        )


def print_plan(options: SearchOptions, run: Run, data: SearchData, search: Search, device: torch.device) -> None:
    """What will be done, and about how long it takes on this machine, by timing the largest network."""
    net = data.space.network(data.space.largest).to(device).eval()
    x = torch.randn(16, *data.config["input_size"], device=device)
    with torch.inference_mode():
        seconds = min(_timed(lambda: net(x), device) for _ in range(3)) / len(x)
    train, val, test = len(data.train), len(data.val), len(data.splits.test)
    epochs = 0 if options.supernet else options.epochs
    least, most = data.space.cost_range("macs")
    typical = dict(search.budget or ()).get("macs", (least + most) / 2) / most
    candidates, at_most = search.planned, "up to"
    if isinstance(search, Slimming):  # from the largest network down
        typical, at_most = (1 + typical) / 2, "about"
    scored = candidates + (options.num_random + 1) + options.num_any_cost
    # a step takes about three forwards
    training = epochs * train * 3 * seconds * networks_per_image(options, data.space)
    scoring = (scored * val + (options.num_random + 2) * test) * typical * seconds
    share = run.num_processes
    trained = f"train {epochs} epochs of {train} images ({format_minutes(training / share)}), " if epochs else ""
    run.print(
        f"plan: {trained}score {at_most} {candidates} candidates and {scored - candidates} networks to compare with on "
        f"{val} images, test {options.num_random + 2} on {test} ({format_minutes(scoring / share)}); about "
        f"{format_minutes((training + scoring) / share)} in all, by the speed of the largest network"
    )
    if not options.supernet and val > 0.2 * (train + val):
        run.print(
            f"note: {val} of {train + val} training images are held out to score candidates on; the report ends with a "
            f"command that trains the found network on all of them"
        )


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def val_parts(options: SearchOptions, data: SearchData, device: torch.device) -> tuple[EvalBatches | None, EvalBatches]:
    """Batches of the validation images: those of pre-screening, a share of each class, and the others."""
    labels = np.asarray(data.splits.train["label"][:])[data.val]
    first = np.zeros(len(labels), dtype=bool)
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        steps = np.floor(np.arange(len(members) + 1) * options.prescreen)
        first[members] = np.diff(steps) > 0
    if options.prescreen and not 0 < first.sum() < len(first):
        raise RunError(f"--prescreen {options.prescreen:g} of {len(first)} validation images leaves a part empty")
    val = np.asarray(data.val)
    batches = [
        eval_batches(
            data.splits.train,
            eval_transform(data.config),
            indices=part.tolist(),
            device=device,
            num_workers=options.workers,
        )
        for part in (val[first], val[~first])
        if len(part)
    ]
    return (batches[0], batches[1]) if options.prescreen else (None, batches[0])


def run_search(options: SearchOptions, search: Search, evaluator: Evaluator, run: Run, clock: Deadline, images: int):
    """Ask, score and tell until the search is done or the time is up; history.jsonl grows by whole generations.

    Returns:
        Why the search ended early, or None.
    """
    pareto, slimming = isinstance(search, ParetoSearch), isinstance(search, Slimming)
    unit, shown = ("step", "reached") if slimming else ("generation", "best")
    middle = "hypervolume" if pareto else "share of largest" if slimming else "mean of parents"
    run.print(f"\n{unit:>10} {'candidates':>10} {shown:>7} {middle:>15} {'MACs':>8} {'seconds':>7} {'ends in':>7}")
    each = 0.0  # seconds per candidate, of the last generation
    while not search.done:
        batch = search.ask()
        late = [search.generation > 0 and clock.over(extra=each * len(batch))]
        if any(late if evaluator.world == 1 else evaluator.gather(late)):  # clocks differ, the answer must not
            done = (
                f"{search.generation} steps" if slimming else f"{search.generation} of {search.generations} generations"
            )
            return f"--max-minutes {options.max_minutes:g}: ended after {done}"
        begin = clock.seconds()
        at_least = None
        if options.prescreen and len(search.history) >= options.parents:
            at_least = sorted(r["score"] for r in search.history)[-options.parents]
        with Progress(-(-len(batch) // evaluator.world), f"{unit} {search.generation + 1}", run.is_main) as bar:
            scores = evaluator.score(batch, report=bar, at_least=at_least)
        search.tell(zip(batch, scores, strict=True))
        spent = clock.seconds() - begin
        each = spent / len(batch)
        for record, arch in zip(search.history[-len(batch) :], batch, strict=True):
            scored = evaluator.record(arch, prescreened=at_least is not None)
            record["seconds"] = scored["seconds"]
            if "correct" in scored:
                record["correct"] = scored["correct"]
            if "value" in scored:
                record["value"] = scored["value"]
            if "prescreened" in scored:
                record["prescreened"], record["at_least"] = scored["prescreened"], at_least
        if run.is_main:
            write_jsonl(run / "history.jsonl", search.history)
        left = each * max(0, search.planned - len(search.history))
        best = search.best
        if slimming:
            best, cost = search.chain()[-1], front_cost(search.budget, search.space)
            middle = best[cost] / search.space.costs(search.space.largest)[cost]
        elif pareto:
            middle = search.hypervolume()
        else:
            middle = np.mean(sorted((r["score"] for r in search.history), reverse=True)[: options.parents]) / images
        run.print(
            f"{search.generation:>10} {len(search.history):>10} {best['score'] / images:>7.4f} "
            f"{middle:>15.4f} {format_cost('macs', best['macs']):>8} {spent:>7.1f} {format_minutes(left):>7}"
        )
    return None


def prescreen_effect(history: Sequence[dict[str, Any]], evaluator: Evaluator, images: int) -> dict[str, Any] | None:
    """What pre-screening saved, and how many of the best candidates that it stopped would have been parents."""
    ended = [r for r in history if "prescreened" in r]
    if not ended:
        return None
    ended.sort(key=lambda r: (r["score"] - r["at_least"], r["key"]), reverse=True)
    again = ended[:RECHECKED]
    scores = evaluator.score([Arch.from_record(r) for r in again])
    return {
        "stopped": len(ended),
        "images_saved": sum(images - r["prescreened"] for r in ended) / (images * len(history)),
        "rechecked": len(again),
        "would_be_parents": sum(s >= r["at_least"] for s, r in zip(scores, again, strict=True)),
    }


def choose(search: Search, table: LatencyTable | None, run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The best network, and what was measured on the way: under a latency budget, the best that keeps it end to end.

    Where none of the first `FINALISTS` does, the fastest of them.
    """
    ranked = candidates(search)
    limit = dict(search.budget or ()).get("latency_ms")
    if limit is None:
        return ranked[0], []
    measured: list[dict[str, Any]] = []
    for record in ranked[:FINALISTS]:
        got = measure_network(Arch.from_record(record), search.space, table)
        measured.append({"key": record["key"], "predicted_ms": record["latency_ms"], **got})
        run.print(f"finalist: {got['ms']:.4g} ms measured, {record['latency_ms']:.4g} predicted, limit {limit:g}")
        if got["ms"] <= limit:
            return record, measured
    fastest = min(range(len(measured)), key=lambda i: measured[i]["ms"])
    run.print(
        f"none of the {len(measured)} best networks keeps the limit when measured end to end: the machine is busy, or "
        f"the table is old. The fastest of them is kept as best/"
    )
    return ranked[fastest], measured


def candidates(search: Search) -> list[dict[str, Any]]:
    """Those within the budget, best first; of a slimming that ended above it, the last network of its chain."""
    limits = dict(search.budget or ())
    ranked = sorted((r for r in search.history if "prescreened" not in r), key=rank_key)
    within = [r for r in ranked if all(r[name] <= limit for name, limit in limits.items())]
    return within or (search.chain()[-1:] if isinstance(search, Slimming) else [])


def family(search: Search) -> list[dict[str, Any]]:
    """What a search has found beside its best network, cheapest first: a front, a chain, or nothing."""
    if isinstance(search, ParetoSearch):
        return distinct_points(search.front(), search.objectives[0])
    return search.chain()[::-1] if isinstance(search, Slimming) else []


def comparable(search: Search) -> Budget | None:
    """The budget of random networks to compare with: of a slimming's result, that of evolution's candidates."""
    return Budget(**search.budget.limits) if isinstance(search, Slimming) and search.budget else search.budget


def front_cost(budget: Budget | None, space: SearchSpace) -> str:
    """What the front sets against accuracy: the budget's first cost that networks differ in; MACs without a budget."""
    idle = space.idle_limits(budget) if budget else ()
    return next((name for name, _ in budget or () if name not in idle), "macs")


def front(records: Sequence[dict[str, Any]], cost: str) -> list[dict[str, Any]]:
    """Records that no other beats in score and cost, cheapest first."""
    points, best = [], -1
    for record in sorted(records, key=lambda r: (r[cost], -r["score"], r["key"])):
        if record["score"] > best:
            points.append(record)
            best = record["score"]
    return points


def distinct_points(points: Sequence[dict[str, Any]], cost: str) -> list[dict[str, Any]]:
    """Of points whose costs differ by less than `NEAR`, the best; a front's order, cheapest first, is kept."""
    kept: list[dict[str, Any]] = []
    for point in points:
        if kept and point[cost] < (1 + NEAR) * kept[-1][cost]:
            if point["score"] > kept[-1]["score"]:
                kept[-1] = point
        else:
            kept.append(point)
    return kept


def score_of(folder: Path, data: SearchData, device: torch.device) -> tuple[int, int]:
    """Correct answers on the test images of a model's folder, loaded and fed the way a user would."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).to(device).eval()
    config = {**timm.data.resolve_model_data_config(model), "background": data.splits.background}
    transform = eval_transform(config)
    return count_correct(model, eval_batches(data.splits.test, transform, device=device))


def export(
    net: Supernet,
    record: dict[str, Any],
    folder: Path,
    options: SearchOptions,
    data: SearchData,
    seen: str | None,
    latency: str | None = None,
) -> None:
    """One network with the supernet's weights, as a folder that timm loads; with the record of what they have seen."""
    info = {
        **{k: record[k] for k in data.space.cost_names if k in record},
        **({"latency_device": latency} if latency else {}),
        "search_val": {"correct": record["score"], "images": len(data.val)},
        "searched": {k: getattr(options, k) for k in ("dataset", "budget", "search", "seed", "supernet")},
        "weights": "inherited from the supernet",
    }
    save_pretrained(
        net.extract(Arch.from_record(record)),
        folder,
        info=info,
        label_names=data.splits.class_names,
        data_config=data.config,
        files={} if seen is None else {"training_data.json": seen},
    )


def finish(
    options: SearchOptions,
    accelerator: Accelerator,
    run: Run,
    data: SearchData,
    net: Supernet,
    search: Search,
    evaluator: Evaluator,
    table: LatencyTable | None,
    facts: dict[str, Any],
) -> None:
    """Baselines, folders of the best and the front, test accuracies, report."""
    device = accelerator.device
    rng = generator(options.seed, Stream.BASELINES)
    others = [data.space.largest]
    if options.num_random:
        with contextlib.suppress(BudgetError):  # random draws may miss a budget that the search did meet
            others += data.space.sample_many(options.num_random, rng, comparable(search))
    spread = [data.space.smallest, *data.space.sample_many(options.num_any_cost, rng)]
    within = "the budget" if search.budget else "the space"
    run.print(
        f"\nscoring {len(others) - 1} random networks of {within} and {options.num_any_cost} of any cost as baselines"
    )
    facts["prescreen"] = prescreen_effect(search.history, evaluator, len(data.val))
    evaluator.score([*others, *spread])
    tester = Evaluator(
        net,
        eval_batches(data.splits.test, eval_transform(data.config), device=device),
        rank=evaluator.rank,
        world=evaluator.world,
        gather=evaluator.gather,
        next_index=evaluator.next_index and (lambda name: evaluator.next_index(f"test {name}")),
        dtype=evaluator.dtype,
    )
    test_scores = tester.score(others)
    if not run.is_main:
        return

    def record(arch: Arch, **more: int) -> dict[str, Any]:
        scored = {k: v for k, v in evaluator.record(arch).items() if k in ("score", "correct")}
        return in_answers({**arch.record(), "key": arch.key(), **data.space.costs(arch), **scored, **more})

    # where, in which runtime and on how many images latency is that of the table
    facts["latency"] = table and str(table.conditions)
    if "latency_ms" in dict(search.budget or ()):
        run.print(f"\nthe best are timed from end to end on {facts['latency']}")
    best, measured = choose(search, table, run)
    best = in_answers(best)
    seen = read_file(options.supernet or run / "supernet", "training_data.json")
    export(net, best, run / "best", options, data, seen, facts["latency"])
    largest, *compared = [record(a, test=t) for a, t in zip(others, test_scores, strict=True)]
    free = [record(a) for a in spread]
    shutil.rmtree(run / "pareto", ignore_errors=True)
    if isinstance(search, ParetoSearch):
        points = search.front()
        facts["objectives"] = list(search.objectives)
        facts["hypervolumes"] = search.hypervolumes
    elif isinstance(search, Slimming):
        facts["objectives"] = [front_cost(search.budget, data.space)]
        points = [in_answers(r) for r in family(search)]
    else:
        cost = front_cost(search.budget, data.space)
        facts["objectives"] = [cost]
        scored = [in_answers(r) for r in search.history if "prescreened" not in r]
        points = front([*scored, largest, *compared, *free], cost)
        points = distinct_points(points, cost)
    for k, point in enumerate(points, start=1):
        export(net, point, run / "pareto" / str(k), options, data, seen, facts["latency"])
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
            "baseline": score_baseline(data.splits, data.config, options.workers),
            "spread": free,
            "front": [{k: p[k] for k in shown} for p in points],
            "val_images": len(data.val),
            "test_images": images,
        },
    )
    run.print("\n" + report(run.folder))
    run.print(f"\nreport: {run / 'report.md'}, pictures beside it. The network, in any script:")
    run.print("    import timm, timm_resnas")
    run.print(f"    model = timm.create_model('local-dir:{run / 'best'}', pretrained=True)")
    run.print("\nTo train it with all training images, those that candidates were scored on included:")
    run.print(f"    {train_command(run.folder, options.dataset)}")


def fingerprint(net: Supernet, val: Sequence[int], prescreen: float) -> str:
    """Names the supernet's weights and the images that candidates are scored on."""
    digest = hashlib.sha256(json.dumps([list(val), prescreen]).encode())
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
