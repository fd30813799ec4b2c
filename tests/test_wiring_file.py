"""What the bundle says of its wiring is what the net does: the candidates, the gates, the edges of every image."""

import json

import numpy as np
import pytest
import torch
from mcruntime.bundle import WIRING, WIRING_MODEL
from mcruntime.engine import OnnxRunner
from tiny_dynamic import scattered_resnet
from tiny_models import images

from mcdeploy import wiring_file
from mcdeploy.compile import compile_with_certificate
from mcdeploy.compile.conditional import told
from mcdeploy.compile.dynamic import record
from mcdeploy.connectivity.ddw import dynamic_stages
from mcdeploy.connectivity.wiring import candidates_of
from mcdeploy.errors import ParityError

VAL = images(40, 16, seed=1)


def batches():
    return [(VAL[:24], torch.zeros(24)), (VAL[24:], torch.zeros(16))]


@pytest.fixture(scope="module", params=["stage", "node"])
def written(request, tmp_path_factory):
    """A net whose routers are random, compiled, and its wiring beside it; by both kinds of routers."""
    folder = tmp_path_factory.mktemp(request.param)
    model = scattered_resnet(6, num_blocks=2, router=request.param)
    small, certificate = compile_with_certificate(model, VAL[:7], VAL)
    candidates = candidates_of(model).to_json()
    wiring_file.write_wiring(
        folder, small, certificate.topology, batches(), example=VAL[:2], opset=20, candidates=candidates
    )
    return folder, small, certificate, candidates


def test_the_file_holds_the_topology_and_what_could_have_been_read(written):
    folder, _, certificate, candidates = written
    tree = json.loads((folder / WIRING).read_text())
    assert tree["topology"] == json.loads(json.dumps(certificate.topology))
    assert tree["candidates"] == json.loads(json.dumps(candidates))


def test_every_edge_has_the_share_of_images_it_is_open_for(written):
    folder, small, _, _ = written
    shares = torch.cat([open_BE.double().mean(0) for open_BE in record(small, VAL).open_BE.values()])
    told = [edge["share"] for edge in json.loads((folder / WIRING).read_text())["dynamic"]]
    assert told == pytest.approx(shares.tolist())
    assert any(0 < share < 1 for share in told)


def test_edges_are_numbered_as_the_topology_is_although_blocks_are_gone(written):
    folder, small, certificate, _ = written
    told = iter(json.loads((folder / WIRING).read_text())["dynamic"])
    rows = certificate.topology["stages"]
    for name, stage in dynamic_stages(small).items():
        s = [row["name"] for row in rows].index(name)
        names = ["", *rows[s]["blocks"]]
        own = ("", *stage.block_names)
        for source, reader in stage.edges:
            edge = next(told)
            assert (edge["from"][0], edge["to"][0]) == (s, s)
            assert (names[edge["from"][1]], names[edge["to"][1]]) == (own[source], own[reader])
    assert next(told, None) is None


def test_onnxruntime_opens_the_edges_that_pytorch_opens_one_image_at_a_time(written):
    folder, small, _, _ = written
    with OnnxRunner(folder / WIRING_MODEL) as runner:
        for image in VAL[:8].split(1):
            seen, weights_BE = record(small, image), runner.infer(image.numpy())
            np.testing.assert_array_equal(weights_BE > 0, torch.cat(list(seen.open_BE.values()), 1))
            np.testing.assert_allclose(weights_BE, torch.cat(list(seen.weights_BE.values()), 1), atol=1e-5)


class Wrong:
    """A runner that answers ``change`` of what is right."""

    def __init__(self, small, change):
        self.small, self.change = small, change

    def infer(self, array):
        seen = record(self.small, torch.from_numpy(array))
        return self.change(
            torch.cat([told(seen.open_BE[name], seen.weights_BE[name]) for name in seen.open_BE], 1).numpy()
        )


def test_a_file_that_opens_another_edge_or_weighs_one_otherwise_is_refused(written):
    _, small, _, _ = written

    def close_one(weights_BE):
        weights_BE[-1, weights_BE[-1].argmax()] = 0
        return weights_BE

    def weigh_more(weights_BE):
        return np.where(weights_BE > 0, weights_BE + 0.01, 0)

    wiring_file._prove(small, Wrong(small, lambda weights_BE: weights_BE), batches())
    with pytest.raises(ParityError, match="otherwise than PyTorch"):
        wiring_file._prove(small, Wrong(small, close_one), batches())
    with pytest.raises(ParityError, match="weight is off"):
        wiring_file._prove(small, Wrong(small, weigh_more), batches())


def test_a_wiring_for_all_images_needs_no_model_beside_it(tmp_path):
    topology = {"aggregate": "mean", "stages": []}
    gates = {"layer1": [[1.0]]}
    wiring_file.write_wiring(tmp_path, torch.nn.Identity(), topology, (), example=VAL[:2], opset=20, gates=gates)
    assert json.loads((tmp_path / WIRING).read_text()) == {
        "topology": topology, "candidates": None, "gates": gates, "dynamic": []
    }  # fmt: skip
    assert not (tmp_path / WIRING_MODEL).exists()


def test_the_gates_are_those_that_were_logged_last(tmp_path):
    rows = [{"gates": {"a": [[0.5, 0.5]]}}, {"gates": {"a": [[0.9, 0.1]]}}, {"gates": {}}, {"kind": "end"}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert wiring_file.last_gates(tmp_path / "metrics.jsonl") == {"a": [[0.9, 0.1]]}
    assert wiring_file.last_gates(tmp_path / "none.jsonl") == {}
