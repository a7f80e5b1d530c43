"""Model cards: what a repository on the Hub says about the model in it.

Every number on a card is in the folder's config.json, is counted from the weights or the architecture, or is one of
the results that the caller measured. What comes from elsewhere (names of data, versions, results) is text, never
Markdown: `escape_markdown`.
"""

import importlib.metadata
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import huggingface_hub as hf
from timm.models import get_pretrained_cfg
from timm.models._registry import model_entrypoint
from torch import nn

from ..arch import Arch
from ..nas.cost import format_cost
from ..version import __version__
from .checks import CARD, CONFIG, EXPORTS, WEIGHTS, Config, build_on_meta, read_config
from .weights import read_header

__all__ = ["escape_markdown", "make_card", "note_exports", "with_exports"]

_BY = "the run that made this repository"
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_MAX_ROWS = 60  # of a table of layers
_EXPORTS_HEADING = "## Other runtimes"


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
        text: A paragraph of the author's own, in Markdown.
        endpoint: The Hub's address in links, if not the usual one.
    """
    config = config or read_config(folder / "config.json")
    model = build_on_meta(config)
    ours = model_entrypoint(config.architecture).__module__.startswith("timm_resnas")
    name = repo_id.split("/")[-1]
    root = f"{(endpoint or hf.constants.ENDPOINT).rstrip('/')}/{repo_id}"
    supernet = hasattr(model, "space")
    base = _base(config)
    all_tags = ["image-classification", "timm", "safetensors"]
    all_tags += ["timm_resnas"] if ours else []
    all_tags += ["neural-architecture-search", "supernet"] if supernet else []
    all_tags += ["neural-architecture-search"] if "searched" in config.info else []
    data = hf.ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license=None if license is None else _line(license),
        tags=list(dict.fromkeys([*all_tags, *map(_line, tags)])),
        metrics=sorted({_line(r["metric"]) for r in results}) or None,
        model_name=name if results else None,
        eval_results=[_eval_result(r, root, revision) for r in results] or None,
        base_model=base.get("repository"),
    )
    parts = [
        f"# {escape_markdown(name)}" + (f" ({escape_markdown(revision)})" if revision else ""),
        _summary(config, model, base),
        text,
        *_usage(config, repo_id, revision, ours, supernet),
        *_architecture(config, model),
        *_costs(folder, config, model),
        *_results(results),
        *_exports(config.info.get("export")),
        *_evidence(config, list(files)),
        *_sources(config, license),
    ]
    body = "\n\n".join(p for p in parts if p)
    return hf.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n", ignore_metadata_errors=False)


# -- text in Markdown ----------------------------------------------------------------------------------------------


def _line(value: Any) -> str:
    """A fact as one line of text: no line breaks, control characters or lone surrogates, and not without end."""
    if isinstance(value, dict | list | tuple):
        value = json.dumps(value, ensure_ascii=False, default=str)
    text = str(value)[:2000].encode("utf-8", "replace").decode("utf-8")
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= 300 else text[:297] + "..."


def escape_markdown(value: Any) -> str:
    """A fact as text of a Markdown paragraph, heading, link or table cell, whatever it holds."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|~&$])", r"\\\1", _line(value))


def _code(value: Any) -> str:
    """A fact as a code span; not for tables."""
    text = _line(value)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if not text or text[0] == "`" or text[-1] == "`" else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _facts(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{escape_markdown(k)} {_code(v)}" for k, v in facts.items() if v is not None)


# -- the parts of a card -------------------------------------------------------------------------------------------


def _eval_result(result: Mapping[str, Any], root: str, revision: str | None) -> hf.EvalResult:
    dataset, split, metric = (_line(result[k]) for k in ("dataset", "split", "metric"))
    kind, _, rest = dataset.partition(":")
    evidence = f"{root}/blob/{quote(revision or 'main')}/{quote(_line(result.get('evidence', 'config.json')))}"
    return hf.EvalResult(
        task_type="image-classification",
        task_name="Image Classification",
        dataset_type=rest if kind == "hf" else kind,
        dataset_name=dataset,
        dataset_split=split,
        metric_type=metric,
        metric_name=f"{metric} ({split})",
        metric_value=result["value"],
        source_name=_line(result.get("by", _BY)),
        source_url=evidence,
    )


def _base(config: Config) -> dict[str, str]:
    """What the weights were trained on from: ``name``, ``license`` if known, ``repository`` if it is one."""
    stated = config.info.get("base_model")
    if not isinstance(stated, Mapping) or not stated.get("name"):
        return {}
    base = {k: _line(stated[k]) for k in ("name", "license") if stated.get(k)}
    repository = base["name"].removeprefix("hf-hub:").split("@")[0]
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository):
        base["repository"] = repository
    return base


def _summary(config: Config, model: nn.Module, base: Mapping[str, str]) -> str:
    architecture = _code(config.architecture)
    searched = config.info.get("searched")
    if hasattr(model, "space"):
        kind = (
            f"A supernet ({architecture}): one set of weights that holds {float(model.space.size()):.3g} "
            f"sub-networks, to search under a compute budget"
        )
    elif isinstance(searched, Mapping):
        kind = f"An image classifier found by architecture search ({architecture})"
        if searched.get("dataset"):
            kind += f" on {escape_markdown(searched['dataset'])}"
        if searched.get("budget"):
            kind += f" under the budget {_code(searched['budget'])}"
    elif config.info.get("converted_from"):
        kind = f"Weights of the authors of {architecture}, converted to safetensors"
    else:
        kind = f"A model of architecture {architecture}"
    text = kind + ", in timm's format."
    if config.info.get("weights"):
        text += f" Its weights: {escape_markdown(config.info['weights'])}."
    if base:
        terms = f", whose licence is {escape_markdown(base['license'])}" if "license" in base else ""
        text += f" It was trained on from {_code(base['name'])}{terms}."
    return text


def _address() -> str | None:
    """What pip reads this package from, where it was installed from an address that others reach."""
    try:
        stated = json.loads(importlib.metadata.distribution("timm_resnas").read_text("direct_url.json") or "{}")
        url, vcs = stated.get("url", ""), stated.get("vcs_info", {})
        if not re.match(r"https://[^@/]+/", url):  # neither a folder of this machine nor a name with a password
            return None
        return f"{vcs['vcs']}+{url}@{vcs['commit_id']}" if vcs else url
    except (importlib.metadata.PackageNotFoundError, ValueError, KeyError, AttributeError):
        return None


def _usage(config: Config, repo_id: str, revision: str | None, ours: bool, supernet: bool) -> list[str]:
    where = f"hf-hub:{repo_id}" + (f"@{revision}" if revision else "")
    parts = ["## Use"]
    if not ours:
        parts.append("```bash\npip install timm\n```")
        imports = "import timm"
    elif address := _address():
        parts.append(f"```bash\npip install {shlex.quote(f'timm_resnas @ {address}')}\n```")
        imports = "import timm, timm_resnas  # registers the architecture; without it timm says 'Unknown model'"
    else:
        parts.append(
            f"The architecture is code of the Python package timm_resnas ({__version__}); install it from its source "
            f"folder, together with timm:\n\n"
            f"```bash\npip install ./timm_resnas  # the folder that holds its pyproject.toml\n```"
        )
        imports = "import timm, timm_resnas  # registers the architecture; without it timm says 'Unknown model'"
    size = config.pretrained_cfg.get("input_size", [3, 224, 224])
    lines = [
        imports,
        "",
        f"model = timm.create_model({where!r}, pretrained=True).eval()",
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)",
        *_flatten(config.info.get("background")),
        f"logits = model(transform(image).unsqueeze(0))  # a PIL image, resized and cropped to {size[1]}x{size[2]}",
    ]
    if config.data.get("label_names"):
        lines.append("label = model.pretrained_cfg['label_names'][logits.argmax().item()]")
    parts.append("```python\n" + "\n".join(lines) + "\n```")
    if ours:
        checked = (
            f"from timm_resnas.hub import load\n\n"
            f"model = load({where!r}, check=True)  # refuses pickles, compares stored logits"
        )
        parts.append(f"```python\n{checked}\n```")
    if supernet:
        parts.append(
            "Any sub-network is an ordinary model, and a search under another budget needs no training:\n\n"
            f"```python\nsmall = model.extract(model.space.smallest)  # an ordinary timm model\n```\n\n"
            f"```bash\naccelerate launch recipes/search.py --supernet {shlex.quote(where)} --budget macs=30%\n```"
        )
    return parts


def _flatten(background: Any) -> list[str]:
    """Lines of the example that show what training showed behind transparent pixels."""
    if not isinstance(background, str) or not re.fullmatch(r"#[0-9a-fA-F]{6}", background):
        return []
    return [
        "from PIL import Image  # transparent pixels show what they showed in training",
        f'background = Image.new("RGBA", image.size, "{background}")',
        'image = Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")',
    ]


def _image(config: Config) -> dict[str, Any]:
    """The network's arguments, with the size of its images."""
    channels, *size = config.pretrained_cfg.get("input_size", [3, 224, 224])
    return {"img_size": size, "in_chans": channels, **config.model_args}


def _architecture(config: Config, model: nn.Module) -> list[str]:
    if hasattr(model, "space"):
        space = model.space
        tables = (_layer_table(arch.layers(**space.model_args)) for arch in (space.largest, space.smallest))
        return ["## Search space", "Largest network:", next(tables), "Smallest network:", next(tables)]
    arch = Arch.of(config.architecture, config.model_args)
    if arch is not None:
        args = json.dumps(arch.args(), separators=(",", ":"))
        return ["## Architecture", _layer_table(arch.layers(**_image(config))), f"```json\n{args}\n```"]
    shown = {k: v for k, v in config.model_args.items() if k not in ("num_classes", "in_chans")}
    text = f"timm's {_code(config.architecture)}"
    return ["## Architecture", text + (f" with {_facts(shown)}." if shown else ".")]


def _layer_table(layers: Sequence[Any]) -> str:
    """Layers in the order of the forward; repeated ones, and repeated pairs (a block's halves), stand there once."""
    counted: list[tuple[int, Any]] = []
    at = 0
    while at < len(layers):
        period = 2 if layers[at : at + 2] == layers[at + 2 : at + 4] else 1
        unit, count = layers[at : at + period], 1
        while layers[at + count * period : at + (count + 1) * period] == unit:
            count += 1
        counted += [(count, layer) for layer in unit]
        at += count * period
    rows = ["| layers | kind | shape | MACs of each | parameters of each |", "|---|---|---|---|---|"]
    for count, layer in counted[:_MAX_ROWS]:
        shape = ", ".join(f"{escape_markdown(name)} {value}" for name, value in layer.shape)
        rows.append(f"| {count} | {escape_markdown(layer.kind)} | {shape} | {layer.macs:,} | {layer.params:,} |")
    if len(counted) > _MAX_ROWS:
        rows.append(f"| {sum(count for count, _ in counted[_MAX_ROWS:])} | more | | | |")
    return "\n".join(rows)


def _costs(folder: Path, config: Config, model: nn.Module) -> list[str]:
    params = config.info.get("params")
    if not isinstance(params, int):
        header = read_header(folder / WEIGHTS, WEIGHTS)
        params = sum(math.prod(shape) for key, (_, shape) in header.items() if not key.endswith(_BUFFERS))
    rows = [f"| parameters | {params:,} |"]
    macs, of = config.info.get("macs"), ""
    if hasattr(model, "space"):
        macs, of = macs or model.space.costs(model.space.largest)["macs"], ", largest network"
    elif macs is None and (arch := Arch.of(config.architecture, config.model_args)) is not None:
        macs = arch.costs(**_image(config))["macs"]
    if isinstance(macs, int):
        rows.append(f"| MACs of one image{of} (convolutions, linear layers, attention products) | {macs:,} |")
    memory, latency = config.info.get("memory"), config.info.get("latency_ms")
    if isinstance(memory, int | float):
        rows.append(f"| peak memory of one image, estimated | {format_cost('memory', memory)} |")
    if isinstance(latency, int | float):
        device = escape_markdown(config.info.get("latency_device") or "as the search estimated it")
        rows.append(f"| latency, {device} | {latency:.4g} ms |")
    size = config.pretrained_cfg.get("input_size", [3, 224, 224])
    rows.append(f"| input | {size[0]} x {size[1]} x {size[2]} |")
    return ["## Costs", "\n".join(["| cost | value |", "|---|---|", *rows])]


def _results(results: Sequence[Mapping[str, Any]]) -> list[str]:
    if not results:
        return []
    rows = ["| data | split | images | metric | value | measured by |", "|---|---|---|---|---|---|"]
    for r in results:
        value = f"{r['value']:.4f}" if isinstance(r["value"], float) else r["value"]
        cells = (r["dataset"], r["split"], r.get("images", ""), r["metric"], value, r.get("by", _BY))
        rows.append(f"| {' | '.join(map(escape_markdown, cells))} |")
    return ["## Results", "\n".join(rows)]


def _exports(block: Any) -> list[str]:
    """What `note_exports` wrote down: how to run the ONNX file, and the runtimes side by side."""
    if not isinstance(block, Mapping) or not isinstance(block.get("runtimes"), list):
        return []
    rows = [r for r in block["runtimes"] if isinstance(r, Mapping)]
    dtype = "uint8" if block.get("dtype") == "uint8" else "float32"
    form = "pixels, 0 to 255" if dtype == "uint8" else "normalised pixels"
    lines = [
        "import numpy as np, onnxruntime",
        "",
        f"session = onnxruntime.InferenceSession({EXPORTS + '/model.onnx'!r})",
        "known = session.get_modelmeta().custom_metadata_map  # input_size, mean, std, label_names, … as JSON",
        f'(logits,) = session.run(None, {{"images": images}})  # {dtype} [B, C, H, W], {form}',
    ]
    batch = _line(block.get("batch_size"))
    table = [
        f"| runtime | logits differ by | accuracy | images | ms, batch 1 | images/s, batch {escape_markdown(batch)} |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        keys = ("name", "difference", "accuracy", "images", "ms", "images_per_second")
        table.append(f"| {' | '.join(escape_markdown(row.get(key, '')) for key in keys)} |")
    where = f"Differences are shares of the largest logit. Measured on {escape_markdown(block.get('device'))}"
    if block.get("dataset"):
        where += f"; accuracy on {escape_markdown(block['dataset'])}, {escape_markdown(block.get('split'))}"
    return [_EXPORTS_HEADING, "```python\n" + "\n".join(lines) + "\n```", "\n".join(table), f"{where}."]


def note_exports(folder: Path, results: Mapping[str, Any]) -> None:
    """Write what was measured of a model's exported files into its config.json, which its card is made from.

    A card that lies in the folder already gets the numbers as well, in place of those that it had.

    Args:
        folder: The model's.
        results: What recipes/export.py found: its results.json.
    """
    here, rows = results["conditions"], []
    for row in results["runtimes"]:
        facts: dict[str, Any] = {"name": row["name"]}
        if "differences" in row:
            facts["difference"] = f"{max(row['differences'].values()):.1e}"
        if "correct" in row:
            facts |= {"accuracy": f"{row['correct'] / row['images']:.4f}", "images": row["images"]}
        if "latency" in row:
            facts["ms"] = f"{row['latency']['ms']:.4g}"
            facts["images_per_second"] = f"{row['throughput']['images_per_second']:,.0f}"
        rows.append(facts)
    device = f"{here['device_name']}, {here['num_threads']} thread{'s' * (here['num_threads'] > 1)}"
    block = {
        "dtype": results["input"]["dtype"],
        "batch_size": here["batch_size"],
        "device": f"{device}, torch {here['torch']}, ONNX Runtime {here['onnxruntime']} ({here['provider']})",
        "dataset": results["dataset"],
        "split": results["split"],
        "files": {name: file["sha256"] for name, file in results["files"].items()},
        "runtimes": rows,
    }
    data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    data["timm_resnas"] = {**data.get("timm_resnas", {}), "export": block}
    _replace(folder / CONFIG, json.dumps(data, indent=2) + "\n")
    if (card := folder / CARD).is_file():
        _replace(card, with_exports(card.read_text(encoding="utf-8"), block))


def with_exports(text: str, block: Any) -> str:
    """A card with the section of config.json's block of an export, in place of the one that it has; None: without."""
    begin = re.search(rf"^{_EXPORTS_HEADING}$", text, re.M)
    end = re.compile(r"^#{1,2} ", re.M).search(text, begin.end()) if begin else None
    before, after = (text[: begin.start()], text[end.start() :] if end else "") if begin else (text, "")
    parts = [before.rstrip("\n"), *_exports(block), after]
    return "\n\n".join(p for p in parts if p).rstrip("\n") + "\n"


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def _evidence(config: Config, files: list[str]) -> list[str]:
    parts = []
    for file in files:
        if file.endswith((".png", ".svg", ".jpg")):
            parts.append(f"![{escape_markdown(Path(file).stem.replace('_', ' '))}]({quote(file)})")
    tables = [f for f in files if f.endswith((".jsonl", ".json", ".yaml", ".csv")) and "/" in f]
    if tables:
        parts.append("Files: " + ", ".join(f"[{escape_markdown(f)}]({quote(f)})" for f in tables))
    searched = config.info.get("searched")
    facts = _facts(searched) if isinstance(searched, Mapping) else ""
    if facts:
        parts.append(f"Search: {facts}")
    return ["## How it was found" if facts else "## Evidence", *parts] if parts else []


def _sources(config: Config, license: str | None) -> list[str]:
    cfg, parts = config.pretrained_cfg, []
    known = get_pretrained_cfg(config.architecture)
    ids = cfg.get("paper_ids") or []
    title = cfg.get("paper_name") or (known.paper_name if known and known.paper_ids == cfg.get("paper_ids") else None)
    for paper in [ids] if isinstance(ids, str) else ids:
        number = re.fullmatch(r"(?:arxiv:)?(\d{4}\.\d{4,5}(?:v\d+)?)", _line(paper), re.I)
        link = f"[arXiv:{number[1]}](https://arxiv.org/abs/{number[1]})" if number else escape_markdown(paper)
        parts.append(f"- {escape_markdown(title) + ', ' if title else ''}{link}")
    if parts:
        parts = ["## To cite", "\n".join(parts)]
    if license:
        parts.append(f"Licence of these weights: {escape_markdown(license)}.")
    converted = config.info.get("converted_from")
    if isinstance(converted, Mapping):
        parts.append(f"Converted from the authors' checkpoint: {_facts(converted)}.")
    version = escape_markdown(config.info.get("version", __version__))
    return [*parts, f"Made with timm_resnas {version}."]
