"""Model cards: they validate, their links resolve, their examples run."""

import importlib.metadata
import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import timm
from hub_client import run_python, send

from timm_resnas.hub import CONFIG, HubError, card, escape_markdown, load, push, read_file, save_pretrained

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
    # 3 heads of 16 on 2 tokens (one position, a class token): 48 x (4 x 40 + 2 x 2) x 2 MACs
    assert "| 1 | attention | dim 40, head\\_dim 16, num\\_heads 3, tokens 2 | 15,744 | 7,944 |" in text
    assert "| digits | test | 360 | accuracy | 0.9750 |" in text
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


def test_examples_of_the_card_run(remote, folder, python, tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", send(remote, folder).card, re.S))
    code = "from PIL import Image\nimage = Image.new('RGB', (40, 40))\n" + code + "\nprint(label)\n"
    done = run_python(python, code, remote.env(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in "0123456789"


# -- what comes from elsewhere is text --------------------------------------------------------------------------------

NASTY = [
    "x\n---\nlicense: mit\n---\n# Mine",
    "a | b | c",
    "`code` ```\nimport os\n```",
    "<script>alert(1)</script>",
    "[click](http://evil.example) ![p](http://evil.example/p.png)",
    "**bold** _it_ ~~no~~ $x$ &lt; #1",
    "\ud800 \x1b[31m \u202e",
    "long " * 500,
    {"a": ["`|`", None]},
]


def rendered(text):
    """A paragraph's text as a reader sees it: escapes of punctuation undone."""
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text)


@pytest.mark.parametrize("value", NASTY, ids=range(len(NASTY)))
def test_facts_are_text_whatever_they_hold(value):
    text = escape_markdown(value)
    assert "\n" not in text and len(text) < 700 and text.encode()
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_|<>\[\]!~$&#]", text)  # nothing that Markdown or HTML acts on
    if isinstance(value, str) and value.isascii() and value.isprintable() and len(value) < 300:
        assert rendered(text) == value


@pytest.mark.parametrize("value", NASTY[:-1], ids=range(len(NASTY) - 1))
def test_card_keeps_its_form_whatever_the_facts_are(net, tmp_path, value):
    plain, nasty = (
        push(
            save_pretrained(
                net,
                tmp_path / name,
                base_model=fact,
                info={
                    "version": fact,
                    "weights": fact,
                    "latency_ms": 1.0,
                    "latency_device": fact,
                    "searched": {"dataset": fact, "budget": fact, "x": fact},
                    "converted_from": {"file": fact, "y": [fact]},
                },
            ),
            "alice/net",
            dry_run=True,
            license=fact,
            tags=[fact],
            results=[dict(dataset=fact, split=fact, metric=fact, value=fact, by=fact, images=fact)],
        ).card
        for name, fact in (("plain", "plain"), ("nasty", value))
    )
    card = huggingface_hub.ModelCard(nasty)
    assert card.data.license == card.data.eval_results[0].dataset_name and "\n" not in card.data.license
    body = huggingface_hub.ModelCard(plain).text
    for mark in (r"(?m)^#", r"(?m)^```", r"(?m)^\|", r"(?m)^- "):
        assert len(re.findall(mark, card.text)) == len(re.findall(mark, body)), mark
    cells = [len(re.findall(r"(?<!\\)\|", row)) for row in re.findall(r"(?m)^\|.*$", card.text)]
    assert cells == [len(re.findall(r"\|", row)) for row in re.findall(r"(?m)^\|.*$", body)]


@pytest.mark.parametrize("value", NASTY, ids=range(len(NASTY)))
def test_a_table_of_runtimes_keeps_its_form_whatever_the_facts_are(value):
    facts = dict.fromkeys(("dtype", "batch_size", "device", "dataset", "split"), value)
    row = dict.fromkeys(("name", "difference", "accuracy", "images", "ms", "images_per_second"), value)
    heading, code, table, where = card._exports({**facts, "runtimes": [row, "no row"]})
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()] == [7, 7, 7]
    assert code.count("```") == 2 and "\n" not in where and "float32" in code
    assert card._exports(value) == card._exports({"runtimes": value}) == []


def test_card_that_is_not_utf8_is_one_sentence(net, tmp_path):
    folder = save_pretrained(net, tmp_path / "m")
    (folder / "README.md").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(HubError, match="README.md is not UTF-8 text"):
        push(folder, "alice/net", dry_run=True)


# -- where the weights are from ---------------------------------------------------------------------------------------


def test_install_line_names_an_address_only_where_there_is_one(folder, monkeypatch):
    class Installed:
        def __init__(self, text):
            self.text = text

        def read_text(self, name):
            return self.text

    def card_of(stated):
        text = None if stated is None else json.dumps(stated)
        monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed(text))
        return push(folder, "alice/net", dry_run=True).card

    git = {"url": "https://example.org/x/net.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
    assert "pip install 'timm_resnas @ git+https://example.org/x/net.git@abc'\n" in card_of(git)
    for other in (None, {"url": "file:///home/me/net"}, {"url": "https://me:secret@example.org/net.git"}):
        text = card_of(other)
        assert "pip install ./timm_resnas" in text and "/home/me" not in text and "secret" not in text


def test_base_model_is_named(tmp_path):
    model = timm.create_model("test_vit", num_classes=3)
    assert model.pretrained_cfg["tag"] == "r160_in1k"
    folder = save_pretrained(model, tmp_path / "m", base_model=True)
    card = huggingface_hub.ModelCard(push(folder, "alice/vit", dry_run=True).card)
    assert card.data.base_model == "timm/test_vit.r160_in1k" and card.data.license is None
    assert "It was trained on from `timm/test_vit.r160_in1k`, whose licence is apache-2.0." in card.text
    folder = save_pretrained(model, tmp_path / "m", base_model="runs/mine")
    card = huggingface_hub.ModelCard(push(folder, "alice/vit", dry_run=True, license="mit").card)
    assert card.data.license == "mit" and "trained on from `runs/mine`." in card.text
    assert load(folder).pretrained_cfg.get("license") is None


def test_nothing_in_the_hub_knows_a_family():
    """Each of these names is one family's; the Hub asks the protocol."""
    for path in Path(card.__file__).parent.glob("*.py"):
        assert not re.search("vit_resnas|network_def|Reduction|VitResNas", path.read_text()), path
