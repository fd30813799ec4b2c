"""Our server answers what a real Triton answered, but for the differences that are written down.

``oracle`` recorded Triton's answers; no Triton is needed here.
"""

from __future__ import annotations

import json

import pytest
from oracle import REPLAYS, our_server, read_golden
from oracle_cases import DIFFERENCES, GRPC_CASES, REST_CASES, RULES, expected

CASES = {"rest": REST_CASES, "grpc": GRPC_CASES}
EVERY = [(kind, name) for kind, cases in CASES.items() for name in cases]


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    """What ours answers to all cases of a kind: asked once, since some cases go on from others."""
    found = {}

    def replay(kind):
        if kind not in found:
            with our_server(tmp_path_factory.mktemp(kind)) as (*ports, control):
                found[kind] = REPLAYS[kind](ports, control)
        return found[kind]

    return replay


def as_text(answer):
    """As JSON, so that the order of members counts, and 1 is not 1.0."""
    return json.dumps(answer)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_ours_answers_what_triton_answered(replayed, kind, name):
    ours, golden, steps = replayed(kind)[name], read_golden(kind)[name], CASES[kind][name]
    written = DIFFERENCES[kind][name].ours if name in DIFFERENCES[kind] else {}
    for number, (answer, triton, step) in enumerate(zip(ours, golden, steps, strict=True)):
        same = expected(kind, step, triton)
        wanted = {key: value for key, value in (same | written.get(number, {})).items() if value is not None}
        assert as_text(answer) == as_text(wanted), f"step {number}; Triton: {as_text(triton)}"
        if number in written:
            assert as_text(answer) != as_text(same), f"step {number} is no difference any more; remove it"


@pytest.mark.parametrize("kind", CASES)
def test_the_golden_answers_are_of_the_cases_there_are(kind):
    golden = read_golden(kind)
    assert {name: len(steps) for name, steps in golden.items()} == {
        name: len(steps) for name, steps in CASES[kind].items()
    }


@pytest.mark.parametrize("kind", CASES)
def test_every_difference_is_of_a_step_that_exists_and_says_why(kind):
    for name, difference in DIFFERENCES[kind].items():
        assert difference.ours, name
        assert set(difference.ours) <= set(range(len(CASES[kind][name]))), name
        assert len(difference.why.split()) > 3, name


@pytest.mark.parametrize(("kind", "rule"), [(kind, rule) for kind, rules in RULES.items() for rule in rules])
def test_every_rule_changes_an_answer_that_no_written_difference_covers(kind, rule):
    assert any(
        rule.apply(step.path if kind == "rest" else step.method, answer) != answer
        for name, answers in read_golden(kind).items()
        if name not in DIFFERENCES[kind]
        for step, answer in zip(CASES[kind][name], answers, strict=True)
    ), rule.why
