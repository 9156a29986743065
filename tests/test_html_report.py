"""The HTML report: its data are those of the model, its page is sound, and a failure leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import bwcache_compile as bw
from bwcache_compile.calibration import PlanEntry, Provenance
from bwcache_compile.html_report import charts, report_data
from bwcache_compile.html_report.formatting import diff_groups, stack_runs
from bwcache_compile.html_report.page import render
from tests.browser import ENTER, ESCAPE, TAB, Browser, browser
from tests.models import OneStream, Refined, Tiny, TwoStream

SECTIONS = ["found", "rejected", "schedule", "indicator", "frontier", "memory", "passes", "images", "settings"]
ALWAYS = [name for name in SECTIONS if name not in ("frontier", "images")]
VOID = {"meta", "link", "input", "img", "br"}
PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)
EVIL = '<script>alert("x")</script>'


class Element:
    """An element of a page: its attributes, its text, and what is inside it."""

    def __init__(self, name: str, attributes: dict[str, str | None]) -> None:
        self.name, self.attributes = name, attributes
        self.inside: list[Element] = []
        self.texts: list[str] = []

    def all(self, *names: str) -> list[Element]:
        """Return the elements of these names inside, in the order of the page."""
        found = [self] if self.name in names else []
        return found + [element for child in self.inside for element in child.all(*names)]

    def get(self, name: str) -> str:
        return self.attributes.get(name) or ""

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Page(HTMLParser):
    """A page as a tree; an element that is closed by another one's end is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("page", {})
        self._open = [self.root]
        self.feed(text)
        self.close()
        assert self._open == [self.root], f"{self._open[-1].name} is not closed"
        self.elements = [element for element in self._every(self.root)]
        self.by_id = {element.get("id"): element for element in self.elements if element.get("id")}

    def _every(self, element: Element) -> list[Element]:
        return [element, *(inner for child in element.inside for inner in self._every(child))]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        assert len(element.attributes) == len(attrs), f"{tag} has an attribute twice"
        self._open[-1].inside.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].inside.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].name == tag, f"</{tag}> closes {self._open[-1].name}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.texts.append(data)


def generated(model: Tiny, steps: int = 8, contexts: tuple[str, ...] = ("cond", "uncond"), **settings: Any) -> bw.CachedModel:
    """Cache a model and run a generation in each context."""
    guard = settings.pop("guard", "host")
    cached = bw.transform(model.eval(), settings, guard=guard)
    with torch.no_grad():
        for step in range(steps):
            for name in contexts:
                with cached.cache_context(name):
                    cached(*model.example(step=step))
    return cached


def a_plan(steps: int = 8) -> bw.CalibrationPlan:
    """Return a calibration of three entries, one of which plain steps beat, and one of which is exact."""
    rows = ((4, 50.25, 41.5), (2, 30.0, 35.75), (steps, float("inf"), None))
    entries = tuple(
        PlanEntry(tuple(step < count for step in range(steps)), ((1.5, -0.5),) * steps, psnr, "fitted", plain)
        for count, psnr, plain in rows
    )
    made = Provenance(
        "OneStream, float32, weights 0",
        (),
        tuple(range(steps)),
        steps,
        ("cond",),
        (),
        "blocks",
        0,
        "a linear sampler",
        1,
        3.5,
        {"torch": "2.13"},
    )
    return bw.CalibrationPlan(entries, made)


@pytest.fixture(scope="module")
def cached() -> bw.CachedModel:
    return generated(OneStream(depth=8), num_steps=8, threshold=0.3, reuse_interval=2, indicator_tokens=2)


@pytest.fixture(scope="module")
def data(cached: bw.CachedModel) -> dict[str, Any]:
    return report_data(cached, plan=a_plan(), images={"a sheet": PNG}, seconds={"plain step": 0.5})


@pytest.fixture(scope="module")
def page(data: dict[str, Any]) -> Page:
    return Page(render(data))


def test_the_data_are_those_of_the_model(cached: bw.CachedModel, data: dict[str, Any]) -> None:
    json.dumps(data, allow_nan=False)
    report = cached.report()
    assert report.blocks
    assert data["run"]["blocks"] == list(report.blocks)
    for name, context in report.contexts.items():
        shown = data["run"]["contexts"][name]
        assert [step["computed"] for step in shown["steps"]] == [record.computed for record in context.steps]
        assert [step["indicator"] for step in shown["steps"]] == [record.indicator for record in context.steps]
        changes = [record.change.tolist() if record.gap else None for record in context.steps]  # type: ignore[union-attr]
        assert [step["change"] for step in shown["steps"]] == changes
        assert shown["weights"] == {str(record.step): [1.0] for record in context.steps if not record.computed}
        share = (context.computed + context.reused * (1 - cached.plan.work.cached)) / len(context.steps)
        assert shown["work"] == share
    assert (data["plan"]["state_bytes"], data["plan"]["blocks"]) == (cached.plan.state_bytes, [b.name for b in cached.plan.blocks])
    assert [value["name"] for value in data["plan"]["regions"][0]["live_ins"]] == list(cached.plan.regions[0].inputs)
    assert {diff["name"]: diff["text"] for diff in data["passes"]} == {name: diff.text for name, diff in cached.graph_diff().items()}
    assert data["settings"]["threshold"] == cached.cache_config.threshold
    assert data["model"]["parameters"] == sum(parameter.numel() for parameter in cached.original.parameters())


def test_every_operator_stands_in_one_part(cached: bw.CachedModel, data: dict[str, Any]) -> None:
    parts = data["found"]["parts"]
    lines = [*parts["prologue"], *(line for block in parts["blocks"] for line in block), *parts["between"], *parts["epilogue"]]
    names = [line.partition(":")[0] for line in lines]
    assert len(names) == len(set(names))
    for block, operators in zip(cached.plan.blocks, parts["blocks"], strict=True):
        assert [line.partition(":")[0] for line in operators] == list(block.nodes)
    assert [line.partition(":")[0] for line in parts["epilogue"]] == ["linear_18"]


def test_the_page_is_sound(page: Page) -> None:
    ids = [element.get("id") for element in page.elements if element.get("id")]
    assert len(ids) == len(set(ids))
    assert [section.get("id") for section in page.root.all("section")] == SECTIONS
    for element in page.elements:
        for name in ("aria-labelledby", "aria-describedby", "for", "data-fold", "data-unfold"):
            assert set(element.get(name).split()) <= set(ids), (element.name, name)
        if element.get("href").startswith("#"):
            assert element.get("href")[1:] in ids
    assert [link.get("href")[1:] for link in page.root.all("nav")[0].all("a")] == SECTIONS
    assert [len(page.root.all(name)) for name in ("h1", "main", "header", "nav", "footer")] == [1, 1, 1, 1, 1]


def test_the_page_says_everything_in_words(page: Page) -> None:
    for drawing in page.root.all("svg"):
        assert drawing.get("role") == "img"
        name, text = (page.by_id[part] for part in drawing.get("aria-labelledby").split())
        assert name.text.strip()
        assert text.text.strip()
    for table in page.root.all("table"):
        assert len(table.all("caption")) == 1
        assert all(cell.get("scope") in ("col", "row") for cell in table.all("th"))
    assert [image.get("alt") for image in page.root.all("img")] == ["a sheet"]
    for element in page.elements:
        if element.get("tabindex") == "0":
            assert element.get("aria-label"), f"{element.name} takes the focus and has no name"


def test_the_page_needs_nothing_else(data: dict[str, Any], page: Page) -> None:
    assert not re.search(r"https?:|@import|url\(|//[a-z]", render(data))
    addresses = [element.get(name) for element in page.elements for name in ("src", "href", "action", "srcset") if element.get(name)]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "default-src 'none'" in page.root.all("meta")[1].get("content")


def test_the_page_shows_the_data(data: dict[str, Any], page: Page) -> None:
    for diff in data["passes"]:
        shown = "".join(part.text for part in page.by_id[f"pass-{diff['name']}"].all("pre"))
        assert shown.splitlines() == diff["text"].splitlines()[1:], diff["name"]
    for place, operators in enumerate(data["found"]["parts"]["blocks"]):
        assert page.by_id[f"block-{place}"].all("pre")[0].text.splitlines() == operators
    tables = {table.all("caption")[0].text: table for table in page.root.all("table")}
    rows = [[cell.text for cell in row.all("th", "td")] for row in tables["Relative change by block and computed step"].all("tr")]
    steps = [step for step in data["run"]["contexts"]["uncond"]["steps"] if step["change"]]
    assert rows[0] == ["block", *(str(step["step"]) for step in steps)]
    assert rows[3] == ["blocks.2", *(f"{step['change'][2]:.4g}" for step in steps)]
    heat = page.by_id["heat-0-name"]
    assert heat.text == "Indicator by block and step, context cond"
    entries = [[cell.text for cell in row.all("th", "td")] for row in tables["Entries of the calibration; # computed, . reused"].all("tr")]
    assert entries[1] == ["4", "2.00x", "50.2 dB", "41.5 dB", "fitted", "####....0 to 3"]
    assert entries[2][2:4] == ["30.0 dB", "35.8 dB, better"]
    assert entries[3][2:4] == ["inf dB", "not measured"]
    assert "500.00 ms" in tables["Time, as it was given to the report"].text


def test_the_schedule_is_drawn_step_by_step(cached: bw.CachedModel, page: Page) -> None:
    drawing = next(svg for svg in page.root.all("svg") if svg.get("aria-labelledby").startswith("schedule-0"))
    hints = [rect.text for rect in drawing.all("rect")]
    records = cached.report().contexts["cond"].steps
    assert hints[: len(records)] == [f"step {r.step}: {'computed' if r.computed else 'reused'}" for r in records]


def test_names_are_escaped() -> None:
    model = type(EVIL, (OneStream,), {})(depth=2)
    cached = generated(model, contexts=(EVIL,), num_steps=8, threshold=0.3)
    text = render(report_data(cached, images={EVIL: PNG}, seconds={EVIL: 1.0}))
    assert EVIL not in text
    page = Page(text)
    assert len(page.root.all("script")) == 1
    assert page.root.all("h1")[0].text == EVIL
    assert page.root.all("img")[0].get("alt") == EVIL
    assert EVIL in page.by_id["schedule"].text


def test_weights_of_the_settings_are_shown() -> None:
    mask = (0, 0, 1, 0, 1, 1)
    weights = tuple((1.25, -0.25) if reused else None for reused in mask)
    cached = generated(OneStream(), 6, ("one",), policy="static", steps_mask=mask, reuse="linear", anchors=2, weights=weights)
    data = report_data(cached)
    assert data["run"]["contexts"]["one"]["weights"] == {"2": [1.25, -0.25], "4": [1.25, -0.25], "5": [1.25, -0.25]}
    page = Page(render(data))
    assert "5 1.2500 -0.2500" in re.sub(r"\s+", " ", " ".join(cell.text for cell in page.by_id["schedule"].all("th", "td")))
    assert "measures nothing" in page.by_id["indicator"].text
    hints = [rect.text for rect in page.by_id["schedule"].all("rect")]
    assert "step 4, anchor 2: -0.25" in hints


def test_weights_of_a_rule_are_not_made_up() -> None:
    cached = generated(OneStream(), 6, ("one",), policy="static", steps_mask=(0, 0, 1, 0, 1, 1), reuse="taylor")
    data = report_data(cached)
    assert (data["run"]["weights"], data["run"]["contexts"]["one"]["weights"]) == ("rule", {})
    assert "does not record them" in Page(render(data)).by_id["schedule"].text


def test_a_guard_per_block_is_shown() -> None:
    settings: dict[str, Any] = {"policy": "adaptive", "granularity": "block", "reuse": "residual"}
    cached = generated(OneStream(), 6, ("one",), guard="graph", num_steps=6, threshold=0.2, reuse_interval=3, **settings)
    data = report_data(cached)
    context = data["run"]["contexts"]["one"]
    assert context["work"] is None
    page = Page(render(data))
    partly = [step["step"] for step in context["steps"] if step["computed"] and not all(step["blocks_computed"])]
    assert partly
    for step in partly:
        assert f"step {step}: some blocks computed" in [rect.text for rect in page.by_id["schedule"].all("rect")]
        for block, computed in zip(data["run"]["blocks"], context["steps"][step]["blocks_computed"], strict=True):
            shown = any(rect.text.startswith(f"{block}, step {step}:") for rect in page.by_id["indicator"].all("rect"))
            assert shown == computed


def test_two_stacks_rejections_and_an_infinite_threshold_are_shown() -> None:
    data = report_data(generated(TwoStream(), 4, ("one",), num_steps=4, threshold=float("inf"), cut="output"))
    assert data["settings"]["threshold"] == "inf"
    assert [len(run) for run in stack_runs(data["found"]["blocks"])] == [2, 2]
    assert "the model's output from the cache" in render(data)
    page = Page(render(report_data(bw.transform(Refined().eval(), example_args=Refined().example()))))
    assert "its stream is not the one that reaches the output" in page.by_id["rejected"].text
    assert "Nothing has run yet" in page.by_id["schedule"].text
    assert [section.get("id") for section in page.root.all("section")] == ALWAYS


def test_changes_that_are_zero_or_not_finite_are_shown(data: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(data))
    for context in changed["run"]["contexts"].values():
        for step in context["steps"]:
            if step["change"]:
                step["change"], step["indicator"] = [0.0, "nan", *[0.0] * 6], 0.0
    assert charts.heat_bounds(changed["run"]) == (0.0, 0.0)
    hints = [rect.text for rect in Page(render(changed)).by_id["indicator"].all("rect")]
    assert {"blocks.0, step 1: 0", "step 1: nan"} <= set(hints)


def test_dynamic_sizes_are_shown_as_arithmetic() -> None:
    example = OneStream().example(batch=2)
    data = report_data(bw.transform(OneStream().eval(), num_steps=4, example_args=example, dynamic_shapes="auto"))
    shapes = [value["shape"] for value in data["model"]["inputs"]]
    assert [len(shape) for shape in shapes] == [3, 1]
    assert isinstance(shapes[0][0], str)
    assert f"float32[{shapes[0][0]}, " in Page(render(data)).by_id["settings"].text


def test_blocks_named_by_hand_are_shown() -> None:
    cached = bw.transform(OneStream(4).eval(), blocks=["blocks.1", "blocks.2"], num_steps=4, example_args=OneStream().example())
    data = report_data(cached)
    assert [block["name"] for block in data["found"]["blocks"]] == ["blocks.1", "blocks.2"]
    assert "named by hand" in Page(render(data)).by_id["rejected"].text


def test_a_file_is_written_whole(cached: bw.CachedModel, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert bw.write_report(path, torch.compile(cached)) == path  # type: ignore[arg-type]
    assert path.read_text(encoding="utf-8") == render(report_data(cached))
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(cached: bw.CachedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("before")
    with pytest.raises(FileNotFoundError):
        bw.write_report(path, cached, images={"none": tmp_path / "none.png"})
    with pytest.raises(FileNotFoundError):
        bw.write_report(tmp_path / "no folder" / "report.html", cached)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="No space left"):
            bw.write_report(path, cached)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        bw.write_report(tmp_path / "folder", cached)
    assert path.read_text() == "before"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["folder", "report.html"]


def test_what_cannot_be_shown_is_refused(cached: bw.CachedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(bw.ConfigError, match="a report requires the result of transform, got OneStream"):
        report_data(OneStream())
    with pytest.raises(bw.StateError, match="nothing is captured yet"):
        report_data(bw.transform(OneStream().eval()))
    with pytest.raises(bw.ConfigError, match=r"images\['text'\] must be a PNG, JPEG or WebP file, got one that begins with b'<svg/>'"):
        report_data(cached, images={"text": b"<svg/>"})
    with pytest.raises(bw.ConfigError, match=r"seconds\['step'\] must be a finite number of at least 0, got nan"):
        report_data(cached, seconds={"step": float("nan")})
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=re.escape('a report needs jinja2: pip install "bwcache-compile[report]".')):
        render({})


def test_small_parts() -> None:
    assert [charts.ranges(numbers) for numbers in ([], [3], [0, 1, 2, 5])] == ["none", "3", "0 to 2, 5"]
    assert charts.ticks(0, 50) == [0, 10, 20, 30, 40, 50]
    assert charts.ticks(0.21, 0.31) == pytest.approx([0.22, 0.24, 0.26, 0.28, 0.3], rel=1e-12)
    assert [charts.heat_level(value, (0.01, 1.0)) for value in (0.0, 0.01, 0.1, 1.0, 2.0)] == [0, 0, 4, 8, 8]
    assert charts.heat_level(0.5, (0.5, 0.5)) == 0
    lines = ["@@ pass", "-a: f32[1] = x()", *(f"+b{i}: f32[1] = y()" for i in range(30)), "-c: f32[1] = z()", "+d: f32[1] = z()"]
    groups = diff_groups("\n".join(lines))
    assert [(group["folded"], group["lines"]) for group in groups] == [(False, 1), (True, 30), (False, 2)]
    assert groups[1]["ends"] == ["b0", "b29"]
    assert "".join(run["text"] for group in groups for run in group["runs"]).splitlines() == lines[1:]
    assert diff_groups("") == []


def is_open(page: Browser, name: str) -> bool:
    return page.run("return document.getElementById(arguments[0]).open", name)


def focus(page: Browser) -> str:
    """Name the element that has the focus by its id, its address or its text."""
    return page.run("const e = document.activeElement; return e.id || e.getAttribute('href') || e.textContent.trim()")


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    with browser() as session:
        yield session


@pytest.fixture
def opened(chrome: Browser, data: dict[str, Any], tmp_path: Path) -> Iterator[Browser]:
    """The report in a browser, which must not complain about it."""
    path = tmp_path / "report.html"
    path.write_text(render(data), encoding="utf-8")
    chrome.open(path.as_uri())
    yield chrome
    assert chrome.messages() == []


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme", "paper"), [(1280, "light", "rgb(247, 247, 245)"), (400, "dark", "rgb(20, 23, 27)")])
def test_a_browser_lays_the_page_out(opened: Browser, width: int, scheme: str, paper: str) -> None:
    opened.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    opened.devtools("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    assert opened.run("return getComputedStyle(document.body).backgroundColor") == paper
    assert opened.run("return document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"


@pytest.mark.slow
def test_a_model_of_40_blocks_has_a_page_of_a_few_megabytes() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "ffn_dim": 32, "freq_dim": 16}
    model = diffusers.WanTransformer3DModel(num_layers=40, **sizes).eval()
    latents, text = torch.randn(1, 16, 2, 8, 8), torch.randn(1, 8, 16)
    cached = bw.transform(model, num_steps=50, threshold=0.2, reuse_interval=3)
    for step in range(50):
        for name in ("cond", "uncond"):
            with cached.cache_context(name):
                cached(latents * (1 + step / 100), torch.tensor([1000.0 - 20 * step]), text)
    text_of_page = render(report_data(cached))
    assert len(text_of_page.encode()) < 5_000_000
    assert len(Page(text_of_page).root.all("details")) > 50


@pytest.mark.slow
def test_a_browser_folds(opened: Browser) -> None:
    opened.click("#pass-whole > summary")
    assert is_open(opened, "pass-whole")
    opened.type(ENTER)
    assert not is_open(opened, "pass-whole")
    opened.click("[data-unfold=operator-list]")
    assert is_open(opened, "block-3")
    opened.click("[data-fold=operator-list]")
    assert not is_open(opened, "block-3")
    opened.run("location.hash = 'block-5'")
    opened.run("dispatchEvent(new HashChangeEvent('hashchange'))")
    assert is_open(opened, "block-5")


@pytest.mark.slow
def test_a_browser_searches(opened: Browser, data: dict[str, Any]) -> None:
    opened.click("#block-2 > summary") if is_open(opened, "stack-0") else opened.click("#stack-0 > summary")
    before = [is_open(opened, f"block-{i}") for i in range(8)]
    opened.type("/")
    assert focus(opened) == "query"
    opened.type("BLOCKS.3.up.weight" + ENTER)
    assert opened.run("return document.activeElement.closest('details').id") == "block-3"
    found = [line for diff in data["passes"] for line in diff["text"].splitlines()[1:] if "blocks.3.up.weight" in line]
    assert opened.run("return document.getElementById('hits').textContent") == f"{len(found) + 1} matches"
    assert is_open(opened, "block-3")
    assert opened.run("return document.querySelector('#block-3 mark').textContent") == "blocks.3.up.weight"
    assert not opened.run("return document.getElementById('block-2').checkVisibility()")
    opened.type(ESCAPE)
    assert focus(opened) == "query"
    assert opened.run("return document.getElementById('query').value") == ""
    assert [is_open(opened, f"block-{i}") for i in range(8)] == before
    assert opened.run("return document.querySelectorAll('mark, .matches, .searching').length") == 0


@pytest.mark.slow
def test_a_browser_reaches_everything_by_keyboard(opened: Browser) -> None:
    place = "return [...document.querySelectorAll('*')].indexOf(document.activeElement)"
    body = opened.run("return [...document.querySelectorAll('*')].indexOf(document.body)")  # where the focus is after the last one
    reached: list[int] = []
    while not reached or reached[-1] not in reached[:-1]:
        opened.type(TAB)
        reached.append(opened.run(place))
        assert len(reached) < 200
        if reached[-1] != body:
            assert opened.run("return getComputedStyle(document.activeElement).outlineStyle") != "none", f"{focus(opened)}: not seen"
    controls = ".skip, nav a, #query, .buttons button, summary, .scroll"
    wanted = "return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()).length"
    assert len(set(reached) - {body}) == opened.run(wanted, controls)
