"""The report of a run: one file that holds everything, and says what its numbers say; written whole or not at all."""

import json
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs

from coterie.analysis import figures
from coterie.analysis.report import (
    Damage,
    DomainQuality,
    LayerRow,
    Report,
    Size,
    Variant,
    clearly_worse_uncalibrated,
    overlap,
    render,
    reversals,
    summarize,
    write_report,
)
from coterie.errors import DataError, OutputError

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} %{x} &amp; <b>"


def quality(domain: str, loss: float, half: float = 0.01, calibrated: bool = True) -> DomainQuality:
    return DomainQuality(domain, 4096, loss, loss - half, loss + half, 0.05, 0.04, 0.06, 0.95, calibrated)


def layers(count: int = 3, experts: int = 8, kept: int = 4) -> list[LayerRow]:
    saliency = [float(experts - e) for e in range(experts)]
    load = [s / sum(saliency) for s in saliency]
    return [LayerRow(i, f"layers.{i}.mlp", experts, 2, list(range(kept)), saliency, load) for i in range(count)]


def variant(name: str = "reap, 50%", rises: tuple[float, float] = (0.1, 0.1)) -> Variant:
    measured = [quality("web", 2.0 + rises[0]), quality("legal", 3.0 + rises[1], calibrated=False)]
    recipe = {"steps": [{"prune": {"method": "reap", "keep": 0.5}}]}
    return Variant(
        name, "reap", "arXiv:2510.13999", "out/reap", Size(6_000_000, 3_000_000, 900), layers(), measured, recipe, []
    )


def report(*variants: Variant) -> Report:
    return Report(
        title="Half of it",
        model="acme/moe",
        architecture="AcmeForCausalLM",
        original=Size(10_000_000, 5_000_000, 1_000),
        original_quality=[quality("web", 2.0), quality("legal", 3.0, calibrated=False)],
        variants=list(variants) or [variant()],
        calibration={
            "files": ["web.txt"],
            "samples": 8,
            "length": 512,
            "tokens_per_domain": {"web": 4096},
            "digest": "ab",
        },
        redundancy={"load_concentration": 0.25, "mean_best_match": 0.5, "warning": "Experts differ a lot."},
        versions={"coterie": "0.1.0"},
        created="today",
        elapsed_seconds=90.0,
    )


def page(value: Report) -> str:
    """The page without plotly.js, which has markup and addresses of its own."""
    whole = render(value)
    assert get_plotlyjs() in whole
    return whole.replace(get_plotlyjs(), "")


class Outline(HTMLParser):
    """Tags with their attributes, and the text a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.text += data


def drawn(text: str) -> dict[str, dict]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, flags=re.DOTALL)
    assert found
    return json.loads(found[1])


def test_page_loads_nothing():
    text = page(report())
    for tag, attributes in Outline(text).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert "src" not in attributes
        assert tag == "a" or "href" not in attributes
    assert "@import" not in text
    assert "url(" not in text
    assert "default-src 'none'" in text


def test_page_shows_every_variant_and_domain():
    text = Outline(page(report(variant("reap, 50%"), variant("dern, 50%")))).text
    for expected in (
        "reap, 50%",
        "dern, 50%",
        "web",
        "legal",
        "6.00 MB",
        "10.0 MB",
        "+0.100",
        "+0.090 to +0.110",
        "95.0%",
    ):
        assert expected in text


def test_page_of_one_variant_leads_with_before_and_after():
    text = " ".join(Outline(page(report())).text.split())
    assert (
        "6.00 MB instead of 10.0 MB, for +0.100 nats per token of loss on average over 2 domains (+11% perplexity)"
        in text
    )
    assert "method: reap" in text


def test_hostile_names_stay_text():
    bad = replace(
        variant(HOSTILE),
        method=HOSTILE,
        paper=HOSTILE,
        path=HOSTILE,
        layers=[replace(row, name=HOSTILE) for row in layers()],
        quality=[replace(quality("web", 2.1), domain=HOSTILE), quality("legal", 9.0, calibrated=False)],
        recipe={HOSTILE: [HOSTILE]},
        warnings=[HOSTILE],
    )
    value = replace(
        report(bad, variant("other")),
        title=HOSTILE,
        model=HOSTILE,
        architecture=HOSTILE,
        created=HOSTILE,
        original_quality=[replace(quality("web", 2.0), domain=HOSTILE), quality("legal", 3.0, calibrated=False)],
        calibration={HOSTILE: HOSTILE, "files": [HOSTILE], "tokens_per_domain": {HOSTILE: 1}},
        redundancy={HOSTILE: 1.0, "warning": HOSTILE},
        versions={HOSTILE: HOSTILE},
    )
    text = page(value)
    outline = Outline(text)
    plain = Outline(page(report(variant(), variant("other"))))
    count = [tag for tag, _ in outline.tags].count
    assert count("script") == [tag for tag, _ in plain.tags].count("script")
    assert count("img") == 0
    assert not any(name.startswith("on") for _, attributes in outline.tags for name in attributes)
    assert HOSTILE in outline.text

    def strings(node):
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict | list):
            for item in node.values() if isinstance(node, dict) else node:
                yield from strings(item)

    # plotly knows a few tags and its own %{...}: only ours may reach it.
    for string in strings(drawn(text)):
        assert set(re.findall(r"<[^>]*>", string)) <= {"<br>", "<b>", "</b>", "<extra>", "</extra>"}
        assert set(re.findall(r"%\{[^}]*\}", string)) <= {
            "%{x}",
            "%{y}",
            "%{z}",
            "%{text}",
            "%{fullData.name}",
            "%{y:.1%}",
        }
    assert "%{x}" not in drawn(text)["damage"]["data"][0]["name"]


def test_json_round_trip():
    value = report(variant("a"), variant("b"))
    assert Report.from_json(value.to_json()) == value


@given(st.floats(allow_nan=False, allow_infinity=False), st.text(), st.none() | st.floats(0, 1))
def test_json_round_trip_of_any_number_and_name(loss, name, kl):
    measured = replace(quality(name, 1.0), loss=loss, kl=kl)
    value = report(replace(variant(name), quality=[measured]))
    assert Report.from_json(value.to_json()) == value


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_named(number):
    value = report(replace(variant(), quality=[replace(quality("web", 2.0), loss=number)]))
    with pytest.raises(DataError, match=r"variants\[0\]\.quality\[0\]\.loss"):
        value.to_json()
    with pytest.raises(DataError):
        render(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        report().to_json().replace('"tokens": 4096', '"tokens": "4096"'),
        report().to_json().replace('"kl": 0.05', '"kl": NaN'),
        report().to_json().replace('"experts": 8', '"experts": 7'),
    ],
)
def test_other_json_is_refused(text):
    with pytest.raises(DataError):
        Report.from_json(text)


def damage(domain: str, low: float, high: float, calibrated: bool) -> Damage:
    return Damage(domain, calibrated, (low + high) / 2, low, high)


@pytest.mark.parametrize(
    ("calibrated", "other", "worse"),
    [
        ([(0.1, 0.2)], (0.21, 0.3), True),
        ([(0.1, 0.2)], (0.2, 0.3), False),  # the intervals touch
        ([(0.0, 0.1), (0.1, 0.25)], (0.21, 0.3), False),  # above one calibrated domain, not above all
        ([(-0.3, -0.2)], (-0.1, 0.1), False),  # worse than the others, but not clearly damaged
        ([(-0.3, -0.2)], (0.01, 0.1), True),
        ([], (0.5, 0.6), False),  # nothing to compare with
    ],
)
def test_uncalibrated_domain_is_clearly_worse(calibrated, other, worse):
    damages = [damage(f"c{i}", *bounds, True) for i, bounds in enumerate(calibrated)]
    found = clearly_worse_uncalibrated([*damages, damage("other", *other, False)])
    assert [d.domain for d in found] == (["other"] if worse else [])


@pytest.mark.parametrize(("rise", "warned"), [(0.119, False), (0.121, True)])
def test_page_warns_exactly_when_the_intervals_part(rise, warned):
    text = page(report(variant(rises=(0.1, rise))))  # intervals are 0.01 to each side
    assert ('id="uncalibrated"' in text) is warned
    assert ("A method that looks best on calibrated domains can be the worst on another" in text) is warned


def test_page_says_when_it_can_say_nothing_about_other_text():
    value = replace(report(), variants=[replace(variant(), quality=[quality("web", 2.1)])])
    value = replace(value, original_quality=[quality("web", 2.0)])
    assert "say nothing about other text" in page(value)


@pytest.mark.parametrize(("rise", "reversed_"), [(0.5, True), (0.05, False)])
def test_best_on_calibrated_and_worst_elsewhere(rise, reversed_):
    value = report(variant("specialist", (0.01, rise)), variant("generalist", (0.1, 0.1)))
    assert [(v.name, d.domain) for v, d in reversals(value)] == ([("specialist", "legal")] if reversed_ else [])
    assert ("is the best variant on the calibrated domains" in page(value)) is reversed_


def test_second_worst_elsewhere_is_no_reversal():
    value = report(variant("best", (0.01, 0.3)), variant("good", (0.1, 0.1)), variant("bad", (0.5, 0.5)))
    assert reversals(value) == []


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("several", [True, False])
def test_missing_quality_is_said_not_invented(before, after, several):
    bare = variant("bare") if after else replace(variant("bare"), quality=[])
    value = report(bare, variant("other")) if several else report(bare)
    value = value if before else replace(value, original_quality=[])
    line = summarize(value)[0]
    assert (line.rise is not None) is (before and after)
    text = page(value)
    assert ("damage" in drawn(text)) is (before and (after or several))
    assert ("No quality was measured" in text) is not (before or after or several)


def test_bare_minimum_renders():
    bare = Variant("x", "", "", "", Size(0, 0, 0), [], [], {}, [])
    value = Report("", "", "", Size(0, 0, 0), [], [bare], {}, None, {}, "", None)
    assert drawn(page(value)) == {}


def test_layers_without_profile_have_no_load_figure():
    unprofiled = replace(variant(), layers=[replace(row, load=None) for row in layers()])
    assert set(drawn(page(report(unprofiled)))) == {"damage", "experts-0"}


def test_heat_map_holds_each_expert_once_in_whole_percent():
    figure = figures.experts(replace(variant(), layers=layers(experts=8, kept=3)), wide=True)
    kept, dropped = figure.data
    assert list(kept.z[0]) == [100, 88, 75, None, None, None, None, None]
    assert list(dropped.z[0]) == [None, None, None, 62, 50, 38, 25, 12]


def test_heat_map_of_many_experts_is_ranked_and_light():
    row = replace(layers(experts=512)[0], saliency=[float(e) for e in range(512)], kept=list(range(256, 512)))
    big = replace(variant(), layers=[replace(row, index=i) for i in range(90)])
    figure = figures.experts(big, wide=True)
    kept, dropped = figure.data
    assert all(value is None for value in kept.z[0][256:])
    assert all(value is None for value in dropped.z[0][:256])
    assert len(render(report(big))) - len(get_plotlyjs()) < 700_000


def test_figures_carry_no_colours_so_that_both_themes_work():
    text = json.dumps(drawn(page(report(variant("a"), variant("b")))))
    assert not re.search(r"#[0-9a-fA-F]{6}\b|rgba?\(", text)


def test_load_of_unused_experts_is_drawn_and_said():
    rows = [replace(row, load=[1.0] + [0.0] * 7) for row in layers()]
    figure = figures.load(report(replace(variant(), layers=rows)))
    assert figure.data[0].lowerfence[0] == figures.UNUSED
    assert figure.data[0].upperfence[0] == 3.0  # 8 times an even share
    assert "7 never used" in figure.data[1].text[0]


def test_retained_share_is_the_load_of_kept_experts():
    figure = figures.retained(report(variant()))
    assert figure.data[0].y[0] == pytest.approx((8 + 7 + 6 + 5) / 36, abs=1e-4)
    everything = replace(variant(), layers=layers(kept=8))
    assert figures.retained(report(everything)) is None


def test_overlap_counts_common_experts():
    a, b = variant("a"), replace(variant("b"), layers=[replace(row, kept=[2, 3, 4, 5]) for row in layers()])
    assert overlap(a, b) == 0.5
    assert overlap(a, replace(b, layers=[])) is None


def test_rows_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="8 experts"):
        LayerRow(0, "x", 8, 2, [0], [1.0] * 7, None)
    with pytest.raises(ValueError, match="kept"):
        LayerRow(0, "x", 8, 2, [8], [1.0] * 8, None)
    with pytest.raises(ValueError, match="names"):
        report(variant("a"), variant("a"))


def test_report_is_written_whole(tmp_path):
    write_report(report(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(report())
    assert os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_failed_write_leaves_the_old_report(tmp_path, monkeypatch, step):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, full)
    with pytest.raises(OutputError, match="No space left"):
        write_report(report(), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_missing_folder_is_the_users_error():
    with pytest.raises(OutputError, match="No such file"):
        write_report(report(), Path("/nowhere/at/all/report.html"))
