"""Publishing a run: which folders go where, and the evidence that goes along."""

from __future__ import annotations

import json
import shlex
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..hub import CONFIG, EVIDENCE, GOLDEN, WEIGHTS, load, push, strip_paths
from ..nas.jsonl import read_jsonl
from .run import RunError, read_json
from .settings import PublishOptions

__all__ = ["publish"]


@dataclass
class Item:
    """A model's folder and where it goes."""

    folder: Path
    repo_id: str
    revision: str | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    text: str | None = None


def collect(options: PublishOptions, scratch: Path) -> tuple[list[Item], Item | None]:
    """The models to publish, and the supernet, which goes first.

    Raises:
        RunError: The folder holds neither a finished run nor a model, or not what was asked for.
    """
    run, repo = Path(options.run), options.repo
    if not run.is_dir():
        raise RunError(f"there is no folder {run}")
    best = next((f for f in (run / "best", run, run / "supernet") if (f / CONFIG).is_file()), None)
    if best is None:
        raise RunError(
            f"{run} holds neither best/ nor supernet/ nor {CONFIG}; expected the folder of a finished run or of a model"
        )
    if not (best / WEIGHTS).is_file():
        raise RunError(f"{best} holds no {WEIGHTS}; expected a folder that save_pretrained wrote")
    results = read_results(run)
    main = Item(best, repo, options.revision)
    items = [main]
    if best == run / "best":
        main.results, main.files = results_of_best(results), evidence(run, results, scratch)
    elif best == run / "supernet":
        main.results, main.files = results_of_supernet(run, results), evidence(run, results, scratch, "training")

    if options.front != "no":
        points = [p for p in (run / "pareto").glob("*/" + CONFIG) if p.parent.name.isdecimal()]
        points.sort(key=lambda p: int(p.parent.name))
        if not points:
            raise RunError(f"{run} holds no pareto/; --front is for the folder of a finished search")
        pictures = {k: v for k, v in main.files.items() if k.endswith("pareto.png")}
        for k, path in enumerate(points, start=1):
            where = (repo, f"pareto-{k}") if options.front == "revisions" else (f"{repo}-pareto-{k}", options.revision)
            text = f"Point {k} of {len(points)} of the front of accuracy against cost, cheapest first; see {repo}."
            items.append(Item(path.parent, *where, results_of_point(path, results), pictures, text=text))

    supernet = None
    if options.supernet:
        if best != run / "best" or not (run / "supernet" / CONFIG).is_file():
            raise RunError(f"{run} holds no supernet/ beside best/; --supernet is for a search that trained its own")
        supernet = Item(run / "supernet", f"{repo}-supernet", options.revision, results_of_supernet(run, results))
        supernet.files = evidence(run, results, scratch, "training")
    return items, supernet


def read_results(run: Path) -> dict[str, Any]:
    path = run / "results.json"
    if not path.is_file():
        return {}
    results = read_json(path)
    clean = strip_paths(results)
    if isinstance(results.get("command"), str):
        try:
            words = shlex.split(results["command"])
        except ValueError:  # it was not quoted
            words = results["command"].split()
        clean["command"] = shlex.join(strip_paths(word) for word in words)
    return clean


def results_of_best(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Accuracies of best/: a search's (counts of correct answers) or a training's (shares)."""
    common = {"dataset": results.get("dataset"), "metric": "accuracy", "evidence": f"{EVIDENCE}/results.json"}
    best, found = results.get("best"), []
    if isinstance(best, dict) and "test" in best:
        images = results["test_images"]
        found.append({**common, "split": "test", "value": round(best["test"] / images, 5), "images": images})
        images = results["val_images"]
        value = round(best["score"] / images, 5)
        found.append({**common, "split": "validation part of the search", "value": value, "images": images})
    elif isinstance(results.get("test"), dict) and "best" in results["test"]:
        images = results.get("images", {}).get("test")
        value = round(results["test"]["best"]["top1"], 5)
        found.append({**common, "split": "test", "value": value, **({"images": images} if images else {})})
    return found


def results_of_point(path: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    score = json.loads(path.read_text(encoding="utf-8")).get("timm_resnas", {}).get("search_val")
    if not score:
        return []
    split, value = "validation part of the search", round(score["correct"] / score["images"], 5)
    return [dict(dataset=results["dataset"], split=split, metric="accuracy", value=value, images=score["images"])]


def results_of_supernet(run: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the largest network, which is what the model computes by itself."""
    records = read_jsonl(run / "training.jsonl") if (run / "training.jsonl").is_file() else []
    accuracy = records[-1]["accuracy"].get("largest") if records else None
    if accuracy is None:
        return []
    dataset = results.get("dataset") or strip_paths(config_info(run / "supernet").get("dataset", "its data"))
    more = {"images": results["val_images"]} if "val_images" in results else {}
    evidence = f"{EVIDENCE}/training.jsonl"
    split = "validation part of the search"
    return [dict(dataset=dataset, split=split, metric="accuracy", value=accuracy, evidence=evidence, **more)]


def config_info(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("timm_resnas", {})


def evidence(run: Path, results: dict[str, Any], scratch: Path, prefix: str = "") -> dict[str, Path]:
    """Pictures and tables of a run, by their names in the repository."""
    names = ("pareto.png", "progress.png", "training.png", "history.jsonl", "training.jsonl")
    found = {f"{EVIDENCE}/{n}": run / n for n in names if (run / n).is_file() and n.startswith(prefix)}
    if results and not prefix:
        path = scratch / "results.json"
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        found[f"{EVIDENCE}/results.json"] = path
    return found


def publish(options: PublishOptions) -> None:
    """Send what the options name, or print what would be sent.

    Raises:
        RunError: Options do not go together, or the folder does not hold what they name.
        HubError: The Hub refuses, or cannot be reached.
    """
    if options.repo is None:
        raise RunError("--repo is missing: OWNER/NAME of a repository, which is made if need be")
    if options.pull_request and options.front == "revisions":
        raise RunError("--pull-request proposes one branch; use --front repositories or leave out one of them")
    if options.tag and options.front == "revisions":
        raise RunError("--tag names one commit; with --front revisions there are several")
    with tempfile.TemporaryDirectory() as scratch:
        items, supernet = collect(options, Path(scratch))
        plan = ([supernet] if supernet else []) + items
        for number, item in enumerate(plan, start=1):
            where = f"{item.repo_id}@{item.revision}" if item.revision else item.repo_id
            print(f"[{number}/{len(plan)}] {item.folder} -> {where}", flush=True)
            load(item.folder, check=(item.folder / GOLDEN).is_file())
            pushed = push(
                item.folder,
                item.repo_id,
                token=options.token,
                revision=item.revision,
                private=options.private,
                create_pr=options.pull_request,
                tag=options.tag,
                tags=options.tags,
                license=options.license,
                results=item.results,
                info=item.info,
                files=item.files,
                text=" ".join(t for t in (item.text, options.text) if t) or None,
                overwrite=options.overwrite,
                dry_run=options.dry_run,
                say=lambda line: print(f"  {line}", flush=True),
            )
            if options.dry_run:
                print(f"  would send {pushed}\n\n{pushed.card}")
            else:
                print(f"  done: {pushed.url}", flush=True)
            if item is supernet:
                # the networks say which weights they came from
                commit = f"@{pushed.commit}" if pushed.commit else ""
                for other in items:
                    other.info["supernet"] = f"hf-hub:{item.repo_id}{commit}"
    if options.dry_run:
        print("nothing was sent (--dry-run)")
    else:
        print(
            f"\n    import timm, timm_resnas\n    model = timm.create_model('hf-hub:{options.repo}', pretrained=True)"
        )
