// The map: tiles of the image, scores over it, outlines of the kept patches, scale bar, and what is under the pointer.
// A point of Leaflet is (-y, x) in level-0 pixels, divided by 2 ** zooms, so that tiles of the server fit its own.

import { byId } from "./dom.js";

const OVERZOOM = 5;
const OUTLINE = { fill: false, interactive: false, color: "#ffffff", weight: 2 };
const CASING = { fill: false, interactive: true, color: "#101318", weight: 5, opacity: 0.75 };
const CHOSEN = "#ffd60a";

export class Stage {
  constructor(version, onMove, onPatch) {
    this.version = version;
    this.onPatch = onPatch;
    this.map = L.map("map", {
      crs: L.CRS.Simple, attributionControl: false, zoomSnap: 0.25, zoomDelta: 1, wheelPxPerZoomLevel: 100,
      fadeAnimation: false, maxBoundsViscosity: 0.8,
    });
    this.map.createPane("scores").style.zIndex = 300;
    this.map.on("moveend zoomend", () => { this.measure(); onMove(); });
    this.map.on("mousemove", (event) => this.tell(this.place(event.latlng)));
    this.map.on("mouseout", () => { this.pointed = null; byId("readout").hidden = true; });
    new ResizeObserver(() => this.map.invalidateSize()).observe(byId("map"));
    this.outlines = L.layerGroup();
    this.task = this.pointed = null;
    this.asking = false;
  }

  point(x, y) {
    return L.latLng(-y / this.unit, x / this.unit);
  }

  place(latlng) {
    return { x: latlng.lng * this.unit, y: -latlng.lat * this.unit };
  }

  bounds(x, y, width, height) {
    return L.latLngBounds(this.point(x, y), this.point(x + width, y + height));
  }

  clear() {
    this.map.eachLayer((layer) => layer.remove());
    this.outlines.clearLayers();
    this.image = this.scoreLayer = this.task = this.pointed = null;
    byId("readout").hidden = byId("scale").hidden = true;
  }

  show(index, image, view) {
    this.clear();
    this.index = index;
    this.image = image;
    this.unit = 2 ** image.zooms;
    const all = this.bounds(0, 0, image.width, image.height);
    this.map.setMinZoom(-20).setMaxZoom(image.zooms + OVERZOOM).setMaxBounds(null);
    this.whole = Math.min(image.zooms + OVERZOOM, this.map.getBoundsZoom(all, false, L.point(24, 24)));
    if (view) this.map.setView(this.point(view.x, view.y), view.zoom, { animate: false });
    else this.map.setView(all.getCenter(), this.whole, { animate: false });
    this.map.setMinZoom(Math.min(this.whole, 0) - 1).setMaxBounds(all.pad(0.6));
    this.tiles(`tiles/${index}/{z}/{x}/{y}?v=${this.version}`).addTo(this.map);
    this.measure();
  }

  tiles(address, options = {}) {
    return L.tileLayer(address, {
      tileSize: 256, noWrap: true, minZoom: -20, minNativeZoom: 0, maxNativeZoom: this.image.zooms,
      maxZoom: this.image.zooms + OVERZOOM, bounds: this.bounds(0, 0, this.image.width, this.image.height),
      keepBuffer: 1, ...options,
    });
  }

  fit() {
    this.map.setView(this.bounds(0, 0, this.image.width, this.image.height).getCenter(), this.whole);
  }

  showScores(task, opacity) {
    this.scoreLayer?.remove();
    this.scoreLayer = this.task = null;
    if (task === null || !this.image?.map) return;
    this.task = task;
    const address = `maps/${this.index}/${task}/{z}/{x}/{y}?v=${this.version}`;
    this.scoreLayer = this.tiles(address, { pane: "scores", opacity }).addTo(this.map);
  }

  setOpacity(opacity) {
    this.scoreLayer?.setOpacity(opacity);
  }

  showKept(kept, visible) {
    this.outlines.clearLayers();
    this.boxes = [...kept].reverse().map((patch) => { // the best last, on top
      const bounds = this.bounds(...patch.box);
      const casing = L.rectangle(bounds, CASING).on("click", () => this.onPatch(patch.rank));
      const line = L.rectangle(bounds, OUTLINE);
      this.outlines.addLayer(casing).addLayer(line);
      return { rank: patch.rank, casing, line };
    });
    this.outlines[visible ? "addTo" : "removeFrom"](this.map);
  }

  toggleKept(visible) {
    this.outlines[visible ? "addTo" : "removeFrom"](this.map);
  }

  mark(rank) {
    for (const box of this.boxes ?? []) {
      box.line.setStyle({ color: box.rank === rank ? CHOSEN : OUTLINE.color, weight: box.rank === rank ? 3 : 2 });
      if (box.rank === rank && this.map.hasLayer(this.outlines)) { box.casing.bringToFront(); box.line.bringToFront(); }
    }
  }

  // Move to a box so that it fills a quarter of the view, in the middle of it.
  fly([x, y, width, height]) {
    const around = this.bounds(x - width, y - height, 3 * width, 3 * height);
    const zoom = Math.min(this.map.getBoundsZoom(around), this.image.zooms + OVERZOOM);
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (still) this.map.setView(around.getCenter(), zoom, { animate: false });
    else this.map.flyTo(around.getCenter(), zoom, { duration: 0.6 });
  }

  view() {
    if (!this.image) return null;
    const { x, y } = this.place(this.map.getCenter());
    return { x: Math.round(x * 10) / 10, y: Math.round(y * 10) / 10, zoom: Math.round(this.map.getZoom() * 1000) / 1000 };
  }

  measure() {
    if (!this.image) return;
    byId("map").classList.toggle("sharp", this.map.getZoom() > this.image.zooms + 0.5);
    const perPixel = this.unit / 2 ** this.map.getZoom(), mpp = this.image.mpp;
    const most = 140 * perPixel * (mpp ?? 1);
    const step = 10 ** Math.floor(Math.log10(most));
    const length = [5, 2, 1].map((factor) => factor * step).find((each) => each <= most);
    const [amount, name] = !mpp ? [length, "px"] : length >= 1000 ? [length / 1000, "mm"] : [length, "\u00b5m"];
    const bar = byId("scale");
    bar.hidden = false;
    bar.firstElementChild.style.width = `${Math.round(length / (mpp ?? 1) / perPixel)}px`;
    bar.firstElementChild.textContent = `${Number(amount.toPrecision(3)).toLocaleString("en")} ${name}`;
  }

  // Tell the place under the pointer and its score, which is that of the pixel of the map that is drawn there.
  async tell(place) {
    const image = this.image, inside = image && place.x >= 0 && place.y >= 0 && place.x < image.width && place.y < image.height;
    this.pointed = inside ? place : null;
    if (!inside) byId("readout").hidden = true;
    if (this.asking) return; // the loop goes on with the new place
    this.asking = true;
    for (let told = null; this.pointed && told !== this.pointed;) {
      told = this.pointed;
      const shown = this.image, score = await this.scoreAt(told);
      if (this.pointed && this.image === shown) this.read(told, score);
    }
    this.asking = false;
  }

  async scoreAt({ x, y }) {
    if (this.task === null) return "";
    const zoom = Math.min(this.image.zooms, Math.max(0, Math.round(this.map.getZoom())));
    const pixel = 2 ** (this.image.zooms - zoom), patches = this.image.map.patches;
    const address = `scores/${this.index}/${this.task}/${zoom}/${Math.floor(x / pixel)}/${Math.floor(y / pixel)}`;
    const answer = await fetch(`${address}?v=${this.version}`).catch(() => null);
    if (!answer?.ok) return "score not known: the server does not answer";
    const score = await answer.json();
    return score === null ? "no patch here"
      : `score ${Number(score.toPrecision(3))} = ${Number((score * patches).toPrecision(2))} / N`;
  }

  read({ x, y }, score) {
    const place = `x ${Math.floor(x).toLocaleString("en")}, y ${Math.floor(y).toLocaleString("en")} px`;
    byId("readout").hidden = false;
    byId("readout").textContent = [place, score].filter(Boolean).join("   \u00b7   ");
  }
}
