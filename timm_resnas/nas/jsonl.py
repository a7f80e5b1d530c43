"""Records as lines of JSON: appended one by one, readable after a kill at any moment."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["append_jsonl", "read_jsonl", "write_jsonl"]


def read_jsonl(path: str | os.PathLike, mend: bool = False) -> list[dict[str, Any]]:
    """Records of a file; none where there is no file.

    A last line that a kill cut short is left out, and with ``mend`` removed from the file, so that appending continues
    at a line's start.

    Raises:
        ValueError: A line other than the last is no JSON object; the message gives file and line.
    """
    path = Path(path)
    if not path.exists():
        return []
    data = path.read_bytes()
    records, good = [], 0
    lines = data.split(b"\n")
    for i, line in enumerate(lines):
        ended = i < len(lines) - 1
        if not line.strip():
            good += len(line) + 1
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not ended:
                raise ValueError
        except ValueError:
            if any(rest.strip() for rest in lines[i + 1 :]):
                raise ValueError(
                    f"{path} line {i + 1} is not a record: {line[:60].decode(errors='replace')!r}; "
                    f"restore the file or remove it to start over"
                ) from None
            break
        records.append(record)
        good += len(line) + 1
    if mend and good < len(data):
        with path.open("r+b") as f:
            f.truncate(good)
    return records


def append_jsonl(path: str | os.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """Add records at the end, in one write."""
    text = "".join(json.dumps(r) + "\n" for r in records)
    with Path(path).open("a", encoding="utf-8") as f:
        f.write(text)


def write_jsonl(path: str | os.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace the file; a reader sees the old records or the new ones."""
    path = Path(path)
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    append_jsonl(fresh, records)
    fresh.replace(path)
