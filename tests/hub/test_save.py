"""Writing a model's folder."""

import pytest

from timm_resnas.hub import HubError, save_pretrained


def test_save_does_not_replace_what_is_no_model(net, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(HubError, match="holds no config.json"):
        save_pretrained(net, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
