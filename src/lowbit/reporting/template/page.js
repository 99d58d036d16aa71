"use strict";
// What the page does beyond reading: sort, filter, save. Without this script it shows everything all the same.

const all = (selector, within = document) => [...within.querySelectorAll(selector)];

function save(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const fileName = (text, suffix) => text.replace(/[^\w.-]+/g, "-").slice(0, 80) + suffix;

// Sorting

function key(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.value === undefined) return cell.textContent.trim().toLowerCase();
  return cell.dataset.value === "" ? null : Number(cell.dataset.value);
}

function sort(table, column, direction) {
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row, place) => ({ row, place, key: key(row, column) }));
  rows.sort((a, b) => {
    if (a.key === null || b.key === null) return (a.key === null) - (b.key === null) || a.place - b.place;
    const order = typeof a.key === "number" ? a.key - b.key : a.key.localeCompare(b.key, "en", { numeric: true });
    return direction * order || a.place - b.place;
  });
  body.append(...rows.map((each) => each.row));
}

for (const table of all(".table table")) {
  all("thead th", table).forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      all("thead th", table).forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
      sort(table, column, direction);
    });
  });
}

// Filtering: every word must occur in a row. Marks of figures in the same section fade with their rows.

for (const input of all("input[type=search]")) {
  const holder = input.closest(".table");
  const rows = [...holder.querySelector("table").tBodies[0].rows];
  const section = input.closest("section");
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const away = new Set();
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      if (row.hidden) away.add(row.cells[0].textContent.trim());
      else shown += 1;
    }
    for (const mark of all(".mark", section)) mark.classList.toggle("away", away.has(mark.dataset.key));
    holder.querySelector("[role=status]").textContent = `${shown} of ${rows.length} rows`;
  });
}

// Saving

const quoted = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

for (const button of all("[data-do=csv]")) {
  button.addEventListener("click", () => {
    const table = button.closest(".table").querySelector("table");
    const lines = [...table.rows].map((row) => [...row.cells].map((cell) => quoted(cell.textContent.trim())).join(","));
    save(fileName(table.dataset.name, ".csv"), "text/csv", lines.join("\n") + "\n");
  });
}

for (const button of all("[data-do=svg]")) {
  button.addEventListener("click", () => {
    const figure = button.closest("figure");
    const text = new XMLSerializer().serializeToString(figure.querySelector("svg"));
    const alone = text.replace(/var\(--[\w-]+,\s*(#[0-9a-f]{6})\)/g, "$1"); // colours of its own: black on white
    save(fileName(figure.dataset.name, ".svg"), "image/svg+xml", alone);
  });
}

for (const tools of all(".tools")) tools.hidden = false;

// A link into a closed part opens it; on paper everything is open.

function openTarget() {
  const target = location.hash ? document.getElementById(decodeURIComponent(location.hash.slice(1))) : null;
  if (target instanceof HTMLDetailsElement) target.open = true;
}
addEventListener("hashchange", openTarget);
openTarget();
let closed = [];
addEventListener("beforeprint", () => {
  closed = all("details:not([open])");
  for (const each of closed) each.open = true;
});
addEventListener("afterprint", () => {
  for (const each of closed) each.open = false;
});
