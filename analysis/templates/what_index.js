"use strict";
const list = document.getElementById("pictures");
const items = [...list.children];
const find = document.getElementById("find");
const order = document.getElementById("order");

function refresh() {
  const wanted = find.value.trim().toLowerCase();
  let count = 0;
  for (const item of items) {
    const words = item.dataset.words.toLowerCase().split("\n");
    item.hidden = !(wanted === "" || words.includes(wanted) || item.dataset.name.toLowerCase().includes(wanted));
    count += Number(!item.hidden);
  }
  document.getElementById("count").textContent = wanted === "" ? "" : `${count} of ${items.length}`;
}

function sort() {
  const value = { at: (item) => Number(item.dataset.at), kept: (item) => Number(item.dataset.kept), words: (item) => -Number(item.dataset.different) }[order.value];
  list.append(...items.sort((a, b) => value(a) - value(b) || Number(a.dataset.at) - Number(b.dataset.at)));
}

find.addEventListener("input", refresh);
order.addEventListener("change", sort);
document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
