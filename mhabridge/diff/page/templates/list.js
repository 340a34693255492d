"use strict";
// Filtering, sorting and walking through the layers. Without this script all of them are there, in execution order.
(() => {
  const tree = document.getElementById("tree");
  if (!tree) return;
  const find = document.getElementById("find");
  const sort = document.getElementById("sort");
  const picks = [...document.querySelectorAll("#tools input[name=verdict]")];
  const shown = document.getElementById("shown");
  const rank = { none: 0, equal: 1, rounding: 2, off: 3, broken: 4 };
  const leaves = [...tree.querySelectorAll("details.layer")].map((layer) => ({
    layer,
    item: layer.parentElement,
    rows: [...layer.querySelectorAll("tr.entry")],
    pictures: [...layer.querySelectorAll("details.picture")],
    text: layer.dataset.text.toLowerCase(),
  }));
  const branches = [...tree.querySelectorAll("li.branch")];
  const grown = new Map([tree, ...tree.querySelectorAll("ol")].filter((list) => !list.closest(".inside"))
    .map((list) => [list, [...list.children]]));
  const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
  const counts = (row) => !("secondLook" in row.dataset); // two backends beside each other are no further comparison
  const why = (row) => (row.nextElementSibling?.matches("tr.why") ? row.nextElementSibling : null);
  const total = leaves.reduce((sum, leaf) => sum + leaf.rows.filter(counts).length, 0);

  function filter() {
    const wanted = find.value.trim().toLowerCase();
    const verdicts = new Set(picks.filter((pick) => pick.checked).map((pick) => pick.value));
    const all = verdicts.size === picks.length;
    let rows = 0, layers = 0;
    for (const leaf of leaves) {
      const named = leaf.text.includes(wanted);
      let visible = 0, entries = 0;
      for (const row of leaf.rows) {
        row.hidden = !(verdicts.has(row.dataset.verdict) && (named || row.dataset.text.toLowerCase().includes(wanted)));
        if (why(row)) why(row).hidden = row.hidden;
        visible += row.hidden ? 0 : 1;
        entries += row.hidden || !counts(row) ? 0 : 1;
      }
      for (const picture of leaf.pictures) picture.hidden = document.getElementById(picture.dataset.row).hidden;
      for (const table of leaf.layer.querySelectorAll(".inside > .scroll")) {
        table.hidden = !table.querySelector("tr.entry:not([hidden])");
      }
      leaf.item.hidden = leaf.rows.length ? !visible : !(all && named);
      rows += entries;
      layers += leaf.item.hidden ? 0 : 1;
    }
    for (const branch of branches) {
      branch.hidden = !branch.querySelector("li.leaf:not([hidden])");
      if ((wanted || !all) && !branch.hidden) branch.firstElementChild.open = true;
    }
    const some = rows < total || layers < leaves.length;
    shown.textContent = some
      ? `${rows.toLocaleString("en")} of ${counted(total, "comparison")} in ${layers.toLocaleString("en")} of ${counted(leaves.length, "layer")}`
      : `${counted(total, "comparison")} in ${counted(leaves.length, "layer")}`;
    document.getElementById("nothing").hidden = layers > 0;
  }

  const value = {
    order: (element) => Number(element.dataset.order),
    name: (element) => element.dataset.name,
    verdict: (element) => -rank[element.dataset.verdict],
    largest: (element) => (element.dataset.largest === "" ? Infinity : -Number(element.dataset.largest)),
    times: (element) => (element.dataset.times === "" ? Infinity : -Number(element.dataset.times)),
  };
  const before = (by) => (a, b) => {
    const [x, y] = [value[by](a), value[by](b)];
    const order = by === "name" ? x.localeCompare(y, "en", { numeric: true }) : x < y ? -1 : x > y ? 1 : 0;
    return order || value.order(a) - value.order(b);
  };

  function arrange() {
    const by = sort.value;
    for (const [list, children] of grown) list.append(...children);
    tree.classList.toggle("flat", by !== "order");
    if (by !== "order") {
      const sorted = [...leaves].sort((a, b) => before(by)(a.layer, b.layer));
      tree.append(...sorted.map((leaf) => leaf.item));
    }
    for (const leaf of leaves) {
      for (const body of new Set(leaf.rows.map((row) => row.parentElement))) {
        const sorted = [...body.querySelectorAll("tr.entry")].sort(before(by));
        body.append(...sorted.flatMap((row) => [row, why(row)].filter(Boolean)));
      }
    }
  }

  function reveal(element) {
    for (let at = element; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  }

  let last = null;
  function next() {
    const found = [...tree.querySelectorAll("details.layer.off, details.layer.broken")]
      .filter((layer) => !layer.parentElement.hidden);
    if (!found.length) { shown.textContent = "Nothing that is shown differs by more than rounding explains."; return; }
    last = found[(found.indexOf(last) + 1) % found.length];
    reveal(last);
    const summary = last.querySelector("summary");
    summary.focus({ preventScroll: true });
    summary.scrollIntoView({ block: "start" });
  }

  function target() {
    const element = /^#layer-\d+$/.test(location.hash) && document.getElementById(location.hash.slice(1));
    if (!element) return;
    reveal(element);
    element.querySelector("summary").focus({ preventScroll: true });
    element.scrollIntoView({ block: "start" });
  }

  document.getElementById("tools").hidden = false;
  document.getElementById("tools").addEventListener("submit", (event) => event.preventDefault());
  find.addEventListener("input", filter);
  for (const pick of picks) pick.addEventListener("change", filter);
  sort.addEventListener("change", arrange);
  document.getElementById("next").addEventListener("click", next);
  document.getElementById("unfold").addEventListener("click", () => {
    for (const { layer, item } of leaves) if (!item.hidden && rank[layer.dataset.verdict] > 2) reveal(layer);
  });
  document.getElementById("fold").addEventListener("click", () => {
    for (const details of tree.querySelectorAll("details")) details.open = false;
  });
  document.getElementById("reset").addEventListener("click", () => {
    find.value = "";
    for (const pick of picks) pick.checked = true;
    filter();
    find.focus();
  });
  addEventListener("hashchange", target);
  document.addEventListener("click", (event) => {
    // A second click on a link does not change the address, and so is no hashchange.
    const link = event.target.closest("a[href^='#layer-']");
    if (link && link.hash === location.hash) setTimeout(target);
  });
  filter(); // what a browser kept of the form after a reload
  if (sort.value !== "order") arrange();
  target();
  addEventListener("load", () => setTimeout(target)); // the browser's own move to the address comes in between
})();
