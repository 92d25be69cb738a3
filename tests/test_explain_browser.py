"""The page of `nemo-dist explain --html` in a real browser: it is drawn, clicked, read and used by keyboard."""

import re
from pathlib import Path

import attrs
import pytest
from browser import CHROMIUM, DRIVER, Browser
from test_explain_page import model_of, setup_of  # noqa: F401  (a fixture)

from nemo_dist import DistributedSetup, ParallelismSizes
from nemo_dist.setup.explain_page import page

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium with chromedriver (Debian: apt-get install chromium chromium-driver)"
)
SIZES = {
    8: {"tp": 2, "pp": 2, "schedule": "1f1b", "batch": 8},
    64: {"tp": 4, "pp": 4, "schedule": "interleaved_1f1b", "batch": 16},
    1024: {"tp": 8, "pp": 8, "dp_replicate": 2, "schedule": "zero_bubble", "batch": 32},
    16384: {"tp": 8, "pp": 16, "cp": 4, "schedule": "1f1b", "batch": 64},
}
COUNTS = [pytest.param(count, marks=[pytest.mark.slow] * (count > 1024)) for count in SIZES]
NARROW, WIDE = (360, 780), (1280, 900)


@attrs.frozen
class Written:
    """A page in a file, and the setup that it shows."""

    setup: DistributedSetup
    path: Path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    window = Browser.start(tmp_path_factory.mktemp("profile"))
    yield window
    window.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory, model_of):  # noqa: F811
    """Return the page for a number of ranks, each written once."""
    done = {}

    def write(count):
        if count not in done:
            setup = setup_of(count, **SIZES[count])
            path = tmp_path_factory.mktemp("pages") / f"{count}.html"
            path.write_text(page(setup, model_of("llama"), 8, 1024, 8))
            done[count] = Written(setup, path)
        return done[count]

    return write


def groups_in_the_page(browser, rank):
    """Return what the page says of a rank: its group along every name, and how many cells are lit for each."""
    return browser.run(
        "page.select({rank: arguments[0]});"
        "return page.ranks.choices.map((choice) => {"
        "  page.select({choice});"
        "  const lit = document.querySelector('.lit').getAttribute('d').split('M').length - 1;"
        "  return {names: choice.names, ranks: page.ranks.group(page.rank, choice), lit};"
        "})",
        rank,
    )


def place_of(browser, rank):
    """Scroll the cell of *rank* into view, and return the middle of it in the window."""
    return browser.run(
        "const {x, y} = page.mesh.corner(Math.floor(arguments[0] / page.mesh.layout.unit));"
        "page.mesh.svg.scrollIntoView();"
        "window.scrollBy(0, y - 200);"
        "const frame = page.mesh.svg.getBoundingClientRect(), half = page.mesh.layout.side / 2;"
        "return [frame.left + x + half, frame.top + y + half]",
        rank,
    )


@pytest.mark.parametrize("count", [pytest.param(count, marks=[pytest.mark.slow] * (count > 64)) for count in SIZES])
def test_a_page_asks_for_nothing_and_logs_no_error(browser, written, count):
    made = written(count)
    browser.open(made.path)
    assert browser.text("h1").startswith(f"{count:,} ranks: pp ")
    assert browser.requests() == [made.path.as_uri()] and browser.errors() == []


@pytest.mark.parametrize("count", COUNTS)
def test_the_groups_that_light_are_those_of_the_plan(browser, written, count):
    made = written(count)
    browser.open(made.path)
    plan = made.setup.plan
    wide = {
        name for view in (plan.dense, *plan.views) for name in (*view.names, *view.flattened) if plan.size(name) > 1
    }
    for rank in (0, count // 3, count - 1):
        found = groups_in_the_page(browser, rank)
        assert {name for one in found for name in one["names"]} == wide
        for one in found:
            for name in one["names"]:
                assert tuple(one["ranks"]) == plan.group_of(rank, name)
            assert one["lit"] == len(one["ranks"])


def test_the_groups_of_a_second_view_are_those_of_the_plan(browser, tmp_path):
    sizes = ParallelismSizes(ep_size=4, tp_size=2, dp_replicate_size=2)
    setup = DistributedSetup.build(parallelism_sizes=sizes, world_size=32)
    (tmp_path / "page.html").write_text(setup.explain_page())
    browser.open(tmp_path / "page.html")
    found = {name: tuple(one["ranks"]) for one in groups_in_the_page(browser, 13) for name in one["names"]}
    assert found["ep"] == setup.plan.group_of(13, "ep") and found["ep_shard"] == setup.plan.group_of(13, "ep_shard")


@pytest.mark.parametrize("size", [NARROW, WIDE])
@pytest.mark.parametrize("count", COUNTS)
def test_every_rank_has_a_cell_of_its_own_where_it_is_drawn(browser, written, count, size):
    browser.open(written(count).path, size=size)
    wrong = browser.run(
        "const {mesh} = page, frame = mesh.svg.getBoundingClientRect(), half = mesh.layout.side / 2, wrong = [];"
        "for (let rank = 0; rank < page.ranks.count; rank++) {"
        "  const {x, y} = mesh.corner(rank);"
        "  const event = {clientX: frame.left + x + half, clientY: frame.top + y + half};"
        "  const within = x >= 0 && y >= 0 && x + 2 * half <= frame.width && y + 2 * half <= frame.height;"
        "  if (mesh.rankAt(event) !== rank || !within)"
        "    wrong.push(rank);"
        "}"
        "return [wrong, mesh.layout.side]"
    )
    assert wrong[0] == [] and wrong[1] >= 4


@pytest.mark.parametrize("count", COUNTS)
def test_a_click_on_a_rank_shows_its_coordinates_groups_and_share(browser, written, count):
    made = written(count)
    browser.open(made.path)
    rank = 5 * count // 8 + 1
    browser.click_at(*place_of(browser, rank))
    panel = browser.text("#rank-panel")
    assert browser.run("return Number(document.querySelector('#rank-number').value)") == rank
    place = {name: index for name, index in made.setup.plan.coordinates(rank).items() if made.setup.plan.size(name) > 1}
    shown = browser.run("return [...document.querySelectorAll('.coordinates span')].map((one) => one.innerText)")
    assert shown == [f"{name} {index}" for name, index in place.items()]
    assert " ".join(map(str, made.setup.plan.group_of(rank, "tp"))) in panel
    assert f"node {rank // 8}, place {rank % 8}" in panel and "layers " in panel


def test_a_click_on_an_axis_lights_its_groups_and_says_where_they_are(browser, written):
    browser.open(written(64).path)
    browser.click("#axes label:has(input[value=tp])")
    assert "16 groups of 4 ranks, each inside one node." in browser.text("#axis-caption")
    browser.click("#axes label:has(input[value=pp])")
    assert "16 groups of 4 ranks, each across 4 nodes." in browser.text("#axis-caption")
    colours = browser.run("return [...document.querySelectorAll('path.cells')].map((one) => one.getAttribute('class'))")
    assert len(colours) == 8  # 16 groups take turns
    browser.click("#axes label:has(input[value=nothing])")
    assert browser.run("return document.querySelectorAll('.lit').length") == 0


def test_a_click_on_a_collective_lights_its_axis(browser, written):
    browser.open(written(64).path)
    browser.run("document.querySelectorAll('#collectives .link')[0].click()")
    assert browser.run("return document.querySelector('#axes input:checked').value") == "pp"
    assert browser.run("return document.activeElement.value") == "pp"


def test_more_ranks_than_cells_are_shown_by_node_and_found_by_number(browser, tmp_path):
    setup = DistributedSetup.build(parallelism_sizes=ParallelismSizes(tp_size=8), world_size=262144)
    (tmp_path / "page.html").write_text(setup.explain_page())
    browser.open(tmp_path / "page.html")
    assert browser.run("return page.mesh.layout.unit") == 8
    browser.run(
        "const box = document.querySelector('#rank-number');box.value = 100001; box.dispatchEvent(new Event('change'))"
    )
    assert "100000 100001" in browser.text("#rank-panel")
    assert browser.run("return document.querySelector('.lit').getAttribute('d').split('M').length - 1") == 1


# ---- keyboard, names, colours, narrow screens ----


def test_the_page_is_used_by_keyboard_alone(browser, written):
    browser.open(written(64).path, "#rank=0&axis=tp")
    reached = []
    for _ in range(60):
        browser.press("Tab")
        reached.append(
            browser.run("return document.activeElement.closest('section')?.id ?? document.activeElement.name")
        )
        if browser.run("return document.activeElement === page.mesh.svg"):
            break
    assert "theme" in reached and reached[-1] == "mesh"
    browser.press("Right", "Right", "Down")
    assert browser.run("return page.rank") == 10
    browser.press("PageDown")
    assert browser.run("return page.rank") == 26
    browser.press("End", "Right")
    assert browser.run("return page.rank") == 63
    assert browser.text("#said").startswith("Rank 63 of 64, node 7: pp 3, dp_shard 3, tp 3")
    browser.run("document.querySelector('#axes input:checked').focus()")
    browser.press("Left")
    assert browser.run("return page.choice.names[0]") != "tp"


def test_the_timeline_is_read_by_keyboard_and_mouse(browser, written):
    browser.open(written(8).path)
    browser.run("page.schedule.svg.focus()")
    browser.press("Right")
    assert browser.text("#said") == "pp 0: forward of microbatch 0, stage 0, time 0 to 1"
    browser.press("Down")
    assert browser.text("#said") == "pp 1: forward of microbatch 0, stage 1, time 1 to 2"
    place = browser.run(
        "page.schedule.svg.scrollIntoView({block: 'center'});"
        "const frame = page.schedule.svg.getBoundingClientRect();"
        "return [frame.left + 2.5 * page.schedule.unit, frame.top + 1.5 * page.schedule.pitch]"
    )
    browser.click_at(*place)
    assert browser.text("#tooltip") == "pp 1: backward of microbatch 0, stage 1, time 2 to 4"
    assert browser.run("return page.rank") == 4  # the first of pp 1


def test_what_takes_the_focus_shows_it_and_has_a_name(browser, written):
    browser.open(written(64).path)
    nodes = browser.devtools("Accessibility.getFullAXTree")["nodes"]
    focusable = [
        node
        for node in nodes
        if any(one["name"] == "focusable" and one["value"]["value"] for one in node.get("properties", []))
        and node["role"]["value"] != "RootWebArea"
    ]
    unnamed = [node["role"]["value"] for node in focusable if not node.get("name", {}).get("value")]
    assert len(focusable) > 20 and unnamed == []
    browser.press("Tab", "Tab")
    styles = browser.run(
        "const one = document.activeElement, shown = one.matches('input[type=radio]') ? one.nextElementSibling : one;"
        "return [getComputedStyle(shown).outlineStyle, parseFloat(getComputedStyle(shown).outlineWidth)]"
    )
    assert styles == ["solid", 3]


FAINT = """
const channel = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
const behind = (node) => {
  for (let one = node; one; one = one.parentElement) {
    const found = numbers(getComputedStyle(one).backgroundColor);
    if (found.length === 3 || found[3] > 0) return found;
  }
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), faint = [];
let count = 0;
for (let text = walker.nextNode(); text; text = walker.nextNode()) {
  const parent = text.parentElement;
  if (!text.data.trim() || parent.closest('script, noscript, svg, .hidden, .narrow, .skip, [hidden]')) continue;
  const [a, b] = [light(numbers(getComputedStyle(parent).color)), light(behind(parent))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  count++;
  if (ratio < 4.5) faint.push([text.data, ratio]);
}
return [faint, count];
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_in_both_themes(browser, written, theme):
    """By 4.5 to 1 at least, as WCAG's level AA asks."""
    browser.open(written(64).path)
    browser.click(f"#theme label:has([value={theme}])")
    faint, count = browser.run(FAINT)
    browser.click("#theme label:has([value=auto])")
    assert faint == [] and count > 100


def background(browser):
    red, green, blue = map(
        int, re.findall(r"\d+", browser.run("return getComputedStyle(document.body).backgroundColor"))[:3]
    )
    return (red + green + blue) / 3


def test_the_theme_is_the_systems_until_the_switch_says_otherwise(browser, written):
    browser.dark(True)
    browser.open(written(8).path)
    assert background(browser) < 60
    browser.dark(False)
    assert background(browser) > 200
    browser.click("#theme label:has([value=dark])")
    assert background(browser) < 60
    browser.click("#theme label:has([value=auto])")
    assert background(browser) > 200


@pytest.mark.parametrize("count", COUNTS)
def test_a_narrow_screen_scrolls_down_only(browser, written, count):
    browser.open(written(count).path, size=NARROW)
    wide = browser.run(
        "const right = [...document.querySelectorAll('main *')].filter((one) => !one.closest('.scroll'))"
        ".filter((one) => one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 90));"
        "return [document.documentElement.scrollWidth, right]"
    )
    assert wide == [NARROW[0], []]


def test_the_address_keeps_what_is_chosen(browser, written):
    browser.open(written(64).path, "#rank=37&axis=dp_shard")
    assert browser.run("return [page.rank, page.choice.names[0]]") == [37, "dp_shard"]
    browser.run("page.select({rank: 12})")
    assert browser.run("return location.hash") == "#rank=12&axis=dp_shard"
