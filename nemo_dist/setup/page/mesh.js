// The mesh: a cell for each rank, in boxes for nodes, in bands for the outermost axis. Of very many ranks a cell is a
// node, or several.

const SIDES = [150, 130, 112, 92, 76, 64, 54, 46, 40, 34, 29, 25, 21, 18, 15, 13, 11, 9, 8, 7, 6, 5, 4];
const MOST_CELLS = 40000;
const MANY = 4000; // ranks, from which the picture takes the whole width and the panel stands above it

class MeshPicture {
  constructor(ranks, page) {
    this.ranks = ranks;
    this.page = page;
    this.hovered = null;
    this.svg = drawn("svg", {
      tabindex: 0,
      role: "application",
      "aria-roledescription": "mesh of ranks",
      "aria-describedby": "mesh-hint",
      onclick: (event) => this.choose(event),
      onmousemove: (event) => this.hover(event),
      onmouseleave: () => this.leave(),
      onkeydown: (event) => this.key(event),
    });
    byId("mesh-picture").append(this.svg);
    byId("mesh-hint").textContent =
      "Click a rank to see what it holds and with whom it talks; with the keyboard, arrows left and right go to the " +
      "next rank, up and down to the next node, Page Up and Page Down to the next band, Home and End to the ends.";
  }

  // Find the largest cells with which all of the picture fits.
  layOut() {
    byId("mesh").classList.toggle("many", this.ranks.count >= MANY);
    const width = Math.max(280, byId("mesh-picture").clientWidth);
    const most = width < 560 ? 1000 : this.ranks.count <= 16 ? 420 : this.ranks.count < MANY ? 700 : 900;
    let unit = 1;
    while (this.ranks.count / unit > MOST_CELLS) unit = unit === 1 ? this.ranks.perNode : unit * 2;
    for (const side of SIDES) {
      const found = this.measured(width, side, unit);
      if (found && (found.height <= most || side === SIDES[SIDES.length - 1])) return found;
    }
    return this.measured(width, 4, unit) || this.measured(width, 4, this.ranks.perNode);
  }

  measured(width, side, unit) {
    const gap = side > 30 ? 4 : side > 12 ? 2 : 1;
    const [inNode, boxed] = unit === 1 ? [this.ranks.perNode, this.ranks.nodes > 1] : [1, false];
    const rows = [...Array(inNode).keys()].map((i) => i + 1).filter((n) => n * n <= inNode && inNode % n === 0).pop();
    const columns = inNode / rows;
    const pad = boxed ? (side > 20 ? 5 : side > 9 ? 3 : 1) : 0;
    const title = boxed && side > 24 ? 17 : 0;
    const node = { width: columns * (side + gap) - gap + 2 * pad, height: rows * (side + gap) - gap + 2 * pad + title };
    const space = boxed ? (side > 20 ? 12 : side > 9 ? 7 : side > 5 ? 3 : 2) : gap;
    const bands = this.bands(unit === 1 ? inNode : unit);
    const nodes = Math.ceil(this.ranks.count / unit / inNode / bands.count);
    const left = bands.count > 1 && width > 620 ? 132 : 0;
    let perRow = Math.min(nodes, Math.floor((width - left - 4 + space) / (node.width + space)));
    if (perRow < 1) return null;
    for (let n = perRow; n > (side > 8 ? 0.55 : 0.75) * perRow; n--) {
      if (nodes % n === 0) {
        perRow = n;
        break;
      }
    }
    const top = bands.count > 1 && !left ? 18 : 0;
    const bandGap = bands.count > 1 ? (side > 9 ? 16 : 9) : 0;
    const bandRows = Math.ceil(nodes / perRow);
    const bandHeight = Math.max(top + bandRows * (node.height + space) - space, left ? 30 : 0);
    return {
      side, gap, unit, inNode, columns, pad, title, node, space, bands, nodes, left, perRow, top, bandGap, bandHeight,
      boxed, width, height: 4 + bands.count * (bandHeight + bandGap) - bandGap,
    };
  }

  // The outermost wide axis divides the picture into bands, where its parts are whole nodes.
  bands(unit) {
    const axis = this.page.data.views[0].axes.find((one) => one.size > 1);
    const whole = axis && this.ranks.count > this.ranks.perNode && (this.ranks.count / axis.size) % unit === 0;
    return whole && axis.size <= 64 ? { name: axis.name, count: axis.size } : { name: null, count: 1 };
  }

  corner(cell) {
    const l = this.layout;
    const node = Math.floor(cell / l.inNode);
    const [band, inBand] = [Math.floor(node / l.nodes), node % l.nodes];
    const inside = cell % l.inNode;
    return {
      x: 2 + l.left + (inBand % l.perRow) * (l.node.width + l.space) + l.pad + (inside % l.columns) * (l.side + l.gap),
      y: 2 + band * (l.bandHeight + l.bandGap) + l.top + Math.floor(inBand / l.perRow) * (l.node.height + l.space) +
        l.pad + l.title + Math.floor(inside / l.columns) * (l.side + l.gap),
    };
  }

  rankAt(event) {
    const l = this.layout;
    const frame = this.svg.getBoundingClientRect();
    const [x, y] = [event.clientX - frame.left - 2 - l.left, event.clientY - frame.top - 2];
    const band = Math.floor(y / (l.bandHeight + l.bandGap));
    const inBand = y - band * (l.bandHeight + l.bandGap) - l.top;
    const [column, row] = [Math.floor(x / (l.node.width + l.space)), Math.floor(inBand / (l.node.height + l.space))];
    const inside = [
      Math.floor((x - column * (l.node.width + l.space) - l.pad) / (l.side + l.gap)),
      Math.floor((inBand - row * (l.node.height + l.space) - l.pad - l.title) / (l.side + l.gap)),
    ];
    const fits = column >= 0 && column < l.perRow && row >= 0 && band >= 0 && band < l.bands.count &&
      row * l.perRow + column < l.nodes && inside[0] >= 0 && inside[0] < l.columns && inside[1] >= 0 &&
      inside[1] < l.inNode / l.columns;
    if (!fits) return null;
    const cell = (band * l.nodes + row * l.perRow + column) * l.inNode + inside[1] * l.columns + inside[0];
    const rank = cell * l.unit;
    return rank < this.ranks.count ? rank : null;
  }

  draw() {
    this.layout = this.layOut();
    const l = this.layout;
    this.svg.setAttribute("width", l.width);
    this.svg.setAttribute("height", l.height);
    this.base = drawn("g");
    this.focus = drawn("g");
    this.texts = drawn("g");
    this.svg.replaceChildren(this.base, this.focus, this.texts);
    this.drawBands();
    this.drawNodes();
    this.colour();
  }

  drawBands() {
    const { bands, bandHeight, bandGap, left, top } = this.layout;
    for (let band = 0; band < bands.count && bands.name; band++) {
      const y = 2 + band * (bandHeight + bandGap);
      const holds = bands.name === this.page.data.layers_axis ? this.page.holds(band) : "";
      this.texts.append(drawn("text", { class: "label strong", x: 2, y: y + 13 }, `${bands.name} ${band}`));
      if (!holds) continue;
      const at = left ? { x: 2, y: y + 28 } : { x: 10 + 9 * `${bands.name} ${band}`.length, y: y + 13 };
      const room = Math.floor((left ? left - 8 : this.layout.width - at.x) / 6.3); // letters
      this.texts.append(drawn("text", { class: "label", ...at }, cutTo(holds, room), drawn("title", {}, holds)));
    }
  }

  drawNodes() {
    const l = this.layout;
    if (!l.boxed) return;
    let outlines = "";
    for (let node = 0; node < this.ranks.nodes; node++) {
      const { x, y } = this.corner(node * l.inNode);
      const [left, above] = [x - l.pad, y - l.pad - l.title];
      outlines += rounded(left, above, l.node.width, l.node.height, l.side > 20 ? 8 : l.side > 9 ? 4 : 2);
      if (l.title) this.texts.append(drawn("text", { class: "label", x: x + 1, y: y - 6 }, `node ${node}`));
    }
    this.base.append(drawn("path", { class: "node", d: outlines }));
  }

  // The colour of a cell's group along *choice*; null where the ranks of the cell are in several.
  colourOf(cell, choice) {
    const { unit } = this.layout;
    const group = this.ranks.groupIndex(cell * unit, choice);
    const last = Math.min(this.ranks.count, (cell + 1) * unit) - 1;
    if (unit > 1 && (choice.step > 1 || this.ranks.groupIndex(last, choice) !== group)) return null;
    return group % COLOURS;
  }

  colour() {
    const { choice } = this.page;
    const { side, unit } = this.layout;
    const paths = new Map();
    const cells = Math.ceil(this.ranks.count / unit);
    const radius = side > 30 ? 7 : side > 12 ? 3 : 1;
    const outline = (x, y) => (side > 8 ? rounded(x, y, side, side, radius) : box(x, y, side, side));
    for (let cell = 0; cell < cells; cell++) {
      const { x, y } = this.corner(cell);
      const colour = choice && this.colourOf(cell, choice);
      const kind = choice === null ? "plain" : colour === null ? "mixed" : `f${colour} dim`;
      paths.set(kind, (paths.get(kind) || "") + outline(x, y));
    }
    for (const old of this.base.querySelectorAll(".cells")) old.remove();
    for (const [kind, d] of paths) this.base.append(drawn("path", { class: `cells ${kind}`, d }));
    this.outline = outline;
    this.light();
  }

  // Light the group of the rank under the pointer, or else of the chosen one, and mark the chosen one.
  light() {
    const { choice, rank } = this.page;
    const { side, unit } = this.layout;
    const parts = [];
    const lit = new Set();
    if (choice) {
      const centre = this.hovered ?? rank;
      for (const one of this.ranks.group(centre, choice)) lit.add(Math.floor(one / unit));
      const d = [...lit].map((cell) => this.outline(this.corner(cell).x, this.corner(cell).y)).join("");
      parts.push(drawn("path", { class: `lit f${this.ranks.groupIndex(centre, choice) % COLOURS}`, d }));
    }
    const { x, y } = this.corner(Math.floor(rank / unit));
    const out = side > 12 ? 2 : 1.5;
    for (const kind of ["ring outer", "ring"]) {
      parts.push(drawn("path", { class: kind, d: rounded(x - out, y - out, side + 2 * out, side + 2 * out, side > 30 ? 9 : 3) }));
    }
    this.focus.replaceChildren(...parts);
    this.number(lit);
    this.svg.setAttribute("aria-label", this.page.spoken());
  }

  number(lit) {
    const { side, unit } = this.layout;
    for (const old of this.texts.querySelectorAll(".rank")) old.remove();
    if (side < 18 || unit > 1) return;
    const detailed = side >= 64;
    for (let rank = 0; rank < this.ranks.count; rank++) {
      const { x, y } = this.corner(rank);
      const colour = this.page.choice && lit.has(rank) ? ` t${this.ranks.groupIndex(rank, this.page.choice) % COLOURS}` : "";
      const size = Math.min(detailed ? side / 4.5 : 14, side * (rank > 99 ? 0.4 : 0.5));
      const middle = y + (detailed ? side * 0.36 : side / 2 + size * 0.36);
      const attributes = { class: `rank${colour}`, x: x + side / 2, "text-anchor": "middle" };
      this.texts.append(drawn("text", { ...attributes, y: middle, "font-size": size, "font-weight": 600 }, `${rank}`));
      if (!detailed) continue;
      const axes = this.ranks.wideAxes().slice(0, side > 90 ? 4 : 2);
      axes.forEach((axis, line) => {
        const text = `${axis.name} ${this.ranks.coordinate(rank, axis.name)}`;
        const letters = side > 120 ? 14 : side > 90 ? 12 : 10;
        const below = middle + 5 + 1.2 * letters * (line + 1);
        this.texts.append(drawn("text", { ...attributes, y: below, "font-size": letters }, text));
      });
    }
  }

  choose(event) {
    const rank = this.rankAt(event);
    if (rank !== null) this.page.select({ rank });
  }

  hover(event) {
    const rank = this.rankAt(event);
    showTooltip(event, rank === null ? null : this.described(rank));
    if (rank === this.hovered) return;
    this.hovered = rank;
    this.light();
  }

  described(rank) {
    const { unit } = this.layout;
    if (unit > 1) return `ranks ${rank} to ${Math.min(this.ranks.count, rank + unit) - 1}`;
    return `rank ${rank} · ${this.ranks.place(rank)}`;
  }

  leave() {
    this.hovered = null;
    showTooltip(null, null);
    this.light();
  }

  key(event) {
    const l = this.layout;
    const band = l.nodes * l.inNode * l.unit;
    const steps = {
      ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.ranks.perNode, ArrowUp: -this.ranks.perNode,
      PageDown: band, PageUp: -band, Home: -this.ranks.count, End: this.ranks.count,
    };
    if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const wanted = this.page.rank + steps[event.key];
    const last = this.ranks.count - 1;
    const far = event.key === "Home" || event.key === "End";
    const rank = far ? Math.max(0, Math.min(last, wanted)) : wanted < 0 || wanted > last ? this.page.rank : wanted;
    this.page.select({ rank });
    say(this.page.spoken());
  }
}
