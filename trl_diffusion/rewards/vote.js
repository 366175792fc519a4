// The page of people's votes. All that counts is on the server: every click is sent at once, and what is shown is its answer.
"use strict";

const WORDS = ["", "liked", "loved"];
const SMALL = 128; // pixels below which a picture is shown with its pixels
let state = null;
let shown = ""; // the group and its pictures on the page

const byId = (id) => document.getElementById(id);
const current = () => (state ? state.groups.find((group) => group.state === "open") : undefined);

async function ask(name, body) {
  try {
    const answer = await fetch(name, body === undefined ? {} : { method: "POST", body: JSON.stringify(body) });
    if (answer.ok) {
      show(await answer.json());
    } else if (answer.status === 409) {
      await ask("state"); // somebody else was faster
    } else {
      trouble(await answer.text());
    }
  } catch {
    trouble("The run does not answer. Votes that were cast are kept; this page goes on when it is back.");
  }
}

function trouble(text) {
  byId("trouble").textContent = text;
}

function picture(key, kind) {
  const image = document.createElement("img");
  image.src = `pictures/${key}`;
  image.alt = kind;
  image.onload = () => {
    image.classList.toggle("small", image.naturalWidth < SMALL);
    image.parentElement.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
  };
  return image;
}

function show(next) {
  trouble("");
  if (state && next.run === state.run) {
    const [older, same] = [next.version.some((n, i) => n < state.version[i]), String(next.version) === String(state.version)];
    if (older || same) return; // an answer that was overtaken by another, or nothing new
  }
  state = next;
  const group = current();
  const number = group ? state.groups.indexOf(group) + 1 : 0;
  byId("where").textContent = group ? `Group ${number} of ${state.groups.length}` : "";
  byId("message").textContent = state.message;
  byId("progress").hidden = state.progress === null;
  byId("progress").value = state.progress ?? 0;
  byId("voting").hidden = !group;
  byId("wait").hidden = Boolean(group);
  document.title = group ? `Vote: ${group.prompt}` : "The trainer's turn";
  byId("dots").replaceChildren(
    ...state.groups.map((each) => {
      const dot = document.createElement("i");
      dot.className = each === group ? "now" : each.state;
      return dot;
    }),
  );
  if (group) showGroup(group);
  for (const id of ["skip", "done"]) byId(id).disabled = !group;
  byId("undo").disabled = state.groups.length === 0;
  showStrip();
}

function showGroup(group) {
  byId("prompt").textContent = group.prompt;
  const name = group.id;
  if (name !== shown) {
    shown = name;
    byId("source").replaceChildren(...(group.source ? [picture(group.source, "the picture that the prompt edits")] : []));
    byId("grid").replaceChildren(
      ...group.images.map(([key], i) => {
        const button = document.createElement("button");
        button.dataset.key = key;
        const digit = document.createElement("span");
        digit.textContent = i + 1;
        button.append(picture(key, `picture ${i + 1}`), digit, document.createElement("b"));
        button.onclick = () => vote(key);
        return button;
      }),
    );
  }
  for (const [key, score] of group.images) {
    const button = byId("grid").querySelector(`[data-key="${key}"]`);
    button.dataset.score = score;
    button.querySelector("b").textContent = WORDS[score];
    button.setAttribute("aria-label", `picture, ${WORDS[score] || "not voted for"}`);
  }
}

function showStrip() {
  byId("progress-strip").hidden = state.strip.length === 0;
  const name = JSON.stringify([state.strip, state.run, state.version[1]]);
  if (byId("strip").dataset.name === name) return;
  byId("strip").dataset.name = name;
  byId("strip").replaceChildren(
    ...state.strip.map((row) => {
      const figure = document.createElement("figure");
      const both = document.createElement("div");
      for (const [key, word] of [[row.before, "before"], [row.now, "now"]]) {
        const side = document.createElement("span");
        side.append(picture(`${key}?${state.run}-${state.version[1]}`, word), word);
        both.append(side);
      }
      const caption = document.createElement("figcaption");
      caption.textContent = row.prompt;
      figure.append(both, caption);
      return figure;
    }),
  );
}

function vote(key) {
  const group = current();
  const found = group?.images.find(([each]) => each === key);
  if (found) ask("vote", { group: group.id, image: key, score: (found[1] + 1) % 3 });
}

const close = (name) => current() && ask(name, { group: current().id });
byId("done").onclick = () => close("done");
byId("skip").onclick = () => close("skip");
byId("undo").onclick = () => ask("undo", {});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const group = current();
  if (event.key === "Enter" || event.key === " " || event.key === "ArrowRight") close("done");
  else if (event.key === "s" || event.key === "S") close("skip");
  else if (event.key === "u" || event.key === "U" || event.key === "Backspace") ask("undo", {});
  else if (/^[1-9]$/.test(event.key) && group?.images[event.key - 1]) vote(group.images[event.key - 1][0]);
  else return;
  event.preventDefault();
});

(async () => {
  for (;;) {
    await ask("state");
    await new Promise((done) => setTimeout(done, 500));
  }
})();
