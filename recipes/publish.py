"""Publish what a run found on the Hugging Face Hub, as models that plain timm loads, with the run's evidence.

    python recipes/publish.py runs/digits-micro --repo owner/name --dry-run        # what would be sent, and the card
    python recipes/publish.py runs/digits-micro --repo owner/name --license apache-2.0
    python recipes/publish.py runs/digits-micro --repo owner/name --front revisions        # also owner/name@pareto-<k>
    python recipes/publish.py runs/digits-micro --repo owner/name --front repositories     # also owner/name-pareto-<k>
    python recipes/publish.py runs/digits-micro --repo owner/name --supernet               # also owner/name-supernet
    python recipes/publish.py runs/digits-micro/pareto/2 --repo owner/name                 # any model's folder

Takes the folder of a search, of a training (their `best/` goes to the repository's main branch), of a supernet's
training, or of one model. Each model is one commit: readers see what was there before, or all of it. A repository
that holds something else is left alone (`--overwrite`). Interrupted, the same command sends only what is missing.

Sent are config.json, the weights as safetensors, an input with its logits, a model card, and under `search/` the
pictures, the history and the results; absolute paths are cut to their last part. The published supernet can be
searched by anyone: `recipes/search.py --supernet hf-hub:owner/name-supernet`.

The access token is that of `hf auth login`, HF_TOKEN or `--token`; HF_ENDPOINT names another Hub.

Errors, each one sentence: no finished run there, stored logits that the weights no longer give, no token, no
permission, a name that is taken, no network (after several tries).
"""

import argparse
import json
import shlex
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import HelpFormatter, RunError, main_guard

from timm_resnas.hub import CONFIG, EVIDENCE, GOLDEN, WEIGHTS, load, push, strip_paths
from timm_resnas.nas.jsonl import read_jsonl


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


def collect(args: argparse.Namespace, scratch: Path) -> tuple[list[Item], Item | None]:
    """The models to publish, and the supernet, which goes first.

    Raises:
        RunError: The folder holds neither a finished run nor a model, or not what was asked for.
    """
    run, repo = args.run, args.repo
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
    main = Item(best, repo, args.revision)
    items = [main]
    if best == run / "best":
        main.results, main.files = results_of_best(results), evidence(run, results, scratch)
    elif best == run / "supernet":
        main.results, main.files = results_of_supernet(run, results), evidence(run, results, scratch, "training")

    if args.front != "no":
        points = [p for p in (run / "pareto").glob("*/" + CONFIG) if p.parent.name.isdecimal()]
        points.sort(key=lambda p: int(p.parent.name))
        if not points:
            raise RunError(f"{run} holds no pareto/; --front is for the folder of a finished search")
        pictures = {k: v for k, v in main.files.items() if k.endswith("pareto.png")}
        for k, path in enumerate(points, start=1):
            where = (repo, f"pareto-{k}") if args.front == "revisions" else (f"{repo}-pareto-{k}", args.revision)
            text = f"Point {k} of {len(points)} of the front of accuracy against cost, cheapest first; see {repo}."
            items.append(Item(path.parent, *where, results_of_point(path, results), pictures, text=text))

    supernet = None
    if args.supernet:
        if best != run / "best" or not (run / "supernet" / CONFIG).is_file():
            raise RunError(f"{run} holds no supernet/ beside best/; --supernet is for a search that trained its own")
        supernet = Item(run / "supernet", f"{repo}-supernet", args.revision, results_of_supernet(run, results))
        supernet.files = evidence(run, results, scratch, "training")
    return items, supernet


def read_results(run: Path) -> dict[str, Any]:
    path = run / "results.json"
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise RunError(f"{path} is damaged: {e}") from None
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


def publish(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        items, supernet = collect(args, Path(scratch))
        plan = ([supernet] if supernet else []) + items
        for number, item in enumerate(plan, start=1):
            where = f"{item.repo_id}@{item.revision}" if item.revision else item.repo_id
            print(f"[{number}/{len(plan)}] {item.folder} -> {where}", flush=True)
            load(item.folder, check=(item.folder / GOLDEN).is_file())
            pushed = push(
                item.folder,
                item.repo_id,
                token=args.token,
                revision=item.revision,
                private=args.private,
                create_pr=args.pull_request,
                tag=args.tag,
                tags=args.tags,
                license=args.license,
                results=item.results,
                info=item.info,
                files=item.files,
                text=" ".join(t for t in (item.text, args.text) if t) or None,
                overwrite=args.overwrite,
                dry_run=args.dry_run,
                say=lambda line: print(f"  {line}", flush=True),
            )
            if args.dry_run:
                print(f"  would send {pushed}\n\n{pushed.card}")
            else:
                print(f"  done: {pushed.url}", flush=True)
            if item is supernet:
                # the networks say which weights they came from
                commit = f"@{pushed.commit}" if pushed.commit else ""
                for other in items:
                    other.info["supernet"] = f"hf-hub:{item.repo_id}{commit}"
    if args.dry_run:
        print("nothing was sent (--dry-run)")
    else:
        print(f"\n    import timm, timm_resnas\n    model = timm.create_model('hf-hub:{args.repo}', pretrained=True)")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run, or of a model")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="repository; made if need be")
    parser.add_argument("--revision", metavar="BRANCH", help="branch of the repository (default: main)")
    parser.add_argument(
        "--front", choices=["no", "revisions", "repositories"], default="no", help="publish pareto/ too, and how"
    )
    parser.add_argument("--supernet", action="store_true", help="publish supernet/ too, as OWNER/NAME-supernet")
    parser.add_argument("--private", action="store_true", help="make private repositories")
    parser.add_argument("--pull-request", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--tag", help="git tag for the commits")
    parser.add_argument("--tags", nargs="*", default=[], metavar="TAG", help="tags of the model card")
    parser.add_argument("--license", metavar="ID", help="licence of the weights, as the Hub knows it: apache-2.0, …")
    parser.add_argument("--text", help="a paragraph of yours for the card")
    parser.add_argument("--token", help="access token (default: that of `hf auth login` or HF_TOKEN)")
    parser.add_argument("--overwrite", action="store_true", help="commit to a repository that holds something else")
    parser.add_argument("--dry-run", action="store_true", help="send nothing, print what would be sent")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    with main_guard("publish.py"):
        if args.pull_request and args.front == "revisions":
            raise RunError("--pull-request proposes one branch; use --front repositories or leave out one of them")
        if args.tag and args.front == "revisions":
            raise RunError("--tag names one commit; with --front revisions there are several")
        publish(args)


if __name__ == "__main__":
    main()
