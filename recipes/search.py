"""Search a vision transformer under a compute budget: train a supernet, or take a pretrained model; export the best.

    accelerate launch recipes/search.py                                          # digits on a CPU, minutes
    accelerate launch recipes/search.py --dataset imagefolder:photos --space mini --img-size 96 --budget macs=60M
    accelerate launch recipes/search.py --budget macs=8M,params=600K --iterations 20 --max-minutes 30
    accelerate launch recipes/search.py --search pareto --objectives macs,params
    accelerate launch recipes/search.py --search slimming --budget params=300K           # a family of networks
    accelerate launch recipes/search.py --latency-table latency.json --budget latency=40%   # of recipes/latency.py
    accelerate launch recipes/search.py --supernet runs/digits-micro/supernet --budget macs=30%    # nothing is trained
    accelerate launch recipes/search.py --score dss                                                # nothing is trained
    accelerate launch recipes/search.py --model vit_small_patch16_224 --dataset imagefolder:photos --budget macs=50%

Three sets of images are kept apart: training, the search's own validation (cut from the training set, recorded in
`state/data.json`) and test. Candidates are scored on the validation images with the supernet's weights; the test
images are used once, for the last table. A random forest on small pixels and colours is its last row; the report says
so where the network found does not beat it, and what would help.

A run's folder is named by the data, the space, and the options that were changed: runs/digits-micro,
runs/digits-micro-seed=3-epochs=20. It holds

    config.yaml            the options
    supernet/              the trained supernet
    training.jsonl         its accuracy while it trained
    history.jsonl          every candidate: model and args, costs, score (correct answers), generation, origin, seconds
    best/                  timm.create_model('local-dir:<run>/best', pretrained=True)
    pareto/<k>/            the same for each point of the front, cheapest first: accuracy against the cost that the
                           budget names first (MACs without one)
    results.json, report.md, pareto.png, progress.png, choices.png
    state/                 what continuing after a kill needs

Budgets are upper limits; candidates cost between 0.975 of the first-named one and it
(paper, released code). `macs=40%` is a share of the supernet's largest network, `none` is no limit. Latency comes from
a table that `recipes/latency.py` measured on this device; what is called best is measured end to end before.
`--search pareto` looks for the whole front instead of one network: accuracy against each of `--objectives`.
`--search slimming` goes from the largest network down to the budget, each time by the step that loses least accuracy
for what it gains (`--gain`: a cost, or size and latency together; EfficientFormer's searches): a block less, the next
smaller width, fewer heads, fewer hidden units. The networks on its way are `pareto/<k>/`, and pareto.png shows what was
rejected. A smaller `--slim-step` scores more candidates; the plan says how many.
`--model … --search slim-masks` (ViT-Slim) scores none: masks on the entries of heads and on hidden units are trained
with the model under a price, and those above a threshold that keeps the budget are left, in a really smaller network;
with `--mask-tokens 0.7` tokens at fixed positions go as well.
`--model … --search uniform` is the cut that one makes by hand, of every block the same share, repaired and fine-tuned
like the others: what a search has to beat. `recipes/benchmark_roads.py` compares all of these roads over several seeds.

`--supernet` takes a folder or a Hub id of a supernet that was trained before, with its own space. Images that it was
trained on, or that are in the test part, by index or content, are not scored on (`--allow-leak` does, and the report
says so). Started again with the same command, a run continues where it was; the same seed and supernet give the same
history, on any number of processes.

`--score dss` (`dss_raw`, `dss_released`, `snip`, `synflow`, `naswot`, `params`, `macs`) goes from a space to a network
without training: candidates are scored by their untrained weights or their costs. `best/` then holds an untrained
network, and the report the command that trains it and how far the score follows the number of parameters and MACs.
`recipes/benchmark.py scores` measures what such scores are worth.

`--model` shrinks a pretrained vision transformer of timm instead: heads and hidden units of each block. The full model
is fine-tuned on the data (`--epochs`, 0: taken as it is), its units are ranked and its layers repaired by
`--calibration` training images, candidates are scored by their agreement with it on images that it was not trained on
(`--score`), and the best one is fine-tuned with the full model as its teacher (`--finetune-epochs`). The folder then
holds `full/` and `finetune/` (stages), `supernet/` (units in order of importance), `best/`, report.md, shrunk.png and
widths.png; a plan with the time of each stage is printed first. `--keep-ratios 1 0.9 0.7 0.5` also searches how many
patches go on from a quarter, half and three quarters of the depth (`vit_tokens`): those that the class token sees most.

Errors: an unknown space or dataset, an image size that the total stride does not divide, a budget that the space
cannot meet, classes with too few images, a supernet of other classes; each is said before anything is trained.
"""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

from timm_resnas.engine.options import parse
from timm_resnas.engine.settings import TRAINING_FREE, UNSCORED, SearchOptions


def defaults(options: SearchOptions) -> dict[str, Any]:
    """What depends on other options, where it is not given."""
    model = options.model is not None
    chosen = {
        "budget": "none" if options.search == "pareto" else "macs=50%" if model else "macs=20%",
        "score": "agreement" if model else "accuracy",
        "epochs": 8 if model else 12,
        "batch_size": 32 if model else 64,
        "lr": 1e-4 if model else 2e-3,
        "val_fraction": 0.15 if model else 1 / 3,
    }
    if options.search not in ("slimming", *UNSCORED):
        chosen["population"] = 60 if model else 100  # a knapsack's networks are among them
        chosen["iterations"] = 4 if model else 6
    if model and options.search == "evolution":
        chosen["mutation_prob"] = 0.1
    if not (model or options.supernet):
        chosen["space"] = "micro"
    return chosen


def resolve(options: SearchOptions) -> SearchOptions:
    """Fill in what depends on other options."""
    given = {name: value for name, value in defaults(options).items() if getattr(options, name) is None}
    return dataclasses.replace(options, **given)


def main(argv: list[str] | None = None) -> None:
    asked = parse(SearchOptions, argv, __doc__)
    options = resolve(asked)
    # torch is imported from here on, so that --help answers at once
    import hashlib

    import accelerate
    import timm
    import torch
    from accelerate.utils import gather_object

    import timm_resnas
    from timm_resnas.engine import search as job
    from timm_resnas.engine.processes import shared_counter, start
    from timm_resnas.engine.run import Deadline, Run, RunError, cli_errors, dataset_name, run_name, short_path
    from timm_resnas.engine.supernet import prepare, recalibrate, train_supernet
    from timm_resnas.nas.evaluate import Evaluator, score_unit
    from timm_resnas.nas.latency import LatencyTable

    with cli_errors("search.py"):
        clock = Deadline(options.max_minutes)
        accelerator = start(options)
        parts = [dataset_name(options.dataset)]
        if options.model is not None:
            parts.append(short_path(options.model.rpartition(":")[2]).replace("/", "-"))
        if options.supernet is not None:
            parts.append(short_path(options.supernet).replace("/", "-"))
        if options.space is not None:
            parts.append(Path(options.space).stem)
        # given as it is without being given: not shown in the name
        told = {k: None for k, v in defaults(asked).items() if getattr(asked, k) == v}
        name = run_name(dataclasses.replace(asked, **told), parts, shown=("dataset", "model", "supernet", "space"))
        job.check_options(options)
        if options.model is not None:
            from timm_resnas.engine.shrink import shrink

            shrink(options, accelerator, clock, name)
            accelerator.end_training()
            return
        run = Run(options, accelerator, name)
        note = None
        if options.supernet is None:
            data = prepare(options, run)
        else:
            net, data, note = job.load_supernet(options, run)
        space, table = data.space, None
        if options.latency_table is not None:
            table = LatencyTable.load(options.latency_table)
            table.price(space, device=table.conditions.device)  # now, not when finalists are measured
        given = {
            "supernet": None if options.supernet is None else job.fingerprint(net, (), 0),
            "latency_table": None if table is None else hashlib.sha256(table.to_json().encode()).hexdigest()[:16],
        }
        for name, was in run.cached("given.json", lambda: given).items():
            if was != given[name]:
                option = f"--{name.replace('_', '-')} {getattr(options, name)}"
                raise RunError(f"{option} has changed since {run.folder} was started; give this run another --name")
        budget = job.make_budget(options, space)
        if options.score in TRAINING_FREE:
            from timm_resnas.engine.training_free import search_training_free

            search_training_free(options, accelerator, run, data, budget, table, clock)
            accelerator.end_training()
            return
        search = job.make_search(options, space, budget, len(data.val))
        budget = search.budget  # a front's has no lower band
        first, batches = job.val_parts(options, data, accelerator.device)
        run.begin()
        run.print(
            f"{options.dataset}: {len(data.train)} images to train on, {len(data.val)} to score candidates on, "
            f"{len(data.splits.test)} to test; {data.splits.num_classes} classes; budget {budget or 'none'}"
        )
        job.print_notes(run, data, budget, note)
        job.print_plan(options, run, data, search, accelerator.device)

        if options.supernet is None:
            net = train_supernet(options, accelerator, run, data)
        else:
            run.print(f"supernet: {options.supernet}, {space.size():.2g} sub-networks")
            net = net.to(accelerator.device)
            recalibrate(options, net, data, accelerator.device)
        if options.channels_last:
            net = net.to(memory_format=torch.channels_last)
        trained = clock.seconds()
        evaluator = Evaluator(
            net,
            batches,
            prescreen=first,
            folder=run.state,
            fingerprint=job.fingerprint(net, data.val, options.prescreen),
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            gather=gather_object,
            next_index=shared_counter(accelerator),
            dtype={"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[options.amp],
            score=options.score,
        )
        ended = job.run_search(options, search, evaluator, run, clock, len(data.val) * score_unit(options.score))
        if ended:
            run.print(ended)
        facts = {
            "command": shlex.join(["accelerate", "launch", *sys.argv]),
            "dataset": options.dataset,
            "space": options.space or f"that of {options.supernet}",
            "space_size": float(space.size()),
            "space_dict": space.to_dict(),
            "budget": {"asked": options.budget, **(budget.to_dict() if budget else {})},
            "search": options.search,
            "score": options.score,
            "parents": options.parents if options.search == "evolution" else None,
            "supernet": options.supernet,
            "leak": note,
            "seed": options.seed,
            "candidates": len(search.history),
            "ended_early": ended,
            "resumed": run.resumed,
            "seconds": {"training": round(trained, 1), "search": round(clock.seconds() - trained, 1)},
            "processes": accelerator.num_processes,
            "versions": {m.__name__: m.__version__ for m in (timm_resnas, timm, torch, accelerate)},
        }
        job.finish(options, accelerator, run, data, net, search, evaluator, table, facts)
        accelerator.end_training()


if __name__ == "__main__":
    main()
