// Memory: a bar for each pipeline rank, stacked by what is held. Neighbours that hold the same are one bar.

function memoryRuns(bars) {
  const runs = [];
  bars.forEach((bar, place) => {
    const last = runs[runs.length - 1];
    const same = last && JSON.stringify(last.bar.held) === JSON.stringify(bar.held);
    if (same && bars.length > 16) last.end = place;
    else runs.push({ bar, start: place, end: place });
  });
  return runs;
}

const total = (bar) => Object.values(bar.held).reduce((sum, bytes) => sum + bytes, 0);

function memoryName(run, axis) {
  if (axis === null || run.axisSize === 1) return "every rank";
  return run.start === run.end ? `${axis} ${run.start}` : `${axis} ${run.start}–${run.end}`;
}

function stagesOf({ bar, start, end, axisSize }) {
  if (axisSize === 1) return bar.modules;
  if (start !== end) return `${plural(end - start + 1, "coordinate")} that hold as much`;
  const stages = bar.stages.length === 1 ? `stage ${bar.stages[0]}` : `stages ${bar.stages.join(", ")}`;
  return `${stages}: ${bar.modules}`;
}

function drawMemory(page) {
  const place = byId("memory-content");
  const { bars, notes } = page.data.memory;
  if (!bars.length) {
    place.replaceChildren(element("p", { class: "caption" }, ...notes, ...(notes.length ? [] : [
      "Which bytes a rank holds depends on the model: add ", element("code", {}, "--model"), " to the command."])));
    return;
  }
  const kinds = [...new Set(bars.flatMap((bar) => Object.keys(bar.held)))];
  const most = Math.max(...bars.map(total));
  const runs = memoryRuns(bars);
  for (const run of runs) run.axisSize = bars.length;
  const legend = element("ul", { class: "legend" }, ...kinds.map((kind, index) =>
    element("li", {}, element("i", { class: `b${index}` }), kind)));
  const rows = runs.flatMap((run) => [
    element("button", { class: "name", type: "button", onclick: () => page.select({ rank: page.firstRank(run.start) }) },
      element("b", {}, memoryName(run, page.data.layers_axis)), element("small", {}, stagesOf(run))),
    element("div", { class: "bar", role: "img", "aria-label": spokenBar(run, page) },
      ...kinds.map((kind, index) => segment(kind, index, run.bar.held[kind] || 0, most))),
    element("span", { class: "total" }, readable(total(run.bar))),
  ]);
  place.replaceChildren(
    legend,
    element("div", { class: "bars" }, ...rows),
    element("details", {}, element("summary", {}, "The numbers"), numbers(runs, kinds, page)),
    element("ul", { class: "notes" }, ...notes.map((note) => element("li", {}, note))),
  );
  requestAnimationFrame(() => fitLabels(place));
}

function spokenBar(run, page) {
  const parts = Object.entries(run.bar.held).map(([kind, bytes]) => `${kind} ${readable(bytes)}`);
  return `${memoryName(run, page.data.layers_axis)}: ${parts.join(", ")}; ${readable(total(run.bar))} in all`;
}

function segment(kind, index, bytes, most) {
  if (!bytes) return null;
  const label = `${kind} ${readable(bytes)}`;
  return element("span", {
    class: `b${index}`,
    style: `width:${(100 * bytes) / most}%`,
    "data-label": label,
    onmousemove: (event) => showTooltip(event, label),
    onmouseleave: (event) => showTooltip(event, null),
  }, label);
}

// A label that its part of the bar cannot hold gives way to the amount, or to nothing.
function fitLabels(place) {
  for (const part of place.querySelectorAll(".bar > span")) {
    const label = part.dataset.label;
    const short = label.split(" ").slice(-2).join(" ");
    part.classList.remove("narrow");
    part.textContent = label;
    if (part.scrollWidth > part.clientWidth) part.textContent = short;
    if (part.scrollWidth > part.clientWidth) part.classList.add("narrow");
  }
}

function numbers(runs, kinds, page) {
  const head = element("tr", {}, element("th", { scope: "col" }, "rank"),
    ...[...kinds, "in all"].map((kind) => element("th", { scope: "col", class: "number" }, kind)));
  const rows = runs.map((run) => element("tr", {},
    element("th", { scope: "row" }, memoryName(run, page.data.layers_axis)),
    ...kinds.map((kind) => element("td", { class: "number" }, kind in run.bar.held ? readable(run.bar.held[kind]) : "–")),
    element("td", { class: "number" }, readable(total(run.bar)))));
  return element("div", { class: "scroll" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)));
}
