"""Measure a latency table on this device, and how well it predicts whole networks.

    python recipes/latency.py --space micro --batch-size 32 --threads 1 --output latency.json
    python recipes/latency.py --space vit_resnas_tiny --device cuda --batch-size 64 --precision amp --output h200.json
    python recipes/latency.py --supernet runs/digits-micro/supernet --batch-size 1 --threads 2 --output latency.json
    python recipes/latency.py --space micro --batch-size 1 --runtime onnxruntime --output onnx.json
    accelerate launch recipes/search.py --latency-table latency.json --budget latency=40%

A table is for one device, number of threads, batch size, image size and precision, and for the networks of one space,
as a user deploys them: the plain timm network in eval and inference mode. The first line takes some minutes. Let the
machine do nothing else meanwhile: what is read is the wall clock, and a note says so where other programs took much.

How it is measured (see `timm_resnas.nas.latency`): some tens of networks that together hold every layer of the space
run from end to end with a time stamp between the layers, taking turns in `--rounds` rounds; the fastest repeat of all
rounds counts, their median and spread are kept beside it. A line through the sums, fitted on `--calibration` random
networks, makes them the latency of a whole network.

`--runtime onnxruntime` measures the networks' ONNX graphs in ONNX Runtime on the CPU, layers by its own profile (see
`timm_resnas.nas.onnx_timer`); a search with such a table exports its finalists and times them there. Exporting takes
seconds for each of the networks before its first round.

Then `--verify` other random networks, spread evenly over the space's range of MACs, are measured from end to end, in
separate rounds, and compared with the prediction: median and largest error, rank correlation, beside what MACs
alone predict. The machine's speed may have changed since the table was measured; by how much is told from the
calibration networks, which are measured again.

Files: FILE, the table (readable, with the comparison in its notes); FILE's name with .png, predicted against measured;
with .records.jsonl every measurement. Started again with the same command, it continues where it was; remove these
records to start over.
"""

from timm_resnas.engine.options import parse
from timm_resnas.engine.settings import LatencyOptions


def main(argv: list[str] | None = None) -> None:
    options = parse(LatencyOptions, argv, __doc__)
    # torch is imported from here on, so that --help answers at once
    from timm_resnas.engine.latency import measure_table
    from timm_resnas.engine.run import cli_errors

    with cli_errors("latency.py"):
        measure_table(options)


if __name__ == "__main__":
    main()
