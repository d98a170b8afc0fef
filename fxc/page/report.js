"use strict";
const table = document.getElementById("layers");
if (table) {
  const body = table.tBodies[0], rows = Array.from(body.rows), heads = Array.from(table.tHead.rows[0].cells);
  const find = document.getElementById("find"), kind = document.getElementById("kind"), shown = document.getElementById("shown");
  const value = (row, at) => {
    const cell = row.cells[at];
    return cell.dataset.v === undefined ? cell.textContent.toLowerCase() : Number(cell.dataset.v || "NaN");
  };
  const sort = (at, sign) => {
    // What has no number comes last either way.
    const key = new Map(rows.map((row) => [row, value(row, at)]));
    const compare = (a, b) => {
      const x = key.get(a), y = key.get(b);
      if (typeof x === "string") return sign * x.localeCompare(y);
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return sign * (x - y);
    };
    body.append(...rows.slice().sort(compare));
    heads.forEach((head, place) => {
      if (place === at) head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
  };
  heads.forEach((head, at) => head.querySelector("button").addEventListener("click", () => {
    const first = rows[0].cells[at].dataset.v === undefined ? "ascending" : "descending";
    const was = head.getAttribute("aria-sort");
    const next = was === null ? first : was === "ascending" ? "descending" : "ascending";
    sort(at, next === "ascending" ? 1 : -1);
  }));
  const filter = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !(words.every((word) => text.includes(word)) && (!kind.value || row.dataset.status === kind.value));
      count += !row.hidden;
    }
    shown.textContent = `${count} of ${rows.length}`;
  };
  find.addEventListener("input", filter);
  kind.addEventListener("change", filter);
  document.getElementById("tools").hidden = false;
  filter();
}
