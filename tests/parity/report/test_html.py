"""The HTML report: self-contained, escaped, complete, and readable on a phone."""

from __future__ import annotations

import dataclasses
import html as standard
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loradeploy.parity.report.html import html
from loradeploy.parity.report.plots import LogScale, condensed, number, shade
from loradeploy.parity.report.results import Heatmap, Localization, ParityReport
from loradeploy.parity.report.writers import write_report
from tests.parity.reports import FULL, HEATMAP, ON_CPU, PASSED

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=y>{{ 7 * 7 }}\x00"
NAMED_BADLY = dataclasses.replace(
    FULL,
    bundle=HOSTILE,
    base=HOSTILE,
    notes=(HOSTILE,),
    results=tuple(
        dataclasses.replace(r, title=HOSTILE, adapter=HOSTILE, message=HOSTILE)
        for r in FULL.results
    ),
    adapters=tuple(dataclasses.replace(a, name=HOSTILE, message=HOSTILE) for a in FULL.adapters),
    controls=tuple(dataclasses.replace(c, adapter=HOSTILE) for c in FULL.controls),
    localizations=tuple(
        dataclasses.replace(
            place,
            adapter=HOSTILE,
            message=HOSTILE,
            steps=tuple(dataclasses.replace(s, module=HOSTILE, op=HOSTILE) for s in place.steps),
        )
        for place in FULL.localizations
    ),
    counterexamples=tuple(dataclasses.replace(c, text=HOSTILE) for c in FULL.counterexamples),
    regressions=tuple(dataclasses.replace(r, where=HOSTILE) for r in FULL.regressions),
)
REPORTS = {
    "passed": PASSED,
    "failed, with everything": FULL,
    "empty": dataclasses.replace(PASSED, results=(), adapters=(), controls=(), notes=()),
    "unicode": dataclasses.replace(PASSED, bundle="日本語 שלום 🦙", base="a\nb"),
    "hostile": NAMED_BADLY,
    "long names": dataclasses.replace(
        FULL,
        bundle="b" * 300,
        results=tuple(
            dataclasses.replace(r, title="t" * 90, adapter="a" * 90) for r in FULL.results
        ),
    ),
}
WHATEVER_IS_TOLD = pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS.keys())


class Page(HTMLParser):
    """The elements and the visible text of a page; fails if elements are not properly nested."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"<{tag}> has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


@WHATEVER_IS_TOLD
def test_the_page_is_well_formed_and_self_contained(report: ParityReport) -> None:
    text = html(report)
    assert text.startswith("<!doctype html>")
    page = Page(text)
    assert {tag for tag, _ in page.elements} & {
        "script",
        "img",
        "link",
        "iframe",
        "object",
    } == set()
    attributes = {name for _, attributes in page.elements for name in attributes}
    assert not attributes & {"src", "href", "onerror", "onload", "action"}
    styles = re.sub(r"url\(#hatch\)", "", text[: text.index("</style>")])
    assert "url(" not in styles
    assert "@import" not in styles
    assert not re.search(r"https?://", text)


def test_names_are_shown_literally_and_never_executed() -> None:
    page = Page(html(NAMED_BADLY))
    assert "<script>alert('x')</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text


@pytest.mark.parametrize("report", [PASSED, FULL], ids=["passed", "failed"])
def test_the_verdict_comes_first_with_the_failures_in_words(report: ParityReport) -> None:
    text = Page(html(report)).text
    verdict = "✓ Parity passed" if report.passed else "✕ Parity failed"
    other = "✕ Parity failed" if report.passed else "✓ Parity passed"
    places = [text.index(verdict)]
    places += [text.index(" ".join(line.split())) for line in report.failures]
    assert places == sorted(places)
    assert max(places) < text.index("Comparisons passed")
    assert other not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (1.43e-4, "1.4e-04"),
        (-8e-5, "-8.0e-05"),
        (0.01, "0.01"),
        (4.5, "4.5"),
    ],
)
def test_numbers_far_below_1_have_an_exponent(value: float | None, text: str) -> None:
    assert number(value) == text


def numbers(report: ParityReport) -> set[str]:
    """Return every number of the report as the page should show it."""
    found = {report.inputs.prompt_tokens, report.inputs.seed, report.seconds}
    texts = {str(value) for value in found} | {report.created}
    for result in report.results:
        for check in result.checks:
            texts |= {number(check.value), number(check.limit)}
        if result.figures is not None:
            texts |= {number(result.figures.p99_abs), f"{result.figures.mean_abs:.4g}"}
            texts.add(f"{result.figures.cosine_distance:.4g}")
    for facts in report.adapters:
        texts |= {number(facts.effect), number(facts.mean_effect), facts.digest}
    for control in report.controls:
        texts.add(number(control.error))
    for place in report.localizations:
        texts |= {number(step.share) for step in place.steps} | {*place.unmatched}
        texts |= {step.node for step in place.offenders}
        if place.heatmap is not None:
            texts |= {number(value) for row in place.heatmap.values for value in row}
    for found_input in report.counterexamples:
        texts |= {", ".join(map(str, found_input.tokens)), number(found_input.error)}
        texts |= {f"{found_input.length} tokens", f"{found_input.tried} tries"}
    for score in report.scores:
        texts |= {
            f"{score.value:.4g} (PyTorch {score.reference:.4g})",
            f"{score.examples} examples",
        }
        texts |= {f"{value:+.2g}" for value in (score.low, score.difference, score.high)}
    for item in report.regressions:
        texts |= {v if isinstance(v, str) else number(v) for v in (item.before, item.now)}
    digests = (report.base_digest, report.graph_digest, report.data_digest, *report.files.values())
    return texts | {digest for digest in digests if digest is not None}


def test_every_number_is_on_the_page() -> None:
    text = Page(html(FULL)).text
    missing = {message for message in numbers(FULL) if message not in text}
    assert missing == set()
    assert "50.0 %" in text  # the mutation score


def test_every_limit_comes_with_its_reason() -> None:
    text = Page(html(PASSED)).text
    reasons = {check.reason for result in PASSED.results for check in result.checks}
    assert {reason for reason in reasons if " ".join(reason.split()) not in text} == set()


@WHATEVER_IS_TOLD
def test_every_plot_has_a_text_description(report: ParityReport) -> None:
    plots = [attributes for tag, attributes in Page(html(report)).elements if tag == "svg"]
    shown = [own for own in plots if own.get("role") == "img"]
    assert all(own.get("aria-label") for own in shown)
    assert len(shown) > 5 or not report.results


def test_variants_have_a_column_only_if_there_are_several() -> None:
    assert "cpu, disable" in Page(html(FULL)).text
    assert f"Ran on cpu {ON_CPU}" in Page(html(FULL)).text
    assert "Variant" not in Page(html(PASSED)).text


# -- plots -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "place"),
    [(1e-6, 0), (1e-3, 50), (1.0, 100), (0.0, 0), (1e9, 100), (float("nan"), 100)],
)
def test_a_logarithmic_scale_has_a_position_for_every_number(value: float, place: float) -> None:
    assert LogScale(-6, 0).at(value) == pytest.approx(place)


def test_a_scale_without_values_is_valid() -> None:
    assert LogScale.over([]).at(1.0) == 100
    assert LogScale.over([0.0, None, float("inf")]).ticks
    assert LogScale.over([1.0, 1.0]).low < LogScale.over([1.0, 1.0]).high


def test_a_heatmap_that_is_too_large_keeps_its_worst_rows() -> None:
    modules, positions = 500, 300
    rows = [[1e-7] * positions for _ in range(modules)]
    rows[321][77], rows[12][299] = 0.5, float("nan")
    names = tuple(f"m{number}" for number in range(modules))
    small = condensed(Heatmap(names, tuple(range(positions)), tuple(map(tuple, rows))))
    assert (len(small.modules), len(small.positions)) == (84, 75)
    cells = [value for row in small.values for value in row]
    assert cells.count(0.5) == 1
    assert sum(value != value for value in cells) == 1
    assert condensed(HEATMAP) is HEATMAP


def test_a_larger_error_never_has_a_lighter_shade() -> None:
    scale = LogScale(-8, -1)
    shades = [shade(10.0**exponent, scale) for exponent in range(-9, 1)]
    assert shades == sorted(shades)
    assert {*shades} >= {0, 6}


def test_a_single_module_can_be_plotted() -> None:
    place = FULL.localizations[0]
    one = dataclasses.replace(place, steps=place.steps[:1], heatmap=None, offenders=())
    text = html(dataclasses.replace(FULL, localizations=(one, empty())))
    assert "relative error of 1 modules" in text


def empty() -> Localization:
    return Localization("onnx", "ONNX", None, 0, 1, (), heatmap=Heatmap((), (), ()))


# -- in a browser ----------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
Browse = Callable[..., str]


@pytest.fixture(scope="session")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Browse:
    """A function that opens a page in headless Chromium with additional options."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")

    def run(page: Path, *options: str) -> str:
        profile = tmp_path_factory.mktemp("profile")
        done = subprocess.run(
            [found, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             f"--user-data-dir={profile}", *options, page.as_uri()],
            capture_output=True, encoding="utf-8", check=True, timeout=120,
        )  # fmt: skip
        return done.stdout

    return run


def framed(text: str, width: int, place: Path) -> Path:
    """Write a page that shows `text` in a frame: browser windows are never as narrow as a phone.

    The page records the width of the framed page with all its details unfolded.
    """
    place.write_text(
        f'<body style="margin:0"><iframe style="border:0;width:{width}px;height:844px"'
        f' srcdoc="{standard.escape(text)}"></iframe><script>onload = () => {{'
        " const page = document.querySelector('iframe').contentDocument;"
        " for (const part of page.querySelectorAll('details')) part.open = true;"
        " document.body.dataset.width = page.documentElement.scrollWidth; }</script>",
        encoding="utf-8",
    )
    return place


def width_of(browse: Browse, text: str, width: int, place: Path) -> int:
    message = re.search(r'data-width="(\d+)"', browse(framed(text, width, place), "--dump-dom"))
    assert message is not None
    return int(message[1])


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["passed", "failed, with everything", "long names"])
def test_the_page_is_no_wider_than_the_window(
    browse: Browse, name: str, width: int, tmp_path: Path
) -> None:
    assert width_of(browse, html(REPORTS[name]), width, tmp_path / "frame.html") == width


def test_a_page_that_is_too_wide_is_detected(browse: Browse, tmp_path: Path) -> None:
    wide = html(PASSED).replace("<main>", '<main><div style="width:700px;height:9px"></div>')
    assert width_of(browse, wide, 390, tmp_path / "frame.html") > 390


def test_the_rendered_page_is_not_blank(browse: Browse, tmp_path: Path) -> None:
    from PIL import Image

    write_report(FULL, tmp_path / "report.html")
    picture = tmp_path / "picture.png"
    browse(tmp_path / "report.html", "--window-size=1280,900", f"--screenshot={picture}")
    with Image.open(picture) as image:
        assert image.size[0] == 1280
        colors = image.convert("RGB").getcolors(1 << 20)
    assert colors is not None
    assert len(colors) > 100
    assert max(count for count, _ in colors) < 0.95 * 1280 * 900
