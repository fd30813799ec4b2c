"""docs/complaints.md has a row for each of the 33 complaints, and each row names something that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from test_cli import COMMANDS
from tiny_models import images, wired_resnet

from mcdeploy import train

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "complaints.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if re.match(r"\| \d+ \|", line)
]


def names_a_test(text):
    file, _, name = text.partition("::")
    path = ROOT / file
    if not path.is_file():
        return False
    found = ast.parse(path.read_text()).body
    return name in {one.name for one in found if isinstance(one, ast.FunctionDef)} and name.startswith("test_")


def names_a_command(text):
    words = text.split()
    return words[0] == "mcdeploy" and (words[1] in COMMANDS or words[1:] == ["nnmass", "search"])


def test_there_are_33_rows_in_order_and_each_cites_a_public_issue():
    assert [int(row[0].strip("| ")) for row in ROWS] == list(range(1, 34))
    for row in ROWS:
        assert len(row) == 4, row
        assert re.search(r"[\w.-]+/[\w.-]+#\d+", row[1]), row
        assert len(row[2]) > 30, row


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("| "))
def test_each_row_is_shown_by_something_that_exists_or_is_not_ours_with_a_reason(row):
    answer, shown = row[2], row[3].strip("| ")
    if shown == "not ours":
        assert answer.startswith("not ours: "), "the reason is in the answer"
        return
    names = re.findall(r"`([^`]+)`", shown)
    assert names
    assert re.sub(r"`[^`]+`", "", shown).strip(" ,") == "", "nothing beside names"
    for name in names:
        assert names_a_command(name) if name.startswith("mcdeploy ") else names_a_test(name), name


def test_what_does_not_exist_is_told_apart():
    assert not names_a_test("tests/test_complaints.py::test_of_nothing")
    assert not names_a_test("tests/test_complaints.py::names_a_test")
    assert not names_a_test("tests/test_nothing.py::test_of_nothing")
    assert not names_a_command("mcdeploy convert")


def test_statistics_are_estimated_anew_when_the_gates_are_frozen():
    """The means of the first norm become the average over the batches; those before count no more."""
    model = wired_resnet(fan_in=2)
    batches = [images(8, 16, seed) for seed in range(3)]
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    seen = []
    hook = norm.register_forward_hook(lambda _, given, __: seen.append(given[0].mean((0, 2, 3)).detach()))
    train._reestimate_bn(model, [(batch, None) for batch in batches], 2)
    hook.remove()
    assert len(seen) == 2, "as many batches as asked for"
    torch.testing.assert_close(norm.running_mean, torch.stack(seen).mean(0))


def test_training_estimates_them_once_and_before_the_wiring_is_fixed_for_good(monkeypatch, tmp_path):
    from runs import short_recipe

    from mcdeploy.connectivity.wiring import gate_values
    from mcdeploy.runs import train_run

    calls = []
    real = train._reestimate_bn

    def watched(model, loader, num_batches):
        calls.append((num_batches, bool(gate_values(model))))
        real(model, loader, num_batches)

    monkeypatch.setattr(train, "_reestimate_bn", watched)
    train_run(short_recipe(), tmp_path / "run", resume=False)
    assert calls == [(2, False)], "once, by train.bn_batches, of a model whose gates are frozen"
