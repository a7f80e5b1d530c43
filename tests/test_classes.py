"""A model's outputs meet a data set's classes by name, never by position alone."""

import pytest
import timm
import torch
from torch.testing import assert_close

from timm_resnas.engine.models import align_classes, background_of
from timm_resnas.engine.run import RunError
from timm_resnas.hub import save_pretrained

NAMES = ["cat", "dog", "owl"]


def model(names=None, **kwargs):
    torch.manual_seed(0)
    net = timm.create_model("vit_resnas", img_size=56, num_classes=3, **kwargs).eval()
    if names:
        net.pretrained_cfg["label_names"] = list(names)
    return net


@pytest.mark.parametrize("kwargs", [{}, {"patch_head": True}, {"distill_token": True}], ids=str)
def test_outputs_are_reordered(kwargs):
    net, x = model(NAMES, **kwargs), torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        before = net(x)
    heads = {
        k: v.clone() for k, v in net.state_dict().items() if k.split(".")[0] in ("head", "head_dist", "patch_head")
    }
    assert align_classes(net, ["owl", "dog", "cat"], "the model", "the data") is None
    with torch.inference_mode():
        assert_close(net(x), before[:, [2, 1, 0]])
    for name, value in heads.items():
        assert torch.equal(net.state_dict()[name], value[[2, 1, 0]])
    assert net.pretrained_cfg["label_names"] == ["owl", "dog", "cat"]


def test_other_classes_are_refused_with_both_lists():
    with pytest.raises(ValueError, match="the supernet has the 3 classes cat, dog, owl, photos the 3 cat, dog, fox"):
        align_classes(model(NAMES), ["cat", "dog", "fox"], "the supernet", "photos")
    with pytest.raises(ValueError, match="cat, dog, owl"):
        align_classes(model(NAMES), ["cat", "dog"], "the supernet", "photos")


def test_a_model_without_names_says_so():
    note = align_classes(model(), NAMES, "the supernet", "photos")
    assert note == "the supernet does not name its classes; their order is taken to be that of photos"
    with pytest.raises(RunError, match="the supernet has 3 classes, photos has 2"):
        align_classes(model(), NAMES[:2], "the supernet", "photos")


def test_the_background_goes_with_the_model(tmp_path):
    config = {"input_size": [3, 56, 56], "mean": [0.5] * 3, "std": [0.5] * 3, "background": "#102030"}
    save_pretrained(model(), tmp_path / "net", label_names=NAMES, data_config=config)
    assert background_of(f"local-dir:{tmp_path / 'net'}") == "#102030"
    again = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True)
    assert "background" not in again.pretrained_cfg and background_of("vit_resnas_tiny") is None
