"""Model cards: what a repository on the Hub says about the model in it.

Every number on a card is in the folder's config.json, is counted from the weights or the architecture, or is one of
the results that the caller measured.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub as hf
from timm.models._registry import model_entrypoint

from ..models.network_def import NetworkDef
from ..nas.cost import format_cost
from ..nas.space import SearchSpace
from ..version import __version__
from .checks import Config, read_config, read_header

__all__ = ["make_card"]

PROJECT_URL: str | None = None  # of this repository, once it has one that `pip install git+…` can read

_PAPERS = {
    "2109.00642": "Searching for Efficient Multi-Stage Vision Transformers",
    "2111.05297": "Sliced Recursive Transformer",
    "2309.01310": "ExMobileViT: Lightweight Classifier Extension for Mobile Vision Transformer",
    "2103.17239": "Going deeper with Image Transformers",
}


def make_card(
    folder: Path,
    repo_id: str,
    *,
    revision: str | None = None,
    config: Config | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    files: Iterable[str] = (),
    license: str | None = None,
    tags: Sequence[str] = (),
    text: str | None = None,
    endpoint: str | None = None,
) -> hf.ModelCard:
    """The card of a model's folder.

    Args:
        folder: With config.json and model.safetensors.
        repo_id: Where it will be, ``owner/name``.
        revision: The branch it will be on, if not main.
        config: The checked config.json, if it differs from the folder's.
        results: Measured numbers, each with ``dataset`` and ``split``, ``metric`` ("accuracy"), ``value``,
            optionally ``images`` (how many), ``by`` (who measured; default: the run that made the repository) and
            ``evidence`` (a file of the repository).
        files: Names of the repository's other files; pictures among them are shown, tables are linked.
        license: Identifier of the weights' licence as the Hub knows it.
        tags: More tags.
        text: A paragraph of the author's own.
        endpoint: The Hub's address in links, if not the usual one.
    """
    config = config or read_config(folder / "config.json")
    ours = model_entrypoint(config.architecture).__module__.startswith("timm_resnas")
    name = repo_id.split("/")[-1]
    root = f"{(endpoint or hf.constants.ENDPOINT).rstrip('/')}/{repo_id}"
    supernet = _space(config) is not None
    all_tags = ["image-classification", "timm", "safetensors"]
    all_tags += ["timm_resnas"] if ours else []
    all_tags += ["neural-architecture-search", "supernet"] if supernet else []
    all_tags += ["neural-architecture-search"] if "searched" in config.info else []
    data = hf.ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license=license,
        tags=list(dict.fromkeys([*all_tags, *tags])),
        metrics=sorted({r["metric"] for r in results}) or None,
        model_name=name if results else None,
        eval_results=[_eval_result(r, root, revision) for r in results] or None,
    )
    parts = [
        f"# {name}" + (f" ({revision})" if revision else ""),
        _summary(config),
        text,
        *_usage(config, repo_id, revision, ours, supernet),
        *_architecture(config),
        *_costs(folder, config),
        *_results(results),
        *_evidence(config, list(files)),
        *_sources(config, license),
    ]
    body = "\n\n".join(p for p in parts if p)
    return hf.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n", ignore_metadata_errors=False)


def _eval_result(result: Mapping[str, Any], root: str, revision: str | None) -> hf.EvalResult:
    kind, _, rest = result["dataset"].partition(":")
    evidence = f"{root}/blob/{revision or 'main'}/{result.get('evidence', 'config.json')}"
    return hf.EvalResult(
        task_type="image-classification",
        task_name="Image Classification",
        dataset_type=rest if kind == "hf" else kind,
        dataset_name=result["dataset"],
        dataset_split=result["split"],
        metric_type=result["metric"],
        metric_name=f"{result['metric']} ({result['split']})",
        metric_value=result["value"],
        source_name=result.get("by", _BY),
        source_url=evidence,
    )


_BY = "the run that made this repository"


def _space(config: Config) -> SearchSpace | None:
    """The search space, where the model is a supernet."""
    if not config.architecture.endswith("_supernet"):
        return None
    space = config.model_args.get("space", config.architecture.removesuffix("_supernet"))
    names = ("img_size", "num_classes", "in_chans")
    args = {k: config.model_args[k] for k in names if k in config.model_args}
    return SearchSpace.create(space).with_model_args(**args)


def _summary(config: Config) -> str:
    kind = f"A model of architecture `{config.architecture}`"
    if (space := _space(config)) is not None:
        kind = (
            f"A supernet (`{config.architecture}`): one set of weights that holds {float(space.size()):.3g} "
            f"sub-networks, to search under a compute budget"
        )
    elif "searched" in config.info:
        searched = config.info["searched"]
        kind = f"An image classifier found by architecture search (`{config.architecture}`)"
        if searched.get("dataset"):
            kind += f" on {searched['dataset']}"
        if searched.get("budget"):
            kind += f" under the budget `{searched['budget']}`"
    elif config.info.get("converted_from"):
        kind = f"Weights of the authors of `{config.architecture}`, converted to safetensors"
    text = kind + ", in timm's format."
    if config.info.get("weights"):
        text += f" Its weights: {config.info['weights']}."
    return text


def _usage(config: Config, repo_id: str, revision: str | None, ours: bool, supernet: bool) -> list[str]:
    where = f"hf-hub:{repo_id}" + (f"@{revision}" if revision else "")
    if not ours:
        install, imports = "pip install timm", "import timm"
    else:
        install = f"pip install git+{PROJECT_URL}" if PROJECT_URL else "pip install .  # in a clone of timm_resnas"
        imports = "import timm, timm_resnas  # registers the architecture; without it timm says 'Unknown model'"
    size = config.pretrained_cfg.get("input_size", [3, 224, 224])
    lines = [
        imports,
        "",
        f"model = timm.create_model('{where}', pretrained=True).eval()",
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)",
        f"logits = model(transform(image).unsqueeze(0))  # a PIL image, resized and cropped to {size[1]}x{size[2]}",
    ]
    if config.data.get("label_names"):
        lines.append("label = model.pretrained_cfg['label_names'][logits.argmax().item()]")
    parts = ["## Use", f"```bash\n{install}\n```", "```python\n" + "\n".join(lines) + "\n```"]
    if ours:
        checked = (
            f"from timm_resnas.hub import load\n\n"
            f"model = load('{where}', check=True)  # refuses pickles, compares stored logits"
        )
        parts.append(f"```python\n{checked}\n```")
    if supernet:
        parts.append(
            "Any sub-network is a model of its own, and a search under another budget needs no training:\n\n"
            f"```python\nsmall = model.extract(model.space.smallest)  # an ordinary timm model\n```\n\n"
            f"```bash\naccelerate launch recipes/search.py --supernet {where} --budget macs=30%\n```"
        )
    return parts


def _architecture(config: Config) -> list[str]:
    args = config.model_args
    if "network_def" in args:
        arch = NetworkDef.from_network_def(args["network_def"])
        return ["## Architecture", _stage_table(arch), f"`network_def`:\n\n```\n{arch}\n```"]
    if (space := _space(config)) is not None:
        return [
            "## Search space",
            "Largest network:",
            _stage_table(space.largest),
            "Smallest network:",
            _stage_table(space.smallest),
        ]
    shown = {k: v for k, v in args.items() if k not in ("num_classes", "in_chans")}
    return ["## Architecture", f"timm's `{config.architecture}`" + (f" with {shown}." if shown else ".")]


def _stage_table(arch: NetworkDef) -> str:
    rows = ["| stage | embed_dim | blocks | heads | head_dim | mlp_hidden |", "|---|---|---|---|---|---|"]
    for i, (dim, blocks) in enumerate(zip(arch.embed_dims, arch.stages, strict=True), start=1):
        present = [b for b in blocks if b.exists]
        columns = (" ".join(str(getattr(b, k)) for b in present) for k in ("num_heads", "head_dim", "mlp_hidden"))
        rows.append(f"| {i} | {dim} | {len(present)} | " + " | ".join(columns) + " |")
    return "\n".join(rows)


def _costs(folder: Path, config: Config) -> list[str]:
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    params = config.info.get("params")
    if params is None:
        params = 0
        for key, (_, shape) in read_header(folder / "model.safetensors", "model.safetensors").items():
            if not key.endswith(buffers):
                size = 1
                for n in shape:
                    size *= n
                params += size
    rows = [f"| parameters | {params:,} |"]
    macs = config.info.get("macs")
    if macs is None and "network_def" in config.model_args:
        names = ("img_size", "patch_size", "in_chans", "num_classes", "distill_token")
        args = {k: config.model_args[k] for k in names if k in config.model_args}
        macs = NetworkDef.from_network_def(config.model_args["network_def"]).costs(**args)["macs"]
    elif macs is None and (space := _space(config)) is not None:
        macs = space.costs(space.largest)["macs"]
    if macs is not None:
        of = ", largest network" if _space(config) is not None else ""
        rows.append(f"| MACs of one image{of} (convolutions, linear layers, attention products) | {macs:,} |")
    if config.info.get("memory") is not None:
        rows.append(f"| peak memory of one image, estimated | {format_cost('memory', config.info['memory'])} |")
    latency = config.info.get("latency_ms")
    if isinstance(latency, int | float):
        device = config.info.get("latency_device")
        rows.append(f"| latency, {device or 'as the search estimated it'} | {latency:.4g} ms |")
    size = config.pretrained_cfg.get("input_size", [3, 224, 224])
    rows.append(f"| input | {size[0]} x {size[1]} x {size[2]} |")
    return ["## Costs", "\n".join(["| cost | value |", "|---|---|", *rows])]


def _results(results: Sequence[Mapping[str, Any]]) -> list[str]:
    if not results:
        return []
    rows = ["| data | split | images | metric | value | measured by |", "|---|---|---|---|---|---|"]
    for r in results:
        value = f"{r['value']:.4f}" if isinstance(r["value"], float) else str(r["value"])
        images = r.get("images", "")
        rows.append(f"| {r['dataset']} | {r['split']} | {images} | {r['metric']} | {value} | {r.get('by', _BY)} |")
    return ["## Results", "\n".join(rows)]


def _evidence(config: Config, files: list[str]) -> list[str]:
    parts = []
    for file in files:
        if file.endswith((".png", ".svg", ".jpg")):
            title = Path(file).stem.replace("_", " ")
            parts.append(f"![{title}]({file})")
    tables = [f for f in files if f.endswith((".jsonl", ".json", ".yaml", ".csv")) and "/" in f]
    if tables:
        parts.append("Files: " + ", ".join(f"[{f}]({f})" for f in tables))
    searched = {k: v for k, v in config.info.get("searched", {}).items() if v is not None}
    if searched:
        parts.append("Search: " + ", ".join(f"{k} `{v}`" for k, v in searched.items()))
    return ["## How it was found" if searched else "## Evidence", *parts] if parts else []


def _sources(config: Config, license: str | None) -> list[str]:
    cfg, parts = config.pretrained_cfg, []
    ids = cfg.get("paper_ids") or []
    for paper in [ids] if isinstance(ids, str) else ids:
        number = paper.lower().removeprefix("arxiv:")
        title = cfg.get("paper_name") or _PAPERS.get(number, "")
        parts.append(f"- {title + ', ' if title else ''}[arXiv:{number}](https://arxiv.org/abs/{number})")
    if parts:
        parts = ["## To cite", "\n".join(parts)]
    if license:
        parts.append(f"Licence of these weights: {license}.")
    converted = config.info.get("converted_from")
    if isinstance(converted, Mapping):
        facts = ", ".join(f"{k} `{v}`" for k, v in converted.items())
        parts.append(f"Converted from the authors' checkpoint: {facts}.")
    versions = f"timm_resnas {config.info.get('version', __version__)}"
    return [*parts, f"Made with {versions}."]
