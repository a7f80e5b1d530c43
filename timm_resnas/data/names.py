"""Names: natural order, the usual names of a data set's parts, classes matched by name."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from .images import DataError

__all__ = ["match_classes", "natural_key"]

_PARTS = {
    "train": "train training trn",
    "test": "test testing tst eval evaluation",
    "val": "val validation valid validate dev devel development",
}
_KINDS = {name: kind for kind, names in _PARTS.items() for name in names.split()}
_PART = re.compile(rf"({'|'.join(_KINDS)})[\s_.-]*(set|data|dataset|images|imgs|split|part)?", re.IGNORECASE)


def natural_key(text: str) -> tuple:
    """Sort key that puts 'class10' behind 'class2', as timm orders classes; total, so that no two texts tie.

    Names that differ only in case, leading zeros or Unicode form would otherwise keep the order of the disk.
    """
    parts = re.split(r"([0-9]+)", unicodedata.normalize("NFC", text).lower())  # macOS stores decomposed names
    numbers = [part.lstrip("0") for part in parts[1::2]]
    parts[1::2] = [(len(number), number) for number in numbers]  # int() refuses numbers of thousands of digits
    return parts, text


def part_kind(name: str) -> str | None:
    """'train', 'test' or 'val' for the usual names of a data set's parts, whatever their case; else None."""
    match = _PART.fullmatch(name.strip())
    return _KINDS[match[1].lower()] if match else None


def pick_part(names: Iterable[str], kind: str, where: str, flag: str) -> str | None:
    """The one of `names` that is the part 'train', 'test' or 'val'; None where there is none.

    Raises:
        DataError: Several could be meant; `flag` is the option that names one.
    """
    found = [name for name in names if part_kind(name) == kind]
    exact = [name for name in found if name == kind] or found
    if len(exact) > 1:
        raise DataError(f"{where} has several parts that could be meant, {some(exact)}; name one by {flag}")
    return exact[0] if exact else None


def some(items: Sequence, limit: int = 8) -> str:
    """A list for a message, cut after `limit` items."""
    shown = ", ".join(str(i) for i in items[:limit])
    return (shown + (f", … ({len(items)} in all)" if len(items) > limit else "")) or "none"


def match_classes(
    model_names: Sequence[str],
    data_names: Sequence[str],
    *,
    aliases: Sequence[Sequence[str]] = (),
    subset: bool = False,
    model: str = "the model",
    data: str = "the data",
) -> list[int] | None:
    """Matches a model's classes with those of a data set by name.

    Args:
        model_names: Names of the model's outputs, in their order.
        data_names: Names of the data's labels, in their order.
        aliases: Other names of the model's outputs, each list as long as `model_names`: ImageNet's WordNet ids and
            their words. The first list that fits is used.
        subset: The data may have some of the model's classes only (for evaluation, not for training).
        model: What messages call the model.
        data: What messages call the data set.

    Returns:
        For each of the data's classes the model's output, so that `logits[:, order]` or `weight[order]` are in the
        data's order; None where both have the same order and nothing is to be done.

    Raises:
        DataError: The classes differ, or a name stands for several; both lists are shown.
    """
    wanted = [_same(n) for n in data_names]
    for names in (model_names, *aliases):
        known = [_same(n) for n in names]
        if known == wanted:
            return None
        if max(Counter(known).values(), default=0) > 1 or max(Counter(wanted).values(), default=0) > 1:
            continue
        if set(wanted) == set(known) or (subset and set(wanted) < set(known)):
            number = {name: k for k, name in enumerate(known)}
            return [number[name] for name in wanted]
    known = [_same(n) for n in model_names]
    twice = [n for n, count in (Counter(known) + Counter()).items() if count > 1] or [
        n for n, count in Counter(wanted).items() if count > 1
    ]
    parts = [f"{model} has the {len(known)} classes {some(model_names)}, {data} the {len(wanted)} {some(data_names)}"]
    if twice:
        parts.append(f"a name that stands for several ({some(twice, 3)}) cannot be matched")
    else:
        parts += [f"only {data} has {some(only)}" for only in [_only(wanted, known)] if only]
        parts += [f"only {model} has {some(only)}" for only in [_only(known, wanted)] if only and not subset]
    raise DataError("; ".join(parts) + ". Classes are matched by name: use the same names for both")


def _same(name: str) -> str:
    return unicodedata.normalize("NFC", str(name))


def _only(a: Sequence[str], b: Sequence[str]) -> list[str]:
    return sorted(set(a) - set(b), key=natural_key)
