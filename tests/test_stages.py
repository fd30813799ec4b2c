import pytest
import torch
from tiny_models import images, small_resnet, timm_model
from torch import nn

from mcdeploy.connectivity.stages import Source, candidate_sources, find_stages
from mcdeploy.connectivity.topology import Node
from mcdeploy.errors import WiringError

# name, image size, (container, blocks, blocks with a choice) of the largest stage
ZOO = [
    ("resnet18", 64, ("layer1", 2, 1)),
    ("resnet50", 64, ("layer3", 6, 4)),
    ("regnety_002", 64, ("s4", 7, 5)),
    ("test_convnext", 64, ("stages.2.blocks", 4, 3)),
    ("test_vit", 160, ("blocks", 6, 5)),
    ("mobilenetv2_050", 64, ("blocks.3", 4, 2)),
]


@pytest.mark.parametrize(("name", "size", "wanted"), ZOO, ids=lambda value: str(value))
def test_stages_are_found_by_tracing(name, size, wanted):
    stages = find_stages(timm_model(name), images(2, size))
    assert wanted in [(stage.name, len(stage.blocks), stage.num_choices()) for stage in stages]


def test_a_first_block_that_changes_shape_reads_only_the_input_and_is_read_by_the_others():
    stages = find_stages(small_resnet(), images(2, 16))
    assert [stages[2].sources_of(i) for i in (1, 2, 3, 4)] == [(0,), (1,), (1, 2), (1, 2, 3)]
    assert [stages[0].sources_of(i) for i in (1, 2)] == [(0,), (0, 1)]


def test_a_network_without_stages_is_refused_in_one_sentence():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
    with pytest.raises(WiringError, match="no wirable stage"):
        find_stages(model, images(2, 8))


def test_an_image_the_model_cannot_take_is_named():
    with pytest.raises(WiringError, match=r"does not run on images of shape \[3, 32, 32\]"):
        find_stages(timm_model("test_vit", in_chans=1), images(2, 32))


def test_a_block_that_writes_into_its_input_is_not_wired():
    class Rude(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.b(self.a(x.relu_()))

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Rude(), Rude(), Rude()))
    with pytest.raises(WiringError, match="no wirable stage"):
        find_stages(model, images(2, 8))


def test_network_scope_offers_earlier_stages_pooled_and_padded():
    stages = find_stages(small_resnet(), images(2, 16))
    table = candidate_sources(stages, "network")
    assert table[2][1] == (
        *(Source(Node(0, i), pool=4, pad=8) for i in (1, 2, 3, 4)),
        *(Source(Node(1, i), pool=2, pad=8) for i in (1, 2, 3, 4)),
        Source(Node(2, 1)),
    )
    assert table[2][0] == (Source(Node(2, 0)),)  # the first block always reads the stage's input


def test_the_input_of_a_stage_is_not_offered_a_second_time_as_the_block_it_came_from():
    same = find_stages(nn.Sequential(nn.Conv2d(3, 8, 1), *(small_resnet().layer1 for _ in range(2))), images(2, 16))
    row = candidate_sources(same, "network")[1][1]
    assert [source.node for source in row] == [*(Node(0, i) for i in (1, 2, 3)), Node(1, 0), Node(1, 1)]


def test_network_scope_needs_feature_maps_with_channels_and_pixels():
    stages = find_stages(timm_model("test_vit"), images(2, 160))
    with pytest.raises(WiringError, match="scope: stage"):
        candidate_sources(stages, "network")


def test_tracing_leaves_the_model_as_it_was():
    model = small_resnet().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    find_stages(model, images(2, 16))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
