// What is chosen, its link, and the keys. The link holds everything that is needed to see the same again.

import { ask, byId, make } from "./dom.js";
import { ImageList } from "./list.js";
import * as panel from "./panel.js";
import { Stage } from "./stage.js";

const data = await (await ask("api/images")).json();
const tasks = data.tasks.map((task) => task.name);
const state = { index: null, task: 0, scores: true, kept: true, opacity: 60, patch: null };
let image = null, kept = [], asked = 0;

const list = new ImageList(data, tasks[0], (index) => choose(index), link);
const stage = new Stage(data.version, link, (rank) => goTo(rank));

function message(text) {
  byId("message").hidden = !text;
  byId("message").textContent = text;
}

async function choose(index, view = null, patch = null) {
  if (index === undefined || !data.images[index]) return;
  Object.assign(state, { index, patch });
  const mine = ++asked, row = data.images[index];
  list.choose(index);
  byId("name").textContent = row.name;
  panel.showAnswers(row.answers, tasks, tasks[state.task]);
  stage.clear();
  image = null;
  kept = [];
  const slow = setTimeout(() => { // what is still there is of the image before
    message("Opening ...");
    panel.showNotes([]);
    panel.showFacts({});
    panel.showKept(index, kept, null, data.version, goTo);
    byId("layers").hidden = true;
  }, 300);
  let found;
  try {
    found = await (await ask(`api/images/${index}`)).json();
  } catch (error) {
    found = { notes: [], problem: `The server does not answer (${error.message}). Is keyhole view still running?` };
  }
  clearTimeout(slow);
  if (mine !== asked) return; // another image was chosen meanwhile
  image = found;
  const without = row.scores || !Object.keys(row.answers).length ? [] : ["Without scores: " + (data.notes.at(-1) ?? "predict again.")];
  panel.showNotes([...image.notes, image.no_scores, image.note, ...without]);
  panel.showFacts(image);
  message(image.problem ?? "");
  byId("layers").hidden = !image.map || Boolean(image.problem);
  if (!image.problem) stage.show(index, image, view);
  layers();
  link();
}

// Scores and kept patches of the chosen task.
function layers() {
  const task = tasks[state.task];
  kept = (image?.kept ?? []).map((patch, place) => ({
    ...patch, place, rank: place + 1, weight: patch.attention[task],
  })).sort((one, other) => other.weight - one.weight || one.rank - other.rank);
  panel.showKept(state.index, image?.problem ? [] : kept, image?.map?.patches, data.version, goTo);
  if (!image || image.problem) return;
  stage.showKept(kept, state.kept);
  if (image.map) panel.showLegend(data.palette, { patches: image.map.patches, top: image.map.top[task] });
  scores();
  stage.mark(state.patch);
  panel.markKept(state.patch);
}

function scores() {
  stage.showScores(state.scores ? state.task : null, state.opacity / 100);
}

function goTo(rank) {
  const patch = kept.find((each) => each.rank === rank);
  if (!patch) return;
  state.patch = rank;
  stage.mark(rank);
  panel.markKept(rank);
  stage.fly(patch.box);
}

function link() {
  if (state.index === null) return;
  const view = stage.view() ?? {};
  const parts = { image: state.index, ...view, task: state.task, opacity: state.opacity, scores: Number(state.scores),
    kept: Number(state.kept), ...(state.patch ? { patch: state.patch } : {}), ...list.settings() };
  history.replaceState(null, "", `#${new URLSearchParams(parts)}`);
}

function controls() {
  byId("task").value = state.task;
  byId("show-scores").checked = state.scores;
  byId("show-kept").checked = state.kept;
  byId("opacity").value = state.opacity;
  byId("opacity-value").textContent = `${state.opacity} %`;
}

async function restore() {
  const said = new URLSearchParams(location.hash.slice(1));
  const number = (name, otherwise) => {
    const value = Number(said.get(name) ?? "x");
    return Number.isFinite(value) ? value : otherwise;
  };
  state.task = Math.min(Math.max(0, Math.trunc(number("task", 0))), Math.max(0, tasks.length - 1));
  state.scores = number("scores", 1) !== 0;
  state.kept = number("kept", 1) !== 0;
  state.opacity = Math.min(100, Math.max(0, number("opacity", 60)));
  list.task = tasks[state.task];
  list.fill();
  list.restore(said);
  controls();
  const view = said.has("zoom") ? { x: number("x", 0), y: number("y", 0), zoom: number("zoom", 0) } : null;
  await choose(number("image", list.shown[0]?.index), view, number("patch", null));
}

const actions = {
  scores() { state.scores = !state.scores; controls(); scores(); link(); },
  kept() { state.kept = !state.kept; controls(); stage.toggleKept(state.kept); link(); },
  opacity(value) {
    state.opacity = Math.min(100, Math.max(0, value));
    controls();
    stage.setOpacity(state.opacity / 100);
    link();
  },
  patch(step) {
    const place = kept.findIndex((patch) => patch.rank === state.patch);
    goTo(kept[place < 0 ? (step > 0 ? 0 : kept.length - 1) : (place + step + kept.length) % kept.length]?.rank);
  },
  theme(dark) {
    document.documentElement.classList.toggle("dark", dark);
    byId("theme").textContent = dark ? "Light" : "Dark";
  },
  async copy() {
    await navigator.clipboard?.writeText(location.href);
    byId("copy").textContent = navigator.clipboard ? "Copied" : "See address bar";
    setTimeout(() => { byId("copy").textContent = "Copy link"; }, 1500);
  },
};

const keys = {
  ArrowDown: () => choose(list.beside(1)), ArrowUp: () => choose(list.beside(-1)),
  n: () => actions.patch(1), p: () => actions.patch(-1), s: actions.scores, k: actions.kept,
  "[": () => actions.opacity(state.opacity - 10), "]": () => actions.opacity(state.opacity + 10),
  "0": () => image && !image.problem && stage.fit(), "+": () => stage.map.zoomIn(), "-": () => stage.map.zoomOut(),
  "/": () => byId("search").focus(), l: actions.copy, "?": () => byId("help").showModal(),
  d: () => byId("theme").click(),
};

document.addEventListener("keydown", (event) => {
  const field = event.target.closest("input[type=search], select, dialog, input[type=range]");
  if (field && event.key === "Escape" && field.id === "search") field.blur();
  if (field || event.ctrlKey || event.metaKey || event.altKey) return;
  const action = keys[event.key] ?? keys[event.key.toLowerCase()];
  if (!action) return;
  event.preventDefault();
  event.stopPropagation(); // Leaflet moves the map by arrows
  action();
}, true);

byId("show-scores").addEventListener("change", actions.scores);
byId("show-kept").addEventListener("change", actions.kept);
byId("opacity").addEventListener("input", (event) => actions.opacity(Number(event.target.value)));
byId("copy").addEventListener("click", actions.copy);
byId("help-button").addEventListener("click", () => byId("help").showModal());
byId("theme").addEventListener("click", () => {
  const dark = !document.documentElement.classList.contains("dark");
  localStorage.setItem("theme", dark ? "dark" : "light");
  actions.theme(dark);
});
byId("task").addEventListener("change", (event) => {
  state.task = Number(event.target.value);
  list.task = tasks[state.task];
  list.fill();
  if (state.index !== null) panel.showAnswers(data.images[state.index].answers, tasks, tasks[state.task]);
  layers();
  link();
});
window.addEventListener("hashchange", restore);

actions.theme((localStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark");
byId("title").textContent = data.title;
document.title = `${data.title} \u2013 keyhole`;
byId("task-choice").hidden = tasks.length < 2;
byId("task").replaceChildren(...tasks.map((name, value) => make("option", { value, textContent: name })));
await restore();
document.body.dataset.ready = "yes";
