"""Adding a rule is one file and one line of a dict literal (with its import): done in a copy, with a toy rule."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]

TOY = '''
"""Toy: every block reads the input of its stage as well as the block before it."""

from typing import Literal

from mcdeploy.connectivity.wiring import FixedEdges
from mcdeploy.section import RuleConfig


class ToyConfig(RuleConfig):
    rule: Literal["toy"]
    aggregate: Literal["mean", "sum"] = "mean"


def toy(stages, candidates, config):
    picked = tuple(tuple(tuple(dict.fromkeys((row[0], row[-1]))) for row in rows) for rows in candidates)
    return picked, [FixedEdges([len(row) for row in rows], config.aggregate) for rows in picked]
'''

USE = """
import sys
from pathlib import Path

import torch

import mcdeploy
from mcdeploy.runs import train_run
from mcdeploy.compile.certify import scramble
from mcdeploy.recipe import load_recipe
from mcruntime.engine import OnnxRunner

assert Path(mcdeploy.__file__).is_relative_to(Path.cwd())
recipe = load_recipe(Path("toy.yaml"))
result, loaders = train_run(recipe, Path("run"), resume=False)
reads = [[node.index for node in row] for row in result.topology.stages[0].reads]
assert reads == [[0], [0, 1], [0, 2], [0, 3]], reads
scramble(result.model)
small = mcdeploy.compile_model(result.model, torch.randn(7, 3, 16, 16))
mcdeploy.export_onnx(small, "toy.onnx", torch.randn(2, 3, 16, 16))
images = torch.randn(3, 3, 16, 16)
with OnnxRunner(Path("toy.onnx"), name="toy") as runner, torch.no_grad():
    assert abs(runner.infer(images.numpy()) - result.model(images).numpy()).max() < 1e-3
try:
    load_recipe(Path("toy.yaml"), ("connectivity.agregate=sum",))
except mcdeploy.McdeployError as error:
    assert "did you mean 'aggregate'" in str(error), error
else:
    raise AssertionError("a mistyped key was taken")
print("a toy net of", sum(p.numel() for p in small.parameters()), "parameters")
"""


def test_a_sixth_rule_is_one_file_and_one_line(tmp_path):
    for package in ("mcdeploy", "export/mcruntime"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    rules = tmp_path / "mcdeploy" / "connectivity" / "rules.py"
    (rules.parent / "toy.py").write_text(TOY)
    before = rules.read_text()
    start = before.index("RULES: dict[str, Rule] = {\n") + len("RULES: dict[str, Rule] = {\n")
    line = '    "toy": Rule(toy.ToyConfig, by_stages(toy.toy)),\n'
    head = before[:start].replace("from mcdeploy.connectivity import ", "from mcdeploy.connectivity import toy, ", 1)
    rules.write_text(head + line + before[start:])

    tree = yaml.safe_load((ROOT / "recipes" / "digits.yaml").read_text())
    del tree["train"]["joint_epochs"], tree["train"]["warmup_epochs"]
    tree["train"]["epochs"] = 1
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({**tree, "name": "toy", "connectivity": {"rule": "toy"}}))
    (tmp_path / "use.py").write_text(USE)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{tmp_path / 'export'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "use.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a toy net of" in done.stdout
