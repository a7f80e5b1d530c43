"""Report and pictures of a search, from the files in its run's folder; made again at any time.

    python recipes/report.py runs/digits-micro

Reads results.json, history.jsonl and training.jsonl; writes report.md, pareto.png, progress.png and choices.png.
"""

from dataclasses import dataclass
from pathlib import Path

from timm_resnas.engine.options import option, parse


@dataclass(frozen=True)
class ReportOptions:
    """report"""

    run: str = option(None, "folder of a finished search", positional=True)


def main(argv: list[str] | None = None) -> None:
    options = parse(ReportOptions, argv, __doc__)
    from timm_resnas.engine.report import report
    from timm_resnas.engine.run import cli_errors

    with cli_errors("report.py"):
        print(report(Path(options.run)))


if __name__ == "__main__":
    main()
