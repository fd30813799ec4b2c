from pathlib import Path

import pytest

from mcdeploy.connectivity.maskconnect import MaskConnectConfig
from mcdeploy.errors import RecipeError
from mcdeploy.recipe import load_recipe, parse_connectivity

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
MINIMAL = "name: x\nmodel: {backbone: resnet20_cifar}\ntrain: {epochs: 2}\n"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_that_ships_loads_and_opens_with_its_command(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert f"mcdeploy train recipes/{path.name}" in path.read_text().split("\nname:")[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "optimiser: sgd\n", "unknown key optimiser; valid keys: "),
        (MINIMAL.replace("epochs: 2", "epoch: 2"), "unknown key train.epoch (did you mean 'epochs'?)"),
        (MINIMAL.replace("epochs: 2", "epochs: two"), "train.epochs: input should be a valid integer, got text 'two'"),
        (MINIMAL.replace("epochs: 2", "epochs: 2, lr: 1e-3"), "write 1.0e-3"),
        (MINIMAL.replace("epochs: 2", "epochs: 0"), "train.epochs: input should be greater than or equal to 1"),
        (MINIMAL.replace("train: {epochs: 2}", ""), "missing key train"),
        ("name: x\ntrain: {epochs: 2}\nmodel: {}\n", "missing key model.backbone"),
        (MINIMAL + "connectivity: {rule: maskconect, fan_in: 1}\n", "unknown rule 'maskconect'"),
        (MINIMAL + "connectivity: {rule: random, fan_in: 1, gate_lr: 1.0}\n", "unknown key connectivity.gate_lr"),
        (MINIMAL + "connectivity: {rule: random}\n", "missing key connectivity.fan_in"),
        (MINIMAL + "connectivity: {rule: maskconnect, fan_in: 1}\n", "needs train.joint_epochs"),
        (MINIMAL.replace("epochs: 2", "epochs: 2, joint_epochs: 1"), "rule: chain has nothing to learn"),
        (MINIMAL.replace("epochs: 2", "epochs: 2, joint_epochs: 2"), "must leave epochs to fine-tune"),
        (MINIMAL.replace("epochs: 2", "epochs: 2, warmup_epochs: 2.0"), "must be less than epochs"),
        (MINIMAL.replace("epochs: 2", "epochs: 2, device: cpu, precision: fp16"), "fp16 needs device: cuda"),
        (MINIMAL.replace("epochs: 2", "epochs: 2, distill: 0.5"), "give model.weights"),
        (MINIMAL + "data: {source: folder}\n", "source: folder needs root"),
        (MINIMAL + "data: {source: timm}\n", "source: timm needs dataset"),
        (MINIMAL + "data: {root: here}\n", "root has no meaning for source: digits"),
        (MINIMAL + "data: {source: folder, root: x, dataset: y}\n", "dataset is only for source: timm"),
        (MINIMAL.replace("resnet20_cifar", "resnet20_cifar, pretrained: true, weights: x"), "exclude each other"),
        ("- a list\n", "a recipe is a mapping"),
        ("a: [1\n", "is not YAML"),
        (MINIMAL + "seed: 1\nseed: 2\n", "line 5 is not YAML: the key 'seed' comes twice"),
        ("a: &x {b: *x}\n", "refers to itself"),
        (MINIMAL.replace("name: x", "name: my net"), "name: string should match pattern"),
        (MINIMAL.replace("name: x", "name: ../../x"), "name: string should match pattern"),
        (MINIMAL + "seed: 99999999999999999999\n", "seed: "),
        (MINIMAL + "data: {std: [0.0, 0.5, 0.5]}\n", "data.std.0: input should be greater than 0"),
        (MINIMAL + "data: {mean: [.nan, 0.5, 0.5]}\n", "data.mean.0: input should be a finite number"),
        (MINIMAL.replace("epochs: 2", "epochs: 2, lr: .inf"), "train.lr: input should be a finite number"),
    ],
)
def test_a_wrong_recipe_names_the_file_the_key_and_what_is_near(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: cannot read"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_set_overrides_a_key_with_a_yaml_value(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    recipe = load_recipe(path, ("train.epochs=5", "data.crop=pad4", "data.mean=[0.5, 0.5, 0.5]", "seed=7"))
    assert (recipe.train.epochs, recipe.data.crop, recipe.data.mean, recipe.seed) == (5, "pad4", (0.5, 0.5, 0.5), 7)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "expected section.key=value"),
        ("train.epoch=3", "did you mean 'epochs'"),
        ("name.x=3", "name is a value, not a section"),
        ("train.epochs=[", "not a YAML value"),
    ],
)
def test_a_wrong_override_says_what_is_wrong(tmp_path, override, message):
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(RecipeError, match=message.replace("[", r"\[")):
        load_recipe(path, (override,))


def test_options_from_python_are_checked_like_those_of_a_file():
    assert parse_connectivity("maskconnect", fan_in=3) == MaskConnectConfig(rule="maskconnect", fan_in=3)
    with pytest.raises(RecipeError, match="did you mean 'fan_in'"):
        parse_connectivity("maskconnect", fanin=3)
