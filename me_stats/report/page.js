"use strict";
const by = id => document.getElementById(id);
const rows = [...document.querySelectorAll(".claims > li")];
const filter = by("page-filter"), all = by("page-all"), shown = by("page-shown"), nothing = by("page-nothing");
const folds = () => rows.filter(row => !row.hidden).map(row => row.querySelector(":scope > details")).filter(Boolean);
const of = (n, total, noun) => `${n} of ${total} ${noun}`;

// What a row says, without its environment and configuration: those would match nearly every word.
let texts = null;
function textOf(row) {
  const skip = node => node.nodeType === 1 && node.matches(".origin, .copied, .anchor") ? 2 : 1;
  const walker = document.createTreeWalker(row, 5, skip), parts = [];
  while (walker.nextNode()) if (walker.currentNode.nodeType === 3) parts.push(walker.currentNode.data);
  return plain(parts.join(" "));
}
function plain(text) {
  return text.normalize("NFKC").toLowerCase().replace(/[’‘]/g, "'").replace(/−/g, "-");
}

function search() {
  const words = plain(filter.value).split(/\s+/).filter(Boolean);
  texts ??= rows.map(textOf);
  rows.forEach((row, i) => { row.hidden = !words.every(word => texts[i].includes(word)); });
  const sections = [...document.querySelectorAll(".others")];
  sections.forEach(part => { part.hidden = words.length > 0 && !part.querySelector(".claims > li:not([hidden])"); });
  const claims = rows.filter(row => !row.closest(".others")), others = rows.filter(row => row.closest(".others"));
  const left = list => list.filter(row => !row.hidden).length;
  const counts = [of(left(claims), claims.length, "claims")];
  if (others.length) counts.push(of(left(others), others.length, "other experiments"));
  shown.textContent = words.length ? counts.join(", ") : "";
  nothing.hidden = left(rows) > 0;
  label();
}
function label() {
  const open = folds();
  all.textContent = open.length && open.every(fold => fold.open) ? "Close all" : "Open all";
}
function address() {
  const query = filter.value.trim();
  history.replaceState(null, "", query ? "#q=" + encodeURIComponent(query) : location.pathname + location.search);
}

filter.hidden = all.hidden = filter.nextElementSibling.hidden = false;
filter.addEventListener("input", () => { search(); address(); });
filter.addEventListener("keydown", event => {
  if (event.key !== "Escape") return;
  event.preventDefault();
  if (!filter.value) return filter.blur();
  filter.value = "";
  search();
  address();
});
addEventListener("keydown", event => {
  const busy = event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input, textarea, select");
  if (event.key !== "/" || busy) return;
  event.preventDefault();
  filter.focus();
  filter.select();
});
all.addEventListener("click", () => {
  const open = folds().some(fold => !fold.open);
  folds().forEach(fold => { fold.open = open; });
});

// An experiment that bears on several claims holds its figure once; the others copy it when they open.
function copy(fold) {
  for (const again of fold.querySelectorAll(".again:not(.copied)")) {
    again.classList.add("copied");
    const figures = [...by(again.dataset.from).querySelectorAll("figure")].map(figure => figure.cloneNode(true));
    figures.forEach(figure => figure.classList.add("copied"));
    again.before(...figures);
  }
}
addEventListener("toggle", event => {
  if (event.target.open) copy(event.target);
  label();
}, true);
document.querySelectorAll(".claims > li > details[open]").forEach(copy);

// A small screen shows a figure at its own size, to be moved about, at a tap.
document.addEventListener("click", event => {
  event.target.closest(".paper")?.classList.toggle("full");
});

// The address names the row that was opened last, ready to be passed on, unless it holds a search.
document.querySelectorAll(".claims").forEach(list => list.addEventListener("click", event => {
  const row = event.target.closest(".claims > li > details > summary")?.closest("li");
  if (row && !filter.value.trim()) history.replaceState(null, "", "#" + encodeURIComponent(row.id));
}));
function named() {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {
    return "";
  }
}
function follow() {
  const name = named();
  if (name.startsWith("q=")) {
    filter.value = name.slice(2);
    return search();
  }
  const target = name && by(name);
  if (!target) return;
  const row = rows.find(one => one.contains(target));
  if (row?.hidden) {
    filter.value = "";
    search();
  }
  for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  const own = target.querySelector(":scope > details");
  if (own) own.open = true;
  target.scrollIntoView();
}
addEventListener("hashchange", follow);
follow();

// Paper has no folds; environments stay in the records.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open]):not(.origin)")];
  closed.forEach(fold => { copy(fold); fold.open = true; });
  document.querySelectorAll("img").forEach(image => { image.loading = "eager"; });
});
addEventListener("afterprint", () => closed.forEach(fold => { fold.open = false; }));
