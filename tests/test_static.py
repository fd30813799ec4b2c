"""A dynamic net cut into its most frequent wirings: static models, a router, and the measured difference."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mcruntime.preprocess import Preprocessing
from tiny_dynamic import X, dynamic_resnet, split, two_ways
from tiny_models import images

from mcdeploy.checkpoint import sha256_of
from mcdeploy.compile.dynamic import record
from mcdeploy.compile.prune import count_parameters
from mcdeploy.connectivity.ddw import dynamic_stages
from mcdeploy.connectivity.wiring import wired_stages
from mcdeploy.errors import BundleError, InputError
from mcdeploy.recipe import ExportConfig
from mcdeploy.static import Router, cut_static, fit_router, most_frequent, nearest_wiring, static_net

HOW = Preprocessing(image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0)
CHAINS = {"layer2": [(0, 1), (1, 2), (2, 3)], "layer3": [(0, 1), (1, 2), (2, 3)]}


def more_wirings():
    """Edge 1 -> 2 of layer1 opens for half of the images, 1 -> 3 of layer2 for three quarters."""
    model = two_ways(X)
    split(model, "layer2", (1, 3), X, share=0.25)
    return model


def test_wirings_are_counted_over_the_whole_net_and_every_image_belongs_to_the_nearest():
    found = record(more_wirings(), X)
    wirings_NE, shares = most_frequent(found, 10)
    assert len(wirings_NE) == len(shares) == 3
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    open_BE = torch.cat(list(found.open_BE.values()), 1)
    assert torch.equal(wirings_NE[nearest_wiring(found, wirings_NE)], open_BE)
    two_NE, most = most_frequent(found, 2)
    assert most == shares[:2]
    distance_BN = (open_BE[:, None] != two_NE).sum(2)
    chosen_B = distance_BN.gather(1, nearest_wiring(found, two_NE)[:, None]).squeeze(1)
    assert torch.equal(chosen_B, distance_BN.amin(1))
    assert (chosen_B > 0).any()


def test_a_static_net_answers_the_images_of_its_wiring_as_the_dynamic_one_and_holds_nothing_else():
    model = two_ways(X).double()
    x = X.double()
    found = record(model, x)
    wirings_NE, _ = most_frequent(found, 2)
    belongs_B = nearest_wiring(found, wirings_NE)
    nets = [static_net(model, found, wiring_E) for wiring_E in wirings_NE]
    for n, net in enumerate(nets):
        mine = x[belongs_B == n]
        with torch.no_grad():
            assert torch.allclose(net(mine), model(mine), rtol=1e-5, atol=1e-5)  # the split edge weighs 0.98 to 1
            assert not torch.allclose(net(x), model(x), rtol=1e-2, atol=1e-2)
        assert not dynamic_stages(net)
        assert not any("router" in key for key in net.state_dict())
    short, long = sorted(nets, key=count_parameters)
    assert any(key.startswith("layer1.1.") for key in long.state_dict())
    assert not any(key.startswith("layer1.1.") for key in short.state_dict())
    assert wired_stages(short) == {}  # a chain without the block


def test_the_router_sees_the_wiring_of_the_first_stage_in_its_input():
    model = two_ways(X)
    found = record(model, X)
    wirings_NE, _ = most_frequent(found, 2)
    target_B = nearest_wiring(found, wirings_NE)
    router = fit_router(model, X, target_B, 2)
    with torch.no_grad():
        assert (router(X).argmax(1) == target_B).double().mean() >= 0.9
        other = images(200, 16, seed=3)
        assert (router(other).argmax(1) == nearest_wiring(record(model, other), wirings_NE)).double().mean() > 0.75


def test_a_router_with_one_wiring_always_picks_it_and_one_that_nobody_has_never():
    model = two_ways(X)
    router = fit_router(model, X, torch.ones(len(X), dtype=torch.int64), 3)
    assert (router(X).argmax(1) == 1).all()


def test_where_the_stem_would_cost_too_much_the_router_reads_a_thumbnail():
    model = dynamic_resnet(2, open_edges={"layer1": [(0, 1), (1, 2), (2, 3)], **CHAINS})
    split(model, "layer3", (1, 3), X)
    found = record(model, X)
    layer3_only = static_net_but(model, found, "layer3")
    router = fit_router(layer3_only, X, torch.arange(len(X)) % 2, 2)
    assert router.kind == "thumbnail"
    assert router.features(X).shape == (len(X), 3 * 8 * 8)
    assert router.macs == 2 * 192
    assert isinstance(router, Router)


def static_net_but(model, found, kept):
    """Every stage of the model static but one."""
    net = static_net(model, found, most_frequent(found, 1)[0][0])
    net.set_submodule(kept, model.get_submodule(kept))
    return net


def loader(x, labels, batch=10):
    return [(x[i : i + batch], labels[i : i + batch]) for i in range(0, len(x), batch)]


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "static"
    model = two_ways(X)
    x = images(40, 16, seed=4)
    with torch.no_grad():
        labels = model(x).argmax(1)
    lines = []
    result = cut_static(
        model, X, loader(x, labels), ExportConfig(), count=5, out=out, labels=[str(i) for i in range(10)],
        preprocessing=HOW, say=lines.append,
    )  # fmt: skip
    return out, model, x, labels, result


def test_the_folder_says_what_it_holds_and_how_well_it_does(cut):
    out, _, x, _, result = cut
    settings = json.loads((out / "static.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "router.onnx", "static.json", "wiring_0.onnx", "wiring_1.onnx",
    ]  # fmt: skip
    for row in (settings["router"], *settings["wirings"]):
        assert row["sha256"] == sha256_of(out / row["file"])
    assert settings["coverage"] == 1
    assert sum(row["sent"] for row in settings["wirings"]) == pytest.approx(1)
    assert settings["validation"]["images"] == result.images == len(x)
    assert result.accuracy_dynamic == 1  # the labels are its own answers
    assert result.accuracy_static == result.top1_agreement > 0.8
    assert Preprocessing.model_validate_json(json.dumps(settings["preprocessing"])) == HOW
    assert not any(node.op_type == "If" for n in (0, 1) for node in onnx.load(out / f"wiring_{n}.onnx").graph.node)


def test_router_and_models_run_without_torch_as_the_readme_says(cut):
    out, model, x, _, result = cut
    code = (out / "README.md").read_text().split("```python")[1].split("```")[0]
    compile(code, "README.md", "exec")
    router = onnxruntime.InferenceSession(out / "router.onnx")
    models = [onnxruntime.InferenceSession(out / f"wiring_{n}.onnx") for n in range(2)]
    picked = [int(router.run(None, {"images": image[None]})[0].argmax()) for image in x.numpy()]
    answers = [
        models[n].run(None, {"images": image[None]})[0].argmax() for n, image in zip(picked, x.numpy(), strict=True)
    ]
    with torch.no_grad():
        same = np.array(answers) == model(x).argmax(1).numpy()
    assert same.mean() == pytest.approx(result.top1_agreement)
    graph = onnx.load(out / "router.onnx").graph
    assert [node.op_type for node in graph.node].count("Conv") == 1
    assert not any("layer" in tensor.name or "linear" in tensor.name.split(".")[:-2] for tensor in graph.initializer)


def test_a_folder_of_something_else_and_a_static_net_are_refused(tmp_path):
    common = {"count": 2, "labels": ["a"], "preprocessing": HOW, "out": tmp_path / "static"}
    with pytest.raises(InputError, match="no edge depends on the image"):
        cut_static(dynamic_resnet(2).layer1.get_submodule("0"), X, [], ExportConfig(), **common)
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "precious.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"holds no static\.json"):
        cut_static(two_ways(X), X, [], ExportConfig(), **common)
    assert (tmp_path / "static" / "precious.txt").read_text() == "mine"
