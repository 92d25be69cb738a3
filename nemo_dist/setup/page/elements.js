"use strict";
// Make elements, and write numbers. Text is always set as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";
const COLOURS = 8;

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const element = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
const drawn = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);
const byId = (id) => document.getElementById(id);

function readable(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let amount = bytes;
  while (amount >= 1024 && units.length > 1) {
    amount /= 1024;
    units.shift();
  }
  return `${Number(amount.toPrecision(amount >= 1000 ? 4 : 3))} ${units[0]}`;
}

function inWords(count) {
  for (const [size, unit] of [[1e12, "trillion"], [1e9, "billion"], [1e6, "million"]]) {
    if (count >= size) return `${(count / size).toPrecision(3)} ${unit}`;
  }
  return count.toLocaleString("en");
}

const plural = (count, word, ending = "s") => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : ending}`;
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const box = (x, y, width, height) => `M${x} ${y}h${width}v${height}h${-width}z`;

// A rectangle with round corners, as a part of a path.
function rounded(x, y, width, height, radius) {
  const r = Math.min(radius, width / 2, height / 2);
  return `M${x + r} ${y}h${width - 2 * r}a${r} ${r} 0 0 1 ${r} ${r}v${height - 2 * r}a${r} ${r} 0 0 1 ${-r} ${r}` +
    `h${2 * r - width}a${r} ${r} 0 0 1 ${-r} ${-r}v${2 * r - height}a${r} ${r} 0 0 1 ${r} ${-r}z`;
}

// Cut *text* after as many words as *letters* have room for.
function cutTo(text, letters) {
  if (text.length <= letters) return text;
  const whole = text.slice(0, letters).replace(/,?\s+\S*$/, "");
  return `${whole}, …`;
}

function say(text) {
  byId("said").textContent = text;
}

function showTooltip(event, text) {
  const tip = byId("tooltip");
  tip.hidden = text === null;
  if (text === null) return;
  tip.textContent = text;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, window.innerWidth - width - 8);
  const below = event.clientY + 18 + height < window.innerHeight;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${below ? event.clientY + 18 : event.clientY - height - 10}px`;
}
