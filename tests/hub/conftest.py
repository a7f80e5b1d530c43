"""Fixtures of the Hub's tests: a server on the loopback interface, a small model, its folder."""

import time

import huggingface_hub
import pytest
import timm
import torch
from hub_server import ask_for_no_agents, running

from timm_resnas.hub import save_pretrained

NETWORK = "((4,24),(1,(24,2,16),(24,48),1),(3,24,40),(1,(40,3,16),(40,96),1),(2,40,10))"


@pytest.fixture(scope="module")
def server():
    with running() as hub_server:
        yield hub_server


@pytest.fixture
def remote(server, tmp_path, monkeypatch):
    """The server, empty, and a client without token, cache or patience."""
    server.reset()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    ask_for_no_agents(monkeypatch)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return server


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return timm.create_model("vit_resnas", network_def=NETWORK, img_size=28, patch_size=14).eval()


@pytest.fixture(scope="module")
def folder(net, tmp_path_factory):
    info = {"params": 1, "searched": {"dataset": "digits", "seed": 0}}
    return save_pretrained(net, tmp_path_factory.mktemp("model") / "net", info=info, label_names=list("0123456789"))
