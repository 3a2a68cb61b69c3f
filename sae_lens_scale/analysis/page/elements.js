"use strict";

const SVG = "http://www.w3.org/2000/svg";

// An element with attributes and children. Text becomes text nodes: nothing in it is markup.
function element(tag, attributes = {}, ...children) {
  const made = ["svg", "rect", "line"].includes(tag)
    ? document.createElementNS(SVG, tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

// Text in which characters that show nothing, or reorder what is around them, can be seen.
function visible(text) {
  return text
    .replace(/\n/g, "↵")
    .replace(/\t/g, "→")
    .replace(/[\u0000-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g,
      (c) => `⟨${c.charCodeAt(0).toString(16)}⟩`);
}

// Text for a screen reader, which says nothing of spaces.
function spoken(text) {
  return text.trim() ? visible(text) : text ? "space" : "empty";
}

function color(expert) {
  return `hsl(${(expert * 137.5) % 360} 65% var(--swatch))`;
}

function swatch(expert) {
  return element("span", { class: "swatch", style: `background:${color(expert)}`, "aria-hidden": "true" });
}

function percent(share) {
  return `${(100 * share).toFixed(share < 0.01 ? 3 : 1)}%`;
}

function number(value) {
  const size = Math.abs(value);
  return size >= 100 && size < 1e6 ? value.toFixed(0) : value.toPrecision(3);
}

function chip(text, kind = "") {
  return element("span", { class: `chip ${kind}` }, visible(text));
}

function heading(level, ...children) {
  return element(`h${level}`, {}, ...children);
}

// A bar chart of counts from 0 to the largest value, described for those who do not see it.
function chart(counts, most, label) {
  const top = Math.max(1, ...counts), width = 10;
  const bars = Array.from(counts, (count, i) => {
    const height = (70 * count) / top;
    return element("rect", { x: i * width, y: 71 - height, width: width - 1, height });
  });
  const peak = counts.indexOf(Math.max(...counts));
  const described = `${label}, from 0 to ${number(most)}; most often about ` +
    number(((peak + 0.5) / counts.length) * most);
  return element("div", {},
    element("svg", {
      viewBox: `0 0 ${counts.length * width} 72`, preserveAspectRatio: "none", role: "img", "aria-label": described,
    }, ...bars, element("line", { x1: 0, x2: counts.length * width, y1: 71.5, y2: 71.5 })),
    element("div", { class: "axis", "aria-hidden": "true" },
      element("span", {}, "0"), element("span", {}, number(most))));
}

// A table with a header row; a cell is text, an element, or a number as text in {number}.
function table(names, rows) {
  const cell = (tag, content) => content?.number !== undefined
    ? element(tag, { class: "number" }, content.number)
    : element(tag, {}, content);
  return element("table", {},
    element("thead", {}, element("tr", {}, names.map((name) => {
      const made = cell("th", name);
      made.scope = "col";
      return made;
    }))),
    element("tbody", {}, rows.map((cells) => element("tr", {}, cells.map((one) => cell("td", one))))));
}

// Mark the row of what is shown elsewhere, if it is in the table: at this index, or none at -1.
function markCurrent(made, index) {
  made.tBodies[0].rows[index]?.setAttribute("aria-current", "true");
}

function select(id, label, options, chosen, change) {
  return element("label", {}, `${label} `,
    element("select", { id, change: (event) => change(event.target.value) },
      options.map((name) => element("option", { value: name, selected: name === chosen && "" }, name))));
}

// A list of elements made from items, some at a time. The focus, on a button that goes, moves on to
// what it brought.
function inPortions(items, portion, show) {
  const box = element("div");
  const add = (begin) => {
    const end = Math.min(items.length, begin + portion);
    const shown = show(items.slice(begin, end));
    box.append(shown);
    if (end < items.length) {
      const more = element("button", {
        type: "button", click: () => { more.remove(); add(end).querySelector("a")?.focus(); },
      }, `Show ${Math.min(portion, items.length - end)} more of ${items.length - end}`);
      box.append(more);
    }
    return shown;
  };
  add(0);
  return box;
}
