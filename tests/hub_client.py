"""What tests of the Hub share: sending to and loading from the server of `hub_server`, Python in a clean process."""

import os
from pathlib import Path

from timm_resnas.hub import load, push

ROOT = Path(__file__).resolve().parents[1]


def send(remote, what, name="alice/net", **more):
    return push(what, name, **{"token": "hf_alice", "endpoint": remote.url, **more})


def fetch(remote, tmp_path, name="alice/net", **more):
    return load(f"hf-hub:{name}", endpoint=remote.url, cache_dir=tmp_path / "cache", **more)


def run_python(python, code, env, *args):
    """A program of the fixture `python`, whose variables for the Hub are those of ``env`` alone."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return python.run(code, *args, env={**clean, **env})
