"use strict";
const list = document.getElementById("cards");
const cards = [...list.children];
const sort = document.getElementById("sort");
const direction = document.getElementById("direction");
const search = document.getElementById("search");
const count = document.getElementById("count");

function arrange() {
  const descending = direction.dataset.descending === "1";
  const key = sort.value === "" ? "order" : "change" + sort.value;
  direction.hidden = sort.value === "";
  direction.textContent = descending ? "Largest first ↓" : "Smallest first ↑";
  const value = (card) => (card.dataset[key] === "" ? null : Number(card.dataset[key]));
  cards.sort((a, b) => {
    const x = value(a), y = value(b);
    if (x === null || y === null) return (x === null) - (y === null); // what has no score comes last
    const difference = key === "order" || !descending ? x - y : y - x;
    return difference || a.dataset.order - b.dataset.order;
  });
  list.append(...cards);
}

function filter() {
  const wanted = search.value.trim().toLowerCase();
  let shown = 0;
  for (const card of cards) {
    card.hidden = !card.querySelector(".prompt").textContent.toLowerCase().includes(wanted);
    shown += !card.hidden;
  }
  count.textContent = shown + " shown";
}

sort.addEventListener("change", arrange);
direction.addEventListener("click", () => {
  direction.dataset.descending = direction.dataset.descending === "1" ? "0" : "1";
  arrange();
});
search.addEventListener("input", filter);

// One image after the other in the same place shows best what differs.
const viewer = document.getElementById("viewer");
const large = document.getElementById("large");
const tabs = document.getElementById("tabs");
let pictures = [];
let current = 0;

function show(index) {
  current = (index + pictures.length) % pictures.length;
  large.src = pictures[current].querySelector("img").src;
  large.alt = pictures[current].querySelector("img").alt;
  [...tabs.children].forEach((tab, i) => tab.setAttribute("aria-pressed", i === current));
}

list.addEventListener("click", (event) => {
  const card = event.target.closest(".card");
  if (event.target.classList.contains("prompt")) event.target.classList.toggle("open");
  const button = event.target.closest("figure button");
  if (!button) return;
  pictures = [...card.querySelectorAll("figure")];
  tabs.replaceChildren(...pictures.map((picture, i) => {
    const tab = document.createElement("button");
    tab.type = "button";
    tab.textContent = picture.querySelector("figcaption").textContent;
    tab.addEventListener("click", () => show(i));
    return tab;
  }));
  large.className = card.classList.contains("pixel") ? "pixel" : "";
  document.getElementById("what").textContent = card.querySelector(".prompt").textContent;
  show(pictures.indexOf(button.closest("figure")));
  viewer.showModal();
});
viewer.addEventListener("click", (event) => {
  if (event.target === viewer) viewer.close();
  if (event.target === large) show(current + 1);
});
viewer.addEventListener("keydown", (event) => {
  if (event.key === "ArrowRight") show(current + 1);
  if (event.key === "ArrowLeft") show(current - 1);
});
arrange();
