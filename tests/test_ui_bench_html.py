"""The report page: well-formed, self-contained, safe and complete."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from ppsd_cli.bench_records import BenchReport, Figures, TaskInfo
from ppsd_cli.ui.bench_html import html_page
from ppsd_cli.ui.bench_svg import speedup_bars
from ppsd_cli.ui.bench_svg_curve import between, families_of
from ppsd_cli.ui.bench_svg_stages import MOST_TICKS, run_histograms, tick_grid
from tests.ui_bench_report import (
    AR,
    EMPTY,
    PPSD,
    fixed_report,
    pipelined,
    row,
    sample,
    small_report,
)
from tests.ui_chain import Chain

VOID = {"meta", "link", "br", "hr", "img", "input"}
EVIL = "<script>alert('x')</script>\"&\x1b[31m"


class Page(HTMLParser):
    """Checks nesting while it reads; keeps tags, attributes and texts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.places: dict[str, list[str]] = {}
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} repeats an attribute"
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        self.places.setdefault(self.open[-1] if self.open else "", []).append(data.strip())

    def of(self, name: str) -> list[str]:
        return [value or "" for _, attribute, value in self.attributes if attribute == name]


def evil_report() -> BenchReport:
    """Text of others wherever a file, a model or a machine may have written it."""
    base = small_report()
    task = TaskInfo(EVIL, EVIL, EVIL, EVIL, 1, 1, None)
    rows = [
        replace(each, categories=tuple((name + EVIL, part) for name, part in each.categories))
        for each in base.rows
    ]
    samples = [
        replace(each, key=replace(each.key, task=EVIL, question_id=EVIL, category=EVIL))
        for each in base.samples
    ]
    return replace(
        base,
        tasks=(task,),
        model=EVIL,
        model_hash=EVIL,
        prompt_checksum=EVIL,
        environment=((EVIL, EVIL),),
        settings=((EVIL, EVIL),),
        rows=tuple(rows),
        samples=tuple(samples),
        failures=tuple(replace(each, gate=EVIL, message=EVIL) for each in base.failures),
        skipped=((EVIL, EVIL),),
        notes=(EVIL,),
    )


@pytest.mark.parametrize("report", [small_report(), fixed_report(), evil_report()])
def test_page_is_well_formed(report: BenchReport) -> None:
    page = Page(html_page(report))
    assert page.tags[:2] == ["html", "head"]
    identifiers = page.of("id")
    assert len(identifiers) == len(set(identifiers))
    assert set(page.of("aria-labelledby")) <= set(identifiers)


@pytest.mark.parametrize("report", [fixed_report(), evil_report()])
def test_page_needs_nothing_else(report: BenchReport) -> None:
    text = html_page(report)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(|src=|href=", text)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_text_of_others_is_shown_not_run() -> None:
    text = html_page(evil_report())
    assert "<script" not in text
    assert "\x1b" not in text
    page = Page(text)
    shown = EVIL.replace("\x1b", "\\x1b")
    for place in ("h1", "strong", "title"):
        assert any(shown in each for each in page.places[place]), place
    # Tasks, categories, settings: every cell that holds it does so in full.
    cells = [each for each in page.places["td"] + page.places["th"] if "script" in each]
    assert len(cells) > 10
    assert all(shown in each for each in cells)


def test_page_has_all_sections() -> None:
    page = Page(html_page(fixed_report()))
    assert page.places["h2"] == [
        "Contenders",
        "Speed-up over plain decoding",
        "Speed-up against acceptance",
        "By category",
        "Runs of accepted tokens",
        "Tick breakdown",
        "What the stages did",
        "One answer, tick by tick",
        "Answers that differ from plain decoding",
        "Gates",
        "Prompts",
        "Environment and settings",
    ]


def test_tables_and_charts_have_names() -> None:
    page = Page(html_page(fixed_report()))
    assert page.tags.count("caption") == page.tags.count("table") > 4
    assert page.tags.count("table") == page.of("class").count("scroll")
    charts = page.of("class").count("chart")
    assert charts == page.of("role").count("img") > 5
    assert all(page.of("aria-label"))


def test_bare_report_still_makes_a_page() -> None:
    """One contender without any figure: no charts, and no failure."""
    base = small_report()
    report = replace(base, rows=(row(AR, EMPTY),), samples=(sample("ar"),), grid_events=())
    page = Page(html_page(replace(report, failures=())))
    assert "svg" not in page.tags
    assert "No gate failed." in page.texts


def test_rows_that_only_the_json_has_are_not_drawn() -> None:
    base = small_report()
    rows = tuple(replace(each, printed=each.contender.name != "eesd-4") for each in base.rows)
    assert "eesd-4" in html_page(base)
    assert "eesd-4" not in html_page(replace(base, rows=rows))


def test_interrupted_run_says_so() -> None:
    assert "interrupted" not in html_page(small_report())
    assert "interrupted" in html_page(replace(small_report(), incomplete=True))


def shares(svg: str, name: str, kind: str) -> list[float]:
    found = re.findall(rf'<rect class="{kind}"[^>]* {name}="([0-9.]+)%"', svg)
    return [float(each) for each in found]


def test_bars_are_as_long_as_the_speedups() -> None:
    svg = speedup_bars(small_report())
    assert svg is not None
    (ppsd,) = shares(svg, "width", "blue")
    (eesd,) = shares(svg, "width", "ochre")
    assert ppsd / eesd == pytest.approx(1.18 / 0.83, abs=1e-3)
    assert f'x1="{ppsd / 1.18:.2f}%"' in svg  # the line at 1


def test_ideal_marks_only_where_acceptance_is_fixed() -> None:
    assert 'class="ideal"' not in (speedup_bars(small_report()) or "")
    assert (speedup_bars(fixed_report()) or "").count('class="ideal"') == 12


def test_curve_is_the_formula_of_the_paper() -> None:
    """Between two values of acceptance the curve follows n / (1 + (n-1)(1-acceptance))."""

    def formula(acceptance: float) -> float:
        return 4 / (1 + 3 * (1 - acceptance))

    curve = list(between([(0.5, formula(0.5)), (1.0, formula(1.0))]))
    assert curve[-1] == (1.0, 4.0)
    assert len(curve) > 10
    for acceptance, speedup in curve:
        assert speedup == pytest.approx(formula(acceptance))


def test_families_join_draft_lengths() -> None:
    names = [(each.name, len(each.rows)) for each in families_of(fixed_report())]
    assert names == [("ppsd", 6), ("eesd, best draft length", 6)]


def test_histogram_counts_every_run() -> None:
    figures = replace(pipelined(30, 1.1, 0.7), runs=((1, 5), (3, 2), (17, 4), (40, 1)))
    report = replace(small_report(), rows=(row(PPSD, figures),))
    ((name, svg),) = run_histograms(report)
    assert name == "ppsd"
    titles = re.findall(r"<title>(\d+) runs of (\S+) accepted", svg)
    assert titles == [
        ("5", "1"),
        ("0", "2"),
        ("2", "3"),
        *(("0", str(at)) for at in range(4, 9)),
        ("5", "&gt;8"),
    ]


def test_grid_is_that_of_the_events() -> None:
    svg = tick_grid(small_report().grid_events)
    assert svg is not None
    cells = re.findall(r"<title>tick (\d+), stage (\d): (\w+)</title>", svg)
    assert cells[0] == ("0", "0", "prompt")
    assert {stage for _, stage, _ in cells} == {"0", "1"}
    # A wrong guess is void in each stage, one tick later in each.
    void = {(int(tick), int(stage)) for tick, stage, state in cells if state == "void"}
    assert void
    last = max(int(tick) for tick, _, _ in cells)
    assert all((tick + 1, 1) in void for tick, stage in void if stage == 0 and tick < last)


def test_grid_counts_from_the_beginning_of_the_answer() -> None:
    """A pipeline that has answered before has ticks behind it."""
    events = list(Chain(stages=2).events())
    later = [replace(event, tick=event.tick + 1234) for event in events]
    assert tick_grid(later) == tick_grid(events)


def test_grid_of_a_long_answer_is_cut() -> None:
    svg = tick_grid(Chain(stages=3, answer=tuple(range(100, 400)), wrong=frozenset()).events())
    assert svg is not None
    assert svg.count("<title>tick ") == MOST_TICKS * 3
    assert tick_grid(()) is None


def test_no_figure_divides_by_nothing() -> None:
    """All-zero figures, as of answers of one token."""
    figures: Figures = replace(
        pipelined(30, 1.1, 0.0), runs=(), stage_seconds=(0.0, 0.0), tick_seconds=0.0
    )
    assert Page(html_page(replace(small_report(), rows=(row(PPSD, figures),))))
