// The page: what is chosen, and everything that shows it.

class Page {
  constructor(data) {
    this.data = data;
    this.ranks = new Ranks(data);
    this.rank = 0;
    this.choice = this.busiest();
    this.readAddress();
    this.mesh = new MeshPicture(this.ranks, this);
    this.schedule = new SchedulePicture(this);
    this.heading();
    this.axes();
    this.everything();
    drawCollectives(this);
    byId("plugins-content").append(...data.plugins.map((line) => element("li", {}, line)));
    byId("footer").append("Written by ", element("code", {}, "nemo-dist explain --html"), `, version ${data.version}.`);
    let width = window.innerWidth;
    window.addEventListener("resize", () => {
      if (window.innerWidth === width) return;
      width = window.innerWidth;
      this.everything();
    });
  }

  // The groups that send most in a step or, without bytes, those of the innermost axis.
  busiest() {
    const { choices } = this.ranks;
    const least = Math.min(...choices.map((choice) => choice.step));
    return choices.reduce((best, choice) => {
      const [now, then] = [this.sentAlong(choice).bytes, best ? this.sentAlong(best).bytes : -1];
      return now > then || (now === then && choice.step === least && best.step > least) ? choice : best;
    }, null);
  }

  everything() {
    this.mesh.draw();
    this.show();
    drawMemory(this);
    this.schedule.draw();
  }

  heading() {
    const { data } = this;
    byId("title").textContent = `${plural(data.world_size, "rank")}: ${data.shape}`;
    const parts = [data.strategy ? `strategy ${data.strategy}` : "no strategy"];
    if (data.recomputation) parts.push(`${data.recomputation} recomputation`);
    if (data.model) parts.unshift(`${data.model.name} with ${inWords(data.model.parameters)} parameters`);
    if (data.model) parts.push(`${plural(data.model.rows, "sequence")} of ${data.model.length.toLocaleString("en")} tokens on each data-parallel rank`);
    byId("subtitle").textContent = parts.join(" · ");
    const sent = data.collectives.reduce((sum, one) => sum + (one.sent || 0), 0);
    const figures = [
      [this.ranks.nodes.toLocaleString("en"), `${this.ranks.nodes === 1 ? "node" : "nodes"} of ${plural(this.ranks.perNode, "rank")}`],
      [this.batches().toLocaleString("en"), "batches read at a time"],
    ];
    if (data.memory.bars.length) figures.push([readable(Math.max(...data.memory.bars.map(total))), "held by the fullest rank, at least"]);
    if (sent) figures.push([readable(sent), "sent by a rank in a step"]);
    if (data.schedule) figures.push([percent(data.schedule.idle), "of the time ranks idle, in theory"]);
    byId("figures").append(...figures.map(([value, name]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  }

  batches() {
    return this.ranks.spans.get(this.data.batch_axis)?.size ?? 1;
  }

  axes() {
    const choices = [{ names: ["nothing"], none: true }, ...this.ranks.choices];
    byId("axes").append(...choices.map((choice, index) => {
      const chosen = choice.none ? this.choice === null : choice === this.choice;
      const input = element("input", { type: "radio", name: "axis", value: choice.names[0], checked: chosen,
        onchange: () => this.select({ choice: choice.none ? null : choice }) });
      const size = choice.none ? "" : ` ${choice.size.toLocaleString("en")}`;
      choice.input = input;
      if (choice.none) this.none = input;
      return element("label", {}, input, element("span", { class: "chip" }, element("b", {}, choice.names[0]), size));
    }));
    if (!this.ranks.choices.length) byId("axes").hidden = true;
  }

  select(change) {
    Object.assign(this, change);
    (this.choice ? this.choice.input : this.none).checked = true;
    if ("choice" in change) this.mesh.colour();
    else this.mesh.light();
    this.show();
    this.writeAddress();
  }

  // Choose the groups of a collective, and go up to where they are lit.
  light(choice) {
    this.select({ choice });
    byId("mesh").scrollIntoView({ block: "start" });
    choice.input.focus({ preventScroll: true });
  }

  show() {
    byId("axis-caption").replaceChildren(...this.captionOf(this.choice));
    this.panel();
  }

  captionOf(choice) {
    if (!choice) return ["Choose an axis to light its groups: the ranks that differ in nothing else."];
    const groups = this.ranks.count / choice.size;
    const sent = this.sentAlong(choice);
    const axis = choice.view.axes.find((one) => choice.names.includes(one.name));
    const also = choice.names.length > 1 ? ` (also ${joined(choice.names.slice(1))})` : "";
    const run = (choice.view.flattened[choice.names[0]] || []).filter((one) => this.ranks.spans.get(one).size > 1);
    const parts = [run.length > 1 ? `${joined(run)} together,` : "", `${plural(groups, "group")} of ${plural(choice.size, "rank")}, each ${this.ranks.where(choice)}.`];
    if (axis?.splits.length) parts.push(`They split ${joined(axis.splits)}.`);
    if (axis?.plugins.length) parts.push(`Claimed by ${joined(axis.plugins)}.`);
    if (sent.kinds.length) parts.push(`In a step: ${joined(sent.kinds)}${sent.bytes ? `; a rank sends ${readable(sent.bytes)}` : ""}.`);
    return [element("strong", {}, choice.names[0]), `${also}: ${parts.join(" ").trim()}`];
  }

  sentAlong(choice) {
    const rows = this.data.collectives.filter((row) => choice.names.includes(row.axis));
    return { kinds: [...new Set(rows.map((row) => row.collective))], bytes: rows.reduce((sum, row) => sum + (row.sent || 0), 0) };
  }

  // What the ranks at *place* of the axis that splits the layers hold, in words.
  holds(place) {
    return this.data.memory.bars[place]?.modules ?? "";
  }

  layersPlace(rank) {
    const axis = this.data.layers_axis;
    return axis && this.data.memory.bars.length > 1 ? this.ranks.coordinate(rank, axis) : 0;
  }

  firstRank(place) {
    const axis = this.data.layers_axis;
    return axis ? place * this.ranks.spans.get(axis).step : 0;
  }

  panel() {
    const { rank, ranks } = this;
    const box = element("input", { type: "number", id: "rank-number", min: 0, max: ranks.count - 1, value: rank,
      "aria-labelledby": "rank-heading", onchange: (event) => this.typed(event.target) });
    const kept = document.activeElement?.id === "rank-number";
    const chosen = document.activeElement?.dataset?.choice;
    const bar = this.data.memory.bars[this.layersPlace(rank)];
    const batch = ranks.spans.get(this.data.batch_axis);
    const reads = batch ? [element("h4", {}, "Reads"), element("p", {},
      `batch ${ranks.coordinate(rank, this.data.batch_axis)} of ${this.batches().toLocaleString("en")}`)] : [];
    const held = bar ? [element("h4", {}, "Holds"), element("p", {}, `${bar.modules}`), element("p", {},
      `${readable(bar.held.parameters)} of their parameters, ${readable(total(bar))} in all at least`)] : [];
    byId("rank-panel").replaceChildren(
      element("header", {}, element("h3", { id: "rank-heading" }, "Rank"), box,
        element("span", { class: "where" }, `node ${ranks.node(rank)}, place ${rank % ranks.perNode}`)),
      element("div", { class: "coordinates" }, ...ranks.wideAxes().map((axis) =>
        element("span", {}, `${axis.name} ${ranks.coordinate(rank, axis.name)}`))),
      ...held,
      ...reads,
      element("h4", {}, ranks.choices.length ? "Talks with" : "Talks with nobody"),
      element("ul", { class: "groups" }, ...ranks.choices.map((choice) => element("li", {}, this.groupButton(choice)))),
    );
    if (kept) byId("rank-number").focus();
    if (chosen) byId("rank-panel").querySelector(`[data-choice="${CSS.escape(chosen)}"]`)?.focus();
  }

  groupButton(choice) {
    const group = this.ranks.group(this.rank, choice);
    const nodes = this.ranks.nodesOf(group);
    return element("button", { type: "button", "aria-pressed": String(choice === this.choice), "data-choice": choice.names[0],
      onclick: () => this.select({ choice }) },
      element("b", {}, choice.names[0]),
      element("small", {}, `${plural(choice.size, "rank")} ${nodes === 1 ? "in this node" : `on ${plural(nodes, "node")}`}`),
      element("span", { class: "ranks" }, listed(group)));
  }

  typed(input) {
    const rank = Number(input.value);
    if (Number.isInteger(rank) && rank >= 0 && rank < this.ranks.count) this.select({ rank });
    else input.value = this.rank;
  }

  spoken() {
    const along = this.choice
      ? `; its group along ${this.choice.names[0]}: ${listed(this.ranks.group(this.rank, this.choice))}` : "";
    return `Rank ${this.rank} of ${this.ranks.count}, node ${this.ranks.node(this.rank)}: ${this.ranks.place(this.rank) || "alone"}${along}`;
  }

  // The address keeps what is chosen, as in page.html#rank=12&axis=tp.
  readAddress() {
    const asked = new URLSearchParams(location.hash.slice(1));
    const rank = Number(asked.get("rank"));
    if (Number.isInteger(rank) && rank >= 0 && rank < this.ranks.count) this.rank = rank;
    if (asked.has("axis")) this.choice = this.ranks.choiceOf(asked.get("axis"));
  }

  writeAddress() {
    history.replaceState(null, "", `#rank=${this.rank}&axis=${this.choice ? this.choice.names[0] : "nothing"}`);
  }
}

function joined(words) {
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words[words.length - 1]}`;
}

function followTheme() {
  const kept = { get: () => null, set: () => {} };
  try {
    kept.get = () => localStorage.getItem("nemo-dist-theme");
    kept.get();
    kept.set = (value) => localStorage.setItem("nemo-dist-theme", value);
  } catch {
    kept.get = () => null; // a browser that keeps nothing for files
  }
  const apply = (value) => {
    if (value === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = value;
  };
  for (const input of byId("theme").querySelectorAll("input")) {
    input.checked = input.value === (kept.get() || "auto");
    input.addEventListener("change", () => {
      kept.set(input.value);
      apply(input.value);
    });
  }
  apply(kept.get() || "auto");
}

followTheme();
window.page = new Page(JSON.parse(byId("data").textContent));
