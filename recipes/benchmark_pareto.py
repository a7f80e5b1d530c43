"""The front of several objectives: our search against NSGA-II's default operators, at equal evaluations.

    python recipes/benchmark_pareto.py runs/digits-micro
    python recipes/benchmark_pareto.py runs/digits-micro --objectives macs --evaluations 300 --seeds 3

The run's trained supernet scores all networks on the run's validation images. Objectives are the error and
`--objectives`. NSGA-II is pymoo's with its default operators on one integer per searched layer: uniform sampling,
simulated binary crossover and polynomial mutation with rounding, duplicates among the integers eliminated; with its
default population of 100, and with one of the size of our generations.

What counts is the hypervolume of all networks that a search has scored, so none loses by what it forgets: the share of
the box between no correct answer at the largest network's costs, the fixed reference point, and a perfect network
without cost. Seeds are those of the searches; the supernet is the same.

A network that several searches ask for is scored once, but counts in each. Scores are kept in the run's
`state/pareto-benchmark/`: started again, all that was scored before costs nothing. Interrupt it at will.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from timm_resnas.arch import Arch
from timm_resnas.data import eval_batches, eval_transform
from timm_resnas.engine.run import Deadline, Progress, RunError, cli_errors, format_minutes
from timm_resnas.engine.search import fingerprint
from timm_resnas.engine.supernet import open_run
from timm_resnas.nas.evaluate import Evaluator
from timm_resnas.nas.pareto import ParetoSearch
from timm_resnas.nas.space import SearchSpace

Score = Callable[[list[Arch]], list[int]]


def ours(space: SearchSpace, score: Score, seed: int, args: argparse.Namespace) -> list[Arch]:
    """Networks that our search scores, in order."""
    generations = 1 + -(-(args.evaluations - args.population) // args.children)
    search = ParetoSearch(
        space,
        None,
        seed,
        objectives=args.objectives,
        population=args.population,
        iterations=generations,
        parents=args.children,
        mutations=args.children - args.children // 2,
        crossovers=args.children // 2,
    )
    while not search.done:
        batch = search.ask()
        search.tell(zip(batch, score(batch), strict=True))
    return [search.archs[r["key"]] for r in search.history]


def nsga2(space: SearchSpace, score: Score, seed: int, args: argparse.Namespace, population: int) -> list[Arch]:
    """Networks that pymoo's NSGA-II scores with its default operators for integers, in order."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.optimize import minimize

    asked: list[Arch] = []

    class Networks(Problem):
        def __init__(self) -> None:
            last = np.array([len(gene.draws) - 1 for gene in space.searched])
            super().__init__(n_var=len(last), n_obj=1 + len(args.objectives), xl=0, xu=last, vtype=int)

        def _evaluate(self, x: np.ndarray, out: dict[str, Any], *_: Any, **__: Any) -> None:
            archs = space.build(x.astype(int))
            asked.extend(archs)
            out["F"] = objectives(space, archs, score(archs), args.objectives)

    algorithm = NSGA2(
        pop_size=population,
        sampling=IntegerRandomSampling(),
        crossover=SBX(vtype=float, repair=RoundingRepair()),
        mutation=PM(vtype=float, repair=RoundingRepair()),
        eliminate_duplicates=True,
    )
    minimize(Networks(), algorithm, ("n_eval", args.evaluations), seed=seed)
    return asked


def objectives(space: SearchSpace, archs: list[Arch], scores: list[int], names: list[str]) -> np.ndarray:
    """Score, negated, and costs: all to be low, [n, 1 + number of costs]."""
    costs = [space.costs(a) for a in archs]
    return np.array([[-s, *(c[n] for n in names)] for s, c in zip(scores, costs, strict=True)], float)


def hypervolume(values: np.ndarray, space: SearchSpace, names: list[str], images: int) -> float:
    """Share of the box between the largest network's costs without a correct answer, and the ideal."""
    from pymoo.indicators.hv import HV

    largest = space.costs(space.largest)
    scale = np.array([images, *(largest[n] for n in names)])
    ideal = np.array([-1] + [0] * len(names))
    return float(HV(ref_point=np.ones(len(scale))).do(values / scale - ideal))


def check(args: argparse.Namespace, space: SearchSpace) -> None:
    """Whether the options can be used.

    Raises:
        RunError: They cannot.
    """
    known = list(space.costs(space.largest))
    if not set(args.objectives) <= set(known):
        raise RunError(f"--objectives must be of {', '.join(known)}; got {' '.join(args.objectives)}")
    if args.evaluations < args.population or (args.evaluations - args.population) % args.children:
        raise RunError(
            f"--evaluations must be --population plus a multiple of --children, so that generations are whole; got "
            f"{args.evaluations}, {args.population} and {args.children}"
        )
    if args.seeds < 1 or args.children < 2:
        raise RunError(f"--seeds must be at least 1 and --children at least 2, got {args.seeds} and {args.children}")


def benchmark(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    _, data, net = open_run(args.run_folder)
    space = net.space
    check(args, space)
    evaluator = Evaluator(
        net,
        eval_batches(data.splits.train, eval_transform(data.config), indices=data.val),
        folder=args.run_folder / "state" / "pareto-benchmark",
        fingerprint=fingerprint(net, data.val, 0.0),
    )
    images = len(data.val)
    methods: dict[str, Callable[..., list[Arch]]] = {"ours": ours}
    for population in dict.fromkeys(min(size, args.evaluations) for size in (100, args.children)):
        methods[f"NSGA-II, population {population}"] = lambda *a, population=population: nsga2(*a, population)

    evaluator.score([space.smallest, space.largest])
    spread = space.sample_many(4, np.random.default_rng(0))
    evaluator.score(spread)
    total = args.seeds * len(methods) * args.evaluations
    seconds = statistics.mean(evaluator.record(a)["seconds"] for a in spread)
    print(
        f"{args.run_folder}: {images} validation images, {1e3 * seconds:.0f} ms each network; {total} evaluations, at "
        f"most {format_minutes(total * seconds)} if none was scored before",
        flush=True,
    )
    volumes: dict[str, list[float]] = {name: [] for name in methods}
    distinct: dict[str, list[int]] = {name: [] for name in methods}
    clock, done = Deadline(), 0
    for seed in range(args.seeds):
        for name, method in methods.items():
            computed, begin = evaluator.num_computed, time.perf_counter()
            with Progress(args.evaluations, f"{name}, seed {seed}") as bar:
                archs = method(space, lambda a, bar=bar: evaluator.score(a, lambda _: bar()), seed, args)
            archs = archs[: args.evaluations]
            values = objectives(space, archs, evaluator.score(archs), args.objectives)
            volumes[name].append(hypervolume(values, space, args.objectives, images))
            distinct[name].append(len({a.key() for a in archs}))
            done += 1
            left = clock.seconds() / done * (args.seeds * len(methods) - done)
            print(
                f"seed {seed}, {name}: {volumes[name][-1]:.4f}; {evaluator.num_computed - computed} networks scored "
                f"in {time.perf_counter() - begin:.0f} s, ends in {format_minutes(left)}",
                flush=True,
            )
    print(
        f"\nhypervolume of error, {', '.join(args.objectives)} after {args.evaluations} evaluations; "
        f"{space.size():.2g} sub-networks"
    )
    print("| search | " + " | ".join(f"seed {s}" for s in range(args.seeds)) + " | median | different networks |")
    print("|---" * (args.seeds + 3) + "|")
    for name, values in volumes.items():
        cells = " | ".join(f"{v:.4f}" for v in values)
        print(f"| {name} | {cells} | {statistics.median(values):.4f} | {statistics.median(distinct[name]):g} |")
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "run_folder")}
        args.json.write_text(json.dumps({"settings": settings, "hypervolumes": volumes, "distinct": distinct}) + "\n")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a run of search.py or supernet.py")
    parser.add_argument("--objectives", nargs="+", default=["macs", "params"], metavar="COST", help="beside the error")
    parser.add_argument("--evaluations", type=int, default=300, help="networks that each search scores")
    parser.add_argument("--population", type=int, default=100, help="networks of our first generation")
    parser.add_argument("--children", type=int, default=50, help="networks of our other generations, and survivors")
    parser.add_argument("--seeds", type=int, default=5, help="repetitions")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0: torch's choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    with cli_errors("benchmark_pareto.py"):
        benchmark(args)


if __name__ == "__main__":
    main()
