// The schedule: a lane for each pipeline rank, time to the right, a box for each task.

const KIND_COLOURS = { F: 0, B: 1, I: 1, W: 2 };
const TASK = 5; // numbers of a task: kind, stage, microbatch, start, end
const LABELLED = 3000; // tasks of a picture that get a text at most

class SchedulePicture {
  constructor(page) {
    this.page = page;
    this.schedule = page.data.schedule;
    this.zoom = 1;
    this.chosen = null;
    if (this.schedule) this.kinds = Object.keys(this.schedule.kinds);
  }

  draw() {
    const place = byId("schedule-content");
    const { schedule } = this;
    if (!schedule) {
      place.replaceChildren(element("p", { class: "caption" },
        "No axis splits the layers: every rank runs all of them, forward and then backward, and waits for no stage."));
      return;
    }
    this.lanes = element("div", { class: "lanes" });
    place.replaceChildren(
      element("div", { class: "row" }, this.caption(), element("div", { class: "zoom", role: "group", "aria-label": "Zoom" },
        this.button("−", "Show more of the time", 0.5), this.button("+", "Show less of the time, larger", 2))),
      element("ul", { class: "legend" }, ...this.kinds.map((kind) => element("li", {},
        element("i", { class: `b${KIND_COLOURS[kind] ?? 4}` }), `${schedule.kinds[kind]} (${kind})`)),
        element("li", {}, element("i", { class: "hollow" }), "idle"), this.several() ? this.fainterNote() : null),
      this.lanes,
      element("ul", { class: "notes" }, ...schedule.notes.map((note) => element("li", {}, note))),
    );
    this.drawLanes();
  }

  caption() {
    const { name, microbatches, rows, idle, stages, axis } = this.schedule;
    const ranks = this.page.data.views[0].axes.find((one) => one.name === axis).size;
    return element("p", { class: "caption" }, element("strong", {}, name),
      `: ${plural(stages, "stage")} on ${plural(ranks, "rank")} of ${axis}, ` +
      `${plural(microbatches, "microbatch", "es")} of ${plural(rows, "row")}. Ranks idle `,
      element("strong", {}, percent(idle)), " of the time in theory: equal stages, a backward of two forwards, free sends.");
  }

  fainterNote() {
    return element("li", {}, "fainter: a later stage of the rank");
  }

  several() {
    return this.schedule.lanes.some((lane) => lane.stages.length > 1);
  }

  button(text, label, factor) {
    return element("button", { type: "button", "aria-label": label, title: label, onclick: () => {
      this.zoom = Math.max(1, Math.min(64, this.zoom * factor));
      this.drawLanes();
    } }, text);
  }

  drawLanes() {
    const { schedule } = this;
    const many = schedule.lanes.length;
    this.height = many <= 8 ? 32 : many <= 16 ? 24 : many <= 32 ? 15 : 10;
    this.pitch = this.height + (many <= 16 ? 5 : 2);
    const labels = drawn("svg", { width: 64, height: many * this.pitch, "aria-hidden": "true" });
    schedule.lanes.forEach((lane, index) => {
      if (many > 32 && index % 4) return;
      labels.append(drawn("text", { class: "label", x: 0, y: index * this.pitch + this.height / 2 + 4 },
        `${schedule.axis} ${lane.coordinate}`));
    });
    this.scroll = element("div", { class: "scroll" });
    this.lanes.replaceChildren(labels, this.scroll);
    const width = Math.max(200, this.scroll.clientWidth - 2);
    this.unit = Math.min(44, width / schedule.length) * this.zoom;
    this.svg = drawn("svg", {
      width: Math.ceil(schedule.length * this.unit) + 1,
      height: many * this.pitch,
      tabindex: 0,
      role: "application",
      "aria-roledescription": "timeline",
      "aria-label": this.spoken(),
      onmousemove: (event) => this.hover(event),
      onmouseleave: (event) => showTooltip(event, null),
      onclick: (event) => this.click(event),
      onkeydown: (event) => this.key(event),
    });
    this.scroll.replaceChildren(this.svg);
    this.drawTasks();
    this.mark();
  }

  drawTasks() {
    const { schedule, unit, height, pitch } = this;
    const paths = new Map();
    const texts = [];
    const labelled = schedule.lanes.reduce((sum, lane) => sum + lane.tasks.length / TASK, 0) <= LABELLED;
    const digits = `${schedule.microbatches - 1}`.length;
    const gap = unit > 5 ? 1.5 : unit > 2 ? 0.6 : 0;
    let idle = "";
    schedule.lanes.forEach((lane, index) => {
      const y = index * pitch;
      idle += rounded(0, y, schedule.length * unit, height, 4);
      for (let at = 0; at < lane.tasks.length; at += TASK) {
        const [kind, stage, microbatch, start, end] = lane.tasks.slice(at, at + TASK);
        const colour = KIND_COLOURS[this.kinds[kind]] ?? 4;
        const later = lane.stages.indexOf(stage) > 0;
        const name = `f${colour}${later ? " later" : ""}`;
        const width = (end - start) * unit - gap;
        const outline = unit > 5 ? rounded(start * unit, y, width, height, 3) : box(start * unit, y, width, height);
        paths.set(name, (paths.get(name) || "") + outline);
        if (labelled && height > 20 && unit > 7 + 6 * digits) {
          texts.push(drawn("text", { class: later ? "" : `t${colour}`, "text-anchor": "middle", "font-size": 11,
            x: start * unit + width / 2, y: y + height / 2 + 4 }, `${microbatch}`));
        }
      }
    });
    this.svg.append(drawn("path", { class: "idle", d: idle }));
    for (const [name, d] of paths) this.svg.append(drawn("path", { class: name, d }));
    this.svg.append(...texts);
  }

  taskAt(event) {
    const frame = this.svg.getBoundingClientRect();
    const lane = Math.floor((event.clientY - frame.top) / this.pitch);
    const time = (event.clientX - frame.left) / this.unit;
    const tasks = this.schedule.lanes[lane]?.tasks ?? [];
    for (let at = 0; at < tasks.length; at += TASK) {
      if (tasks[at + 3] <= time && time < tasks[at + 4]) return { lane, task: at / TASK };
    }
    return this.schedule.lanes[lane] ? { lane, task: null } : null;
  }

  describe({ lane, task }) {
    const { axis, lanes, kinds } = this.schedule;
    const place = `${axis} ${lanes[lane].coordinate}`;
    if (task === null) return `${place}: idle`;
    const [kind, stage, microbatch, start, end] = lanes[lane].tasks.slice(task * TASK, (task + 1) * TASK);
    return `${place}: ${kinds[this.kinds[kind]]} of microbatch ${microbatch}, stage ${stage}, time ${start} to ${end}`;
  }

  spoken() {
    const where = this.chosen ? this.describe(this.chosen) : "arrow keys go from task to task";
    return `Schedule ${this.schedule.name}, ${this.schedule.lanes.length} lanes; ${where}`;
  }

  hover(event) {
    const found = this.taskAt(event);
    showTooltip(event, found && this.describe(found));
  }

  click(event) {
    const found = this.taskAt(event);
    if (!found) return;
    if (found.task !== null) this.choose(found);
    this.page.select({ rank: this.page.firstRank(this.schedule.lanes[found.lane].coordinate) });
  }

  choose(found) {
    this.chosen = found;
    this.mark();
    this.svg.setAttribute("aria-label", this.spoken());
    say(this.describe(found));
  }

  mark() {
    this.svg.querySelector(".chosen")?.remove();
    if (!this.chosen) return;
    const { lane, task } = this.chosen;
    const [start, end] = this.schedule.lanes[lane].tasks.slice(task * TASK + 3, task * TASK + 5);
    const d = rounded(start * this.unit + 1, lane * this.pitch + 1, (end - start) * this.unit - 3, this.height - 2, 3);
    this.svg.append(drawn("path", { class: "chosen", d }));
    const [left, right] = [start * this.unit, end * this.unit];
    if (left < this.scroll.scrollLeft) this.scroll.scrollLeft = left - 20;
    if (right > this.scroll.scrollLeft + this.scroll.clientWidth) this.scroll.scrollLeft = right - this.scroll.clientWidth + 20;
  }

  key(event) {
    const { lanes } = this.schedule;
    const now = this.chosen || { lane: 0, task: -1 };
    const count = (lane) => lanes[lane].tasks.length / TASK;
    const moves = {
      ArrowRight: () => ({ lane: now.lane, task: Math.min(count(now.lane) - 1, now.task + 1) }),
      ArrowLeft: () => ({ lane: now.lane, task: Math.max(0, now.task - 1) }),
      ArrowDown: () => this.beside(now, Math.min(lanes.length - 1, now.lane + 1)),
      ArrowUp: () => this.beside(now, Math.max(0, now.lane - 1)),
      Home: () => ({ lane: now.lane, task: 0 }),
      End: () => ({ lane: now.lane, task: count(now.lane) - 1 }),
    };
    if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.choose(moves[event.key]());
  }

  // The task of another lane that runs when the chosen one does, or next.
  beside({ lane, task }, other) {
    const start = task < 0 ? 0 : this.schedule.lanes[lane].tasks[task * TASK + 3];
    const { tasks } = this.schedule.lanes[other];
    for (let at = 0; at < tasks.length; at += TASK) if (tasks[at + 4] > start) return { lane: other, task: at / TASK };
    return { lane: other, task: tasks.length / TASK - 1 };
  }
}
