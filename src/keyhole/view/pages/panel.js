// The right side: what was predicted, the kept patches, and facts about the image.

import { byId, make, percent, written } from "./dom.js";

const MOST_CLASSES = 5;

// The chosen task first, with its classes; of the others the answer alone.
export function showAnswers(answers, tasks, chosen) {
  const order = Object.entries(answers).sort(([one], [other]) => (other === chosen) - (one === chosen));
  if (!order.length) {
    byId("answers").replaceChildren(make("p", {
      className: "hint", textContent: "No prediction is stored for it. keyhole predict RUN IMAGES --out DIR makes one; then open DIR.",
    }));
    return;
  }
  byId("answers").replaceChildren(...order.map(([task, answer]) => {
    const box = make("div", { className: "answer" }), wrong = answer.error > 0;
    const classes = Object.entries(answer.probability).sort((one, other) => other[1] - one[1]);
    const known = answer.error !== null && classes.length;
    box.append(make("h2", { textContent: tasks.length > 1 ? `Prediction: ${task}` : "Prediction" }));
    box.append(make("div", { className: "line" }, make("b", {
      className: known ? (wrong ? "wrong" : "right") : "",
      textContent: `${known ? (wrong ? "\u2717 " : "\u2713 ") : ""}${written(answer.predicted)}`,
    })));
    if (answer.true) box.append(make("div", { className: "hint", textContent: `true: ${written(answer.true)}` }));
    if (task !== chosen) return box;
    for (const [name, share] of classes.slice(0, MOST_CLASSES)) {
      box.append(make("div", { className: "line" }, make("span", { textContent: name }),
        make("span", { textContent: percent(share) })), make("meter", { min: 0, max: 1, value: share }));
    }
    if (classes.length > MOST_CLASSES) {
      box.append(make("div", { className: "hint", textContent: `and ${classes.length - MOST_CLASSES} others` }));
    }
    return box;
  }));
}

export function showKept(index, kept, patches, version, onPatch) {
  byId("strip").hidden = !kept.length;
  const of = patches ? ` of ${patches.toLocaleString("en")}` : "";
  byId("strip-title").textContent = `${kept.length}${of} patches kept`;
  byId("patches").replaceChildren(...kept.map((patch) => {
    const side = Math.max(...patch.box.slice(2));
    const picture = make("img", {
      alt: "", loading: "lazy", src: `patches/${index}/${patch.place}?v=${version}`, className: side < 80 ? "small" : "",
    });
    const button = make("button", {
      title: `${patch.rank}: x ${patch.box[0]}, y ${patch.box[1]}, score ${patch.score}`, ariaPressed: "false",
    }, picture, percent(patch.weight));
    button.dataset.rank = patch.rank;
    button.addEventListener("click", () => onPatch(patch.rank));
    return button;
  }));
}

export function markKept(rank) {
  for (const button of byId("patches").children) {
    const chosen = Number(button.dataset.rank) === rank;
    button.ariaPressed = chosen;
    if (chosen) button.scrollIntoView({ block: "nearest" });
  }
}

export function showFacts(image) {
  const size = image.width && `${image.width.toLocaleString("en")} \u00d7 ${image.height.toLocaleString("en")} px`;
  const facts = {
    size,
    resolution: image.mpp && `${Number(image.mpp.toPrecision(4))} \u00b5m per pixel`,
    levels: image.levels?.length > 1 && image.levels.map((level) => Math.round(level[2])).join(", "),
    model: image.model,
    file: image.path,
  };
  byId("facts").replaceChildren(...Object.entries(facts).filter(([, value]) => value)
    .flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]));
}

export function showNotes(notes) {
  byId("notes").replaceChildren(...notes.filter(Boolean).map((note) => make("p", { textContent: note })));
}

export function showLegend(palette, { patches, top }) {
  byId("ramp").replaceChildren(...palette.map((color) => {
    const step = make("i");
    step.style.background = `rgb(${color.join(" ")})`;
    return step;
  }));
  byId("hottest").textContent = `${Number(top.toPrecision(3)).toLocaleString("en")} \u00d7 1/N`;
  byId("legend-text").textContent =
    `Share of a patch in the attention over all N = ${patches.toLocaleString("en")}, comparable across this image.`;
}
