// Controls above the overview of methods: a text, a choice for each column that has few values, and how many are shown.
// Without this script the table is whole.

const CHOICES = ["Family", "For", "Starts as the base", "Merges", "Calibrated"];

function filterable(table) {
  const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
  const rows = [...table.tBodies[0].rows];
  const values = (row, column) => row.cells[column].textContent.split(",").map((text) => text.trim());

  const bar = document.createElement("form");
  bar.className = "filter";
  bar.addEventListener("submit", (event) => event.preventDefault());

  const search = document.createElement("input");
  Object.assign(search, { type: "search", placeholder: "Any words", name: "words" });
  search.setAttribute("aria-label", "Words that a row must contain");
  bar.append(search);

  const chosen = new Map();
  for (const head of CHOICES) {
    const column = heads.indexOf(head);
    if (column < 0) continue;
    const select = document.createElement("select");
    select.name = head;
    select.setAttribute("aria-label", head);
    select.append(new Option(`${head}: any`, ""));
    for (const value of [...new Set(rows.flatMap((row) => values(row, column)))].sort()) {
      select.append(new Option(`${head}: ${value}`, value));
    }
    chosen.set(column, select);
    bar.append(select);
  }
  const count = document.createElement("output");
  bar.append(count);

  function update() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const fits =
        words.every((word) => text.includes(word)) &&
        [...chosen].every(([column, select]) => !select.value || values(row, column).includes(select.value));
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${rows.length}`;
  }

  bar.addEventListener("input", update);
  bar.addEventListener("reset", () => setTimeout(update));
  const reset = document.createElement("button");
  Object.assign(reset, { type: "reset", textContent: "All" });
  bar.append(reset);
  table.closest(".filterable").before(bar);
  update();
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".filterable table").forEach(filterable);
});
