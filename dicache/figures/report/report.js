"use strict";

// The cells of a map, numbered row by row; places and sizes are shares of the area.
function gridOf(area) {
  const rows = Number(area.dataset.rows), columns = Number(area.dataset.columns);
  const within = (place, count) => Math.min(Math.max(Math.floor(place * count), 0), count - 1);
  const at = (row, column) => within(row / rows, rows) * columns + within(column / columns, columns);
  return {
    first: 0,
    find: (x, y) => within(y, rows) * columns + within(x, columns),
    move(place, key) {
      const row = Math.floor(place / columns), column = place % columns;
      return {
        ArrowLeft: at(row, column - 1), ArrowRight: at(row, column + 1),
        ArrowUp: at(row - 1, column), ArrowDown: at(row + 1, column),
        Home: at(row, 0), End: at(row, columns - 1),
      }[key];
    },
    box: (place) => [(place % columns) / columns, Math.floor(place / columns) / rows, 1 / columns, 1 / rows],
    read(table, place) {
      const row = table.tBodies[0].rows[Math.floor(place / columns)].cells, column = 1 + (place % columns);
      const names = [[table.dataset.row, row[0]], [table.dataset.column, table.tHead.rows[0].cells[column]]];
      return `${names.map(([word, cell]) => `${word || ""} ${cell.textContent}`.trim()).join(", ")}: ${row[column].textContent}`;
    },
  };
}

// The marks of a chart, in the order of the rows that tell of them; null for a row without one.
function marksOf(area) {
  const marks = JSON.parse(area.dataset.marks), along = area.dataset.nearest === "x";
  const known = [...marks.keys()].filter((i) => marks[i] !== null);
  return {
    first: known[0],
    find(x, y, size) {
      const apart = ([left, top]) => Math.hypot((left - x) * size.width, along ? 0 : (top - y) * size.height);
      return known.reduce((best, i) => (apart(marks[i]) < apart(marks[best]) ? i : best));
    },
    move(place, key) {
      const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -known.length, End: known.length }[key];
      return by && known[Math.min(Math.max(known.indexOf(place) + by, 0), known.length - 1)];
    },
    box: (place) => (along ? [marks[place][0], 0, 0, 1] : [...marks[place], 0, 0]),
    read(table, place) {
      const [name, ...cells] = table.tBodies[0].rows[place].cells, heads = table.tHead.rows[0].cells;
      const values = cells.map((cell, i) => `${heads[i + 1].textContent} ${cell.textContent}`);
      return `${table.dataset.row || ""} ${name.textContent}: ${values.join(", ")}`.trim();
    },
  };
}

const tip = document.querySelector(".tip");
let told = null; // the area that the tip is of

function placeTip(left, top, bottom) {
  const { width, height } = tip.getBoundingClientRect(), gap = 8;
  const above = top - height - gap, below = Math.min(bottom + gap, innerHeight - height - gap);
  tip.style.left = `${Math.min(Math.max(left - width / 2, gap), document.documentElement.clientWidth - width - gap)}px`;
  tip.style.top = `${above > gap ? above : below}px`;
}

for (const area of document.querySelectorAll(".area")) {
  const table = document.getElementById(area.dataset.table), cursor = area.querySelector(".cursor");
  const plot = area.dataset.marks ? marksOf(area) : gridOf(area);
  let current = plot.first;

  function show(place) {
    current = place;
    const size = area.getBoundingClientRect(), [left, top, width, height] = plot.box(place);
    Object.entries({ left, top, width, height }).forEach(([side, share]) => (cursor.style[side] = `${100 * share}%`));
    cursor.hidden = false;
    told = area;
    tip.textContent = plot.read(table, place);
    placeTip(size.left + (left + width / 2) * size.width, size.top + top * size.height, size.top + (top + height) * size.height);
  }
  function hide() {
    cursor.hidden = true;
    if (told === area) tip.textContent = "";
  }
  function point(event) {
    const size = area.getBoundingClientRect();
    show(plot.find((event.clientX - size.left) / size.width, (event.clientY - size.top) / size.height, size));
  }

  area.addEventListener("pointerdown", point);
  area.addEventListener("pointermove", point);
  area.addEventListener("pointerleave", hide);
  area.addEventListener("focus", () => show(current));
  area.addEventListener("blur", hide);
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const place = plot.move(current, event.key);
    if (place === undefined) return;
    event.preventDefault();
    show(place);
  });
}

for (const slider of document.querySelectorAll("input[type=range]")) {
  const figure = slider.closest("figure");

  function show() {
    figure.style.setProperty("--split", `${slider.value}%`);
    slider.setAttribute("aria-valuetext", `${slider.value} % uncached`);
  }
  function drag(event) {
    if (!event.buttons) return;
    const size = event.currentTarget.getBoundingClientRect();
    slider.value = (100 * (event.clientX - size.left)) / size.width;
    show();
  }

  slider.addEventListener("input", show);
  for (const pair of figure.querySelectorAll(".pair")) {
    pair.addEventListener("pointerdown", drag);
    pair.addEventListener("pointermove", drag);
  }
  show(); // browsers keep a slider where it was when a page is loaded again
}
