// The list of images: filtered, sorted, and drawn only where it is seen, so that ten thousand images are no trouble.

import { byId, make, percent, written } from "./dom.js";

const ROW = 58;
const CHOICES = ["truth", "predicted", "right", "split", "sort", "search"];

export class ImageList {
  constructor(data, task, onChoose, onChange) {
    this.images = data.images.map((image, index) => ({ ...image, index }));
    this.version = data.version;
    this.task = task;
    this.onChoose = onChoose;
    this.chosen = null;
    this.fill(data);
    for (const id of CHOICES) byId(id).addEventListener("input", () => { this.refresh(); onChange(); });
    byId("list").addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(byId("list"));
    byId("rows").addEventListener("click", (event) => {
      const row = event.target.closest(".item");
      if (row) onChoose(Number(row.dataset.index));
    });
  }

  answer(image) {
    return image.answers[this.task];
  }

  fill() {
    const distinct = (value) => [...new Set(this.images.map(value).filter(Boolean))].sort();
    const answered = this.images.some((image) => this.answer(image));
    const options = (id, all, values) => {
      const select = byId(id), before = select.value;
      select.replaceChildren(make("option", { value: "", textContent: all }),
        ...values.map((value) => make("option", { value, textContent: value })));
      select.value = values.includes(before) ? before : "";
      select.hidden = values.length < 2;
    };
    const few = (values) => (values.length > 200 ? [] : values); // numbers are no labels
    options("truth", "any true label", few(distinct((image) => this.answer(image)?.true)));
    options("predicted", "any prediction", few(distinct((image) => this.answer(image)?.predicted)));
    options("split", "any split", distinct((image) => image.split));
    byId("right").hidden = !this.images.some((image) => [0, 1].includes(this.answer(image)?.error));
    for (const option of byId("sort").options) option.hidden = !answered && !["", "name"].includes(option.value);
    this.refresh();
  }

  settings() {
    return Object.fromEntries(CHOICES.map((id) => [id, byId(id).value]).filter(([, value]) => value));
  }

  restore(settings) {
    for (const id of CHOICES) {
      byId(id).value = settings.get(id) ?? "";
      if (byId(id).selectedIndex === -1) byId(id).value = "";
    }
    this.refresh();
  }

  refresh() {
    const wanted = Object.fromEntries(CHOICES.map((id) => [id, byId(id).value]));
    const words = wanted.search.toLowerCase().split(/\s+/).filter(Boolean);
    this.shown = this.images.filter((image) => {
      const answer = this.answer(image);
      return words.every((word) => image.name.toLowerCase().includes(word))
        && (!wanted.split || image.split === wanted.split)
        && (!wanted.truth || answer?.true === wanted.truth)
        && (!wanted.predicted || answer?.predicted === wanted.predicted)
        && (!wanted.right || (wanted.right === "wrong" ? answer?.error > 0 : answer?.error === 0));
    });
    this.sort(wanted.sort);
    const all = this.images.length;
    byId("count").textContent = this.shown.length === all
      ? `${all.toLocaleString("en")} image${all === 1 ? "" : "s"}`
      : `${this.shown.length.toLocaleString("en")} of ${all.toLocaleString("en")} images`;
    this.draw();
  }

  sort(by) {
    const sign = by.startsWith("-") ? -1 : 1, key = by.replace("-", "");
    const value = (image) => {
      const answer = this.answer(image);
      return { name: image.name, error: answer?.error, confidence: answer?.confidence,
               truth: answer?.true, predicted: answer?.predicted }[key];
    };
    if (!key) return;
    this.shown.sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      if (a === b || (a ?? b) === null || (a ?? b) === undefined) return one.index - other.index;
      if (a === null || a === undefined) return 1; // what is not known comes last
      if (b === null || b === undefined) return -1;
      return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
    });
  }

  draw() {
    const list = byId("list"), rows = byId("rows");
    if (!this.shown.length) {
      rows.style.height = "auto";
      rows.replaceChildren(make("p", { className: "hint", textContent: "No image fits these filters." }));
      rows.firstChild.style.padding = "8px 12px";
      return;
    }
    rows.style.height = `${this.shown.length * ROW}px`;
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 3);
    const last = Math.min(this.shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 3);
    const before = new Map([...rows.children].map((row) => [row.dataset.key, row]));
    rows.replaceChildren(...this.shown.slice(first, last).map((image, place) => {
      const key = `${image.index} ${this.task}`;
      const row = before.get(key) ?? this.row(image, key);
      row.style.top = `${(first + place) * ROW}px`;
      row.setAttribute("aria-selected", image.index === this.chosen);
      return row;
    }));
  }

  row(image, key) {
    const answer = this.answer(image), said = make("span", { className: "said" });
    if (answer) {
      const sure = answer.confidence === null ? "" : ` ${percent(answer.confidence)}`;
      const wrong = answer.error > 0, exact = Object.keys(answer.probability).length > 0;
      if (exact && answer.error !== null) {
        said.append(make("b", { className: wrong ? "wrong" : "right", textContent: wrong ? "\u2717 " : "\u2713 " }));
      }
      said.append(`${written(answer.predicted)}${sure}`);
      if (answer.true && (wrong || !exact)) said.append(` \u00b7 true ${written(answer.true)}`);
    } else {
      said.textContent = image.split;
    }
    const picture = make("img", { alt: "", loading: "lazy", src: `thumbnails/${image.index}?v=${this.version}` });
    picture.addEventListener("error", () => picture.replaceWith(make("span", { className: "blank" })));
    const name = make("span", { className: "name", title: image.name }, make("bdi", { textContent: image.name }));
    const row = make("div", { className: "item", role: "option" }, picture, make("div", {}, name, said));
    row.dataset.index = image.index;
    row.dataset.key = key;
    return row;
  }

  choose(index) {
    this.chosen = index;
    const place = this.shown.findIndex((image) => image.index === index), list = byId("list");
    if (place >= 0 && place * ROW < list.scrollTop) list.scrollTop = place * ROW;
    if (place >= 0 && (place + 1) * ROW > list.scrollTop + list.clientHeight) {
      list.scrollTop = (place + 1) * ROW - list.clientHeight;
    }
    this.draw();
  }

  // The image that comes `step` places after the chosen one in the list as it is now.
  beside(step) {
    const place = this.shown.findIndex((image) => image.index === this.chosen);
    const next = place < 0 ? 0 : Math.min(this.shown.length - 1, Math.max(0, place + step));
    return this.shown[next]?.index;
  }
}
