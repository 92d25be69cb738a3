// Which ranks form groups: the arithmetic of nemo_dist.planning, on the axes that the page was given.

class Ranks {
  constructor(data) {
    this.count = data.world_size;
    this.perNode = Math.min(data.ranks_per_node, data.world_size);
    this.nodes = Math.ceil(this.count / this.perNode);
    this.views = data.views;
    this.spans = new Map();
    for (const view of data.views) this.addSpans(view);
    this.choices = this.findChoices(data.collectives);
  }

  addSpans(view) {
    let step = this.count;
    const places = new Map();
    for (const axis of view.axes) {
      step /= axis.size;
      places.set(axis.name, { size: axis.size, step });
    }
    for (const [name, run] of Object.entries(view.flattened)) {
      const size = run.reduce((product, axis) => product * places.get(axis).size, 1);
      places.set(name, { size, step: places.get(run[run.length - 1]).step });
    }
    for (const [name, span] of places) if (!this.spans.has(name)) this.spans.set(name, { ...span, view });
  }

  // What can be chosen: each set of groups once, with all the names that it has.
  findChoices(collectives) {
    const found = new Map();
    const used = new Set(collectives.map((one) => one.axis));
    for (const [name, { size, step, view }] of this.spans) {
      const key = `${size}/${step}`;
      if (size === 1) continue;
      if (!found.has(key)) found.set(key, { names: [], size, step, view, used: false });
      found.get(key).names.push(name);
      found.get(key).used ||= used.has(name);
    }
    return [...found.values()];
  }

  choiceOf(name) {
    return this.choices.find((choice) => choice.names.includes(name)) || null;
  }

  groupIndex(rank, { size, step }) {
    return Math.floor(rank / (size * step)) * step + (rank % step);
  }

  group(rank, { size, step }) {
    const first = rank - (Math.floor(rank / step) % size) * step;
    return Array.from({ length: size }, (_, index) => first + index * step);
  }

  coordinate(rank, name) {
    const { size, step } = this.spans.get(name);
    return Math.floor(rank / step) % size;
  }

  node(rank) {
    return Math.floor(rank / this.perNode);
  }

  nodesOf(group) {
    return new Set(group.map((rank) => this.node(rank))).size;
  }

  // The least and the greatest number of nodes that a group of *choice* is on.
  spread(choice) {
    if (choice.spread) return choice.spread;
    let [least, most] = [Infinity, 0];
    for (let block = 0; block < this.count; block += choice.size * choice.step) {
      for (let first = block; first < block + choice.step; first++) {
        const nodes = this.nodesOf(this.group(first, choice));
        [least, most] = [Math.min(least, nodes), Math.max(most, nodes)];
      }
    }
    choice.spread = { least, most };
    return choice.spread;
  }

  where(choice) {
    const { least, most } = this.spread(choice);
    if (most === 1) return "inside one node";
    return least === most ? `across ${most.toLocaleString("en")} nodes` : `across ${least} to ${most} nodes`;
  }

  // The axes of all views on which ranks differ, each once.
  wideAxes() {
    const found = new Map();
    for (const view of this.views) {
      for (const axis of view.axes) if (axis.size > 1 && !found.has(axis.name)) found.set(axis.name, axis);
    }
    return [...found.values()];
  }

  place(rank) {
    return this.wideAxes().map((axis) => `${axis.name} ${this.coordinate(rank, axis.name)}`).join(", ");
  }
}

// A group in short: all of its ranks, or the first ones and the last.
function listed(ranks) {
  const few = ranks.length <= 10 ? ranks : [...ranks.slice(0, 6), "…", ranks[ranks.length - 1]];
  return few.join(" ");
}
