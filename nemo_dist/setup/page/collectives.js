// The collectives of a step: along which axis, of what, how often, and the bytes that one rank sends.

function drawCollectives(page) {
  const place = byId("collectives-content");
  const rows = page.data.collectives;
  if (!rows.length) {
    place.replaceChildren(element("p", { class: "caption" }, "No rank sends anything to another one in a step."));
    return;
  }
  const known = rows.some((row) => row.sent !== null);
  const most = Math.max(1, ...rows.map((row) => row.sent || 0));
  const names = ["along", "collective", "of", "where", known ? "a rank sends" : "bytes"];
  const head = element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)));
  place.replaceChildren(
    element("p", { class: "caption" }, known
      ? "Bytes are those that one rank sends in an optimizer step on one batch, with ring or pairwise algorithms."
      : "How many bytes they move depends on the model: add --model to the command."),
    element("table", { class: "stacked" }, element("thead", {}, head),
      element("tbody", {}, ...rows.map((row) => collectiveRow(page, row, most)))),
  );
}

function collectiveRow(page, row, most) {
  const choice = page.ranks.choiceOf(row.axis);
  const axis = choice
    ? element("button", { class: "link", type: "button", title: `Light the groups along ${row.axis}`,
        onclick: () => page.light(choice) }, row.axis)
    : row.axis;
  const amount = row.sent === null ? "–" : readable(row.sent);
  const share = row.sent === null ? null : element("span", { style: `width:${(100 * row.sent) / most}%` });
  return element("tr", {},
    element("td", {}, axis),
    element("td", {}, row.collective),
    element("td", {}, row.of, element("br"), element("small", { class: "hint" }, row.often)),
    element("td", { "data-label": "" }, choice ? page.ranks.where(choice) : ""),
    element("td", { class: "amount number", "data-label": "a rank sends" }, amount, share));
}
