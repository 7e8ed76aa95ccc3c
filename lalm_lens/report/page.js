"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const BANDS = { early: "#8fb8de", object: "#f2c46d", late: "#a8d5a2", last: "#e08a8a" };
const LINES = ["#4a8fd6", "#d9772f", "#8a9099", "#c98a10", "#48a14d", "#cf4d4d", "#9467bd", "#2ca6a4", "#b5739d", "#7a6a3a"];
const KINDS = {
  audio_window: "windows of audio positions", encoder_window: "windows of the audio encoder's states",
  moment: "windows that the search for the moment tried", lens: "audio positions, the lens alone", token: "text positions",
};
const DASHES = ["solid", "dash", "dot", "dashdot"]; // where there are more lines than colours
const narrow = matchMedia("(max-width: 40rem)");
const marginOf = () => (narrow.matches ? { l: 58, r: 74, t: 8, b: 40 } : { l: 76, r: 92, t: 8, b: 40 }); // of all figures of a clip, so that their seconds stand in line
const CONFIG = { displayModeBar: false, responsive: true };
const DRAG = matchMedia("(hover: hover)").matches ? "zoom" : false; // where fingers scroll, they do not zoom
let context = null, playing = null;
const decoded = new Map();

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const escaped = (said) => said.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const visible = (token) => escaped(token.replace(/\n/g, "\\n").replace(/ /g, "\u2423"));
const layerName = (layer) => (layer < 0 ? "embed" : String(layer));
const readable = (value) => (value !== 0 && Math.abs(value) < 5e-4 ? value.toExponential(1) : value.toFixed(3));
const span = (start, end) => `${start.toFixed(2)} to ${end.toFixed(2)} s`;

function layout(more) {
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line") };
  const { xaxis, yaxis, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("ink"), size: 12 },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("soft"), font: { color: colour("ink") }, align: "left" },
    dragmode: DRAG, uirevision: "what a reader has chosen stays", xaxis: { ...axis, ...xaxis },
    yaxis: { ...axis, exponentformat: "none", ...yaxis }, ...rest,
  };
}

function plot(place, traces, { height, ...rest }) { // the element has the height: plotly forgets its own when a window changes
  place.style.height = `${height}px`;
  Plotly.react(place, traces, layout(rest), CONFIG);
}

function layerTicks(layers) {
  const blocks = layers.filter((layer) => layer >= 0), step = Math.max(1, Math.ceil(blocks.length / 10));
  const shown = layers.filter((layer) => layer < 0 || layer % step === 0);
  return { tickvals: shown, ticktext: shown.map(layerName) };
}

function wrapped(said, most) { // in lines of so many letters; a word that is longer is cut into some
  const lines = [""];
  for (const word of said.split(" ").flatMap((each) => each.match(new RegExp(`.{1,${Math.floor(most)}}`, "gu")))) {
    if (lines[lines.length - 1].length + word.length >= most) lines.push("");
    lines[lines.length - 1] += (lines[lines.length - 1] ? " " : "") + word;
  }
  return lines;
}

function drawCurve(place) {
  const its = data.curves[place.dataset.curve], traces = [];
  const places = its.lines.map((_, n) => n).sort((one, other) => its.lines[one].hidden - its.lines[other].hidden); // those that are seen first have colours of their own
  its.lines.forEach((line, n) => {
    const same = { legendgroup: line.name, visible: line.hidden ? "legendonly" : true };
    const nth = places.indexOf(n), paint = LINES[nth % LINES.length], x = line.layers;
    const dash = DASHES[Math.floor(nth / LINES.length) % DASHES.length];
    if (line.low.every((value) => value !== null)) {
      traces.push({
        ...same, x: [...x, ...x.slice().reverse()], y: [...line.high, ...line.low.slice().reverse()], fill: "toself",
        fillcolor: paint + "33", line: { width: 0 }, mode: "lines", hoverinfo: "skip", showlegend: false,
      });
    }
    traces.push({
      ...same, x, y: line.mean, name: line.name, mode: "lines+markers", line: { color: paint, dash }, marker: { size: 5 },
      text: x.map((layer, i) => `layer ${layerName(layer)}: ${line.mean[i] === null ? "not known" : readable(line.mean[i])}` +
        (line.low[i] === null ? "" : ` (${readable(line.low[i])} to ${readable(line.high[i])})`)),
      hovertemplate: "%{text}",
    });
  });
  const shapes = its.marks.map((y) => (
    { type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: colour("soft"), width: 1, dash: "dot" } }));
  const layers = [...new Set(its.lines.flatMap((line) => line.layers))].sort((a, b) => a - b);
  const known = its.lines.flatMap((line) => line.layers.filter((_, i) => line.mean[i] !== null));
  const [first, last] = [Math.min(...known), Math.max(...known)];
  const legend = its.lines.reduce((width, line) => width + Math.max(150, 60 + 6 * line.name.length), 0);
  const below = 56 + 24 * Math.ceil(legend / place.clientWidth); // its axis, and rows of its legend
  const about = [...wrapped(its.title, place.clientWidth / 7), `n = ${its.n}${its.heard ? `, corrupted by ${its.heard}` : ""}`];
  const above = 18 + 16 * about.length;
  plot(place, traces, {
    title: { text: about.map(escaped).join("<br>"), font: { size: 12 }, yref: "container", y: 1, yanchor: "top", pad: { t: 18 } },
    height: 200 + above + below, shapes, margin: { l: 55, r: 10, t: above, b: below },
    legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", font: { size: 11 } },
    xaxis: { ...layerTicks(layers.filter((layer) => first <= layer && layer <= last)), range: [first - 0.4, last + 0.4],
      title: { text: its.note ? `layer (${its.note})` : "layer", standoff: 8 } },
    yaxis: { automargin: true, title: { text: its.y, standoff: 6 }, ...(its.range ? { range: its.range } : {}) },
  });
}

function wordsOf(map, row, column) {
  const cell = map.words === null ? [] : map.words[row][column], said = [];
  for (let n = 0; n < cell.length; n += 2) {
    const word = data.words[cell[n]], shown = visible(word);
    said.push(`${/[\p{L}\p{N}]/u.test(word) ? shown : `\u201c${shown}\u201d`} ${(cell[n + 1] / 1000).toFixed(3)}`);
  }
  return said.length ? "<br>the lens says: " + said.join(", ") : "";
}

function whereIs(map, column) {
  const its = map.columns[column], parts = [];
  if (its.token !== undefined) parts.push(`<b>${visible(its.token)}</b>`);
  if (its.positions) {
    const [first, last] = its.positions;
    parts.push(first === last ? `position ${first}` : `positions ${first} to ${last}`);
  }
  if (its.start_s !== undefined) parts.push(span(its.start_s, its.end_s));
  if (its.of_s && (its.of_s[0] !== its.start_s || its.of_s[1] !== its.end_s)) parts.push(`of ${span(...its.of_s)}`);
  if (map.axis === "slots") parts.push("looks at the whole clip: no time span");
  const what = [its.segment, its.region].find((name) => name && name !== "none");
  if (what) parts.push(what);
  if (its.option) parts.push(`option ${escaped(its.option)}${its.is_correct ? ", the true one" : ""}`);
  return parts.join(", ");
}

function hover(map) {
  const place = map.columns.map((_, column) => whereIs(map, column));
  return map.layers.map((layer, row) => map.columns.map((_, column) => {
    const rate = map.recovery && map.recovery[row][column];
    const says = rate === null || rate === undefined ? "" : `<br>recovery ${rate.toPrecision(4)}`;
    return `${place[column]}<br>layer ${layerName(layer)}${says}${wordsOf(map, row, column)}`;
  }));
}

const isOwnScale = () => document.getElementById("own")?.checked;

function largest(map) {
  return Math.max(0, ...map.recovery.flat().filter((rate) => rate !== null).map(Math.abs));
}

function mostOf(card, map) { // of all maps of its kind in its study, so that clips can be compared by their colours
  const alike = data.cards.filter((other) => other.study === card.study).flatMap((other) => other.maps);
  const maps = isOwnScale() ? [map] : alike.filter((other) => other.kind === map.kind && other.recovery !== null);
  return Math.min(1, Math.max(0.01, ...maps.map(largest)));
}

function scale(card, map) {
  if (map.recovery === null) {
    const z = map.words.map((row) => row.map((cell) => (cell.length ? cell[1] / 1000 : null)));
    const paint = [[0, colour("few")], [1, colour("many")]];
    return { z, zmin: 0, zmax: 1, colorscale: paint, said: "probability<br>of the word" };
  }
  const most = map.axis === "tokens" ? 1 : mostOf(card, map), whose = isOwnScale() ? "its own scale" : "common scale";
  const paint = [[0, colour("low")], [0.5, colour("middle")], [1, colour("high")]];
  return { z: map.recovery, zmin: -most, zmax: most, colorscale: paint, said: map.axis === "tokens" ? "recovery<br>rate" : `recovery rate<br>${whose}` };
}

function edges(map) { // of the columns; in time a gap between two stretches is a column of its own
  if (map.axis !== "time") return { x: map.columns.map((_, n) => n), at: map.columns.map((_, n) => n) };
  const x = [map.columns[0].start_s], at = [];
  map.columns.forEach((column, n) => {
    if (column.start_s > x[x.length - 1] + 1e-6) { x.push(column.start_s); at.push(null); }
    x.push(column.end_s);
    at.push(n);
  });
  return { x, at };
}

function bands(map) {
  const shapes = [], annotations = [];
  for (let start = 0, end; start < map.columns.length; start = end) {
    const segment = map.columns[start].segment;
    for (end = start + 1; end < map.columns.length && map.columns[end].segment === segment;) end += 1;
    if (!BANDS[segment]) continue;
    shapes.push({ type: "rect", xref: "x", yref: "paper", x0: start - 0.5, x1: end - 0.5, y0: 1.01, y1: 1.05,
      fillcolor: BANDS[segment], line: { width: 0 } });
    annotations.push({ xref: "x", yref: "paper", x: (start + end - 1) / 2, y: 1.05, yanchor: "bottom", text: segment,
      showarrow: false, font: { size: 11 } });
  }
  return { shapes, annotations };
}

function xaxisOf(map, card) {
  const title = { text: `${KINDS[map.kind]}${map.axis === "time" ? ", s" : ""}`, standoff: 8 };
  if (map.axis === "time") {
    const end = card.duration_s || map.columns[map.columns.length - 1].end_s;
    return { range: [0, end], title, showgrid: false };
  }
  if (map.axis === "slots") {
    return { title: { text: "audio slots, each of the whole clip: no place in time" }, showgrid: false };
  }
  const tickvals = map.columns.map((_, n) => n);
  const ticktext = map.columns.map((column) => visible(column.token || column.region));
  return { tickvals, ticktext, tickangle: -90, tickfont: { size: 10 }, showgrid: false, title };
}

function drawMap(place, card, map) {
  const isText = map.axis === "tokens", { z, said, ...paint } = scale(card, map), { x, at } = edges(map), text = hover(map);
  const cells = (grid, none) => grid.map((row) => at.map((n) => (n === null ? none : row[n])));
  const longest = Math.max(...map.columns.map((column) => (column.token || column.region || "").length));
  const below = isText ? 44 + 6 * longest : marginOf().b; // its tokens stand upright
  const height = Math.max(90, 13 * map.layers.length + 30) + below + (isText ? 22 : 0);
  const margin = isText ? { ...marginOf(), t: 30, b: below } : marginOf();
  const rows = map.layers.map((_, n) => n), ticks = layerTicks(map.layers);
  plot(place, [{
    type: "heatmap", x, y: rows, z: cells(z, null), text: cells(text, ""), hovertemplate: "%{text}<extra></extra>",
    ...paint, xgap: isText ? 1 : 0, ygap: 1, hoverongaps: true,
    colorbar: { title: { text: said, side: "right", font: { size: 11 } }, thickness: 10, x: 1.01, xpad: 0, tickfont: { size: 10 } },
  }], {
    height, margin, ...(isText ? bands(map) : {}), xaxis: xaxisOf(map, card),
    yaxis: { title: { text: map.kind === "encoder_window" ? "encoder block" : "layer" }, showgrid: false,
      tickvals: ticks.tickvals.map((layer) => map.layers.indexOf(layer)), ticktext: ticks.ticktext },
  });
  return at;
}

function drawSpectrogram(place, card) {
  const [n_bins, n_frames] = card.mel.shape.split(",").map(Number), each = card.duration_s / n_frames;
  plot(place, [{
    type: "heatmap", z: card.mel, x0: each / 2, dx: each, y0: 0, dy: 1, colorscale: "Viridis", showscale: false,
    hovertemplate: "%{x:.2f} s<extra></extra>",
  }], {
    height: 130, margin: { ...marginOf(), b: 22 }, xaxis: { range: [0, card.duration_s], showgrid: false, ticksuffix: " s" },
    yaxis: { title: { text: "log-mel" }, showticklabels: false, ticks: "", showgrid: false, range: [-0.5, n_bins - 0.5] },
  });
}

async function soundOf(index) {
  context = context || new AudioContext();
  if (!decoded.has(index)) {
    const bytes = Uint8Array.from(atob(data.sounds[index].split(",")[1]), (letter) => letter.charCodeAt(0));
    decoded.set(index, await context.decodeAudioData(bytes.buffer));
  }
  return decoded.get(index);
}

async function play(index, start, end) {
  const buffer = await soundOf(index);
  await context.resume();
  alone(null);
  playing = context.createBufferSource();
  playing.buffer = buffer;
  playing.connect(context.destination);
  playing.start(0, start, Math.max(0.01, end - start));
}

async function clicked(article, card, axis, its) {
  const told = article.querySelector(".told");
  if (its.start_s === undefined) {
    told.textContent = axis === "slots"
      ? "This slot looks at the whole clip. It has no time span, so nothing is played."
      : "This is text: there is nothing to play.";
    return;
  }
  const [start, end] = its.of_s || [its.start_s, its.end_s];
  if (card.clean === undefined) {
    told.textContent = `${span(start, end)}: there is no clip to play.`;
    return;
  }
  const which = article.querySelector("select"), index = which ? Number(which.value) : card.clean;
  const name = which ? which.selectedOptions[0].textContent : "clean";
  marked(article, start, end);
  article.querySelector(`audio[data-sound="${index}"]`).currentTime = start; // to go on from there
  await play(index, start, end);
  told.textContent = `Played ${span(start, end)} of the ${name} clip.`;
}

function marked(article, start, end) {
  const place = article.querySelector(".spectrogram");
  const shape = { type: "rect", xref: "x", yref: "paper", x0: start, x1: end, y0: 0, y1: 1, line: { color: "#fff", width: 2 } };
  if (place) Plotly.relayout(place, { shapes: [shape] });
}

function stretch(card, at) { // the column of a map around a moment, or else its second
  const timed = card.maps.filter((map) => map.axis === "time").flatMap((map) => map.columns);
  const second = { start_s: Math.floor(at), end_s: Math.min(Math.floor(at) + 1, card.duration_s) };
  return timed.find((its) => its.start_s <= at && at < its.end_s) || second;
}

function figure(article, name) {
  const outer = document.createElement("div"), inner = document.createElement("div");
  outer.className = "figure";
  inner.className = name;
  outer.append(inner);
  article.querySelector(".figures").append(outer);
  return inner;
}

function drawCard(article) {
  const card = data.cards[article.dataset.card], isNew = !article.querySelector(".figure");
  if (isNew && card.mel) figure(article, "spectrogram");
  if (isNew) card.maps.forEach((map) => {
    const place = figure(article, "map");
    if (map.axis === "tokens") place.style.minWidth = `${150 + 16 * map.columns.length}px`;
  });
  if (card.mel) drawSpectrogram(article.querySelector(".spectrogram"), card);
  article.querySelectorAll(".map").forEach((place, n) => {
    const map = card.maps[n], at = drawMap(place, card, map);
    if (!isNew) return;
    place.on("plotly_click", ({ points: [point] }) => {
      const column = at[point.pointNumber[1]];
      if (column !== null) clicked(article, card, map.axis, map.columns[column]);
    });
  });
  if (isNew && card.mel) {
    article.querySelector(".spectrogram").on("plotly_click", ({ points: [{ x }] }) => clicked(article, card, "time", stretch(card, x)));
  }
  article.dataset.drawn = "yes";
}

const draw = (place) => (place.matches("article") ? drawCard(place) : drawCurve(place));
const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries.filter((entry) => entry.isIntersecting)) {
    seen.unobserve(target);
    target.dataset.drawn = "yes";
    draw(target);
  }
}, { rootMargin: "800px" });

const drawn = () => document.querySelectorAll("[data-drawn]").forEach(draw);
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
function theme(isDark) {
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  drawn();
}

function alone(player) { // one sound at a time
  if (playing) playing.stop();
  document.querySelectorAll("audio").forEach((other) => { if (other !== player) other.pause(); });
}

document.querySelectorAll("audio").forEach((player) => {
  player.src = data.sounds[player.dataset.sound];
  player.onplay = () => alone(player);
});
document.getElementById("theme").onclick = () => theme(document.documentElement.dataset.theme !== "dark");
const own = document.getElementById("own");
if (own) own.onchange = () => document.querySelectorAll("article[data-drawn]").forEach(draw);
let width = innerWidth, resized = null;
addEventListener("resize", () => { // titles are wrapped, and margins are chosen, for a width
  clearTimeout(resized);
  if (innerWidth !== width) resized = setTimeout(() => { width = innerWidth; drawn(); }, 150);
});
prefersDark.onchange = () => theme(prefersDark.matches);
theme(prefersDark.matches);
document.querySelectorAll("[data-curve], [data-card]").forEach((place) => seen.observe(place));
