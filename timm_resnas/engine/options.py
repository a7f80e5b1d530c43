"""Options of a job: one frozen dataclass, from which flags, YAML files and help are made.

This module imports neither torch nor timm, so that ``--help`` answers at once.

A field is declared with `option`: its default, one line of help, and what values it may have. Classes are combined by
inheritance; the first line of the docstring of the class that declares a field is its group in the help.

>>> @dataclass(frozen=True)
... class TrainOptions(RunOptions):
...     '''training'''
...     epochs: int = option(30, "training epochs", range="[1, inf)", basic=True)
>>> options = parse(TrainOptions, ["--epochs", "3"])
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from .launcher import fail

__all__ = ["changed_options", "fixed_options", "option", "parse"]

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    range: str | None = None,
    choices: Sequence[str] | None = None,
    metavar: str | tuple[str, ...] | None = None,
    nargs: str | int | None = None,
    const: Any = None,
    basic: bool = False,
    free: bool = False,
    positional: bool = False,
) -> Any:
    """A field of an options class.

    Args:
        default: Its default.
        help: One line; the default is added to it.
        range: Interval of a number, such as ``"[0, 1)"`` or ``"(0, inf)"``. NaN and infinity are always refused.
        choices: The values of a text.
        metavar: What stands for its value in the help.
        nargs: Number of values of a list, as argparse counts them.
        const: Value of the flag without a value (with ``nargs="?"``).
        basic: Shown by ``--help``; the others by ``--help-all`` only.
        free: It does not decide results: a run may be continued with another value.
        positional: Given without a flag.
    """
    meta = dict(help=help, range=range, choices=choices, metavar=metavar, nargs=nargs, const=const)
    meta |= dict(basic=basic or positional, free=free, positional=positional)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


def parse(cls: type[T], argv: Sequence[str] | None = None, doc: str = "", **defaults: Any) -> T:
    """Options from the command line.

    As timm's scripts in two stages: ``--config file.yaml`` sets defaults, flags override them. Wrong flags, keys and
    values end the program with a message that names the flag or the file.

    Args:
        cls: The options class.
        argv: Arguments; those of the program where None.
        doc: The help's text.
        **defaults: Replace the class's defaults.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    full = "--help-all" in argv
    parser = _parser(cls, doc, full)
    parser.set_defaults(**defaults)
    if full:
        parser.print_help()
        parser.exit()
    if "config" in {field.name for field in dataclasses.fields(cls)}:
        first = _Parser(add_help=False)
        first.add_argument("--config")
        path = first.parse_known_args(argv)[0].config
        if path is not None:
            parser.set_defaults(**_read_config(parser, cls, path))
    return cls(**vars(parser.parse_args(argv)))


def fixed_options(options: Any) -> dict[str, Any]:
    """The options that decide results: a run is continued with the same values only."""
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if not f.metadata["free"]}


def changed_options(options: Any) -> dict[str, Any]:
    """The options that decide results and are not the defaults; with ``--config``, not that file's."""
    defaults = parse(type(options), [] if options.config is None else ["--config", options.config])
    return {name: value for name, value in fixed_options(options).items() if value != getattr(defaults, name)}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        """One line, without the usage of eighty options before it."""
        fail(self.prog, f"error: {message}")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)


def _parser(cls: type, doc: str, full: bool) -> argparse.ArgumentParser:
    more = "" if full else "\n\n--help-all shows every option."
    parser = _Parser(description=doc.strip() + more, formatter_class=_Formatter)
    parser.add_argument("--help-all", action="store_true", default=argparse.SUPPRESS, help="show every option")
    hints = typing.get_type_hints(cls)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in dataclasses.fields(cls):
        meta = field.metadata
        owner = next(c for c in reversed(cls.__mro__) if field.name in c.__dict__.get("__annotations__", {}))
        title = (owner.__doc__ or "options").strip().splitlines()[0]
        group = groups.setdefault(title, parser.add_argument_group(title) if title not in groups else None)
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        shown = f" (default: {default})" if default not in (None, [], "", False) else ""
        hidden = not (full or meta["basic"])
        text = argparse.SUPPRESS if hidden else meta["help"].replace("%", "%%") + shown.replace("%", "%%")
        kind, many = _kind(hints[field.name])
        flag = f"--{field.name.replace('_', '-')}"
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
            continue
        given = {"metavar": meta["metavar"]} if meta["metavar"] and not meta["choices"] else {}
        if many or meta["nargs"]:
            given["nargs"] = meta["nargs"] or "+"
        if meta["const"] is not None:
            given["const"] = meta["const"]
        if meta["choices"]:
            given["choices"] = list(meta["choices"])
        if meta["positional"]:
            group.add_argument(field.name, type=_reader(kind, meta["range"]), help=text, **given)
        else:
            group.add_argument(flag, type=_reader(kind, meta["range"]), default=default, help=text, **given)
    return parser


def _kind(hint: Any) -> tuple[type, bool]:
    """(type of a value, whether there are several) of an annotation such as ``int | None`` or ``list[float]``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) in (list, tuple):
        return typing.get_args(hint)[0], True
    return hint, False


def _reader(kind: type, interval: str | None) -> Any:
    """A function from text (or a YAML value) to a checked value."""

    def read(value: Any) -> Any:
        try:
            if isinstance(value, bool | list | dict) or (
                kind is int and isinstance(value, float) and value != int(value)
            ):
                raise ValueError
            number = kind(value)
        except (TypeError, ValueError, OverflowError):
            what = {int: "an integer", float: "a number"}.get(kind, "a text")
            raise argparse.ArgumentTypeError(f"must be {what}, got {value!r:.60}") from None
        if kind in (int, float):
            if not math.isfinite(number):
                raise argparse.ArgumentTypeError(f"must be a finite number, got {value}")
            if interval is not None and not _inside(number, interval):
                raise argparse.ArgumentTypeError(f"must be in {interval}, got {value}")
        return number

    return read


def _inside(number: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    return above and (number <= high if interval[-1] == "]" else number < high)


def _read_config(parser: argparse.ArgumentParser, cls: type, path: str) -> dict[str, Any]:
    """Defaults from a YAML file."""
    import yaml

    where = f"--config {path}"
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as e:
        parser.error(f"{where}: {e.strerror}")
    except UnicodeDecodeError:
        parser.error(f"{where} is not a text file")
    except (yaml.YAMLError, RecursionError) as e:
        parser.error(f"{where} is not YAML: {(str(e).splitlines() or ['too deeply nested'])[0]}")
    if not isinstance(data, dict):
        parser.error(f"{where} must hold 'option: value' lines, got {type(data).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name != "config"}
    names = {key: str(key).replace("-", "_") for key in data}
    if unknown := sorted(str(key) for key, name in names.items() if name not in fields):
        parser.error(f"{where} has unknown options: {', '.join(unknown)}; known: {', '.join(sorted(fields))}")
    hints = typing.get_type_hints(cls)
    clean = {}
    for key, value in data.items():
        field = fields[names[key]]
        kind, many = _kind(hints[field.name])
        if value is None:
            if type(None) not in typing.get_args(hints[field.name]):
                parser.error(f"{where}: {key} needs a value, got none")
        elif kind is bool:
            if not isinstance(value, bool):
                parser.error(f"{where}: {key} must be true or false, got {value!r:.60}")
        else:
            if many != isinstance(value, list):
                parser.error(f"{where}: {key} must be {'a list' if many else 'one value'}, got {value!r:.60}")
            read = _reader(kind, field.metadata["range"])
            try:
                value = [read(v) for v in value] if many else read(value)
            except argparse.ArgumentTypeError as e:
                parser.error(f"{where}: {key} {e}")
            nargs, choices = field.metadata["nargs"], field.metadata["choices"]
            if isinstance(nargs, int) and len(value) != nargs:
                parser.error(f"{where}: {key} takes {nargs} values, got {len(value)}")
            if choices and value not in choices:
                parser.error(f"{where}: {key} must be one of {', '.join(choices)}, got {value!r:.60}")
        clean[field.name] = value
    return clean
