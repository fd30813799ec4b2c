import copy
import json
import math

import pytest
import timm
import torch
from runs import short_recipe
from timm.models.swin_transformer import SwinTransformer
from tiny_models import images, small_resnet, timm_model
from torch import nn

import mcdeploy
from mcdeploy.compile.certify import scramble
from mcdeploy.connectivity.ddw import Seen, adjacencies, dynamic_stages, pattern_ids
from mcdeploy.connectivity.wiring import topology_of
from mcdeploy.errors import RecipeError, WiringError
from mcdeploy.runs import open_run, train_run

ROUTERS = ("stage", "node")
CLOSED, OPEN = -40.0, 40.0


def shuffle_routers(model, spread=3.0, seed=0):
    """Routers that decide differently for different images."""
    generator = torch.Generator().manual_seed(seed)
    for stage in dynamic_stages(model).values():
        for linear in stage.router.values():
            for parameter in (linear.weight, linear.bias):
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread
                parameter.data.copy_(values)


def dynamic_resnet(router="stage", num_blocks=4, seed=0, **options):
    """A small net in float64 whose images are wired differently; evaluation mode."""
    model = mcdeploy.wire(small_resnet(num_blocks), "ddw", image_size=16, router=router, **options).double()
    shuffle_routers(model, seed=seed)
    return model.eval()


def set_biases(model, value_of):
    """Every router says ``value_of(stage, source, reader)`` for every image."""
    for stage in dynamic_stages(model).values():
        for node, edges in stage.routed.items():
            linear = stage.router[str(node)]
            linear.weight.data.zero_()
            linear.bias.data.copy_(torch.tensor([value_of(stage, i, j) for i, j in edges]))


def batch(count=6, seed=0):
    """Noise on grounds of different colours, so that routers can tell images apart."""
    colours = torch.randn(count, 3, 1, 1, generator=torch.Generator().manual_seed(seed))
    return (images(count, 16, seed) * 0.5 + 2 * colours).double()


def hooks(model, hook):
    return [getattr(stage, hook)() for stage in dynamic_stages(model).values()]


# The paper's equations image by image, in plain Python, to compare with: x has a batch of one.
def one_image(stage, x):
    blocks, config = list(stage)[:-1], stage.config
    output = len(blocks) + 1
    features, alpha = {0: x}, {}

    def ask_router(node):
        if node in stage.routed:
            linear = stage.router[str(node)]
            z = linear.weight @ features[node].mean((0, 2, 3)) + linear.bias
            alpha.update(zip(stage.routed[node], torch.sigmoid(z / config.temperature), strict=True))

    ask_router(0)
    first = 0 if stage.index == 0 else 1  # the later stages halve the resolution in their first block
    if first:
        features[1] = blocks[0](x)
        ask_router(1)
    for j in range(first + 1, output + 1):
        before = [i for i in features if i >= first]
        chosen = [i for i in before if alpha[i, j] >= config.tau]
        if j == output and not chosen:
            chosen = [max(before)]
        if not chosen:
            continue
        received = sum(alpha[i, j] * features[i] for i in chosen)
        if config.aggregate == "mean":
            received = received / sum(alpha[i, j] for i in chosen)
        features[j] = received if j == output else blocks[j - 1](received)
        ask_router(j)
    return features[output]


def image_by_image(model, batch_BCHW):
    rows = []
    for image in batch_BCHW.split(1):
        x = model.act1(model.bn1(model.conv1(image)))
        for stage in dynamic_stages(model).values():
            x = one_image(stage, x)
        rows.append(model.forward_head(x))
    return torch.cat(rows)


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
@pytest.mark.parametrize("router", ROUTERS)
def test_values_and_gradients_of_a_batch_match_a_loop_over_images(router, aggregate):
    model = dynamic_resnet(router, aggregate=aggregate, seed=1, temperature=2.0, tau=0.6, open_bias=3.0)
    other = copy.deepcopy(model)
    x = batch(8)
    found, expected = model(x), image_by_image(other, x)
    patterns = torch.cat([w.patterns_B[:, None] for w in adjacencies(model, x).values()], 1)
    assert len(patterns.unique(dim=0)) > 3  # else the test shows little
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(torch.cat([model(image) for image in x.split(1)]), found, rtol=1e-12, atol=1e-12)

    found.square().sum().backward()
    expected.square().sum().backward()
    got, wanted = ({name: p.grad for name, p in net.named_parameters() if p.grad is not None} for net in (model, other))
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, parameter in model.named_parameters():  # a block that no image has run has no gradient
        zeros = torch.zeros_like(parameter)
        assert torch.allclose(got.get(name, zeros), wanted.get(name, zeros), rtol=1e-9, atol=1e-12 * largest), name
    assert any(gradient.abs().max() > 1e-3 * largest for name, gradient in wanted.items() if ".router." in name)


def test_in_training_a_batch_is_computed_with_zeros_for_the_images_that_skip_a_node():
    model = dynamic_resnet("stage", num_blocks=2)
    stage, received = dynamic_stages(model)["layer1"], []
    stage[1].register_forward_pre_hook(lambda _, args: received.append(args[0]))
    model.train()
    model(batch(8))
    runs_B = stage.last.open[0][:, [e[1] == 2 for e in stage.edges]].any(1)
    skipped_B = received[0].abs().amax((1, 2, 3)) == 0
    assert 0 < int(skipped_B.sum()) < 8
    assert not (skipped_B & stage.last.executed[0][:, 2]).any()
    assert skipped_B[~runs_B].all() or not (~runs_B).any()


def test_the_gradient_of_an_edge_weight_is_the_product_of_what_it_joins():
    model = dynamic_resnet("stage", aggregate="sum")
    stage, seen = dynamic_stages(model)["layer2"], []
    join = stage._join

    def spy(j, features, routing):
        joined = join(j, features, routing)
        if routing.weights[j].requires_grad:  # the first block has a constant edge
            routing.weights[j].retain_grad()
            joined.retain_grad()
            seen.append((stage.sources[j], routing.weights[j], joined, dict(features)))
        return joined

    stage._join = spy
    model.train()  # nothing is skipped, and BN mixes the images
    model(batch()).square().sum().backward()
    assert len(seen) == 4
    for sources, weights_BS, joined, features in seen:
        for position, i in enumerate(sources):
            expected_B = (joined.grad * features[i].detach()).sum((1, 2, 3))
            assert torch.allclose(weights_BS.grad[:, position], expected_B, rtol=1e-9, atol=1e-12)


BACKBONES = {
    "resnet18": 32, "resnext50_32x4d": 32, "mobilenetv2_050": 32, "regnetx_002": 32, "resnet32_cifar": 16,
    "test_convnext": 32, "test_vit": 160,
}  # fmt: skip


@pytest.mark.parametrize(("name", "size"), BACKBONES.items())
def test_with_only_the_chain_open_a_model_is_bit_identical_to_timms(name, size):
    model, x = timm_model(name), images(2, size)
    keys = list(model.state_dict())
    with torch.no_grad():
        expected, single = model(x), model(x[:1])
        mcdeploy.wire(model, "ddw", image_size=size)
        set_biases(model, lambda stage, i, j: OPEN if i == j - 1 else CLOSED)
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x[:1]), single)
        set_biases(model, lambda stage, i, j: OPEN)
        assert not torch.equal(model(x), expected)
    extra = [key for key in model.state_dict() if key not in keys]
    assert set(keys) <= set(model.state_dict())
    assert extra
    assert all(".router." in key or key.endswith(".open_share_E") for key in extra)


@pytest.mark.parametrize(
    ("name", "router"), [("resnet18", "node"), ("mobilenetv2_050", "stage"), ("regnetx_002", "node")]
)
def test_a_backbone_for_a_detector_keeps_its_feature_maps_and_teaches_its_routers(name, router):
    model = timm.create_model(name, features_only=True, pretrained=False)
    scramble(model)
    x = images(2, 64)
    expected = [feature.shape for feature in model.eval()(x)]
    mcdeploy.wire(model, "ddw", image_size=64, router=router, aggregate="sum")
    features = model(x)
    assert [feature.shape for feature in features] == expected
    sum(feature.square().mean() for feature in features).backward()
    for stage in dynamic_stages(model).values():
        assert all(linear.weight.grad.abs().sum() > 0 for linear in stage.router.values())


def test_channels_that_come_last_are_averaged_over_the_pixels():
    torch.manual_seed(0)
    model = SwinTransformer(img_size=32, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2), num_classes=4)
    mcdeploy.wire(model.double().eval(), "ddw", image_size=32)
    stages = list(dynamic_stages(model).values())
    assert [stage.router["0"].in_features for stage in stages] == [8, 16]
    shuffle_routers(model)
    x = images(4, 32).double()
    assert torch.allclose(model(x), torch.cat([model(image) for image in x.split(1)]), rtol=1e-11)


@pytest.mark.parametrize("router", ROUTERS)
def test_at_batch_1_only_the_nodes_that_are_executed_are_called(router):
    model = dynamic_resnet(router, seed=2)
    called = []
    for stage in dynamic_stages(model).values():
        for node, block in enumerate(stage, start=1):
            block.register_forward_hook(lambda *_, place=(stage.index, node): called.append(place))
    skipped = 0
    for image in batch().split(1):
        called.clear()
        found = adjacencies(model, image)
        executed = [
            (s, node)
            for s, wirings in enumerate(found.values())
            for node in range(1, 6)
            if wirings.executed_BN[0, node]
        ]
        assert called == executed
        skipped += 15 - len(executed)
        for wirings in found.values():  # a node runs exactly when something is read, the output always does
            reads_N = wirings.open_BNN[0].any(0)
            assert torch.equal(reads_N[1:], wirings.executed_BN[0, 1:])
            assert torch.equal(wirings.weights_BNN > 0, wirings.open_BNN)
    assert skipped > 5


def test_what_no_open_path_leads_from_to_the_output_is_not_executed_when_that_is_known_at_the_start():
    def only(stage, i, j):  # 0 -> 1, 0 -> output: block 1 is read by nobody
        return OPEN if (i, j) in ((0, 1), (0, 5)) else CLOSED

    executed = {}
    for router in ROUTERS:
        model = dynamic_resnet(router)
        set_biases(model, only)
        executed[router] = adjacencies(model, batch(2))["layer1"].executed_BN[0].tolist()
    assert executed["stage"] == [True, False, False, False, False, True]
    assert executed["node"] == [True, True, False, False, False, True]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("training", [False, True])
def test_where_every_edge_is_closed_the_output_reads_the_newest_node_that_runs(router, training):
    model = dynamic_resnet(router, num_blocks=2)
    set_biases(model, lambda stage, i, j: CLOSED)
    x = batch(3).requires_grad_()
    stem = model.act1(model.bn1(model.conv1(x)))
    expected = model.forward_head(model.layer3[0](model.layer2[0](stem)))
    if training:
        for stage in dynamic_stages(model).values():
            stage.training = True  # the flag of the stage alone: BN stays as it is
    found = model(x)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("router", ROUTERS)
def test_newest_means_the_last_block_that_runs_and_not_the_last_block(router):
    model = dynamic_resnet(router)
    set_biases(model, lambda stage, i, j: OPEN if (i, j) in ((0, 1), (1, 3)) else CLOSED)
    x = batch(3)
    stem = model.act1(model.bn1(model.conv1(x)))
    stage = dynamic_stages(model)["layer1"]
    assert torch.equal(stage(stem), stage[2](stage[0](stem)))


def test_closed_edges_get_no_gradient_from_the_task_and_one_from_the_penalty():
    model = dynamic_resnet("stage", aggregate="sum", target_open=0.9)
    set_biases(model, lambda stage, i, j: 1.0 if i == j - 1 else -1.0)
    edges, bias = dynamic_stages(model)["layer1"].routed[0], model.layer1.router["0"].bias
    model.train()
    model(batch()).square().sum().backward(retain_graph=True)
    is_open = torch.tensor([i == j - 1 for i, j in edges])
    assert (bias.grad[is_open] != 0).all()
    assert (bias.grad[~is_open] == 0).all()
    bias.grad = None
    sum(hooks(model, "penalty")).backward()
    assert (bias.grad[~is_open] != 0).any()


@pytest.mark.parametrize("router", ROUTERS)
def test_chances_of_0_and_1_give_the_executed_share_itself(router):
    model = dynamic_resnet(router)
    stage, generator = dynamic_stages(model)["layer1"], torch.Generator().manual_seed(0)
    shares = set()
    for _ in range(40):
        chosen = {edge: float(torch.rand((), generator=generator) < 0.3) for edge in stage.edges}
        set_biases(model, lambda s, i, j: (OPEN if chosen[i, j] else CLOSED) * 100 if s is stage else OPEN)  # noqa: B023
        adjacencies(model, batch(2))
        really = stage.last.executed_share([0])[0] * sum(stage.macs)
        z_BR = torch.cat([stage.router[str(node)].bias for node in stage.routed]).expand(2, -1)
        assert stage.expected_macs(z_BR).item() == pytest.approx(float(really), abs=1e-6)
        shares.add(float(really))
    assert len(shares) > 3


def test_the_penalty_is_the_squared_distance_of_the_executed_share_from_its_target():
    model = dynamic_resnet("stage", target_open=0.25, penalty=3.0).train()
    model(batch())
    stages = list(dynamic_stages(model).values())
    done = sum(
        macs * float(executed_B.double().mean())
        for stage in stages
        for macs, executed_B in zip(stage.macs, stage.last.executed[stage.index].T[1:-1], strict=True)
    )
    share = done / sum(sum(stage.macs) for stage in stages)
    assert sum(hooks(model, "penalty")).item() == pytest.approx(3 * (share - 0.25) ** 2)
    assert sum(hooks(model, "penalty")).item() == 0  # no forward pass since
    assert sum(hooks(dynamic_resnet("stage").train(), "penalty")).item() == 0


@pytest.mark.parametrize(("target", "bias"), [(0.5, 1.5), (0.9, -0.5)])
def test_training_pulls_the_executed_share_to_its_target_from_above_and_from_below(target, bias):
    model = mcdeploy.wire(small_resnet(3), "ddw", image_size=16, target_open=target, penalty=20.0).train()
    set_biases(model, lambda stage, i, j: bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    distances = []
    for step in range(30):
        logits = model(images(4, 16, seed=step % 4))
        (logits.square().mean() * 1e-3 + sum(hooks(model, "penalty"))).backward()
        optimizer.step()
        optimizer.zero_grad()
        last = dynamic_stages(model)["layer1"].last
        distances.append(abs(float(last.executed_share(last.open).mean()) - target))
    assert distances[0] > 0.3
    assert sum(distances[-5:]) / 5 < 0.15


def test_block_macs_are_those_of_the_convolutions():
    model = dynamic_resnet("stage")
    assert model.layer1.macs == (2 * 9 * 8 * 8 * 16 * 16,) * 4
    assert model.layer3.macs == (9 * (8 * 16 + 16 * 16) * 4 * 4, *(2 * 9 * 16 * 16 * 4 * 4,) * 3)


def test_entropy_and_number_of_wirings_of_a_hand_made_case():
    seen = Seen()
    seen.add(torch.tensor([[True, False], [True, False]]), torch.tensor([0.5, 0.5]))
    seen.add(torch.tensor([[True, True], [False, False]]), torch.tensor([1.0, 0.0]))
    assert seen.summary() == {"entropy_bits": 1.5, "wirings": 3.0, "executed": 0.5}
    assert seen.open_share().tolist() == [0.75, 0.25]
    every = torch.tensor([[bool(code >> bit & 1) for bit in range(12)] for code in range(4096)])
    assert len(pattern_ids(every).unique()) == 4096


def test_statistics_count_the_images_of_the_steps_since_the_last_call():
    model = dynamic_resnet("node", num_blocks=2).train()
    assert hooks(model, "statistics") == [{}, {}, {}]
    found = []
    for seed in (0, 1):
        model(batch(5, seed))
        hooks(model, "after_step")
        found.append({s.index: s.last.open[s.index] for s in dynamic_stages(model).values()})
    rows = hooks(model, "statistics")
    for index, (stage, row) in enumerate(zip(dynamic_stages(model).values(), rows, strict=True)):
        open_BE = torch.cat([step[index] for step in found])
        shares = [share for node in row["open"] for share in node]
        assert shares == pytest.approx(open_BE.double().mean(0).tolist())
        assert row["wirings"] == len(open_BE.unique(dim=0))
        assert stage.gate_values() == row["open"]
    network = torch.cat([torch.cat([step[index] for step in found]) for index in range(3)], 1)
    _, counts = network.unique(dim=0, return_counts=True)
    assert rows[2]["network_wirings"] == len(counts) > 1
    assert rows[2]["network_entropy_bits"] == pytest.approx(-sum(c / 10 * math.log2(c / 10) for c in counts.tolist()))
    assert hooks(model, "statistics") == [{}, {}, {}]


def test_warm_up_opens_everything_and_the_temperature_moves_to_its_end():
    model = dynamic_resnet("stage", warm_up=2, temperature=1.0, temperature_end=0.25)
    stage, x = dynamic_stages(model)["layer1"], batch()
    assert (float(stage.tau), float(stage.temperature)) == (0.5, 0.25)  # of a model that is loaded, not trained
    dynamic, shown = model(x), []
    for epoch in range(5):
        for part in dynamic_stages(model).values():
            part.start_epoch(epoch, 5)
        adjacencies(model, x)
        shown.append((bool(stage.last.open[0].all()), round(float(stage.temperature), 4)))
    assert [everything for everything, _ in shown] == [True, True, False, False, False]
    assert [t for _, t in shown] == [1.0, 0.7071, 0.5, 0.3536, 0.25]
    assert torch.equal(model(x), dynamic)


def test_under_autocast_routers_and_penalty_stay_in_float32():
    model = mcdeploy.wire(small_resnet(), "ddw", image_size=16, target_open=0.5).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images(4, 16))
    last = dynamic_stages(model)["layer1"].last
    assert {z.dtype for z in last.logits.values()} == {torch.float32}
    assert logits.dtype == torch.bfloat16
    penalty = sum(hooks(model, "penalty"))
    assert penalty.dtype == torch.float32
    (logits.float().square().mean() + penalty).backward()
    assert model.layer3.router["0"].bias.grad.isfinite().all()


def test_a_compiled_step_is_one_graph_with_the_eager_values_and_gradients():
    model = dynamic_resnet("stage", num_blocks=2, target_open=0.5).train()
    other = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(2):
            for run, net in ((compiled, model), (other, other)):
                (run(batch(5, step)).square().mean() + sum(hooks(net, "penalty"))).backward()
                hooks(net, "after_step")
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=1e-9, atol=1e-12), name
    assert hooks(model, "statistics") == hooks(other, "statistics")


def test_an_exported_program_takes_any_batch_and_computes_the_same():
    model = dynamic_resnet("node", num_blocks=2)
    program = torch.export.export(model, (batch(4),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
    for count in (2, 3, 7):
        assert torch.allclose(program.module()(batch(count, 5)), model(batch(count, 5)), rtol=1e-12)


def test_a_trained_net_is_rebuilt_from_its_checkpoint_and_its_wirings_are_logged(tmp_path):
    options = {"rule": "ddw", "warm_up": 1, "target_open": 0.6, "penalty": 5.0, "temperature_end": 0.5}
    recipe = short_recipe(connectivity=options, train={"joint_epochs": 0, "ema_decay": 0.5})
    result, loaders = train_run(recipe, tmp_path, resume=False)
    _, model, header = open_run(tmp_path)
    x, _ = next(iter(loaders.val))
    with torch.no_grad():
        assert torch.equal(model(x), result.model(x))
    assert header["topology"]["stages"][0]["blocks"] == ["0", "1", "2", "3", "output"]
    epochs = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = [row["statistics"]["layer3"] for row in epochs if row["kind"] == "epoch"]
    assert logged[0]["network_executed"] == 1.0  # warm-up
    assert logged[0]["network_wirings"] == 1.0
    assert all({"open", "entropy_bits", "wirings", "executed"} <= row.keys() for row in logged)


def test_a_smaller_stage_keeps_what_it_still_decides():
    model = dynamic_resnet("node", seed=3)
    x = batch()
    with torch.no_grad():
        expected = model(x)
        everything = copy.deepcopy(model)
        for name, stage in dynamic_stages(everything).items():
            decided = [edge for edges in stage.routed.values() for edge in edges]
            everything.set_submodule(name, stage.smaller(tuple(range(1, 6)), decided, stage.constant))
        assert torch.equal(everything(x), expected)

        found = adjacencies(model, x)
        for name, stage in dynamic_stages(model).items():
            open_NN = found[name].open_BNN.any(0)
            decided = [e for edges in stage.routed.values() for e in edges if open_NN[e]]
            kept = tuple(j for j in range(1, 6) if open_NN[:, j].any())
            small = stage.smaller(kept, decided, stage.constant)
            assert len(small.edges) < len(stage.edges)
            model.set_submodule(name, small)
        assert torch.allclose(model(x), expected, rtol=1e-12)

    plain = small_resnet().double()
    mcdeploy.wire(plain, "ddw", image_size=16)
    kept = dynamic_stages(plain)["layer1"]
    chain = kept.smaller((1, 3, 5), [], {(0, 1): 1.0, (1, 3): 0.3, (3, 5): 0.2})
    stem = torch.rand(2, 8, 16, 16, dtype=torch.float64)
    assert not chain.router
    assert torch.equal(chain(stem), kept[2](kept[0](stem)))
    with pytest.raises(WiringError, match="both ends of every edge"):
        kept.smaller((1, 5), [(1, 2)], {})


def test_the_topology_is_the_complete_graph_and_cannot_be_fixed():
    model = dynamic_resnet("stage")
    topology = topology_of(model)
    assert [len(row) for row in topology.stages[0].reads] == [1, 2, 3, 4, 5]
    assert [len(row) for row in topology.stages[1].reads] == [1, 1, 2, 3, 4]  # the first block halves the resolution
    assert topology.stages[0].blocks == ("0", "1", "2", "3", "output")
    stage = dynamic_stages(model)["layer1"]
    with pytest.raises(WiringError, match="depends on the image"):
        stage.fix(stage.wiring("layer1"), "mean", frozenset())
    assert copy.deepcopy(model).layer1.last is not stage.last
    assert len({id(part.last) for part in dynamic_stages(copy.deepcopy(model)).values()}) == 1


class WithOutput(nn.Module):
    def __init__(self):
        super().__init__()
        resnet = small_resnet(2)
        self.stem = nn.Conv2d(3, 8, 1)
        self.stage = nn.Sequential()
        self.stage.add_module("output", resnet.layer1[0])
        self.stage.add_module("1", resnet.layer1[1])

    def forward(self, x):
        return self.stage(self.stem(x))


def test_what_does_not_fit_is_refused():
    with pytest.raises(RecipeError, match=r"open_bias 1.0 starts every edge at 0.731, closed by tau 0.8"):
        mcdeploy.wire(small_resnet(), "ddw", image_size=16, tau=0.8)
    with pytest.raises(RecipeError, match="target_open needs edges that can close"):
        mcdeploy.wire(small_resnet(), "ddw", image_size=16, tau=0.0, target_open=0.5)
    with pytest.raises(WiringError, match="a block named output"):
        mcdeploy.wire(WithOutput(), "ddw", image_size=16)
    with pytest.raises(WiringError, match="no wirable stage"):
        mcdeploy.wire(timm_model("densenet121"), "ddw", image_size=32)
