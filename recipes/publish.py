"""Publish what a run found on the Hugging Face Hub, as models that plain timm loads, with the run's evidence.

    python recipes/publish.py runs/digits-micro --repo owner/name --dry-run        # what would be sent, and the card
    python recipes/publish.py runs/digits-micro --repo owner/name --license apache-2.0
    python recipes/publish.py runs/digits-micro --repo owner/name --front revisions        # also owner/name@pareto-<k>
    python recipes/publish.py runs/digits-micro --repo owner/name --front repositories     # also owner/name-pareto-<k>
    python recipes/publish.py runs/digits-micro --repo owner/name --supernet               # also owner/name-supernet
    python recipes/publish.py runs/digits-micro/pareto/2 --repo owner/name                 # any model's folder

Takes the folder of a search, of a training (their `best/` goes to the repository's main branch), of a supernet's
training, or of one model. Each model is one commit: readers see what was there before, or all of it. A repository
that holds something else is left alone (`--overwrite`). Interrupted, the same command sends only what is missing.

Sent are config.json, the weights as safetensors, an input with its logits, a model card, and under `search/` the
pictures, the history and the results; absolute paths are cut to their last part. ONNX files that recipes/export.py made
of a model go along, under `export/`. The published supernet can be
searched by anyone: `recipes/search.py --supernet hf-hub:owner/name-supernet`.

The access token is that of `hf auth login`, HF_TOKEN or `--token`; HF_ENDPOINT names another Hub.

Errors, each one sentence: no finished run there, stored logits that the weights no longer give, no token, no
permission, a name that is taken, no network (after several tries).
"""

from timm_resnas.engine.options import parse
from timm_resnas.engine.settings import PublishOptions


def main(argv: list[str] | None = None) -> None:
    options = parse(PublishOptions, argv, __doc__)
    from timm_resnas.engine.publish import publish
    from timm_resnas.engine.run import cli_errors

    with cli_errors("publish.py"):
        publish(options)


if __name__ == "__main__":
    main()
