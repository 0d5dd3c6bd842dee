"""Descriptions of nodes."""

from __future__ import annotations

import pytest

from engine.planner.hardware import HOST_SHARE, KINDS, NodesError, find_kind, parse_nodes


def test_nodes_are_read_in_their_order() -> None:
    nodes = parse_nodes("2x8xH200, 1x4xL40S")
    assert [(n.name, n.kind.name, n.gpus, n.rdma) for n in nodes] == [
        ("n0", "H200", 8, True),
        ("n1", "H200", 8, True),
        ("n2", "L40S", 4, False),
    ]
    assert parse_nodes("2\u00d78\u00d7H100")[1].gpus == 8
    assert not parse_nodes("2x8xH200", rdma=False)[0].rdma


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("H100", "H100"),
        ("h100-80GB", "H100"),
        ("A100-80", "A100-80"),
        ("a100 80gb", "A100-80"),
        ("RTX 4090", "RTX4090"),
        ("rtx_4090", "RTX4090"),
        ("4090", "RTX4090"),
        ("l40s", "L40S"),
    ],
)
def test_kinds_are_found_as_people_write_them(name: str, kind: str) -> None:
    assert find_kind(name).name == kind


def test_an_unknown_kind_gets_the_nearest() -> None:
    with pytest.raises(NodesError, match=r"no GPU kind 'H2000'\. Did you mean H200\?"):
        parse_nodes("1x8xH2000")
    with pytest.raises(NodesError, match=r"Known: B200, H200, H100"):
        find_kind("quantum")


@pytest.mark.parametrize("text", ["", "8xH200", "1x8", "ax8xH200", "1x8xH200,", "-1x8xH200"])
def test_other_forms_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(NodesError, match="Write NODESxGPUSxKIND, for example 1x8xH200"):
        parse_nodes(text)


@pytest.mark.parametrize("text", ["0x8xH200", "1x0xH200", "1000000x8xH200"])
def test_numbers_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(NodesError, match="at least 1"):
        parse_nodes(text)


def test_the_kinds_that_were_promised_are_there() -> None:
    assert {"H200", "H100", "A100-80", "L40S", "RTX4090"} <= KINDS.keys()
    assert 79 < KINDS["H100"].memory_bytes / 2**30 < 80 < 140 < KINDS["H200"].memory_bytes / 2**30 < 141


def test_the_hosts_memory_is_told_behind_a_colon_or_is_the_usual() -> None:
    usual, told = parse_nodes("1x8xH200,1x8xH200:1024 GiB")
    assert usual.host_bytes == int(2048 * 2**30 * HOST_SHARE)
    assert told.host_bytes == int(1024 * 2**30 * HOST_SHARE)
    assert told.kind == usual.kind
    assert all(kind.host_bytes > 0 for kind in KINDS.values())
    with pytest.raises(NodesError, match="1x8xH200:1024"):
        parse_nodes("1x8xH200:lots")
