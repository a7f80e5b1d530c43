"""Publishing a model as a repository of the Hub."""

import contextlib
import json
import logging
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub as hf
from huggingface_hub import errors
from torch import nn

from ..version import __version__
from .card import make_card, with_exports
from .checks import CARD, CONFIG, EXPORTS, GOLDEN, PICKLES, WEIGHTS, build_on_meta, read_config
from .errors import NO_TOKEN, TRIES, HubError, check_repo_id, hub_errors, retry, status_of
from .save import save_pretrained
from .weights import check_weights, sha256_of

__all__ = ["EVIDENCE", "PushResult", "push", "strip_paths"]

EVIDENCE = "search"  # folder of a repository for what a run recorded
_PUBLISHED = (".json", ".jsonl", ".md", ".png", ".safetensors", ".svg", ".txt", ".yaml")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PushResult:
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
) -> PushResult:
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
        results: Measured numbers for the card, see `timm_resnas.hub.card.make_card`.
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
    check_repo_id(repo_id)
    if create_pr and tag:
        raise HubError("a pull request has no commit to tag yet; leave out tag or create_pr")
    if create_pr and revision not in (None, "main"):
        raise HubError("the Hub opens pull requests on main only; leave out revision or create_pr")
    with _folder_of(folder_or_model, save_args) as folder:
        sources, card = _contents(folder, repo_id, revision, license, tags, results, info, files, text, endpoint)
        sizes = {name: len(s) if isinstance(s, bytes) else s.stat().st_size for name, s in sources.items()}
        planned = PushResult(repo_id, revision or "main", sizes, card)
        if dry_run:
            return planned
        token = token if token is not None else hf.get_token()
        if not token:
            raise HubError(NO_TOKEN)
        api = hf.HfApi(endpoint=endpoint, token=token, library_name="timm_resnas", library_version=__version__)
        message = commit_message or f"{json.loads(sources[CONFIG])['architecture']}, timm_resnas {__version__}"
        say = say or _logger.info
        with hub_errors(repo_id, "write to", revision=revision):
            if not create_pr:
                retry(lambda: api.create_repo(repo_id, private=private, exist_ok=True), say)
            stale = _stale_files(api, repo_id, revision, private, sources, overwrite or create_pr, say)
            say(f"sending {planned}")

            def commit() -> hf.CommitInfo:
                # made for each try: the client marks what it has sent
                operations: list[Any] = [hf.CommitOperationAdd(name, source) for name, source in sources.items()]
                if stale:  # an earlier try may have deleted them, though its answer got lost
                    there = {f.rfilename for f in api.model_info(repo_id, revision=revision).siblings or ()}
                    operations += [hf.CommitOperationDelete(name) for name in stale if name in there]
                return api.create_commit(
                    repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr
                )

            # an answer that got lost must not open a second pull request
            done = retry(commit, say, tries=1 if create_pr else TRIES)
            if tag:
                _put_tag(api, repo_id, tag, done.oid, say)
    return replace(planned, commit=done.oid, url=str(done.pr_url or done.commit_url))


def _put_tag(api: hf.HfApi, repo_id: str, tag: str, commit: str, say: Callable[[str], Any]) -> None:
    try:
        retry(lambda: api.create_tag(repo_id, tag=tag, revision=commit), say)
    except errors.HfHubHTTPError as e:
        if status_of(e) != 409:
            raise
        if retry(lambda: api.model_info(repo_id, revision=tag), say).sha != commit:
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
) -> tuple[dict[str, Any], str]:
    """What the repository will hold by name, bytes or a Path, and the card; the folder is checked as a reader would."""
    for name in (CONFIG, WEIGHTS):
        if (folder / name).exists():
            _check_regular(folder / name)
    config = read_config(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise HubError(f"{folder} holds no {WEIGHTS}; expected a folder of save_pretrained")
    check_weights(folder / WEIGHTS, config, build_on_meta(config))
    sources: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in _PUBLISHED and not path.name.startswith("."):
            _check_regular(path)
            sources[path.name] = path
    exported, hashes = _exports(folder)
    sources |= exported
    for name, file in (files or {}).items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or name in (CONFIG, WEIGHTS, CARD):
            raise HubError(f"{name!r} cannot be the name of an additional file")
        if not Path(file).is_file():
            raise HubError(f"there is no file {file}")
        sources[name] = Path(file)
    block = strip_paths({**config.info, **(info or {})})
    measured = block.get("export")
    stale = "export" in block and not (isinstance(measured, Mapping) and hashes and measured.get("files") == hashes)
    if stale:
        del block["export"]  # of other files than those that are there
    if results:
        block["results"] = [dict(r) for r in results]
    license = license or block.get("license")
    data = {**config.data, "timm_resnas": block}
    if license:
        block["license"] = license
        if "pretrained_cfg" in data:
            data["pretrained_cfg"] = {**data["pretrained_cfg"], "license": license}
    try:
        sources[CONFIG] = (json.dumps(data, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as e:
        raise HubError(f"info and results must be JSON-plain: {e}") from None
    if CARD in sources:  # the author's own
        try:
            own = sources[CARD].read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise HubError(
                f"{sources[CARD]} is not UTF-8 text; save it as UTF-8, or remove it and one is made"
            ) from None
        if stale:
            own = with_exports(own, None)
            sources[CARD] = own.encode()
        return sources, own
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


def _exports(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Files for other runtimes, by their names in the repository; not programs of torch.export, whose reader unpickles.

    Returns:
        The files, and the sha256 of each that was measured, by its name in the folder.

    Raises:
        HubError: They are of other weights than the folder's, or not those that were measured.
    """
    exports = folder / EXPORTS
    if not exports.is_dir():
        return {}, {}
    try:
        results = json.loads((exports / "results.json").read_text(encoding="utf-8"))
        weights, hashes = results["weights"], {name: file["sha256"] for name, file in results["files"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        weights, hashes = None, {}
    if weights != sha256_of(folder / WEIGHTS):
        raise HubError(f"{exports} was not made from {folder / WEIGHTS}; run recipes/export.py again, or remove it")
    found = {}
    for path in sorted(exports.iterdir()):
        if path.suffix in (".onnx", *_PUBLISHED) and not path.name.startswith("."):
            _check_regular(path)
            if path.suffix == ".onnx" and hashes.get(path.name) != sha256_of(path):
                raise HubError(
                    f"{path} is not a file that {exports / 'results.json'} tells of; run recipes/export.py again, or "
                    f"remove it"
                )
            found[f"{EXPORTS}/{path.name}"] = path
    return found, hashes


def _check_regular(path: Path) -> None:
    """A folder's file is published only where it lies in the folder: a link could name any file of this machine."""
    if not stat.S_ISREG(path.lstat().st_mode):
        kind = "a link" if path.is_symlink() else "not a regular file"
        raise HubError(f"{path} is {kind}; only files that lie in the folder itself are published: copy it there")


def strip_paths(value: Any) -> Any:
    """JSON-plain data without this machine's paths: of an absolute one, only its last part stays."""
    if isinstance(value, Mapping):
        return {k: strip_paths(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strip_paths(v) for v in value]
    if isinstance(value, str):
        for mark in re.finditer(r"^|[:=]", value):  # 'imagefolder:/home/…' and '--output=/home/…' as well
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
        return retry(lambda: api.model_info(repo_id, revision=revision), say)

    main = look(None)
    if private and main.private is False:
        raise HubError(f"{repo_id} exists already and is public; choose another name, or leave out private")
    found = main
    if revision is not None and revision != "main":
        try:
            found = look(revision)
        except errors.RevisionNotFoundError:
            # from the first commit, which is empty: until the commit below, a reader of the branch finds no model
            first = retry(lambda: api.list_repo_commits(repo_id), say)[-1].commit_id
            retry(lambda: api.create_branch(repo_id, branch=revision, revision=first, exist_ok=True), say)
            found = look(revision)
    names = {f.rfilename for f in found.siblings or ()}
    if not names - {".gitattributes", CARD, "LICENSE"}:
        return []
    if not anything_goes:
        made_by_us = False
        if CONFIG in names:
            path = retry(
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
    ours = {GOLDEN, *PICKLES}
    return sorted(n for n in names if n not in sources and (n in ours or n.startswith((f"{EVIDENCE}/", f"{EXPORTS}/"))))
