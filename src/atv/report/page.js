"use strict";
// A click on a column's header sorts by it: ascending, descending, then the order that the table came in.
const words = new Intl.Collator(document.documentElement.lang, { numeric: true });
const next = { ascending: "descending", descending: null };
const isNumber = (row, column) => row.cells[column].dataset.value !== undefined;

function compare(a, b, column, turn) {
  const numbers = [isNumber(a, column), isNumber(b, column)];
  if (numbers[0] && numbers[1]) return turn * (a.cells[column].dataset.value - b.cells[column].dataset.value);
  if (numbers[0] !== numbers[1]) return numbers[0] ? -1 : 1; // a dash last, either way round
  return turn * words.compare(a.cells[column].textContent, b.cells[column].textContent);
}

for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const sorted = head.getAttribute("aria-sort");
    const order = sorted ? next[sorted] : "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    if (order) head.setAttribute("aria-sort", order);
    const turn = order === "descending" ? -1 : 1;
    body.append(...(order ? [...original].sort((a, b) => compare(a, b, column, turn)) : original));
  }));
}
