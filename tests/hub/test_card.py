"""Model cards: they validate, their links resolve, their examples run."""

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import timm
from hub_client import run_python, send

from timm_resnas.hub import CONFIG, HubError, push, read_file, save_pretrained

# the client's own way to send a file
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


# -- the card ---------------------------------------------------------------------------------------------------------


def test_card_validates_and_its_links_resolve(remote, folder, tmp_path):
    picture = tmp_path / "pareto.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(8))
    history = tmp_path / "history.jsonl"
    history.write_text("{}\n")
    result = dict(dataset="digits", split="test", metric="accuracy", value=0.975, images=360)
    pushed = send(
        remote,
        folder,
        license="cc-by-4.0",
        tags=["digits"],
        results=[{**result, "evidence": "search/history.jsonl"}],
        files={"search/pareto.png": picture, "search/history.jsonl": history},
    )
    path = huggingface_hub.hf_hub_download("alice/net", "README.md", endpoint=remote.url, cache_dir=tmp_path)
    card = huggingface_hub.ModelCard.load(path)
    assert remote.log("POST /api/validate-yaml")
    data = card.data
    assert (data.license, data.library_name, data.model_name) == ("cc-by-4.0", "timm", "net")
    assert {"digits", "timm", "timm_resnas", "neural-architecture-search"} <= set(data.tags)
    (found,) = data.eval_results
    assert (found.dataset_name, found.dataset_split, found.metric_type, found.metric_value) == (
        *("digits", "test", "accuracy"),
        0.975,
    )
    files = remote.files("alice/net")
    text = card.text
    root = f"{remote.url}/alice/net/blob/main/"
    linked = [link.removeprefix(root) for link in (*re.findall(r"\]\(([^)]+)\)", text), found.source_url)]
    local = [link for link in linked if not link.startswith("http")]
    assert set(local) == {"search/pareto.png", "search/history.jsonl"} <= set(files)
    assert {link for link in linked if link.startswith("http")} == {"https://arxiv.org/abs/2109.00642"}
    assert text.index("import timm, timm_resnas") < text.index("create_model('hf-hub:alice/net'")
    assert "| 2 | 40 | 1 | 3 | 16 | 96 |" in text and "| digits | test | 360 | accuracy | 0.9750 |" in text
    assert pushed.card == Path(path).read_text()
    config = json.loads(read_file("hf-hub:alice/net", CONFIG, endpoint=remote.url, cache_dir=tmp_path))
    assert config["timm_resnas"]["license"] == "cc-by-4.0"


def test_card_of_a_plain_timm_model_does_without_the_plugin(tmp_path):
    folder = save_pretrained(timm.create_model("test_vit"), tmp_path / "m")
    card = push(folder, "alice/vit", dry_run=True).card
    assert "timm_resnas  #" not in card and "pip install timm\n" in card and "model-index" not in card


def test_card_of_the_author_is_kept(net, tmp_path):
    folder = save_pretrained(net, tmp_path / "m")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert push(folder, "alice/net", dry_run=True).card.endswith("# Mine\n")


def test_refused_card_says_so(remote, net, tmp_path):
    folder = save_pretrained(net, tmp_path / "m")
    (folder / "README.md").write_text("---\nlicense: [1]\n---\n# Mine\n")
    with pytest.raises(HubError, match="license"):
        send(remote, folder)
    assert remote.files("alice/net") == []


def test_examples_of_the_card_run(remote, folder, tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", send(remote, folder).card, re.S))
    code = "from PIL import Image\nimage = Image.new('RGB', (40, 40))\n" + code + "\nprint(label)\n"
    done = run_python(code, remote.env(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in "0123456789"
