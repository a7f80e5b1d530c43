import json

import pytest
import timm

from timm_resnas.arch import Arch, ArchError
from timm_resnas.models.network_def import Block, NetworkDef, Reduction

DEF = ((4, 24), (1, (24, 2, 16), (24, 48), 1), (3, 24, 40), (1, (40, 5, 8), (40, 80), 0), (2, 40, 16))


@pytest.mark.parametrize("form", [DEF, str(DEF), str(DEF).replace("(", "[").replace(")", "]"), f"  {DEF}\n"])
def test_forms_are_equal(form):
    arch = NetworkDef.from_network_def(form)
    assert arch.to_network_def() == DEF
    assert NetworkDef.from_network_def(str(arch)) == arch == NetworkDef.parse(form)
    record = json.loads(json.dumps(arch.record()))
    assert Arch.from_record(record) == Arch.of(**record) == NetworkDef.parse(record) == NetworkDef.parse(arch) == arch
    assert hash(arch) == hash(NetworkDef.from_network_def(DEF))


def test_every_entry_type_round_trips():
    for first in ((0, 8), (4, 8), (5, 8, 3)):
        network_def = (first, (1, (8, 1, 8), (8, 3), 1), (3, 8, 8), (2, 8, 0))
        assert NetworkDef.from_network_def(network_def).to_network_def() == network_def


def test_key_ignores_genes_of_absent_blocks_only():
    def variant(heads, hidden, exists):
        return NetworkDef.from_network_def((DEF[0], (1, (24, heads, 16), (24, hidden), exists), *DEF[2:]))

    assert variant(2, 48, 0).key() == variant(1, 7, 0).key()
    keys = {variant(2, 48, 1).key(), variant(1, 48, 1).key(), variant(2, 7, 1).key(), variant(2, 48, 0).key()}
    assert len(keys) == 4


def test_key_keeps_positions_and_canonical_does_not():
    block, absent = (1, (8, 1, 8), (8, 16), 1), (1, (8, 1, 8), (8, 16), 0)
    first = NetworkDef.from_network_def(((0, 8), absent, block, (2, 8, 2)))
    second = NetworkDef.from_network_def(((0, 8), block, absent, (2, 8, 2)))
    assert first.key() != second.key()
    assert first.canonical() == second.canonical() == NetworkDef.from_network_def(((0, 8), block, (2, 8, 2)))


def test_shape_properties():
    arch = NetworkDef.from_network_def(DEF)
    assert arch.embed_dims == (24, 40)
    assert arch.depths == (1, 0)
    assert [len(s) for s in arch.stages] == [1, 1]
    assert arch.num_reductions == 1 and arch.total_stride(14) == 28
    assert arch.grids((56, 84), 14) == ((4, 6), (2, 3))
    assert isinstance(arch.blocks[1], Reduction) and arch.blocks[0] == Block(24, 2, 16, 48)
    assert arch.with_num_classes(3).to_network_def()[-1] == (2, 40, 3)


@pytest.mark.parametrize(
    "network_def, message",
    [
        (DEF[1:], r"entry 0 .*patch embedding .*first entry"),
        (DEF[:-1], r"entry 3 .*head .*last entry"),
        (((4, 24), (1, (32, 2, 16), (32, 48), 1), (2, 32, 5)), r"entry 1 .*embed_dim is 32, expected 24"),
        (((4, 24), (3, 20, 40), (2, 40, 5)), r"entry 1 .*C_in is 20, expected 24"),
        (((4, 24), (3, 24, 20), (2, 20, 5)), r"entry 1 .*C_out 20 is smaller than C_in 24"),
        (((4, 24), (2, 25, 5)), r"entry 1 .*C is 25, expected 24"),
        (((4, 24), (1, (24, 2, 16), (25, 48), 1), (2, 24, 5)), r"entry 1 .*C of the MLP is 25, expected .* 24"),
        (((4, 24), (1, (24, 0, 16), (24, 48), 1), (2, 24, 5)), r"entry 1 .*heads must be between 1 and"),
        (((4, 24), (1, (24, 2), (24, 48), 1), (2, 24, 5)), r"entry 1 .*expected \(1, \(C, heads, head_dim\)"),
        (((4, 24), (1, (24, 2, 16), (24, 48), 2), (2, 24, 5)), r"exists must be 0 or 1"),
        (((4, 24), (7, 24, 24), (2, 24, 5)), r"entry 1 .*unknown type"),
        (((4, 24.0), (2, 24, 5)), r"entry 0 .*C must be an integer, got 24.0"),
        (((4, True), (2, 1, 5)), r"C must be an integer, got True"),
        (((4, 10**9), (2, 10**9, 5)), r"C must be between 1 and 65536"),
        (((4, 24, 24), (2, 24, 5)), r"expected \(4, C\)"),
        (((4, 24), (0, 24), (2, 24, 5)), r"entry 1 .*must be the first"),
        ("((4,24),", r"not a nested tuple or list of integers"),
        ("__import__('os').getcwd()", r"not a nested tuple or list of integers"),
        ("(" * 5000, r"not a nested tuple or list of integers"),
        ("1" * 70000, r"70000 characters"),
        (((4, 24),) * 600, r"600 entries"),
        (17, r"must be a tuple"),
        ((), r"has 0 entries"),
    ],
)
def test_errors_name_the_entry_and_what_was_expected(network_def, message):
    with pytest.raises(ArchError, match=message):
        NetworkDef.from_network_def(network_def)


@pytest.mark.parametrize("img_size, near", [(200, "224x224"), ((224, 200), "224x224"), (20, "56x56")])
def test_image_size_error_names_a_size_that_works(img_size, near):
    with pytest.raises(ValueError, match=f"total stride 56 .*{near}"):
        timm.create_model("vit_res_tiny", img_size=img_size, device="meta")


def test_odd_patch_size():
    with pytest.raises(ArchError, match="must be even"):
        NetworkDef.from_network_def(DEF).grids(15, 15)
    assert NetworkDef.from_network_def(((0, 8), (2, 8, 2))).grids(15, 5) == ((3, 3),)


@pytest.mark.parametrize(
    "record",
    [None, {}, {"model": "resnet18", "args": {}}, {"model": "vit_resnas"}, {"model": ["vit_resnas"], "args": {}}],
)
def test_records_of_other_things(record):
    with pytest.raises(ArchError, match="an architecture's record has a model"):
        Arch.from_record(record)


def test_parse_says_what_it_takes():
    assert Arch.of("resnet18", {}) is None
    for value, message in (
        ({"model": "resnet18", "args": {}}, "the architecture is a 'resnet18', expected a 'vit_resnas'"),
        ({"widths": []}, "vit_resnas is described by network_def; got widths"),
        (3.5, "expected an architecture of 'vit_resnas' or its arguments, got float"),
    ):
        with pytest.raises(ArchError, match=message):
            NetworkDef.parse(value)
