"""Shrinking a trained vision transformer under a budget: fit to the data, rank, search, repair, fine-tune, compare."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

import timm_resnas

from ..arch import Arch
from ..data import EvalBatches, eval_batches, eval_transform
from ..families.elastic import ElasticSupernet, elastic
from ..families.elastic_space import ElasticSpace
from ..families.elastic_tokens import with_tokens
from ..hub import save_pretrained
from ..nas.cost import Budget, BudgetError
from ..nas.count import count_macs
from ..nas.evaluate import SCORES, Evaluator, count_correct, in_answers, score_unit
from ..nas.evolution import Search
from ..nas.knapsack import alone, knapsack, losses
from ..nas.latency import LatencyTable, measure_network
from ..nas.slimming import Slimming
from ..nas.space import SearchSpace
from ..nas.supernet import Supernet
from ..nas.timing import Conditions, measure_together
from .baseline import score_baseline
from .models import class_names_of, open_model
from .processes import shared_counter
from .run import Deadline, Run, RunError, format_minutes
from .search import (
    FINALISTS,
    candidates,
    comparable,
    family,
    fingerprint,
    front_cost,
    make_budget,
    make_search,
    run_search,
)
from .seeds import Stream, generator
from .settings import UNSCORED, SearchOptions, TrainOptions
from .shrink_report import report
from .slim import check_masks, train_masks
from .supernet import SearchData, networks_per_image, num_archs, seen_images, train_supernet
from .train import ModelTraining, TrainData
from .train import prepare as prepare_model
from .training import check_passes

__all__ = ["shrink"]

POWERS = (1.0, 0.7, 0.5, 1.5)  # of the losses of single genes, in the knapsacks that a search starts from
REPAIRED = 3  # best candidates that are repaired layer after layer before one is chosen
TAUGHT_AT = 0.2  # of --lr, when a shrunk network is fine-tuned
ELASTIC_STEP = "sandwich"
LEAST_TRAINED = 4  # times as many units are in the full network's layers as in the smallest one's of --elastic-epochs


def shrink(options: SearchOptions, accelerator: Accelerator, clock: Deadline, name: str) -> None:
    """The whole job; each stage that a killed run has finished is taken from its folder.

    Args:
        options: The resolved options.
        accelerator: See `Training`.
        clock: Started with the program.
        name: Of the run's folder, where the options have none.

    Raises:
        ValueError: The model, the data or the options cannot be used; said before any long work.
    """
    run = Run(options, accelerator, name)
    model, data, fits = _prepare(options, run)
    space, table = _supernet(options, model).space, None
    if options.latency_table is not None:
        table = LatencyTable.load(options.latency_table)
        table.price(space, device=table.conditions.device)
    budget = make_budget(options, space)
    val = _batches(options, data, data.splits.train, accelerator.device, data.val)
    unscored, search, held = options.search in UNSCORED, None, budget
    if unscored:
        if budget is None:
            raise RunError(
                f"--search {options.search} cuts a network down to a --budget, such as macs=60%; none leaves it whole"
            )
        if options.search == "slim-masks":
            check_masks(options, model, budget)
        elif space.even(budget) is None:
            raise RunError(f"no network of the same share of every block is within {budget}; take another --search")
        held = Budget(lower=0, **budget.limits)
    else:
        search = make_search(options, space, budget, len(data.val))  # its errors, before the work
        held = search.budget
    run.begin()
    _print_plan(options, run, data, model, space, search, held)

    # 1. the full model, for these classes
    best = fine_tune(
        options, accelerator, run.part("full"), model, data, epochs=options.epochs, lr=options.lr, fit=not fits
    )
    full = open_model(str(best), pretrained=True).to(accelerator.device).eval()

    # 2. heads and hidden units in order of importance, layers repaired for any number of them
    images = _calibration(options, data, accelerator.device)
    net = _supernet(options, full).eval()
    if options.elastic_epochs:
        net = _train_elastic(options, accelerator, run.part("elastic"), net, data, images).eval()
    net.calibrate(images.split(64))
    if run.is_main and not (run / "supernet").exists():
        save_pretrained(
            net,
            run / "supernet",
            label_names=data.splits.class_names,
            data_config=data.config,
            files=seen_images(data.splits, data.val),
        )
    accelerator.wait_for_everyone()
    if table is not None:
        table.price(net.space, device=table.conditions.device)

    ended = None
    if options.search == "slim-masks":
        # 3. masks trained with the model, and the network that they leave
        choice, found = _by_masks(options, accelerator, run, best, data, budget)
    elif unscored:
        # 3. of every block the same share
        choice = run.cached("winner.json", lambda: _evenly(net.space, budget, table))
        found = net.extract(Arch.from_record(choice["best"]), repair=images)
    else:
        # 3. the search; the best of the candidates, repaired layer after layer
        search, ended = _search(options, accelerator, run, net, val, data, budget, clock)
        choice = run.cached("winner.json", lambda: _choose(options, net, search, val, images, table))
        found = net.extract(Arch.from_record(choice["best"]), repair=images)

    # 4. what was found is taught by the full model
    before = copy.deepcopy(found)
    facts = {
        "shrunk": {"model": options.model, "budget": options.budget, "search": options.search, "seed": options.seed},
        **{name: choice["best"][name] for name in net.space.cost_names if name in choice["best"]},
    }
    everything = data._replace(train=sorted([*data.train, *data.val]), val=[])
    tuned = fine_tune(
        options,
        accelerator,
        run.part("finetune"),
        found,
        everything,
        epochs=options.finetune_epochs,
        lr=options.lr * TAUGHT_AT,
        teacher=best,
        facts=facts,
    )
    if run.is_main:
        shutil.rmtree(run / "best", ignore_errors=True)
        shutil.copytree(tuned, run / "best")
        front = [] if search is None else _front(search, net, run, data, facts, images)
        limits = budget if search is None else comparable(search)
        results = _compare(options, run, data, net, choice, before, images, budget, limits)
        results.update(
            command=shlex.join(["accelerate", "launch", *sys.argv]),
            ended_early=ended,
            budget={"asked": options.budget, **(held.to_dict() if held else {})},
            candidates=0 if search is None else len(search.history),
            objectives=[front_cost(budget, net.space)],
            front=front,
            seconds=round(clock.seconds(), 1),
            resumed=run.resumed,
            processes=accelerator.num_processes,
            versions={m.__name__: m.__version__ for m in (timm_resnas, timm, torch, accelerate)},
        )
        run.write_json("results.json", results)
        run.print("\n" + report(run.folder))
        run.print(f"\nreport: {run / 'report.md'}, pictures beside it. The network, in any script:")
        run.print("    import timm, timm_resnas")
        run.print(f"    model = timm.create_model('local-dir:{run / 'best'}', pretrained=True)")
    accelerator.wait_for_everyone()


# -- stages ------------------------------------------------------------------------------------------------------------


def _train_options(options: SearchOptions, **given: Any) -> TrainOptions:
    """The training options that a search has as well, and others."""
    names = {f.name for f in dataclasses.fields(TrainOptions)} & {f.name for f in dataclasses.fields(SearchOptions)}
    return dataclasses.replace(TrainOptions(), **{**{n: getattr(options, n) for n in names}, **given})


def _prepare(options: SearchOptions, run: Run) -> tuple[nn.Module, TrainData, bool]:
    """The model with its weights, for the data's classes; the data; whether its own classes are the data's."""
    if options.supernet is not None or options.space is not None:
        raise RunError("--model goes neither with --space nor with --supernet: its own widths are the space")
    check_passes(dataclasses.replace(options, warmup_epochs=0), run.num_processes)  # each stage has its own warm-up
    if options.elastic_epochs and num_archs(options) < 2:
        raise RunError("--elastic-epochs trains the full network and narrower ones at once; --num-archs 1 is too few")
    if options.prescreen or options.search == "pareto" and options.score != "accuracy":
        other = "--prescreen" if options.prescreen else "--search pareto (add --score accuracy)"
        raise RunError(f"--score {options.score}, the finer one of --model, does not go with {other}")
    model, data = prepare_model(_train_options(options, pretrained=True, epochs=max(1, options.epochs)), run)
    size = tuple(data.config["input_size"][1:])
    if hasattr(model, "set_input_size") and tuple(getattr(model.patch_embed, "img_size", None) or size) != size:
        model.set_input_size(img_size=size)  # one of any image size: costs are those at the data's
    source = open_model(options.model)  # with the classes that it was saved with
    names = class_names_of(source)
    fits = source.num_classes == data.splits.num_classes and (not names or set(names) == set(data.splits.class_names))
    if options.epochs == 0 and not fits:
        raise RunError(
            f"--epochs 0 keeps the classifier of {options.model}, which has other classes than {options.dataset}; fit "
            f"it with --epochs 1 or more"
        )
    return model, data, fits


def _batches(
    options: SearchOptions, data: TrainData, part: Any, device: torch.device, indices: Sequence[int] | None = None
) -> EvalBatches:
    return eval_batches(
        part,
        eval_transform(data.config),
        batch_size=64,
        indices=indices,
        device=device,
        num_workers=options.workers,
    )


def _calibration(options: SearchOptions, data: TrainData, device: torch.device) -> torch.Tensor:
    """Training images without augmentation, [n, C, H, W]."""
    rng = generator(options.seed, Stream.CALIBRATION)
    chosen = rng.permutation(np.asarray(data.train))[: options.calibration]
    return torch.cat([x for x, _ in _batches(options, data, data.splits.train, device, chosen.tolist())])


def _search(
    options: SearchOptions,
    accelerator: Accelerator,
    run: Run,
    net: ElasticSupernet,
    val: Iterable,
    data: TrainData,
    budget: Budget | None,
    clock: Deadline,
) -> tuple[Search, str | None]:
    """A search at its end, and why it ended early, or None; evolution begins with what each layer alone can spare."""
    evaluator = _evaluator(options, accelerator, run, net, val, data)
    start = []
    if probes := _probes(options, net.space):
        run.print(f"\nscoring {len(probes)} networks with one layer narrowed, to start from")
        loss = losses(net.space, evaluator.score(probes))
        start = [a for p in POWERS if budget is not None and (a := knapsack(net.space, loss, budget, p)) is not None]
    search = make_search(options, net.space, budget, len(data.val), start)
    unit = len(data.val) * score_unit(options.score)
    return search, run_search(options, search, evaluator, run, clock, unit)


def _by_masks(
    options: SearchOptions, accelerator: Accelerator, run: Run, full: Path, data: TrainData, budget: Budget
) -> tuple[dict[str, Any], nn.Module]:
    """What masks find, in the form of `_choose`, and the network with the weights that were trained with them."""
    model = open_model(str(full), pretrained=True).to(accelerator.device)
    chosen = _train_options(options, pretrained=True)
    net = train_masks(options, chosen, accelerator, run.part("masks"), model, data)
    masks = net.within(budget, options.mask_tokens)
    arch = net.arch(masks)
    best = {**arch.record(), "key": arch.key(), **net.costs(masks)}
    if masks.tokens is not None:
        best["tokens"] = [int(mask.sum()) for mask in masks.tokens]
    return {"best": best, "finalists": [], "kept_latency": True}, net.shrink(masks)


def _evenly(space: ElasticSpace, budget: Budget, table: LatencyTable | None) -> dict[str, Any]:
    """The even cut, in the form of `_choose`."""
    arch, kept = space.even(budget), True
    priced = [name for name in space.cost_names if name != "latency_ms" or name in budget.limits]
    best = {**arch.record(), "key": arch.key(), **{name: space.cost_of(arch, name) for name in priced}}
    if "latency_ms" in budget.limits:
        best["measured_ms"] = measure_network(arch, space, table)["ms"]
        kept = best["measured_ms"] <= budget.limits["latency_ms"]
    return {"best": best, "finalists": [], "kept_latency": kept}


def _probes(options: SearchOptions, space: ElasticSpace) -> list[Arch]:
    """Networks to score before the search."""
    return alone(space) if options.search == "evolution" else []


def _supernet(options: SearchOptions, model: nn.Module) -> ElasticSupernet:
    net = elastic(model)
    return with_tokens(net, options.keep_ratios) if options.keep_ratios else net


def _trained_space(space: ElasticSpace) -> ElasticSpace:
    """The networks that --elastic-epochs trains: none of a tiny part of the full one."""
    choices = [[[n for n in gene if n * LEAST_TRAINED >= gene[0]] for gene in pair] for pair in space.choices]
    return SearchSpace.from_dict({**space.to_dict(), "choices": choices})


def _train_elastic(
    options: SearchOptions,
    accelerator: Accelerator,
    run: Run,
    net: ElasticSupernet,
    data: TrainData,
    images: torch.Tensor,
) -> Supernet:
    """Narrower networks trained at once by the sandwich rule, the full one by labels and the others by its answers."""
    net.calibrate(images.split(64), repair=False)
    sandwich = dataclasses.replace(
        options,
        step=ELASTIC_STEP,
        epochs=options.elastic_epochs,
        arch_warmup_epochs=0,
        warmup_epochs=min(options.warmup_epochs, options.elastic_epochs / 2),
        min_lr=min(options.min_lr, options.lr / 20),
    )
    given = SearchData(data.splits, _trained_space(net.space), data.train, data.val, data.config)
    return train_supernet(sandwich, accelerator, run, given, net)


def _evaluator(
    options: SearchOptions, accelerator: Accelerator, run: Run, net: ElasticSupernet, val: Iterable, data: TrainData
) -> Evaluator:
    return Evaluator(
        net,
        val,
        folder=run.state,
        fingerprint=fingerprint(net, data.val, 0.0),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        gather=gather_object,
        next_index=shared_counter(accelerator),
        dtype={"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[options.amp],
        score=options.score,
    )


def fine_tune(
    options: SearchOptions,
    accelerator: Accelerator,
    run: Run,
    model: nn.Module,
    data: TrainData,
    *,
    epochs: int,
    lr: float,
    teacher: Path | None = None,
    facts: Mapping[str, Any] | None = None,
    fit: bool = False,
) -> Path:
    """Train a model that has weights, or save it as it is where there are no epochs; its folder.

    Args:
        options: Of the search.
        accelerator: See `Training`.
        run: The stage's part of the run; a finished one is taken as it is.
        model: The model.
        data: What it is trained on.
        epochs: How long.
        lr: Highest learning rate.
        teacher: Folder of a model whose probabilities are half of the loss.
        facts: See `ModelTraining`.
        fit: Whether a classifier of other classes is first fitted to the model's features.
    """
    best = run / "best"
    if (best / "config.json").is_file():
        run.print(f"{run.folder.name}: trained before, {best}")
        return best
    given = dict(epochs=max(1, epochs), lr=lr, min_lr=min(options.min_lr, lr / 20), pretrained=teacher is None)
    if teacher is not None:
        given.update(teacher=str(teacher), distill="logit")
    chosen = _train_options(options, **given, warmup_epochs=min(options.warmup_epochs, max(1, epochs)))
    model = model.to(accelerator.device)
    if fit and epochs:
        fit_classifier(model, _batches(options, data, data.splits.train, accelerator.device, data.train), run)
    if not epochs:
        if run.is_main:
            names = data.splits.class_names
            save_pretrained(model.eval(), best, info=dict(facts or {}), label_names=names, data_config=data.config)
        accelerator.wait_for_everyone()
        return best
    training = ModelTraining(chosen, accelerator, run, model, data, None, facts)
    run.print(
        f"\n{run.folder.name}: {epochs} epochs of {training.steps} steps, {len(data.train)} images, learning rate up "
        f"to {lr:g}" + (f"; continues at step {training.state.step}" if training.state.step else "")
    )
    training.run_epochs()
    training.choose()
    if run.is_main:
        shutil.rmtree(run.state / "training", ignore_errors=True)
    accelerator.wait_for_everyone()
    return best


@torch.inference_mode()
def fit_classifier(model: nn.Module, batches: Iterable, run: Run) -> None:
    """Start a classifier from a logistic regression on the features of training images.

    One of another form than a linear layer is left as it is.
    """
    head = model.get_classifier()
    if not isinstance(head, nn.Linear):
        return
    from sklearn.linear_model import LogisticRegression

    model.eval()
    features, labels = [], []
    for x, y in batches:
        features.append(model.forward_head(model.forward_features(x), pre_logits=True).float().cpu())
        labels.append(y.cpu())
    x, y = torch.cat(features).double(), torch.cat(labels).numpy()
    if x.ndim != 2 or x.shape[1] != head.in_features or len(np.unique(y)) != head.out_features:
        return
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    fitted = LogisticRegression(C=0.1, max_iter=300).fit(((x - mean) / std).numpy(), y)
    weight, bias = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
    if len(weight) == 1:  # two classes share one row
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    weight = weight / std
    head.weight.copy_(weight)
    head.bias.copy_(bias - weight @ mean)
    run.print(f"the classifier starts from a logistic regression on the features of {len(y)} images")


def _choose(
    options: SearchOptions,
    net: ElasticSupernet,
    search: Any,
    val: Iterable,
    images: torch.Tensor,
    table: LatencyTable | None,
) -> dict[str, Any]:
    """The best candidate by the score of its repaired network; under a latency budget, of those that keep it."""
    limits = dict(search.budget or ())
    ranked = candidates(search)
    found, score = [], SCORES[options.score]
    with torch.inference_mode():  # or the images' activations are kept
        targets = [net(x) if options.score == "agreement" else y for x, y in val]
    for record in ranked[: FINALISTS if "latency_ms" in limits else REPAIRED]:
        arch = Arch.from_record(record)
        model = net.extract(arch, repair=images)
        with torch.inference_mode():
            repaired = sum(int(score(model(x), t).sum()) for (x, _), t in zip(val, targets, strict=True))
        measured = {}
        if "latency_ms" in limits:
            measured = measure_network(arch, search.space, table)
        found.append({**record, "repaired": repaired, **({"measured_ms": measured["ms"]} if measured else {})})
    kept = [r for r in found if r.get("measured_ms", 0.0) <= limits.get("latency_ms", np.inf)]
    order = sorted(kept, key=lambda r: (-r["repaired"], r["macs"], r["key"]))
    best = order[0] if order else min(found, key=lambda r: r["measured_ms"])
    return {"best": best, "finalists": found, "kept_latency": bool(order)}


def _front(
    search: Any, net: ElasticSupernet, run: Run, data: TrainData, facts: Mapping[str, Any], images: torch.Tensor
) -> list[dict[str, Any]]:
    """Folders of a front or a chain, repaired, without fine-tuning; none for other searches."""
    shutil.rmtree(run / "pareto", ignore_errors=True)
    points = [in_answers(r) for r in family(search)]
    for k, point in enumerate(points, start=1):
        model = net.extract(Arch.from_record(point), repair=images)
        save_pretrained(
            model,
            run / "pareto" / str(k),
            info={**facts, **{name: point[name] for name in net.space.cost_names}},
            label_names=data.splits.class_names,
            data_config=data.config,
        )
    return [{k: p[k] for k in ("key", *net.space.cost_names, "score")} for p in points]


def _compare(
    options: SearchOptions,
    run: Run,
    data: TrainData,
    net: ElasticSupernet,
    choice: Mapping[str, Any],
    found: nn.Module,
    images: torch.Tensor,
    budget: Budget | None,
    limits: Budget | None,
) -> dict[str, Any]:
    """Test accuracy, costs and latency of the full model, the found one, an even cut, and random ones within limits."""
    device = images.device
    test = _batches(options, data, data.splits.test, device)
    size = tuple(data.config["input_size"])
    models: dict[str, nn.Module] = {
        "full model": open_model(str(run / "full" / "best"), pretrained=True),
        "found, by masks" if options.search == "slim-masks" else "found, repaired": found,
        "found, fine-tuned": timm.create_model(f"local-dir:{run / 'best'}", pretrained=True),
    }
    if options.search != "uniform" and budget is not None and (even := net.space.even(budget)) is not None:
        models["even cut, repaired"] = net.extract(even, repair=images)
    conditions = Conditions.here(batch_size=1, device=device.type if device.type == "cuda" else "cpu")
    rows = {}
    for name, model in models.items():
        model = model.to(device).eval()
        correct, count = count_correct(model, test)
        params = sum(p.numel() for p in model.parameters())
        rows[name] = {"test": correct, "macs": count_macs(model, size), "params": params}
    for name, timed in measure_together(models, conditions).items():
        rows[name].update(timed)
    randoms = []
    if budget is not None and options.num_random:
        rng = generator(options.seed, Stream.BASELINES)
        drawn: list[Any] = []
        with contextlib.suppress(BudgetError):  # random draws may miss a budget that was met
            drawn = net.space.sample_many(options.num_random, rng, limits)
        for arch in drawn:
            with torch.inference_mode():
                net.set_arch(arch)
                correct, _ = count_correct(net, test)
                net.set_arch(None)
            randoms.append({**net.space.costs(arch), "key": arch.key(), "test": correct})
    return {
        "model": options.model,
        "dataset": options.dataset,
        "search": options.search,
        "score": options.score,
        "seed": options.seed,
        "space_dict": net.space.to_dict(),
        "space_size": float(net.space.size()),
        "images": {"train": len(data.train), "val": len(data.val), "test": len(data.splits.test)},
        "calibration": len(images),
        "epochs": {
            **{"full": options.epochs, "elastic": options.elastic_epochs, "finetune": options.finetune_epochs},
            **({"masks": options.mask_epochs} if options.search == "slim-masks" else {}),
        },
        "best": {k: v for k, v in choice["best"].items() if k != "seconds"},
        "finalists": choice["finalists"],
        "kept_latency": choice["kept_latency"],
        "conditions": str(conditions),
        "networks": rows,
        "random": randoms,
        "baseline": score_baseline(data.splits, data.config, options.workers),
    }


def _print_plan(
    options: SearchOptions,
    run: Run,
    data: TrainData,
    model: nn.Module,
    space: Any,
    search: Search | None,
    budget: Budget | None,
) -> None:
    """What will be done and about how long each stage takes, by timing the full model."""
    costs = space.costs(space.largest)
    device = next(model.parameters()).device
    x = torch.randn(8, *data.config["input_size"], device=device)
    with torch.inference_mode():
        model.eval()(x)
        begin = time.perf_counter()
        model(x)
        each = (time.perf_counter() - begin) / len(x)
    limit = dict(budget or ()).get("macs", 0.6 * costs["macs"]) / costs["macs"]
    slimming = isinstance(search, Slimming)
    train, val, test = len(data.train), len(data.val), len(data.splits.test)
    count, at_most = search.planned if search else 0, "about" if slimming else "up to"
    mask_epochs = options.mask_epochs if options.search == "slim-masks" else 0
    probes, calibration = len(_probes(options, space)), min(options.calibration, train)
    stages = {
        f"fine-tune the full model, {options.epochs} epochs of {train} images": options.epochs * train * 3 * each,
        f"train {num_archs(options)} networks at once, {options.elastic_epochs} epochs of {train} images": (
            options.elastic_epochs
            * train
            * 3
            * each
            * networks_per_image(dataclasses.replace(options, step=ELASTIC_STEP), _trained_space(space))
        ),
        f"rank units and prepare repair on {calibration} images": calibration * 4 * each,
        f"score {probes} networks with one layer narrowed on {val} images": probes * val * each,
        f"train the model and its masks, {mask_epochs} epochs of {train} images": mask_epochs * train * 3.2 * each,
        f"search, {at_most} {count} candidates": count * val * ((1 + limit) / 2 if slimming else limit) * each,
        f"repair {REPAIRED} finalists": REPAIRED * calibration * 6 * each if search else 0,
        f"fine-tune the found network, {options.finetune_epochs} epochs of {train + val} images": (
            options.finetune_epochs * (train + val) * (3 * limit + 1) * each
        ),
        f"test {options.num_random + 4} networks on {test} images": (options.num_random + 4) * test * limit * each,
    }
    run.print(
        f"{options.model}: {costs['macs'] / 1e6:,.0f} MMACs, {costs['params']:,} parameters; {options.dataset}: "
        f"{train} images to train on, {val} to score candidates on, {test} to test; "
        f"budget {budget or 'none'}\nplan:"
    )
    for text, seconds in stages.items():
        if not seconds:
            continue
        run.print(f"  {format_minutes(seconds):>7}  {text}")
    run.print(f"  {format_minutes(sum(stages.values())):>7}  in all, by the speed of the full model")
