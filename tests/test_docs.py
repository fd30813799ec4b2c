"""Documentation that runs: every shell line of the README, its links, its tables."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mcdeploy import recipe
from mcdeploy.connectivity.rules import RULES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'export'}", "OMP_NUM_THREADS": "1"}
# What other tests run (serve), or what sets a machine up.
ELSEWHERE = ("make", "git", "cd", "pip", "curl", "mcdeploy serve", "mcdeploy demo")


def shell_lines():
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        for line in block.splitlines():
            command = line.split("  #")[0].strip()
            if command and not command.startswith(("#", *ELSEWHERE)):
                yield command


def test_the_commands_of_the_readme_run_in_their_order(tmp_path):
    lines = list(shell_lines())
    assert any(line.startswith("mcdeploy train") for line in lines)
    for line in lines:
        words = shlex.split(line)
        program = [sys.executable, "-m", "mcdeploy.cli"] if words[0] == "mcdeploy" else [sys.executable]
        words = [str(ROOT / word) if word.startswith("examples/") else word for word in words[1:]]
        done = subprocess.run(
            [*program, *words], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def test_no_page_waits_for_a_figure():
    for page in pages():
        assert not re.search(r"^[A-Z_]{8,}$", page.read_text(), re.MULTILINE), page


def pages():
    return sorted(
        path
        for path in [
            *ROOT.glob("*.md"),
            *ROOT.glob("export/*.md"),
            *ROOT.glob("recipes/**/*.md"),
            *ROOT.glob("docs/*.md"),
        ]
    )


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.name)
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_tour_names_functions_that_exist_in_the_order_of_the_code():
    from test_structure import LINE

    tour = README.split("## How it works")[1].split("\n## ")[0]
    named = re.findall(r"`(?:mcdeploy|mcruntime)\.([a-z_.]+)\.([A-Za-z_]+)`", tour)
    assert len(named) >= 12
    places = []
    for module, name in named:
        home = ROOT / ("mcdeploy" if module in LINE else "export/mcruntime") / module.replace(".", "/")
        source = home.with_suffix(".py") if home.with_suffix(".py").exists() else home / "__init__.py"
        assert re.search(rf"^\s*(?:def|class|async def) {name}\b", source.read_text(), re.MULTILINE), f"{module}.{name}"
        places.append(LINE.index(module) if module in LINE else len(LINE))
    assert places == sorted(places)


def test_every_key_of_a_recipe_is_in_the_table_of_recipes():
    table = (ROOT / "recipes" / "README.md").read_text()
    sections = {
        "data": [recipe.DataConfig], "model": [recipe.ModelConfig], "train": [recipe.TrainConfig],
        "export": [recipe.ExportConfig], "connectivity": [rule.config for rule in RULES.values()],
    }  # fmt: skip
    missing = [
        f"{section}.{key}"
        for section, models in sections.items()
        for model in models
        for key in model.model_fields
        if f"`{section}.{key}`" not in table
    ]
    assert not missing


def test_every_recipe_has_a_row():
    table = (ROOT / "recipes" / "README.md").read_text()
    assert not [path.stem for path in (ROOT / "recipes").glob("*.yaml") if f"`{path.stem}`" not in table]


def test_the_loop_of_ones_own_learns_and_exports(tmp_path):
    import importlib.util

    spec = importlib.util.spec_from_file_location("own_loop", ROOT / "examples" / "own_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(tmp_path / "m.onnx", steps=40) > 0.5  # ten classes; chance is 0.1
    assert (tmp_path / "m.onnx").exists()
