"""Random topologies for property tests."""

from hypothesis import strategies as st

from mcdeploy.connectivity.topology import Node, StageWiring, Topology


@st.composite
def topologies(draw: st.DrawFn, blocks_per_stage: tuple[int, ...], across: bool = False) -> Topology:
    """Wirings of stages with the given numbers of blocks; the first block of a stage reads the stage's input."""
    stages = []
    for s, num_blocks in enumerate(blocks_per_stage):
        reads: list[tuple[Node, ...]] = [(Node(s, 0),)]
        for i in range(2, num_blocks + 1):
            choices = [Node(s, j) for j in range(0 if s == 0 else 1, i)]  # later stages of a ResNet halve their input
            if across:
                choices += [Node(t, j) for t in range(s) for j in range(1, blocks_per_stage[t] + 1)]
            picked = draw(st.lists(st.sampled_from(choices), min_size=1, max_size=3, unique=True))
            reads.append(tuple(sorted(picked)))
        stages.append(StageWiring(f"layer{s + 1}", tuple(str(i) for i in range(num_blocks)), tuple(reads)))
    return Topology(tuple(stages), draw(st.sampled_from(["mean", "sum"])))
