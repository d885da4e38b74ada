"""The report as a page: its structure read with html.parser, its plots as files, and all of it in a real browser."""

import base64
import contextlib
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from browser import browser_of
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

import atv.report
from atv.evaluation.records import load_runs
from atv.paper.published import PaperNumbers
from atv.report import all_tables, check_format, comparison_tables, formats
from atv.report.figure import COLOURS, INK
from atv.report.page import provenance_of
from atv.report.plots import _apart, draw
from atv.report.tables import Table, number

BAD = "<script>alert(1)</script>"
TASKS = {BAD: "N<L>U", "arc": "Reasoning", "bbh_logical_deduction_five_objects": "Unseen"}
LLM = 'a "small" <b>LLM</b>'
VOID = {"meta", "link", "img", "input", "br", "hr", "wbr"}


def make_run(folder, method, seed, marks):
    """A finished run with a row for each mark of each task, `x` being a right answer."""
    folder.mkdir(parents=True)
    settings = {"method": method, "llm": LLM, "seed": seed, "dtype": "bfloat16", "revision": None}
    run = {"schema": 2, "finished": True, "settings": settings, "seconds": 1.5, "versions": {"torch": "2.13.0"},
           "commit": "c0ffee", "machine": "Linux & Co, 2 cores"}  # fmt: skip
    if method == "atv":
        run["method"] = {"config": {"positions": "last", "scale": 0.1, "expansion_rank": None}}
    (folder / "run.json").write_text(json.dumps(run))
    rows = [
        {"task": task, "category": TASKS.get(task, "Safety"), "split": "test", "template": 0, "answer_prefix": "A:",
         "example": example, "target": "A", "outputs": {"first_token": "A", "first_token_among_options": "A"},
         "scores": {"first_token": mark == "x", "first_token_among_options": mark != "-"},
         "prompt_tokens": 900 if method == "icl" else 50, "seconds": 0.25, "demonstrations": 0}
        for task, line in marks.items()
        for example, mark in enumerate(line)
    ]  # fmt: skip
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs, and the page that the command line made of them in a process of its own."""
    folder = tmp_path_factory.mktemp("a page")
    names = list(TASKS)
    for seed in (1, 2):
        for method, lines in (("zero-shot", ("---o", "x---", "-x")), ("icl", ("xxx-", "x-o-", "xx")),
                              ("atv", ("xxxx", "xx-o", "xx")[: 3 if seed == 1 else 2])):  # fmt: skip
            changed = [line if seed == 1 else line[::-1].replace("x", "-", 1) for line in lines]
            make_run(folder / "runs" / f"{method}-{seed}", method, seed, dict(zip(names, changed, strict=False)))
    code = (
        "import sys; sys.argv = ['atv', 'paper', 'tables', 'runs', '--out', 'my report.html']\n"
        "from atv.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Written to my report.html" in done.stdout
    return folder


class Page(HTMLParser):
    """Every element with its attributes and text, in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.declarations = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_decl(self, decl):
        self.declarations.append(decl)

    def handle_starttag(self, tag, attrs):
        self.elements.append({"tag": tag, "text": "", "inside": tuple(self.open), **dict(attrs)})
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "text": "", "inside": tuple(self.open), **dict(attrs)})

    def handle_endtag(self, tag):
        assert self.elements[self.open.pop()]["tag"] == tag

    def handle_data(self, data):
        for index in self.open:
            self.elements[index]["text"] += data

    def all(self, *tags, inside=None):
        found = [element for element in self.elements if element["tag"] in tags]
        return [e for e in found if inside is None or self.elements.index(inside) in e["inside"]]

    def rows(self, table):
        return [self.all("th", "td", inside=line) for line in self.all("tr", inside=table)]


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "my report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tables(folder):
    with contextlib.chdir(folder):
        return all_tables(load_runs(["runs"]), PaperNumbers())


def test_the_page_is_well_formed_and_everything_that_is_referred_to_is_there(page):
    assert page.declarations == ["DOCTYPE html"]
    assert page.all("html")[0]["lang"] == "en"
    assert "width=device-width" in next(e["content"] for e in page.all("meta") if e.get("name") == "viewport")
    ids = [element["id"] for element in page.elements if "id" in element]
    assert len(ids) == len(set(ids))
    named = {name for e in page.elements for name in e.get("aria-labelledby", "").split()}
    targets = {e["href"][1:] for e in page.elements if e.get("href", "").startswith("#")}
    clips = {name for e in page.elements for value in e.values() for name in re.findall(r"url\(#(.+?)\)", str(value))}
    assert named | targets | clips <= set(ids)
    assert {"content", "provenance", "run-6"} <= targets
    levels = [int(e["tag"][1]) for e in page.elements if re.fullmatch("h[1-6]", e["tag"])]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    first = next(e for e in page.elements if e["tag"] == "a")
    assert (first["class"], first["href"]) == ("skip", "#content")


def test_the_page_fetches_nothing_and_says_so(page, folder):
    policy = next(e["content"] for e in page.all("meta") if "http-equiv" in e)
    [script] = page.all("script")
    digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
    assert policy.split("; ") == ["default-src 'none'", f"script-src 'sha256-{digest}'", "style-src 'unsafe-inline'",
                                  "base-uri 'none'", "form-action 'none'"]  # fmt: skip
    assert not page.all("link", "img", "iframe", "object", "embed", "base", "image", "foreignobject")
    assert not [e for e in page.elements if "src" in e or "http" in e.get("style", "")]
    for element in page.elements:
        target = element.get("href", "#")
        assert target.startswith("#") or (folder / target.replace("%20", " ")).is_file(), target
        assert not [name for name in element if name.startswith("on")]
    assert "@import" not in page.all("style")[0]["text"]
    assert "url(" not in page.all("style")[0]["text"]


def test_what_records_say_is_text_and_never_markup(page, folder):
    text = (folder / "my report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "<b>" not in text
    assert any(e["text"] == BAD for e in page.all("th"))
    assert any("N<L>U" in e["text"] for e in page.all("text"))
    assert any(LLM in e["text"] for e in page.all("dd"))


def test_every_table_is_there_with_its_caption_its_note_and_values_to_sort_by(page, tables):
    assert len(tables) == 7
    headings, notes = [e["text"] for e in page.all("h2")], [e["text"] for e in page.all("p") if "note" in e.values()]
    assert headings == [*(table.title for table in tables), "Where the numbers come from"]
    assert notes == [table.note for table in tables]
    values = {}
    for index, table in enumerate(tables, 1):
        found = next(e for e in page.all("table") if e["id"] == f"table-{index}")
        assert page.all("caption", inside=found)[0]["text"].startswith(table.title)
        head, *body = page.rows(found)
        assert [cell["text"] for cell in head] == table.columns
        assert {cell["scope"] for cell in head} == {"col"}
        assert [e["type"] for e in page.all("button", inside=found)] == ["button"] * len(head)
        assert [[cell["text"] for cell in line] for line in body] == table.rows
        assert {line[0]["scope"] for line in body} == {"row"}
        bold = {(row, column) for row, line in enumerate(body) for column, cell in enumerate(line)
                if page.all("strong", inside=cell)}  # fmt: skip
        assert bold == table.bold
        values |= {cell["text"]: cell.get("data-value") for line in body for cell in line}
    assert (values["–"], values["atv"], values["in-domain"]) == (None, None, None)
    assert {text: float(values[text]) for text in values if " ± " in text} == {
        text: float(text.split()[0]) for text in values if " ± " in text}  # fmt: skip
    assert "17.1 ± 0.0" in values  # the paper's
    assert any(text.startswith("-") and float(value) < 0 for text, value in values.items() if value)


def test_a_cell_s_value_is_its_number_without_the_spread():
    assert [number(cell) for cell in ("40.1 ± 1.2", "-15.00", "+2", "–", "", "zero-shot")] == [
        40.1, -15, 2, None, None, None]  # fmt: skip


def test_every_plot_has_words_numbers_runs_and_the_command(page, tables, folder):
    figures = page.all("figure")
    assert [e["id"] for e in figures] == ["plot-2-scores", "plot-2-cost", "plot-3-scores", "plot-4-scores",
                                          "plot-4-cost", "plot-5-scores", "plot-7-differences"]  # fmt: skip
    for figure in figures:
        table = tables[int(figure["id"][5]) - 1]
        [image] = page.all("svg", inside=figure)
        assert image["role"] == "img"
        title, text = (page.all(tag, inside=figure)[0]["text"] for tag in ("title", "desc"))
        caption = page.all("figcaption", inside=figure)[0]["text"]
        assert caption.startswith(f"{title}; also as SVG, PNG, PDF")
        [details] = page.all("details", inside=figure)
        assert page.all("p", inside=details)[0]["text"] == text
        head, *body = ([cell["text"] for cell in line] for line in page.rows(page.all("table", inside=details)[0]))
        shown = {row[0] if table.text == 1 else tuple(row[:3]): dict(zip(table.columns, row, strict=True))
                 for row in table.rows}  # fmt: skip
        assert body
        for line in body:
            row = shown[line[0] if table.text == 1 else tuple(line[:3])]
            assert line == [row[column] for column in head]
        assert not [line for line in body if line[0].startswith("paper")]
        assert "atv paper tables runs --out 'my report.html'" in details["text"]
        assert [e["text"] for e in page.all("a", inside=details)] == list(table.runs)
        for link in page.all("a", inside=page.all("figcaption", inside=figure)[0]):
            data = (folder / link["href"].replace("%20", " ")).read_bytes()
            assert data[:4] == {"SVG": b"<?xm", "PNG": b"\x89PNG", "PDF": b"%PDF"}[link["text"]]
    assert "runs/atv-2" not in tables[3].runs  # it was not asked the unseen task
    assert len(list((folder / "my report_plots").iterdir())) == 3 * len(figures)


def test_the_differences_in_words_are_those_of_the_table(page, tables):
    text = page.all("desc")[-1]["text"]
    found = {
        (accuracy, kind, method): side.split()[0]
        for accuracy, kind, sides in re.findall(r"(first_token\w*), ([\w-]+): (.+?)\.", text)
        for side in sides.split("; ")
        for method in re.sub("above|below|not told apart from", "", side).strip().split(", ")
    }
    rows = [row for row in tables[-1].rows if row[3] != "–"]
    assert found == {
        tuple(row[:3]): "above" if float(row[4]) > 0 else "below" if float(row[5]) < 0 else "not" for row in rows
    }
    assert {"above", "not"} <= set(found.values())


def test_runs_are_described_at_the_end(page):
    shared = dict(zip((e["text"] for e in page.all("dt")), (e["text"] for e in page.all("dd")), strict=True))
    assert shared == {"LLM": LLM, "dtype": "bfloat16", "machine": "Linux & Co, 2 cores", "commit": "c0ffee",
                      "versions": "torch 2.13.0"}  # fmt: skip
    table = next(e for e in page.all("table") if e["id"] == "runs")
    head, *body = ([cell["text"] for cell in line] for line in page.rows(table))
    assert head == ["method", "seed", "rows", "seconds", "configuration", "folder"]
    assert ["atv", "2", "8", "1.5", "positions last, scale 0.1", "runs/atv-2"] in body
    assert ["icl", "1", "10", "1.5", "–", "runs/icl-1"] in body


def test_what_only_some_runs_say_is_a_column():
    run = {"method": "a", "seed": "1", "rows": "2", "seconds": "3", "commit": "x"}
    shared, each = provenance_of([run | {"folder": "f"}, run | {"device": "gpu", "folder": "g"}])
    assert shared == {"commit": "x"}
    assert each.columns == ["method", "seed", "rows", "seconds", "device", "folder"]
    assert each.rows == [["a", "1", "2", "3", "–", "f"], ["a", "1", "2", "3", "gpu", "g"]]


def table_of(kind, rows):
    columns = ["score", "tasks", "atv minus", "difference", "from", "to", "p"]
    if kind != "differences":
        columns = ["method", "tokens", "s/query", "NLU", "Avg"]
    return Table("In-domain accuracy: x", columns, rows, "", text=3 if kind == "differences" else 1, plots=(kind,))


def test_a_plot_shows_each_number_at_its_place():
    """Read off the SVG: marks and ticks are on one scale."""
    rows = [["zero-shot", "50", "0.1", "20.0", "20.0 ± 3.0"], ["atv", "50", "0.2", "70.0", "70.0"],
            ["paper, L: atv", "50", "0.2", "99.0", "99.0"], ["icl", "–", "–", "–", "–"]]  # fmt: skip
    [plot] = draw(table_of("scores", rows), "a")
    assert [row[0] for row in plot.table.rows] == ["zero-shot", "atv"]
    root = ElementTree.fromstring(plot.svg.replace("viewBox", "viewbox"))
    words = [e.text for e in root.iter("text")]
    assert "20.0 ± 3.0" in words
    assert "99.0" not in words
    marks = [float(e.attrib["x"]) for e in root.iter("use") if COLOURS[0] in e.attrib.get("style", "")]
    assert len(marks) == 3  # two, and that of the legend
    ticks = {}
    for element in root.iter("g"):
        if re.search(r"xtick_\d+$", element.attrib.get("id", "")):
            [place] = {float(use.attrib["x"]) for use in element.iter("use")}
            ticks[float(element.find(".//text").text)] = place
    per_point = (ticks[100] - ticks[0]) / 100
    assert marks[0] == pytest.approx(ticks[0] + 20 * per_point, abs=0.01)
    assert marks[1] == pytest.approx(ticks[0] + 70 * per_point, abs=0.01)


def test_more_data_sets_than_colours_are_drawn_apart():
    kinds, others = ["all 6", *"abcdef"], ["zero-shot", "icl"]
    rows = [["accuracy", kind, other, "+1.00", "-1.00", "+3.00", "0.5"] for kind in kinds for other in others]
    [plot] = draw(table_of("differences", rows), "a")
    root = ElementTree.fromstring(plot.svg.replace("viewBox", "viewbox"))
    assert {*kinds, *others} <= {e.text for e in root.iter("text")}
    filled = re.compile(f"fill: ({'|'.join(COLOURS)})")
    marks = [float(e.attrib["y"]) for e in root.iter("use") if filled.search(e.attrib.get("style", ""))]
    assert len(marks) == 3 * len(kinds)  # for each kind two, then those of the legend
    first, second = marks[: 2 * len(kinds) : 2], marks[1 : 2 * len(kinds) : 2]
    assert max(first) < min(second)
    assert len({*first, *second}) == 2 * len(kinds)


def test_plots_take_the_page_s_colour_and_are_the_same_every_time():
    rows = [["zero-shot", "50", "0.1", "20.0", "20.0"], ["$x^$ & <i>", "900", "0.2", "30.0", "30.0"]]
    (one,), (two,), (other,) = (draw(table_of("cost", rows), name) for name in "aab")
    assert one == two
    assert one.files == other.files
    assert "currentColor" in one.svg
    assert INK not in one.svg
    assert "http" not in one.svg
    assert "mathdefault" not in one.svg  # how matplotlib writes powers of ten
    assert "<i>" not in one.svg
    ids = [set(re.findall(r' id="(.+?)"', plot.svg)) for plot in (one, other)]
    assert not ids[0] & ids[1]
    assert INK in one.files[".svg"].decode()


def test_what_has_no_numbers_is_not_drawn():
    for kind, row in (("scores", ["icl", *"––––"]), ("cost", ["icl", "–", "–", "1.0", "1.0"]),
                      ("differences", ["accuracy", "unseen", "icl", *"––––"])):  # fmt: skip
        assert draw(table_of(kind, [row]), "a") == []


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12).map(sorted), st.floats(0.1, 8))
def test_labels_are_apart_in_order_and_inside(values, gap):
    places = _apart(values, gap, 0, 100)
    assert len(places) == len(values)
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(places))
    assert places[0] >= -1e-9
    assert places[-1] <= 100 + 1e-9
    if all(b - a >= gap for a, b in pairwise(values)):
        assert places == pytest.approx(values)


def contrast(one, other):
    """WCAG's, from its formula."""
    parts = [[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in (one, other)]
    light = [[v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in part] for part in parts]
    low, high = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in light)
    return (high + 0.05) / (low + 0.05)


def test_text_and_marks_are_seen_in_light_and_dark():
    style = Path(atv.report.__file__).with_name("page.css").read_text()
    themes = [dict(re.findall(r"--(\w+): (#\w+);", block)) for block in re.findall(r":root {.*?}", style)]
    assert len(themes) == 2
    for theme in themes:
        theme = {name: "#ffffff" if colour == "#fff" else colour for name, colour in theme.items()}
        assert all(contrast(colour, theme["ground"]) >= 3 for colour in COLOURS)
        assert all(contrast(theme[name], theme["ground"]) >= 4.5 for name in ("ink", "quiet", "link"))
        assert contrast(theme["ink"], theme["shade"]) >= 4.5


def test_without_matplotlib_the_extra_is_named_and_reports_need_none_to_be_imported(monkeypatch, tmp_path):
    check_format(tmp_path / "r.html", page=True)
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with refused("r.html", "matplotlib", "adaptive-task-vectors[report]", ".md"):
        check_format(tmp_path / "r.html", page=True)
    check_format(tmp_path / "r.md")
    code = "import sys, atv.report; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_in_a_browser_tables_sort_nothing_is_fetched_and_a_phone_shows_it(folder, tmp_path):
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        browser = browser_of(playwright)
        asked, said = [], []
        address = (folder / "my report.html").as_uri()
        backgrounds, texts = set(), set()
        for theme, width in (("light", 1280), ("dark", 1280), ("light", 360), ("dark", 360)):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=theme)
            page.set_default_timeout(60_000)
            page.on("request", lambda request: asked.append(request.url))
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.goto(address)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert len(page.screenshot(path=tmp_path / f"{theme}-{width}.png", full_page=True)) > 20_000
            backgrounds.add((theme, page.evaluate("getComputedStyle(document.body).backgroundColor")))
            fill = "getComputedStyle(document.querySelector('.plot text')).fill"
            texts.add((theme, page.evaluate(fill)))
        assert len(backgrounds) == len(texts) == 2  # one for each theme
        assert len({colour for _, colour in texts}) == 2

        def column(name):
            place = page.locator("#table-4 thead th").all_inner_texts().index(name)
            return page.locator(f"#table-4 tbody tr > :nth-child({place + 1})").all_inner_texts()

        before = column("Avg"), column("method")
        task = "bbh_logical_deduction_five_objects"
        button = page.locator("#table-4").get_by_role("button", name=task)
        head = page.locator("#table-4 th", has=page.get_by_role("button", name=task))
        button.click()
        assert head.get_attribute("aria-sort") == "ascending"
        known = [float(cell.split()[0]) for cell in column(task) if cell != "–"]
        assert known == sorted(known)
        assert len(set(known)) > 2
        button.focus()
        page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == "descending"
        known = [float(cell.split()[0]) for cell in column(task) if cell != "–"]
        assert known == sorted(known, reverse=True)
        page.locator("#table-4").get_by_role("button", name="s/query").click()
        assert head.get_attribute("aria-sort") is None
        assert column("s/query")[-1] == "–"  # last, both ways
        page.keyboard.press("Space")
        assert column("s/query")[-1] == "–"
        page.locator("#table-4").get_by_role("button", name="method").click()
        assert column("method")[0] == "atv"
        for _ in range(2):
            page.keyboard.press("Enter")
        assert (column("Avg"), column("method")) == before
        assert page.locator("#table-4 [aria-sort]").count() == 0

        page.reload()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
        assert set(asked) == {address}
        assert said == []
        with page.expect_event("requestfailed") as refusal:
            page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
        assert refusal.value.failure == "csp"
        browser.close()


def test_paper_tables_say_which_runs_are_behind_what_is_drawn(folder):
    rows = load_runs([folder / "runs"])
    assert [table.plots for table in comparison_tables(rows)] == [
        ("scores", "cost"), ("scores",), ("scores", "cost"), ("scores",), (), ("differences",)]  # fmt: skip


def test_a_page_shows_the_mark_and_its_footnote_and_draws_without_what_is_not_defined(tmp_path):
    for method, marks in (("zero-shot", "x---"), ("atv", "xx-x")):
        make_run(tmp_path / method, method, 1, {"arc": marks, "other": marks})
    for file in tmp_path.glob("*/predictions.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [
            row | {"scores": row["scores"] | {"first_token": None}} if row["task"] == "other" else row for row in rows
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = load_runs([tmp_path])
    page = atv.report.write_page(rows, all_tables(rows), tmp_path / "page.html", "atv report")[0]
    text = page.read_text(encoding="utf-8")
    assert "–†</td>" in text
    assert re.search(r'<td data-value="75.0"[^>]*>(<strong>)?75.0†', text)
    assert text.count("†: first_token is not defined in ") == 3
    assert "first_token is not defined in other: " in text
