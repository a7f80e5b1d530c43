"""imagefolder:<dir>: one folder per class, below the folders of the parts or without parts."""

import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .images import IMAGE_EXTENSIONS, DataError, require
from .names import natural_key, part_kind, pick_part, some
from .parts import EvalPart, Reading, Splits, cut_test, make_splits, whole_or_cut

__all__ = ["open_folder", "open_folder_eval"]


def open_folder(name: str, folder: Path, reading: Reading, test_fraction: float) -> Splits:
    """The training and test parts of a folder of images.

    Raises:
        DataError: Its layout does not say which folders are parts and which are classes; or files are unfit.
    """
    reading.refuse(name, "image_key", "label_key", "hf_config")
    layout = _Layout(folder)
    train, test, notes = layout.training(reading.train_split, reading.test_split)
    data, train_names, more = _class_folders(train, without=test)
    notes += more
    if test is None:
        return make_splits(name, *cut_test(data, test_fraction), reading, notes)
    test_data, test_names, more = _class_folders(test)
    notes += more
    if test_names != train_names:
        only = [sorted(set(a) - set(b)) for a, b in ((train_names, test_names), (test_names, train_names))]
        raise DataError(
            f"the class folders differ: only in {train}: {some(only[0])}; only in {test}: {some(only[1])}; "
            "both need the same classes"
        )
    return make_splits(name, data, test_data, reading, notes)


def open_folder_eval(name: str, folder: Path, split: str | None, reading: Reading, test_fraction: float) -> EvalPart:
    """The part of a folder of images that is evaluated (see `load_eval`).

    Raises:
        DataError: As `open_folder`.
    """
    reading.refuse(name, "image_key", "label_key", "hf_config")
    part, tested = _Layout(folder).evaluated(split)
    data, _, notes = _class_folders(part)
    shown = "all" if part == folder else Path(os.path.relpath(part, folder)).as_posix()
    return whole_or_cut(name, shown, data, None if tested else split, tested, reading, test_fraction, notes)


class _Layout:
    """Which sub-folders of a folder are parts, and which are classes.

    A folder with the usual name of a part is one when it holds folders and no images; one with images right in it may
    also be a class (trains). Beside parts, other folders are not used.
    """

    def __init__(self, folder: Path):
        must_be_folder(folder)
        require("datasets")
        self.folder = folder
        self.entries = {e.name: e for e in _folders(folder)}
        self.inside = {n: {_same(f.name) for f in _folders(e)} for n, e in self.entries.items()}
        usual = {n: kind for n in self.entries if (kind := part_kind(n))}
        self.nested = {n for n, inside in self.inside.items() if inside and not _has_images(self.entries[n])}
        self.parts = {n: kind for n, kind in usual.items() if n in self.nested}
        # images without class folders, as in public test parts
        alone = self.parts or len(usual) == len(self.entries)
        self.unlabelled = [n for n in usual if alone and n not in self.parts]
        self.others = [n for n in self.entries if n not in self.parts and n not in self.unlabelled]

    def training(self, train: str | None, test: str | None) -> tuple[Path, Path | None, list[str]]:
        """Folders to train and to test on (None: to be cut from the former), and notes."""
        train_dir = None if train is None else self._named(train, "--train-split")
        test_dir = None if test is None else self._named(test, "--test-split")
        if train_dir is None:
            left = [n for n in self.parts if self.entries[n] != test_dir]
            if name := pick_part(left, "train", str(self.folder), "--train-split"):
                train_dir = self.entries[name]
            elif test_dir or self.parts or self.unlabelled:
                self._no_training(test)
            else:
                self._check_classes("--train-split and --test-split")
                return self.folder, None, []
        if test_dir is None and train_dir != self.folder:
            left = [n for n in self.parts if self.entries[n] != train_dir]
            for kind in ("test", "val"):
                if name := pick_part(left, kind, str(self.folder), "--test-split"):
                    test_dir = self.entries[name]
                    break
        return train_dir, test_dir, self._unused(train_dir, test_dir)

    def evaluated(self, split: str | None) -> tuple[Path, bool]:
        """The folder to evaluate, and whether training would leave all of it in one part; else it cuts a test part."""
        where = str(self.folder)
        if split not in (None, "train", "test"):
            return self._named(split, "--split"), True
        if self.parts and self.others and "train" not in self.parts.values():
            self._mixed("--split")
        kinds = set(self.parts.values())
        test = next((kind for kind in ("test", "val") if kind in kinds), None)
        if split != "train" and test:
            return self.entries[pick_part(self.parts, test, where, "--split")], True
        if "train" in kinds:
            return self.entries[pick_part(self.parts, "train", where, "--split")], test is not None
        if self.parts or self.unlabelled:
            found = some([*self.parts, *self.unlabelled])
            raise DataError(f"{where} has no {split or 'test'} part with class folders; it has {found}")
        self._check_classes("--split")
        return self.folder, False

    def _named(self, asked: str, flag: str) -> Path:
        if asked in self.entries or os.path.isdir(self.folder / asked):
            return self.folder if asked == "." else self.folder / asked
        near = [n for n in self.entries if n.lower() == asked.lower()]
        if flag == "--split":
            near = near or [n for n, kind in self.parts.items() if kind == part_kind(asked)]
        if len(near) == 1:
            return self.entries[near[0]]
        raise DataError(f"{self.folder} has no folder {asked!r}; it has {some(list(self.entries))} ({flag})")

    def _no_training(self, test: str | None) -> None:
        if self.parts and self.others:
            self._mixed("--train-split")
        if not self.parts and test is None:
            first = self.entries[self.unlabelled[0]]
            raise DataError(f"{first} holds no class folders; expected {first / '<class>'}/<images>")
        raise DataError(
            f"{self.folder} has no part to train on; it has {some(list(self.entries))}: name one by --train-split"
        )

    def _mixed(self, flag: str) -> None:
        both = " --test-split " + next(iter(self.parts)) if flag == "--train-split" else ""
        raise DataError(
            f"{self.folder} has the part {some(list(self.parts))} beside other folders ({some(self.others)}); if these "
            f"are the classes, say so by {flag} .{both}, or move them into a folder train"
        )

    def _check_classes(self, flags: str) -> None:
        """Refuses folders that look like parts or a wrapping: all of them hold the same sub-folders, and no images."""
        if len(self.entries) == 1 and self.nested:
            (name,) = self.entries
            raise DataError(
                f"{self.folder} holds the single folder {name!r}, which holds {some(sorted(self.inside[name]))}; "
                f"give imagefolder:{self.folder / name}"
            )
        if len(self.entries) < 2 or len(self.nested) < len(self.entries):
            return
        times = Counter(inner for inside in self.inside.values() for inner in inside)
        shared = sorted((n for n, count in times.items() if count > 1), key=natural_key)
        if 2 * len(shared) >= len(times):
            raise DataError(
                f"in {self.folder}, {some(list(self.entries))} hold the same sub-folders ({some(shared)}), so they "
                f"look like parts, not classes; name them by {flags}, or say that they are the classes by "
                f"{flags.split()[0]} ."
            )

    def _unused(self, train: Path, test: Path | None) -> list[str]:
        if train == self.folder:
            return []
        used = {train, test}
        left = [n for n in (*self.parts, *self.others) if self.entries[n] not in used]
        notes = [f"not used: {some(left)} in {self.folder}"] if left else []
        if self.unlabelled:
            notes.append(f"not used: {some(self.unlabelled)} in {self.folder}, without class folders")
        if test is None:
            notes.append(f"{self.folder} has no test part with class folders: one is cut from {train.name}")
        return notes


def must_be_folder(folder: Path) -> None:
    """Raises `DataError` for what is not a folder."""
    if not os.path.isdir(folder):
        raise DataError(f"{folder} is not a folder" if os.path.exists(folder) else f"there is no folder {folder}")


def _same(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as found:
            return [e for e in found if not e.name.startswith((".", "__"))]
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {error.strerror}") from None


def _folders(folder: Path) -> list[Path]:
    found = (Path(folder, e.name) for e in _entries(folder) if e.is_dir())
    return sorted(found, key=lambda e: natural_key(e.name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS) and _is_text(name)


def _is_text(name: str) -> bool:
    """False for names that are not UTF-8, which tables cannot hold."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def _has_images(folder: Path) -> bool:
    return any(_is_image(e.name) for e in _entries(folder) if not e.is_dir())


def _class_folders(folder: Path, without: Path | None = None) -> tuple:
    """The images below a folder's class folders as a `Dataset`, the classes' names, and notes."""
    must_be_folder(folder)
    classes = [c for c in _folders(folder) if c != without]
    if not classes:
        tables = [e.name for e in _entries(folder) if e.name.startswith("metadata.")]
        loose = _has_images(folder)
        hint = f"; {tables[0]} beside them is read by hf:{folder}" if loose and tables else ""
        raise DataError(
            f"{folder} holds {'images but no class folders' if loose else 'no class folders'}; "
            f"expected {folder / '<class>'}/<images>, one folder per class{hint}"
        )
    if unreadable := [c.name for c in classes if not _is_text(c.name)]:
        raise DataError(f"{folder} has the class folder {unreadable[0]!r}, whose name is not UTF-8; rename it")
    names = [_same(c.name) for c in classes]
    if twice := [n for n, count in Counter(names).items() if count > 1]:
        raise DataError(f"{folder} has several class folders whose names look alike: {some(twice)}; rename them")
    paths, labels, ignored = [], [], []
    for c, class_folder in enumerate(classes):
        found, other = _images_below(class_folder)
        if not found:
            raise DataError(f"the class folder {class_folder} holds no images ({' '.join(IMAGE_EXTENSIONS)})")
        paths += found
        labels += [c] * len(found)
        ignored += other
    notes = []
    if ignored:
        kinds = Counter(_kind_of_file(f) for f in ignored)
        shown = some([f"{count} {kind}" for kind, count in kinds.most_common()])
        notes.append(f"files below {folder} that are not images by their names are left out: {shown}")
    return _file_dataset(paths, labels, names), names, notes


def _images_below(folder: Path) -> tuple[list[str], list[str]]:
    """All images below a folder, in natural order, and the names of the other files."""
    found, other, seen = [], [], set()

    def fail(error: OSError) -> None:
        raise DataError(f"the folder {error.filename} cannot be read: {error.strerror}") from None

    for root, dirs, files in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(root)
        if real in seen:  # a link to a folder above or beside it: its images would count twice
            dirs.clear()
            continue
        seen.add(real)
        dirs[:] = sorted((d for d in dirs if not d.startswith(".")), key=natural_key)
        for name in files:
            if not name.startswith("."):
                (found if _is_image(name) else other).append(os.path.join(root, name))
    return sorted(found, key=lambda path: natural_key(os.path.relpath(path, folder))), other


def _kind_of_file(path: str) -> str:
    name = os.path.basename(path)
    if not _is_text(name):
        return "with names that are not UTF-8"
    return os.path.splitext(name)[1].lower() or "without an extension"


def _file_dataset(paths: list[str], labels: Sequence[int], names: Sequence[str]):
    import pyarrow as pa

    files = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), pa.array(paths)], names=["bytes", "path"])
    return make_dataset(files, labels, names)


def make_dataset(images, labels: Sequence[int], names: Sequence[str]):
    """A `datasets.Dataset` of an arrow array of structs of bytes and path, and class numbers."""
    import pyarrow as pa

    datasets = require("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    table = pa.table({"image": images, "label": pa.array(np.asarray(labels, dtype=np.int64))})
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))
