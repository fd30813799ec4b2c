"""The page and the Markdown hold every number, warn where they should, and treat names as text."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

from test_profile import made
from test_report import a_bench

from mcdeploy.bench_page import bench_markdown, draw_profiles, write_bench_page

EVIL = "<script>x|y</script>"


class Texts(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not any(key in ("src", "href") or key.startswith("on") for key, _ in attrs)

    def handle_data(self, data):
        self.texts.append(data)


def page_of(tmp_path, report, profiles=(), command=""):
    path = tmp_path / "bench.html"
    write_bench_page(path, report, profiles, command)
    found = Texts()
    found.feed(path.read_text())
    return found.tags, " ".join(found.texts)


def test_the_page_holds_numbers_plots_machine_method_and_profile(tmp_path):
    report = replace(a_bench(), warnings=("somebody else was busy",), gpu={"state": "floating"})
    profiles = [made("big", ("layer1.0", 30), ("layer1.1", 10)), made("small", ("layer1.1", 9))]
    tags, text = page_of(tmp_path, report, profiles, "mcdeploy bench big small")
    for wanted in ("0.600 [0.580, 0.610]", "Fast CPU", "somebody else was busy", "floating", "30 (75.0%)"):
        assert wanted in text
    assert "mcdeploy bench big small" in text
    assert "one call of infer" in text
    assert tags.count("svg") == 2
    assert "script" not in tags


def test_names_are_text_and_never_markup(tmp_path):
    tags, text = page_of(tmp_path, a_bench(second=EVIL), [made(EVIL, (EVIL, 3))], EVIL)
    assert "script" not in tags
    assert EVIL in text
    assert EVIL.replace("|", r"\|") in bench_markdown(a_bench(second=EVIL), [made(EVIL, (EVIL, 3))])


def test_a_bench_without_profile_or_warnings_has_no_empty_sections(tmp_path):
    page_of(tmp_path, a_bench())
    heads = re.findall("<h2>(.*?)</h2>", (tmp_path / "bench.html").read_text())
    assert heads == ["Latency"]


def test_markdown_tables_have_as_many_cells_as_heads():
    text = bench_markdown(replace(a_bench(), warnings=("busy",)), [made("big", ("layer1.0", 30))], "mcdeploy bench")
    assert "**Warning:** busy." in text
    assert "| ~10.0 [" in text  # 500 samples are too few for p99
    for table in re.split(r"\n\n", text):
        if table.startswith("|"):
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
            assert len(widths) == 1, table


def test_bars_are_as_long_as_the_time_and_share_one_scale():
    svg = draw_profiles([made("a", ("x", 40), ("y", 10)), made("b", ("x", 20))])
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', svg)]
    assert widths[0] == 2 * widths[1] == 4 * widths[2]
