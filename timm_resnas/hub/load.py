"""Loading a model from the Hub or a folder, checked before it is built."""

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub as hf
import timm
from huggingface_hub.utils import tqdm
from torch import nn

from ..version import __version__
from .checks import (
    CONFIG,
    GOLDEN,
    MAX_CONFIG_BYTES,
    MAX_PARAMS,
    PICKLES,
    WEIGHTS,
    build_on_meta,
    plain_name,
    read_config,
)
from .errors import HubError, check_repo_id, hub_errors, is_unreachable, retry, why_not
from .weights import check_golden, check_tensors, check_values, check_weights

__all__ = ["fetch", "load", "read_file"]

_logger = logging.getLogger(__name__)
T = TypeVar("T")


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
    configuration must describe a network and images of sane size; the weights must be that network's, of its types and
    shapes, finite, with the digest that config.json states (where it does); all that comes from one commit.

    Args:
        name_or_folder: ``hf-hub:owner/name`` or ``hf-hub:owner/name@revision`` (timm's ``hf_hub:`` is the same),
            ``local-dir:<folder>`` or a folder.
        revision: Branch, tag or commit on the Hub.
        check: Compute the stored input's logits and compare.
        allow_pickle: Also read pickled weights where there are no safetensors (torch's ``weights_only``).
        max_params: Larger networks are refused.
        token: The Hub's access token; the one that was logged in with, if None.
        cache_dir: Where downloads are kept; the Hub's cache, if None.
        endpoint: Another Hub's address.
        **kwargs: Model arguments that override the saved ones (``num_classes``, ``img_size``, ``drop_path_rate``, …).

    Raises:
        HubError: It cannot be had, is not a model, or asks for too much; in one sentence.
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
    check_tensors(model.state_dict(), f"{source}: {path.name}")
    if golden is not None:
        check_golden(model, golden, f"{source}: {GOLDEN}")
    return model


def fetch(name_or_folder: str | os.PathLike, *, weights: bool = True, allow_pickle: bool = False) -> Path:
    """The local folder of a model, downloaded if need be, for ``timm.create_model('local-dir:<folder>')``.

    Configuration and weights are checked as by `load`.

    Args:
        name_or_folder: See `load`.
        weights: Also get the weights.
        allow_pickle: See `load`.

    Raises:
        HubError: See `load`.
    """
    source = _source(name_or_folder, None, None, None, None)
    if weights:
        path = _fetch(source, allow_pickle, MAX_PARAMS)
        if path.name == WEIGHTS:
            check_values(path, f"{source}: {WEIGHTS}")
        return path.parent
    path = source.file(CONFIG, limit=MAX_CONFIG_BYTES)
    build_on_meta(read_config(path, f"{source}: {CONFIG}"), MAX_PARAMS)
    return path.parent


def _fetch(source: "_Local | _Remote", allow_pickle: bool, max_params: int) -> Path:
    """The file of a model's weights, beside its config.json; both checked."""
    config = read_config(source.file(CONFIG, limit=MAX_CONFIG_BYTES), f"{source}: {CONFIG}")
    model = build_on_meta(config, max_params)
    if source.has(WEIGHTS):
        path = source.file(WEIGHTS, limit=_size_limit(model))
        check_weights(path, config, model, f"{source}: {WEIGHTS}")
        return path
    pickled = [f for f in PICKLES if source.has(f)]
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
        HubError: The model's folder or repository cannot be had, or the file is not text.
    """
    source = _source(name_or_folder, revision, token, cache_dir, endpoint)
    if not source.has(plain_name(filename)):
        return None
    try:
        return source.file(filename, limit=1 << 26).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise HubError(f"{source}: {filename} is not UTF-8 text") from None


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
    check_repo_id(repo_id)
    return _Remote(repo_id, revision or rev or None, token, cache_dir, endpoint)


def _parse_name(name: str | os.PathLike, revision: str | None) -> tuple[str, str]:
    if isinstance(name, os.PathLike):
        name = f"local-dir:{os.fspath(name)}"
    if ":" not in name and Path(name).is_dir():
        name = f"local-dir:{name}"
    kind, _, where = name.partition(":")
    kind = kind.lower().replace("hf_hub", "hf-hub")  # timm takes both
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
        self._args: dict[str, Any] = dict(token=token, cache_dir=cache_dir, endpoint=endpoint)
        self.sizes: dict[str, int | None] | None = None  # unknown without the Hub
        self.because: str | None = None  # why it is not asked
        api = hf.HfApi(endpoint=endpoint, token=token)
        with hub_errors(repo_id, "read", revision=revision):
            try:
                info = retry(lambda: api.model_info(repo_id, revision=revision, files_metadata=True, timeout=30))
            except Exception as e:
                if not is_unreachable(e):
                    raise
                self.because = why_not(e)
                _logger.warning(f"the Hub {self.because}; looking for {self} in the cache")
            else:
                self.revision = info.sha  # what follows is read from this commit, whatever is pushed meanwhile
                self.sizes = {f.rfilename: f.size for f in info.siblings or ()}
                if not isinstance(self.revision, str):
                    raise TypeError("no commit")

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
        with hub_errors(self.repo_id, "read", name, because=self.because):
            path = self._download(name, self._asked if name == CONFIG else self.revision, limit)
            if self.sizes is not None and path.parent.name != self.revision:  # a push came in between
                path = self._download(name, self.revision, limit)
        _check_size(self, name, path.stat().st_size, limit)
        return path

    def _download(self, name: str, revision: str | None, limit: int | None) -> Path:
        """Through the cache, which learns what a branch points to only where it is asked by the branch's name."""
        expected = (self.sizes or {}).get(name)
        most = limit if expected is None else expected

        def download() -> str:
            return hf.hf_hub_download(
                self.repo_id,
                name,
                revision=revision,
                local_files_only=self.sizes is None,
                library_name="timm_resnas",
                library_version=__version__,
                tqdm_class=_meter(f"{self}: {name}", most),
                **self._args,
            )  # type: ignore[return-value]  # a str without dry_run

        return Path(retry(lambda: _within(_PATIENCE + (most or 0) / _SLOWEST, download, f"{self}: {name}")))


_SLOWEST = 10_000  # bytes a second, over a whole download
_PATIENCE = 120.0  # seconds beyond that
_SLACK = 1 << 20  # bytes; counts of progress are not exact where a download is resumed


def _within(seconds: float, call: Callable[[], T], what: str) -> T:
    """The result of a call that may take so long; one that takes longer is left to end by itself."""
    done: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            done.append((call(), None))
        except BaseException as e:
            done.append((None, e))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        raise HubError(f"{what} did not arrive within {seconds:,.0f} s; the Hub or the way to it is too slow")
    result, error = done[0]
    if error is not None:
        raise error
    return result


def _meter(what: str, most: int | None) -> type[tqdm]:
    """A progress bar that ends a download which brings more than ``most`` bytes."""

    class Meter(tqdm):
        _brought = 0

        def update(self, n: float | None = 1) -> bool | None:
            self._brought += int(n or 0)
            if most is not None and self._brought > most + _SLACK:
                raise HubError(f"{what} brings more than the {most:,} bytes that are expected; the download was ended")
            return super().update(n)

    return Meter
