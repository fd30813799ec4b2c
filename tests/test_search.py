import itertools
import json
import re

import pytest
import timm
import torch
from tiny_models import images

from mcdeploy import cli
from mcdeploy.compile.prune import count_macs, count_parameters
from mcdeploy.connectivity.nnmass import nn_mass_of_model
from mcdeploy.errors import InputError
from mcdeploy.model import build_model
from mcdeploy.recipe import load_recipe
from mcdeploy.search import (
    FAMILIES,
    MOST_ROWS,
    Candidate,
    cost_of_cells,
    mobilenet_candidate,
    pareto_front,
    search,
    table_of,
    write_recipe,
)


def bare(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options).eval()


def counts(model, size):
    return count_parameters(model), count_macs(model, torch.zeros(1, 3, size, size, device="meta"))


@pytest.mark.parametrize("conv", ["plain", "depthwise"])
@pytest.mark.parametrize(
    ("widths", "depths", "skips", "size", "classes"),
    [
        ((32, 64, 128), (13, 13, 13), (40, 80, 125), 32, 10),
        ((4, 6, 10), (2, 5, 7), (0, 3, 100), 16, 7),
        ((8, 8), (9, 3), (12, 1), 8, 100),
    ],
)
def test_closed_forms_of_cell_nets_are_the_counts_of_the_built_net(conv, widths, depths, skips, size, classes):
    shape = {"widths": widths, "depths": depths, "skips": skips, "conv": conv}
    model = bare("nnmass_cells", **shape, img_size=size, num_classes=classes)
    assert cost_of_cells(**shape, image_size=size, num_classes=classes) == counts(model, size)


@pytest.mark.parametrize("width", [0.35, 0.6, 1.0, 1.4])
def test_closed_forms_of_mobilenets_are_the_counts_and_the_mass_of_the_built_net(width):
    for depths, size in (((1, 2, 3, 4, 3, 3, 1), 224), ((2, 1, 3, 1, 2, 4, 2), 65)):
        model = bare("nnmass_mobilenet", depths=depths, width=width, num_classes=11)
        found = mobilenet_candidate(depths, width, num_classes=11, image_size=size)
        assert (found.parameters, found.macs) == counts(model, size)
        mass = nn_mass_of_model(model)
        assert found.nn_mass == pytest.approx(mass.total())
        assert found.density == pytest.approx(mass.density())


@pytest.mark.parametrize(
    ("depths", "width", "mass", "millions"),
    [
        ((1, 2, 3, 4, 3, 3, 1), 1.4, 1807, 582), ((2, 3, 4, 5, 4, 3, 1), 1.0, 1654, 375.5),
        ((1, 2, 3, 4, 3, 3, 1), 0.75, 975, 209), ((2, 3, 4, 5, 4, 3, 1), 0.6, 1030, 187),
    ],
)  # fmt: skip
def test_the_published_mobilenets_have_their_mass_and_macs(depths, width, mass, millions):
    found = mobilenet_candidate(depths, width)
    assert found.nn_mass == pytest.approx(mass)
    assert found.macs / 1e6 == pytest.approx(millions, abs=0.5)


def test_what_a_search_says_of_its_pick_is_true_of_the_built_net():
    for family, budget in (("cells", 3e5), ("cells-depthwise", 3e5), ("mobilenet", 3e6)):
        found = search(family, max_parameters=budget)
        model = bare(FAMILIES[family].backbone, **found.pick.options)
        assert counts(model, 224 if family == "mobilenet" else 32) == (found.pick.parameters, found.pick.macs)
        mass = nn_mass_of_model(model)
        assert (mass.total(), mass.density()) == pytest.approx((found.pick.nn_mass, found.pick.density))


def test_the_pick_has_the_highest_mass_of_all_that_fit_and_the_front_holds_what_nothing_beats():
    family = FAMILIES["cells"]
    found = search("cells", width=8, depths=range(3, 9), max_parameters=120_000, max_macs=1.6e7)
    everything = list(family.enumerate(8, range(3, 9)))
    fitting = [c for c in everything if c.parameters <= 120_000 and c.macs <= 1.6e7]
    assert (found.num_candidates, found.num_fitting) == (len(everything), len(fitting))
    assert 0 < len(fitting) < len(everything)
    assert found.pick.nn_mass == max(c.nn_mass for c in fitting)
    for candidate in fitting:
        beaten = any(
            (o.nn_mass, -o.parameters, -o.macs) != (candidate.nn_mass, -candidate.parameters, -candidate.macs)
            and o.nn_mass >= candidate.nn_mass
            and o.parameters <= candidate.parameters
            and o.macs <= candidate.macs
            for o in fitting
        )
        assert (candidate in found.front) != beaten
    masses = [c.nn_mass for c in found.front]
    assert masses == sorted(masses)


def test_of_nets_with_equal_mass_the_cheaper_one_is_on_the_front():
    def net(mass, parameters, macs):
        return Candidate("", {}, mass, 0.0, parameters, macs)

    nets = [net(1, 5, 5), net(1, 4, 9), net(1, 6, 6), net(2, 9, 4), net(0, 4, 9)]
    for order in itertools.permutations(nets):
        assert set(map(id, pareto_front(order))) == {id(nets[0]), id(nets[1]), id(nets[3])}


def test_a_tighter_budget_never_raises_the_mass():
    masses = [search("cells", max_parameters=budget).pick.nn_mass for budget in (1.5e5, 3e5, 6e5, 1e6)]
    assert masses == sorted(set(masses))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("foo", {}, "unknown family 'foo'; known are cells, cells-depthwise, mobilenet"),
        ("cells", {"max_parameters": 100}, "the smallest of 1,127 has 131,162 parameters and 16,967,680 MACs"),
        ("cells", {"max_macs": 1e6}, "no net of family cells at width 16 fits the budget"),
        ("cells", {"width": 2.5}, "width 2.5: family cells needs a whole number of channels"),
        ("mobilenet", {"width": 0}, "needs a positive factor"),
        ("cells", {"depths": range(2, 5)}, "depths of family cells lie between 3 and 64"),
        ("mobilenet", {"depths": range(1, 10)}, "depths of family mobilenet lie between 1 and 8"),
    ],
)
def test_what_cannot_be_searched_is_one_sentence(family, options, message):
    with pytest.raises(InputError, match=message):
        search(family, **options)


def test_the_table_is_short_and_ends_with_the_pick():
    found = search("cells-depthwise", max_parameters=1e6)
    table = table_of(found)
    assert table.row_count == MOST_ROWS < len(found.front)
    labels = list(table.columns[0].cells)
    assert labels[0] == found.front[0].label
    assert labels[-1] == f"{found.pick.label}  <- the pick"
    assert len(set(labels)) == MOST_ROWS


@pytest.mark.parametrize("family", FAMILIES)
def test_the_written_recipe_loads_and_builds_the_pick(tmp_path, family):
    found = search(family, max_parameters=2.7e6 if family == "mobilenet" else 2e5)
    write_recipe(found, tmp_path / "small.yaml")
    text = (tmp_path / "small.yaml").read_text()
    assert f"mcdeploy train {tmp_path / 'small.yaml'}" in text
    recipe = load_recipe(tmp_path / "small.yaml")
    assert recipe.name == "small"
    classes, size = (1000, 64) if family == "mobilenet" else (10, 32)
    model = build_model(recipe.model, recipe.connectivity, classes, size)
    assert count_parameters(model) == found.pick.parameters
    assert nn_mass_of_model(model).total() == pytest.approx(found.pick.nn_mass)
    model.train()(images(2, size)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_recipe_needs_a_yaml_file_with_a_name_for_the_run(tmp_path):
    found = search("cells", max_parameters=2e5)
    for name in ("small.json", "my net.yaml", "-x.yaml"):
        with pytest.raises(InputError, match=r"a recipe is a \.yaml file"):
            write_recipe(found, tmp_path / name)


def run(capsys, *arguments):
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["mcdeploy", *map(str, arguments)])
            cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_prints_the_pick_and_writes_recipe_and_json(tmp_path, capsys):
    files = ("--out", tmp_path / "a.yaml", "--json", tmp_path / "a.json")
    code, out, _ = run(
        capsys, "nnmass", "search", "--max-params", "2e5", "--max-macs", "2e8", "--depths", "3:8", *files
    )
    assert code == 0
    found = search("cells", depths=range(3, 9), max_parameters=2e5, max_macs=2e8)
    assert f"pick: {found.pick.label}: NN-Mass {found.pick.nn_mass:,.1f}" in out
    assert "<- the pick" in out
    assert f"next: mcdeploy train {tmp_path / 'a.yaml'}" in out
    assert load_recipe(tmp_path / "a.yaml").model.options["skips"] == found.pick.options["skips"]
    tree = json.loads((tmp_path / "a.json").read_text())
    assert tree["pick"] == tree["front"][-1]
    assert tree["pick"]["parameters"] == found.pick.parameters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "needs a budget; give --max-params, --max-macs or both"),
        (("--max-params", "100"), "no net of family cells at width 16 fits the budget"),
        (("--max-params", "1e6", "--depths", "9:5"), "--depths 9:5: expected two whole numbers A:B with A <= B"),
        (("--max-params", "1e6", "--out", "nowhere/a.yaml"), "there is no folder nowhere"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(capsys, arguments, message):
    code, _, error = run(capsys, "nnmass", "search", *arguments)
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_the_options_of_the_command_are_these(capsys):
    code, out, _ = run(capsys, "nnmass", "search", "--help")
    assert code == 0
    found = sorted(set(re.findall(r"(?<![\w-])--[a-z-]+", out)))
    assert found == ["--depths", "--family", "--help", "--json", "--max-macs", "--max-params", "--out", "--width"]
