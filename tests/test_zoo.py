import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests import zoo

PAGE = Path(__file__).parents[1] / "recipes" / "results" / "zoo.md"


def committed():
    """Family to its cells, from the page."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert lines[0] == list(zoo.HEAD)
    return {cells[0]: dict(zip(zoo.HEAD, cells, strict=True)) for cells in lines[1:]}


# NCHW, tokens, NHWC, and a stage that the host walks. The command does the other families.
@pytest.mark.parametrize("family", ["convnext", "vision_transformer", "mambaout", "convit"])
def test_a_small_model_of_the_family_goes_through_the_whole_pipeline(family):
    row = zoo.check(family)
    assert (row.result, row.reason) == ("ok", "")
    assert row.stages > 0
    assert 0 < row.parameters[1] <= row.parameters[0]


def test_a_family_that_cannot_be_wired_is_refused_in_a_sentence():
    row = zoo.check("tnt")
    assert row.result == "refused"
    assert "has no wirable stage" in row.reason
    assert row.passed_over == ["tnt_s_legacy_patch16_224", "tnt_s_patch16_224", "tnt_b_patch16_224"]


def test_nothing_constant_is_left_in_a_scrambled_model_and_its_answer_depends_on_the_image():
    model = timm.create_model("resnet18", num_classes=10)
    assert any(parameter.min() == parameter.max() for parameter in model.parameters())
    zoo.scramble_all(model, zoo.images(8, 32))
    assert not any(parameter.min() == parameter.max() for parameter in model.parameters())
    with torch.no_grad():
        one, other = model(zoo.images(2, 32))
    assert (one - other).abs().max() > 0.1 * one.abs().max()


class Off:
    """A runner that is off by a share of the answer, or answers only some of the images."""

    def __init__(self, share=0.0, leave_out=0):
        self.share = share
        self.leave_out = leave_out

    def infer(self, images):
        return images[self.leave_out :] * (1 + self.share)


def test_an_answer_that_is_off_or_says_nothing_breaks_a_family():
    batch = torch.tensor([[1.0, 2.0], [1.1, 2.0], [1.0, 2.0]])
    zoo.compare(nn.Identity(), Off(1e-5), batch)
    with pytest.raises(AssertionError, match=r"off by 2\.0e-03 at batch 1"):  # 1e-4 of 2, by a spread of 0.1
        zoo.compare(nn.Identity(), Off(1e-4), batch)
    with pytest.raises(AssertionError, match=r"answers \(0, 2\) at batch 1"):
        zoo.compare(nn.Identity(), Off(leave_out=1), batch)
    with pytest.raises(AssertionError, match="every image gets the same answer"):
        zoo.compare(nn.Identity(), Off(), torch.ones(3, 2))
    with pytest.raises(AssertionError, match="not finite"):
        zoo.compare(nn.Identity(), Off(), torch.full((3, 2), torch.inf))


def test_the_page_holds_every_family_of_its_timm_and_none_is_broken():
    rows = committed()
    if f"timm {timm.__version__}," in PAGE.read_text():  # another timm may have other families
        assert list(rows) == zoo.families()
    results = [row["result"].split()[0] for row in rows.values()]
    assert set(results) == {"ok", "refused"}
    assert results.count("ok") >= 0.85 * len(results)
    assert f"**{results.count('ok')} ok, {results.count('refused')} refused, 0 broken**" in PAGE.read_text()


def test_every_refusal_is_one_sentence():
    refusals = [row["result"] for row in committed().values() if row["result"] != "ok"]
    assert refusals
    for refusal in refusals:
        assert re.fullmatch(r"refused because \S.{20,400}", refusal)
        assert not re.search(r"[.!?] [A-Z]|\x1b|Traceback|\n", refusal)


def test_a_family_in_a_process_of_its_own_leaves_its_row_and_the_page(tmp_path):
    page = tmp_path / "zoo.md"
    arguments = ["--only", "vgg", "--work", str(tmp_path), "--out", str(page), "--seconds", "1"]
    assert zoo.main(arguments) == 1
    assert zoo.read_row(tmp_path / "vgg.json").reason.startswith("its process ended with")
    assert "| vgg | - | - | - | - | - | - | broken: its process ended with" in page.read_text()
    assert "0 ok, 0 refused, 1 broken" in page.read_text()
