import json

import networkx as nx
import pytest
from hypothesis import given
from strategies import topologies

from mcdeploy.connectivity.topology import Node, StageWiring, Topology, chain_reads, count_edges

GRAPHS = topologies((4, 1, 5), across=True)


def stage(*reads):
    return Topology(
        (StageWiring("s", tuple("abcdef"[: len(reads)]), tuple(tuple(Node(0, i) for i in r) for r in reads)),)
    )


def test_a_block_that_nothing_reads_is_dead_and_so_is_what_only_it_reads():
    topology = stage((0,), (1,), (2,), (0,), (1, 4))
    assert topology.dead_blocks() == (Node(0, 2), Node(0, 3))


@given(GRAPHS)
def test_live_is_what_networkx_finds_upstream_of_the_outputs(topology):
    graph = nx.DiGraph()
    graph.add_nodes_from(topology.outputs())
    for node, sources in topology.edges().items():
        graph.add_edges_from((source, node) for source in sources)
    expected = set(topology.outputs()).union(*(nx.ancestors(graph, node) for node in topology.outputs()))
    assert topology.live() == expected


@given(GRAPHS)
def test_json_brings_back_the_same_topology(topology):
    assert Topology.from_json(json.loads(json.dumps(topology.to_json()))) == topology


@given(GRAPHS)
def test_removing_dead_blocks_leaves_live_ones_with_the_same_edges_and_removing_twice_changes_nothing(topology):
    small, moved = topology.without_dead_blocks()
    assert not small.dead_blocks()
    assert small.without_dead_blocks()[0] == small
    assert count_edges(small) == count_edges(topology, topology.live())
    assert all(small.describe(new) == topology.describe(old) for old, new in moved.items())


def test_a_chain_with_dead_blocks_is_still_a_chain():
    assert stage((0,), (1,), (2,)).is_chain(0)
    assert stage((0,), (1,), (1,), (3,)).is_chain(0)
    assert not stage((0,), (1,), (1, 2)).is_chain(0)
    assert Topology((StageWiring("s", ("a", "b"), chain_reads(0, 2)),)).is_chain(0)


@pytest.mark.parametrize(
    ("reads", "message"),
    [(((0,), ()), "s.b reads nothing"), (((1,), (0,)), "not earlier"), (((0,), (2,)), "not earlier")],
)
def test_an_impossible_wiring_is_refused(reads, message):
    with pytest.raises(ValueError, match=message):
        stage(*reads)


def test_what_is_not_a_topology_is_refused():
    with pytest.raises(ValueError, match="not a topology"):
        Topology.from_json({"stages": [{"name": "x"}], "aggregate": "mean"})
