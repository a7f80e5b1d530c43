"""Models in timm's own format: save them, publish them on the Hugging Face Hub, load them back.

A model's folder or repository holds

    config.json                as timm writes it; what is ours stands in the block ``timm_resnas``, which timm ignores
    model.safetensors          the weights
    test_tensors.safetensors   an input and the logits that belong to it
    README.md                  in a repository: the model card
"""

import contextlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import huggingface_hub as hf
import timm
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from torch import nn

from .checks import MAX_PARAMS, HubError, build_on_meta, check_finite, check_weights, read_config, read_header
from .nas.supernet import VitResNasSupernet
from .version import __version__

__all__ = ["HubError", "Pushed", "fetch", "load", "push", "read_file", "save_pretrained"]

CONFIG, WEIGHTS, GOLDEN, CARD = "config.json", "model.safetensors", "test_tensors.safetensors", "README.md"
EVIDENCE = "search"  # folder of a repository for what a run recorded
_PUBLISHED = (".json", ".jsonl", ".md", ".png", ".safetensors", ".svg", ".txt", ".yaml")
_PICKLES = ("pytorch_model.bin", "pytorch_model.pth", "model.pth")

_logger = logging.getLogger(__name__)
T = TypeVar("T")


# -- folders ------------------------------------------------------------------------------------------------------


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    info: Mapping[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    golden: bool = True,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write a model's folder for ``timm.create_model('local-dir:<folder>', pretrained=True)``.

    The folder appears whole or not at all; a model's folder that was there is replaced, with all that is in it.

    Args:
        model: A model made by `timm.create_model`.
        folder: Where to.
        info: JSON-plain facts about the model (costs, scores, how it was found), kept in config.json under
            ``timm_resnas``, which timm ignores.
        label_names: Class names in the order of the classifier's outputs.
        data_config: Preprocessing (``input_size, mean, std, crop_pct, interpolation, …``) where it differs from the
            model's own.
        golden: Store an input and its logits, too, which `load` can check.
        files: More text files, name -> content; `read_file` reads them back.

    Raises:
        ValueError: A model argument is not JSON-plain.
        HubError: The folder holds something else than a model.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise HubError(f"{folder} exists and holds no {CONFIG}; it would be replaced: give the name of a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"timm_resnas": {"version": __version__, **(info or {})}}
    if label_names is not None:
        config["label_names"] = list(label_names)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    before = fresh.with_name(f"{fresh.name}-before")
    try:
        fresh.chmod(0o755)
        timm.models.save_for_hf(
            model, fresh, model_config=config, safe_serialization=True, data_config=dict(data_config or {}) or None
        )
        if golden:
            size = json.loads((fresh / CONFIG).read_text(encoding="utf-8"))["pretrained_cfg"]["input_size"]
            try:
                save_file(golden_tensors(model, size), fresh / GOLDEN)
            except Exception as e:  # weights that were trained for days are not lost over this
                _logger.warning(f"{folder}: no {GOLDEN}, the model does not compute {size} images: {_first_line(e)}")
        for name, content in (files or {}).items():
            (fresh / _plain_name(name)).write_text(content, encoding="utf-8")
        if folder.exists():
            folder.rename(before)  # a kill leaves one of the two whole
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(before, ignore_errors=True)
    return folder


def golden_tensors(model: nn.Module, input_size: Sequence[int], images: int = 2) -> dict[str, torch.Tensor]:
    """An input and the logits of a model for it, in evaluation mode.

    Args:
        model: The model.
        input_size: Channels, height and width of its images.
        images: How many.

    Returns:
        ``input`` ``[images, C, H, W]`` (float16, to be small: its values are exact in float32), ``logits``; of a
        supernet also ``logits_smallest``, those of its smallest sub-network.
    """
    x = torch.randn(images, *input_size, generator=torch.Generator().manual_seed(0)).to(torch.float16).float()
    return {"input": x.to(torch.float16), **_outputs(model, x)}


def _outputs(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    param = next(model.parameters())
    x = x.to(param.device, param.dtype)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            if not isinstance(model, VitResNasSupernet):
                outputs = {"logits": model(x)}
            else:
                active = model.active
                outputs = {}
                for name, arch in (("logits", None), ("logits_smallest", model.space.smallest)):
                    model.set_arch(arch)
                    outputs[name] = model(x)
                model.set_arch(active)
    finally:
        model.train(training)
    return {k: v.float().cpu().contiguous().clone() for k, v in outputs.items()}


def check_golden(model: nn.Module, path: str | os.PathLike, where: str | None = None) -> float:
    """Compare a model's outputs with the stored ones.

    Returns:
        The largest difference of a logit; 0.0 on the machine that stored them, rounding elsewhere.

    Raises:
        HubError: The file does not belong to the model, or its outputs are others.
    """
    where = where or str(path)
    shapes = {k: s for k, (_, s) in read_header(Path(path), where).items()}
    size = tuple(timm.data.resolve_model_data_config(model)["input_size"])
    images = (shapes.get("input") or (0,))[0]
    if not 1 <= images <= 16 or shapes["input"] != (images, *size) or "logits" not in shapes:
        raise HubError(f"{where} must hold input, 1 to 16 images of {list(size)}, and logits; it has {shapes!r:.200}")
    stored = load_file(path)
    outputs = _outputs(model, stored["input"].float())
    worst = 0.0
    for name, expected in stored.items():
        if name == "input":
            continue
        got = outputs.get(name)
        if got is None or got.shape != expected.shape:
            raise HubError(f"{where}: {name} {list(expected.shape)} is no output of this model")
        difference = (got - expected).abs().max().item()
        # timm's tolerance between machines
        if not torch.allclose(got, expected.float(), rtol=1e-3, atol=1e-4):
            raise HubError(
                f"{where}: {name} of the loaded model differ from the stored ones by {difference:.3g}; the weights "
                f"or the code that computes the model have changed"
            )
        worst = max(worst, difference)
    return worst


# -- loading ------------------------------------------------------------------------------------------------------


def load(
    name_or_folder: str | os.PathLike,
    *,
    revision: str | None = None,
    check: bool = False,
    allow_pickle: bool = False,
    max_params: int = MAX_PARAMS,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    endpoint: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Load a model from the Hub or a folder, checked before it is built.

    As ``timm.create_model(name, pretrained=True)``, with these differences: only safetensors are read; the
    configuration must describe a network of sane size and the weights must be that network's; every number in them
    must be finite; all that comes from one commit.

    Args:
        name_or_folder: ``hf-hub:owner/name`` or ``hf-hub:owner/name@revision``, ``local-dir:<folder>`` or a folder.
        revision: Branch, tag or commit on the Hub.
        check: Compute the stored input's logits and compare.
        allow_pickle: Read pickled weights, too, where there are no safetensors (torch's ``weights_only``).
        max_params: Larger networks are refused.
        token: The Hub's access token; the one that was logged in with, if None.
        cache_dir: Where downloads are kept; the Hub's cache, if None.
        endpoint: Another Hub's address.
        **kwargs: Model arguments that override the saved ones (``num_classes``, ``img_size``, ``drop_path_rate``, …).

    Raises:
        HubError: It cannot be had, is no model, or asks for too much; in one sentence.
    """
    if check and (changed := sorted(kwargs.keys() - {"device"})):
        raise HubError(f"check compares a model as it was saved; leave out {', '.join(changed)}")
    source = _source(name_or_folder, revision, token, cache_dir, endpoint)
    path = _fetch(source, allow_pickle, max_params)
    golden = source.file(GOLDEN, limit=1 << 28) if check else None
    try:
        model = timm.create_model(f"local-dir:{path.parent}", pretrained=True, **kwargs)
    except Exception as e:  # a damaged pickle raises anything
        why = " ".join(str(e).split()) or type(e).__name__
        raise HubError(f"{source} cannot be loaded: {why:.300}") from e
    check_finite(model, f"{source}: {path.name}")
    if golden is not None:
        check_golden(model, golden, f"{source}: {GOLDEN}")
    return model


def fetch(name_or_folder: str | os.PathLike, *, weights: bool = True, allow_pickle: bool = False) -> Path:
    """The local folder of a model, downloaded if need be, for ``timm.create_model('local-dir:<folder>')``.

    Configuration and weights are checked as by `load`, except for numbers that are not finite.

    Args:
        name_or_folder: See `load`.
        weights: Get the weights, too.
        allow_pickle: See `load`.

    Raises:
        HubError: See `load`.
    """
    source = _source(name_or_folder, None, None, None, None)
    if weights:
        return _fetch(source, allow_pickle, MAX_PARAMS).parent
    path = source.file(CONFIG)
    build_on_meta(read_config(path, f"{source}: {CONFIG}"), MAX_PARAMS)
    return path.parent


def _fetch(source: "_Local | _Remote", allow_pickle: bool, max_params: int) -> Path:
    """The file of a model's weights, beside its config.json; both checked."""
    config = read_config(source.file(CONFIG), f"{source}: {CONFIG}")
    model = build_on_meta(config, max_params)
    if source.has(WEIGHTS):
        path = source.file(WEIGHTS, limit=_size_limit(model))
        check_weights(path, config, model, f"{source}: {WEIGHTS}")
        return path
    pickled = [f for f in _PICKLES if source.has(f)]
    if not pickled:
        raise HubError(f"{source} holds no {WEIGHTS}")
    if not allow_pickle:
        raise HubError(
            f"{source} holds no {WEIGHTS}, only {pickled[0]}, a pickle, which can run code; "
            f"allow_pickle=True (--allow-pickle) reads it with torch's weights_only"
        )
    return source.file(pickled[0], limit=_size_limit(model))


def read_file(
    name_or_folder: str | os.PathLike,
    filename: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    endpoint: str | None = None,
) -> str | None:
    """A text file that stands beside a model, such as ``config.json``; None where there is none.

    Args: as `load`.

    Raises:
        HubError: The model's folder or repository cannot be had, or the file is no text.
    """
    source = _source(name_or_folder, revision, token, cache_dir, endpoint)
    if not source.has(_plain_name(filename)):
        return None
    try:
        return source.file(filename, limit=1 << 26).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise HubError(f"{source}: {filename} is not UTF-8 text") from None


def _plain_name(name: str) -> str:
    if name != os.path.basename(name) or name.startswith(".") or "\\" in name:
        raise HubError(f"{name!r} is not the plain name of a file beside a model")
    return name


def _source(
    name: str | os.PathLike,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike | None,
    endpoint: str | None,
) -> "_Local | _Remote":
    kind, where = _parse_name(name, revision)
    if kind == "local-dir":
        return _Local(Path(where))
    repo_id, _, rev = where.partition("@")
    _check_repo_id(repo_id)
    return _Remote(repo_id, revision or rev or None, token, cache_dir, endpoint)


def _parse_name(name: str | os.PathLike, revision: str | None) -> tuple[str, str]:
    if isinstance(name, os.PathLike):
        name = f"local-dir:{os.fspath(name)}"
    if ":" not in name and Path(name).is_dir():
        name = f"local-dir:{name}"
    kind, _, where = name.partition(":")
    if kind not in ("hf-hub", "local-dir") or not where:
        if name.count("/") == 1 and not name.startswith((".", "/", "~")):
            raise HubError(f"there is no folder {name!r}; a repository is written 'hf-hub:{name}'")
        raise HubError(f"{name!r} is neither a model's folder nor 'hf-hub:owner/name'")
    if kind == "local-dir" and revision is not None:
        raise HubError(f"revision={revision!r} is for repositories; {where} is a folder")
    if kind == "hf-hub" and revision is not None and "@" in where and where.split("@", 1)[1] != revision:
        raise HubError(f"two revisions are named: {name!r} and revision={revision!r}")
    return kind, where


def _size_limit(model: nn.Module) -> int:
    """Bytes that a file of a network's weights may have: all of it in float64, and a header."""
    return 8 * sum(t.numel() for t in model.state_dict().values()) + (8 << 20)


class _Local:
    """A model's folder."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise HubError(f"there is no folder {folder}")
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def file(self, name: str, limit: int | None = None) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise HubError(f"{self} holds no {name}")
        _check_size(self, name, path.stat().st_size, limit)
        return path


def _check_size(where: Any, name: str, size: int | None, limit: int | None) -> None:
    if limit is not None and size is not None and size > limit:
        raise HubError(f"{where}: {name} has {size:,} bytes; at most {limit:,} are expected for this network")


class _Remote:
    """One commit of a repository."""

    def __init__(
        self,
        repo_id: str,
        revision: str | None,
        token: str | bool | None,
        cache_dir: str | os.PathLike | None,
        endpoint: str | None,
    ) -> None:
        self.repo_id, self.revision, self._asked = repo_id, revision, revision
        self._args = dict(token=token, cache_dir=cache_dir, endpoint=endpoint)
        self.sizes: dict[str, int | None] | None = None  # unknown without the Hub
        api = hf.HfApi(endpoint=endpoint, token=token)
        with _explained(repo_id, "read", revision=revision):
            try:
                info = _retried(lambda: api.model_info(repo_id, revision=revision, files_metadata=True, timeout=30))
            except Exception as e:
                if not _is_unreachable(e):
                    raise
                _logger.warning(f"the Hub cannot be reached ({type(e).__name__}); looking for {self} in the cache")
            else:
                self.revision = info.sha  # what follows is read from this commit, whatever is pushed meanwhile
                self.sizes = {f.rfilename: f.size for f in info.siblings or ()}

    def __str__(self) -> str:
        return f"hf-hub:{self.repo_id}" + (f"@{self.revision}" if self.revision else "")

    def has(self, name: str) -> bool:
        if self.sizes is not None:
            return name in self.sizes
        return isinstance(
            hf.try_to_load_from_cache(
                self.repo_id, name, cache_dir=self._args["cache_dir"], revision=self.revision or "main"
            ),
            str,
        )

    def file(self, name: str, limit: int | None = None) -> Path:
        if self.sizes is not None:
            if name not in self.sizes:
                raise HubError(f"{self} holds no {name}")
            _check_size(self, name, self.sizes[name], limit)
        with _explained(self.repo_id, "read", name):
            path = self._download(name, self._asked if name == CONFIG else self.revision)
            if self.sizes is not None and path.parent.name != self.revision:  # a push came in between
                path = self._download(name, self.revision)
        _check_size(self, name, path.stat().st_size, limit)
        return path

    def _download(self, name: str, revision: str | None) -> Path:
        """Through the cache, which learns what a branch points to only where it is asked by the branch's name."""

        def download() -> str:
            return hf.hf_hub_download(
                self.repo_id,
                name,
                revision=revision,
                local_files_only=self.sizes is None,
                library_name="timm_resnas",
                library_version=__version__,
                **self._args,
            )

        return Path(_retried(download))


# -- publishing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pushed:
    """What was published, or would be."""

    repo_id: str
    revision: str  # branch
    files: dict[str, int]  # name in the repository -> bytes
    card: str
    commit: str | None = None  # None after a dry run
    url: str | None = None  # of the commit or pull request

    def __str__(self) -> str:
        rows = [f"  {size:>13,}  {name}" for name, size in sorted(self.files.items())]
        head = f"{self.repo_id} ({self.revision}): {len(self.files)} files, {sum(self.files.values()):,} bytes"
        return "\n".join([head, *rows])


def push(
    folder_or_model: str | os.PathLike | nn.Module,
    repo_id: str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    tag: str | None = None,
    tags: Sequence[str] = (),
    license: str | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    info: Mapping[str, Any] | None = None,
    files: Mapping[str, str | os.PathLike] | None = None,
    text: str | None = None,
    commit_message: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    endpoint: str | None = None,
    say: Callable[[str], Any] | None = None,
    **save_args: Any,
) -> Pushed:
    """Publish a model as a repository of the Hub, in one commit: a reader sees what was there before, or all of it.

    Called again after an interruption, it sends only what the Hub does not have. The repository is made if need be.

    Args:
        folder_or_model: A folder of `save_pretrained`, or a model of timm.
        repo_id: ``owner/name``.
        token: The Hub's access token; the one that was logged in with, if None.
        revision: A branch; made, without main's files, where it does not exist.
        private: Make a private repository.
        create_pr: Open a pull request instead of committing; the repository must exist.
        tag: Also put this git tag on the commit.
        tags: The card's tags.
        license: Identifier of the weights' licence, as the Hub knows it; default: that of ``info["license"]``, if any.
        results: Measured numbers for the card, see `timm_resnas.card.make_card`.
        info: JSON-plain facts added to config.json's block ``timm_resnas``.
        files: More files: name in the repository -> local path.
        text: A paragraph for the card.
        commit_message: Default: says which architecture.
        overwrite: Also commit to a repository that holds something that `push` did not make.
        dry_run: Say what would be sent; the Hub is not asked.
        endpoint: Another Hub's address.
        say: Called with each line of progress.
        **save_args: For a model: the arguments of `save_pretrained`.

    Raises:
        HubError: It cannot be published; in one sentence. The repository is as it was.
    """
    _check_repo_id(repo_id)
    if create_pr and tag:
        raise HubError("a pull request has no commit to tag yet; leave out tag or create_pr")
    if create_pr and revision not in (None, "main"):
        raise HubError("the Hub opens pull requests on main only; leave out revision or create_pr")
    with _folder_of(folder_or_model, save_args) as folder:
        sources, card = _contents(folder, repo_id, revision, license, tags, results, info, files, text, endpoint)
        sizes = {name: len(s) if isinstance(s, bytes) else s.stat().st_size for name, s in sources.items()}
        planned = Pushed(repo_id, revision or "main", sizes, card)
        if dry_run:
            return planned
        token = token if token is not None else hf.get_token()
        if not token:
            raise HubError(_NO_TOKEN)
        api = hf.HfApi(endpoint=endpoint, token=token, library_name="timm_resnas", library_version=__version__)
        message = commit_message or f"{json.loads(sources[CONFIG])['architecture']}, timm_resnas {__version__}"
        say = say or _logger.info
        with _explained(repo_id, "write to", revision=revision):
            if not create_pr:
                _retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True), say)
            stale = _stale_files(api, repo_id, revision, private, sources, overwrite or create_pr, say)
            say(f"sending {planned}")

            def commit() -> hf.CommitInfo:
                # made anew each time: the client marks what it has sent
                operations = [hf.CommitOperationAdd(name, source) for name, source in sources.items()]
                if stale:  # an earlier try may have deleted them, though its answer got lost
                    there = {f.rfilename for f in api.model_info(repo_id, revision=revision).siblings or ()}
                    operations += [hf.CommitOperationDelete(name) for name in stale if name in there]
                return api.create_commit(
                    repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr
                )

            # an answer that got lost must not open a second pull request
            done = _retried(commit, say, tries=1 if create_pr else _TRIES)
            if tag:
                _put_tag(api, repo_id, tag, done.oid, say)
    return replace(planned, commit=done.oid, url=str(done.pr_url or done.commit_url))


def _put_tag(api: hf.HfApi, repo_id: str, tag: str, commit: str, say: Callable[[str], Any]) -> None:
    try:
        _retried(lambda: api.create_tag(repo_id, tag=tag, revision=commit), say)
    except errors.HfHubHTTPError as e:
        if _status(e) != 409:
            raise
        if _retried(lambda: api.model_info(repo_id, revision=tag), say).sha != commit:
            raise HubError(
                f"published as commit {commit}, but the tag {tag} of {repo_id} names another commit; choose another tag"
            ) from None


@contextlib.contextmanager
def _folder_of(folder_or_model: str | os.PathLike | nn.Module, save_args: dict[str, Any]) -> Iterator[Path]:
    if isinstance(folder_or_model, nn.Module):
        with tempfile.TemporaryDirectory() as scratch:
            yield save_pretrained(folder_or_model, Path(scratch) / "model", **save_args)
    elif save_args:
        raise TypeError(f"push() got arguments that only fit a model: {', '.join(save_args)}")
    else:
        yield Path(folder_or_model)


def _check_repo_id(repo_id: str) -> None:
    try:
        hf.utils.validate_repo_id(repo_id)
    except errors.HFValidationError as e:
        raise HubError(f"{repo_id!r} is no repository's name: {_first_line(e)}") from None
    if repo_id.count("/") != 1:
        raise HubError(f"{repo_id!r} is no repository's name; expected owner/name")


def _contents(
    folder: Path,
    repo_id: str,
    revision: str | None,
    license: str | None,
    tags: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    info: Mapping[str, Any] | None,
    files: Mapping[str, str | os.PathLike] | None,
    text: str | None,
    endpoint: str | None,
) -> tuple[dict[str, bytes | Path], str]:
    """What the repository will hold, by name, and the card; the folder is checked as a reader would."""
    from .card import make_card

    config = read_config(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise HubError(f"{folder} holds no {WEIGHTS}; expected a folder of save_pretrained")
    check_weights(folder / WEIGHTS, config, build_on_meta(config))
    sources: dict[str, bytes | Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in _PUBLISHED and not path.name.startswith("."):
            sources[path.name] = path
    for name, path in (files or {}).items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or name in (CONFIG, WEIGHTS, CARD):
            raise HubError(f"{name!r} cannot be the name of an additional file")
        if not Path(path).is_file():
            raise HubError(f"there is no file {path}")
        sources[name] = Path(path)
    block = public({**config.info, **(info or {})})
    if results:
        block["results"] = [dict(r) for r in results]
    license = license or block.get("license")
    if license:
        block["license"] = license
    data = {**config.data, "timm_resnas": block}
    try:
        sources[CONFIG] = (json.dumps(data, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as e:
        raise HubError(f"info and results must be JSON-plain: {e}") from None
    if CARD in sources:  # the author's own
        return sources, sources[CARD].read_text(encoding="utf-8")
    config = replace(config, info=block, data=data)
    others = [n for n in sources if n not in (CONFIG, WEIGHTS, GOLDEN, CARD)]
    card = make_card(
        folder,
        repo_id,
        revision=revision,
        config=config,
        results=results,
        files=others,
        license=license,
        tags=tags,
        text=text,
        endpoint=endpoint,
    )
    sources[CARD] = str(card).encode()
    return sources, str(card)


def public(value: Any) -> Any:
    """JSON-plain data without this machine's paths: of an absolute one, only its last part stays."""
    if isinstance(value, Mapping):
        return {k: public(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [public(v) for v in value]
    if isinstance(value, str):
        for mark in re.finditer(r"^|[:=]", value):  # 'imagefolder:/home/…' and '--output=/home/…', too
            rest = value[mark.end() :]
            address = re.match(r"//[^/]", rest)  # of 'https://…'
            if not address and os.path.isabs(rest) or rest.startswith("~"):
                return value[: mark.end()] + os.path.basename(os.path.normpath(rest))
    return value


def _stale_files(
    api: hf.HfApi,
    repo_id: str,
    revision: str | None,
    private: bool,
    sources: Mapping[str, Any],
    anything_goes: bool,
    say: Callable[[str], Any],
) -> list[str]:
    """Files of an earlier push that this one does not have; makes the branch where there is none.

    Raises:
        HubError: The repository is somebody else's work, or public where a private one was asked for.
    """

    def look(revision: str | None) -> Any:
        return _retried(lambda: api.model_info(repo_id, revision=revision), say)

    main = look(None)
    if private and main.private is False:
        raise HubError(f"{repo_id} exists already and is public; choose another name, or leave out private")
    found = main
    if revision is not None and revision != "main":
        try:
            found = look(revision)
        except errors.RevisionNotFoundError:
            # from the first commit, which is empty: until the commit below, a reader of the branch finds no model
            first = _retried(lambda: api.list_repo_commits(repo_id), say)[-1].commit_id
            _retried(lambda: api.create_branch(repo_id, branch=revision, revision=first, exist_ok=True), say)
            found = look(revision)
    names = {f.rfilename for f in found.siblings or ()}
    if not names - {".gitattributes", CARD, "LICENSE"}:
        return []
    if not anything_goes:
        made_by_us = False
        if CONFIG in names:
            path = _retried(
                lambda: hf.hf_hub_download(repo_id, CONFIG, revision=found.sha, token=api.token, endpoint=api.endpoint),
                say,
            )
            with contextlib.suppress(ValueError, AttributeError):
                made_by_us = "timm_resnas" in json.loads(Path(path).read_text(encoding="utf-8"))
        if not made_by_us:
            raise HubError(
                f"the name is taken: {repo_id} holds something that was not published by timm_resnas "
                f"({', '.join(sorted(names)[:4])}); choose another name, or overwrite (--overwrite) to commit over it"
            )
    ours = {GOLDEN, *_PICKLES}
    return sorted(n for n in names if n not in sources and (n in ours or n.startswith(f"{EVIDENCE}/")))


# -- what can go wrong on the way -----------------------------------------------------------------------------------

_TRIES = 4
_WAIT = 1.0  # seconds before the second try; doubled for each after it
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


def _network_errors() -> tuple[type[Exception], ...]:
    """The client's HTTP library has changed its name twice."""
    found: list[type[Exception]] = [ConnectionError, TimeoutError]
    for library, name in (("httpx2", "TransportError"), ("httpx", "TransportError"), ("requests", "RequestException")):
        if library in sys.modules:
            found.append(getattr(sys.modules[library], name))
    return tuple(found)


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """The client wraps what goes wrong in an upload's threads into a RuntimeError."""
    try:
        yield
    except RuntimeError as e:
        if isinstance(e.__cause__, Exception):
            raise e.__cause__ from None
        raise


def _status(e: BaseException) -> int | None:
    return getattr(getattr(e, "response", None), "status_code", None)


def _is_unreachable(e: BaseException) -> bool:
    if isinstance(e, errors.HfHubHTTPError):
        return _status(e) in _TRANSIENT
    return isinstance(e, _network_errors())


def _is_cut_off(e: BaseException) -> bool:
    return isinstance(e, OSError) and "consistency check" in str(e).lower()


def _retried(call: Callable[[], T], say: Callable[[str], Any] | None = None, tries: int = _TRIES) -> T:
    """Call again, after a while, where the network or the server failed for the moment."""
    wait = _WAIT
    for left in reversed(range(tries)):
        try:
            with _unwrapped():
                return call()
        except errors.OfflineModeIsEnabled:
            raise
        except Exception as e:
            if left == 0 or not (_is_unreachable(e) or _is_cut_off(e)):
                raise
            (say or _logger.warning)(f"{_first_line(e)}; trying again in {wait:g} s")
        time.sleep(wait)
        wait *= 2
    raise AssertionError


def _first_line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0][:200]


@contextlib.contextmanager
def _explained(repo_id: str, doing: str, name: str | None = None, revision: str | None = None) -> Iterator[None]:
    """Turn the client's errors into one sentence that says what would be right."""
    what = f"{name} of {repo_id}" if name else repo_id
    try:
        yield
    except errors.HFValidationError as e:
        raise HubError(f"{repo_id!r} is no repository's name; expected owner/name ({_first_line(e)})") from e
    except errors.LocalTokenNotFoundError as e:
        raise HubError(_NO_TOKEN) from e
    except errors.GatedRepoError as e:
        raise HubError(f"{repo_id} is gated: ask for access on its page, then pass a token of that account") from e
    except errors.BadRequestError as e:
        raise HubError(f"the Hub refuses the request about {what}: {_first_line(e)}") from e
    except errors.RevisionNotFoundError as e:
        raise HubError(f"{repo_id} has no branch, tag or commit {revision or 'of that name'}") from e
    except errors.LocalEntryNotFoundError as e:
        raise HubError(
            f"{what} is not in the cache, and the Hub "
            + ("is not asked in offline mode (HF_HUB_OFFLINE)" if hf.constants.HF_HUB_OFFLINE else "cannot be reached")
            + "; load it once with a connection"
        ) from e
    except errors.EntryNotFoundError as e:
        raise HubError(f"{repo_id} holds no {name}") from e
    except errors.RepositoryNotFoundError as e:
        raise HubError(
            f"there is no repository {repo_id} that this token may {doing}: check the name; a private one needs a "
            f"token of an account that has access"
        ) from e
    except errors.OfflineModeIsEnabled as e:
        raise HubError("offline mode (HF_HUB_OFFLINE) is on; publishing needs a connection") from e
    except errors.HfHubHTTPError as e:
        status = _status(e)
        if status == 401:
            raise HubError(_NO_TOKEN) from e
        if status == 403:
            raise HubError(
                f"this token may not {doing} {repo_id}: it needs write permission, and the account must own "
                f"{repo_id.split('/')[0]!r} or be a member of it"
            ) from e
        raise HubError(f"the Hub refuses to {doing} {what} (HTTP {status}): {_first_line(e)}") from e
    except _network_errors() as e:
        raise HubError(
            f"the Hub cannot be reached to {doing} {what} ({_first_line(e)}); the same command goes on where it was"
        ) from e
    except OSError as e:
        if not _is_cut_off(e):
            raise
        raise HubError(f"{what} arrived cut off, again and again; try later") from e
    except ValueError as e:
        if isinstance(e, HubError):
            raise
        raise HubError(" ".join(str(e).split())[:400]) from e


_NO_TOKEN = (
    "the Hub needs an access token that may write: make one at https://huggingface.co/settings/tokens, then run "
    "`hf auth login`, set HF_TOKEN, or pass token (--token)"
)
