"use strict";
// Draws what the page's data hold. One function a section; nothing is fetched.

const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#2a78d6", "#e07b00", "#1b9e5a", "#c2408f", "#7a5cd6", "#b88a00", "#0f9fb3", "#d0463b", "#6b7b3a", "#8a6d5a"];
const DASHES = { train: "solid", eval: "dot", epoch: "dash" };
const SIGNS = { start: "triangle-up", save: "square", end: "diamond", message: "circle" };
const byId = (id) => document.getElementById(id);
const colour = (run) => COLOURS[run % COLOURS.length];
const hidden = new Set(); // runs that are not drawn

function make(tag, text, kind) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  if (kind) element.className = kind;
  return element;
}

function table(columns, rows) {
  const whole = make("div", null, "scroll"), inner = make("table"), head = make("tr");
  for (const column of columns) head.append(make("th", column));
  inner.append(head);
  for (const row of rows) {
    const line = make("tr");
    for (const cell of row) line.append(cell instanceof Node ? cell : make("td", cell));
    inner.append(line);
  }
  whole.append(inner);
  return whole;
}

function number(value) {
  if (value === null || value === undefined) return "";
  return typeof value === "number" ? Number(value.toPrecision(5)).toString() : String(value);
}

// -- what there is ------------------------------------------------------------------------------

// "train/loss" and "eval/loss" share a chart; a chart is named by what comes after the kind.
function charts() {
  const found = new Map();
  data.runs.forEach((run, index) => {
    for (const name of Object.keys(run.curves)) {
      const cut = name.indexOf("/"), kind = name.slice(0, cut);
      const of = cut > 0 && kind in DASHES ? name.slice(cut + 1) : name;
      if (/^throughput\/.*_share$/.test(name)) continue; // it has a chart of its own
      if (!found.has(of)) found.set(of, []);
      found.get(of).push({ run: index, name, dash: DASHES[kind] || "solid", label: kind in DASHES ? kind : "" });
    }
  });
  const rank = (name) => (name === "loss" ? 0 : name.endsWith("loss") ? 1 : /^(lr|grad_norm)/.test(name) ? 3 : name.startsWith("throughput/") ? 4 : 2);
  return [...found].sort((a, b) => rank(a[0]) - rank(b[0]) || a[0].localeCompare(b[0]));
}

// Where on the chosen axis a step lies.
function along(run, steps) {
  const axis = byId("axis").value, known = run.axes;
  if (axis === "step" || !known.step || known.step.length === 0) return steps;
  const xs = known.step, ys = known[axis];
  let at = 0;
  return steps.map((step) => {
    if (at > 0 && xs[at - 1] > step) at = 0;
    while (at < xs.length - 1 && xs[at + 1] <= step) at += 1;
    if (at >= xs.length - 1) return ys[xs.length - 1];
    const share = (step - xs[at]) / (xs[at + 1] - xs[at]);
    return ys[at] + Math.max(0, share) * (ys[at + 1] - ys[at]);
  });
}

// An exponential mean, without the pull of a beginning at zero (as in Adam).
function smooth(values, weight) {
  if (weight === 0) return values;
  let sum = 0, mass = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return sum / mass;
  });
}

// -- curves -------------------------------------------------------------------------------------

function layout(more) {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: of("--line"), zerolinecolor: of("--line"), linecolor: of("--line"), automargin: true };
  return Object.assign({
    margin: { l: 48, r: 12, t: 8, b: 34 }, paper_bgcolor: of("--card"), plot_bgcolor: of("--card"),
    font: { color: of("--ink"), size: 12 }, hovermode: "closest", showlegend: false, xaxis: { ...axis, title: { text: byId("axis").selectedOptions[0].textContent, standoff: 4 } },
    yaxis: { ...axis, type: byId("log").checked ? "log" : "linear" },
  }, more);
}

function lines(curves) {
  const weight = Number(byId("smoothing").value), drawn = [];
  for (const { run: index, name, dash, label } of curves) {
    if (hidden.has(index)) continue;
    const run = data.runs[index], curve = run.curves[name], x = along(run, curve.step);
    if (curve.least) { // between which values the points lie that are one point here
      drawn.push({ x, y: curve.most, mode: "lines", line: { width: 0, color: colour(index) }, hoverinfo: "skip" });
      drawn.push({ x, y: curve.least, mode: "lines", line: { width: 0, color: colour(index) }, fill: "tonexty", fillcolor: colour(index) + "33", hoverinfo: "skip" });
    }
    drawn.push({
      x, y: smooth(curve.value, weight), name: `${run.name}${label ? ` (${label})` : ""}`,
      mode: curve.step.length < 60 ? "lines+markers" : "lines", line: { color: colour(index), dash, width: 1.8 },
      marker: { size: 4 }, hovertemplate: "%{y:.5g}<br>%{x:.6g}<extra>%{fullData.name}</extra>",
    });
  }
  return drawn;
}

function events() {
  if (!byId("events").checked) return [];
  return data.runs.flatMap((run, index) => {
    const told = run.events.filter((event) => event.kind !== "start" || event.step > 0);
    if (hidden.has(index) || told.length === 0) return [];
    return [{
      x: along(run, told.map((event) => event.step)), y: told.map(() => 0.015), yaxis: "y2", mode: "markers", name: "events",
      marker: { color: colour(index), size: 7, opacity: 0.8, symbol: told.map((event) => SIGNS[event.kind] || "circle") },
      text: told.map((event) => `${run.name}, step ${event.step}: ${event.kind}<br>${wrapped(event.text)}`), hovertemplate: "%{text}<extra></extra>",
    }];
  });
}

function wrapped(text) {
  const safe = text.replace(/&/g, "&amp;").replace(/</g, "&lt;");
  return safe.slice(0, 400).replace(/(.{60}\S*)\s/g, "$1<br>").replace(/\n/g, "<br>");
}

function draw(chart) {
  const more = { yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true } };
  return Plotly.react(chart.plot, [...lines(chart.curves), ...events()], layout(more), { responsive: true, displaylogo: false, displayModeBar: "hover" });
}

function drawTime(chart) {
  const run = data.runs[chart.run];
  const parts = Object.keys(run.curves).filter((name) => /^throughput\/.*_share$/.test(name)).sort();
  const traces = parts.map((name, number) => ({
    x: along(run, run.curves[name].step), y: run.curves[name].value, stackgroup: "one", mode: "lines", name: name.replace(/^throughput\/|_share$/g, ""),
    line: { width: 0.5, color: COLOURS[number % COLOURS.length] }, hovertemplate: "%{y:.1%}<extra>%{fullData.name}</extra>",
  }));
  const shown = layout({ showlegend: true, legend: { orientation: "h", y: 1.12 } });
  shown.yaxis = { ...shown.yaxis, type: "linear", range: [0, 1], tickformat: ".0%" };
  return Plotly.react(chart.plot, traces, shown, { responsive: true, displaylogo: false });
}

function card(place, heading, note) {
  const whole = make("div", null, "card"), plot = make("div", null, "plot");
  whole.append(make("h3", heading), plot);
  if (note) whole.append(make("p", note, "faint"));
  place.append(whole);
  return plot;
}

// What is not drawn point by point is said.
function noteOf(curves) {
  const notes = [];
  for (const { run, name } of curves) {
    const curve = data.runs[run].curves[name], of = data.runs.length > 1 ? ` of ${data.runs[run].name}` : "";
    if (curve.together) notes.push(`${name}${of}: ${curve.of.toLocaleString("en")} points, the means of ${curve.together} each; the band is from the least to the most of them`);
    if (curve.not_finite) notes.push(`${name}${of}: ${curve.not_finite} of ${curve.of.toLocaleString("en")} are NaN or infinite, first at step ${curve.where[0]}`);
  }
  return notes.join(". ");
}

// -- sections -----------------------------------------------------------------------------------

function showRuns() {
  const place = byId("runs"), rows = data.runs.map((run, index) => {
    const cell = make("td"), label = make("label"), box = make("input"), dot = make("span", null, "dot");
    box.type = "checkbox";
    box.checked = true;
    box.addEventListener("change", () => { box.checked ? hidden.delete(index) : hidden.add(index); redraw(); });
    dot.style.background = colour(index);
    label.append(box, dot, document.createTextNode(run.name));
    cell.append(label);
    const last = Object.entries(run.curves).filter(([name]) => name.startsWith("eval/")).slice(0, 4)
      .map(([name, curve]) => `${name} ${number(curve.value.at(-1))}`).join(", ");
    const environment = run.facts.environment || {};
    return [cell, run.status.status || "not known", number(run.status.step), number(environment.ranks), last, run.status.sentence || run.status.reason || ""];
  });
  place.append(make("h2", "Runs"), table(["run", "state", "step", "ranks", "last evaluation", "in words"], rows));
  for (const run of data.runs) for (const note of run.notes) place.append(make("p", `${run.name}: ${note}.`, "faint"));
}

function showTable() {
  if (!data.table) return;
  const told = data.table, place = byId("table");
  place.append(make("h2", told.heading), table(told.columns, told.rows));
  for (const sentence of told.sentences) place.append(make("p", sentence));
  place.append(make("p", told.method, "faint"));
}

function showSamples() {
  const every = data.runs.flatMap((run, index) => run.samples.map((sample) => ({ run: index, ...sample })));
  if (every.length === 0) return;
  const place = byId("samples"), grid = make("div", null, "grid");
  place.append(make("h2", "Samples"));
  for (const sample of every) {
    const whole = make("div", null, "card sample"), dot = make("span", null, "dot"), heading = make("h3");
    dot.style.background = colour(sample.run);
    heading.append(dot, document.createTextNode(`${sample.name}, step ${sample.step}`));
    whole.append(heading);
    if (sample.png) {
      const image = make("img");
      image.src = `data:image/png;base64,${sample.png}`;
      image.alt = sample.name;
      whole.append(image);
    }
    if (sample.text) whole.append(make("pre", sample.text));
    if (sample.missing) whole.append(make("p", sample.missing, "faint"));
    grid.append(whole);
  }
  place.append(grid);
}

function flat(values, before = "", into = {}) {
  for (const [name, value] of Object.entries(values || {})) {
    if (value !== null && typeof value === "object" && !Array.isArray(value)) flat(value, `${before}${name}.`, into);
    else into[before + name] = Array.isArray(value) ? JSON.stringify(value) : number(value);
  }
  return into;
}

// Rows that differ between runs come first, and in colour.
function compared(place, heading, of) {
  const told = data.runs.map(of), names = [...new Set(told.flatMap(Object.keys))];
  if (names.length === 0) return;
  const differs = (name) => new Set(told.map((one) => one[name])).size > 1;
  const rows = [...names.filter(differs), ...names.filter((name) => !differs(name))].map((name) =>
    [name, ...told.map((one) => make("td", one[name] ?? "", differs(name) ? "differs" : ""))]);
  byId(place).append(make("h2", heading), table(["", ...data.runs.map((run) => run.name)], rows));
}

function showTold() {
  const rows = data.runs.flatMap((run) => run.events.map((event) => [run.name, number(event.step), event.kind, event.time ? new Date(event.time * 1000).toLocaleString() : "", make("td")
    .appendChild(make("pre", event.text)).parentNode]));
  if (rows.length) byId("told").append(make("h2", "What happened"), table(["run", "step", "", "when", "what was told"], rows));
}

// -- all of it ----------------------------------------------------------------------------------

const drawn = [];

function redraw() {
  return Promise.all(drawn.map((chart) => chart.draw(chart)));
}

function theme(dark) {
  document.documentElement.classList.toggle("dark", dark);
}

async function library() {
  const packed = Uint8Array.from(atob(byId("library").textContent), (letter) => letter.charCodeAt(0));
  const text = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  const script = make("script");
  script.textContent = text;
  document.head.append(script);
}

async function main() {
  const began = performance.now();
  byId("made").textContent = `made ${new Date(data.made * 1000).toLocaleString()}`;
  byId("dark").checked = matchMedia("(prefers-color-scheme: dark)").matches;
  theme(byId("dark").checked);
  showRuns();
  showTable();
  showSamples();
  compared("config", "Settings", (run) => flat(run.config));
  compared("hooks", "Callbacks, by hook, in the order of their calls", (run) => Object.fromEntries(Object.entries(run.facts.hooks || {}).map(([hook, names]) => [hook, names.join(", ")])));
  compared("environment", "Environment", (run) => flat(run.facts.environment));
  showTold();
  await library();
  for (const [heading, curves] of charts()) drawn.push({ curves, plot: card(byId("charts"), heading, noteOf(curves)), draw });
  const timed = data.runs.map((run, index) => index).filter((index) => Object.keys(data.runs[index].curves).some((name) => /_share$/.test(name)));
  if (timed.length) {
    const grid = make("div", null, "grid");
    byId("time").append(make("h2", "Where a step's time goes"), grid);
    for (const run of timed) drawn.push({ run, plot: card(grid, data.runs[run].name), draw: drawTime });
  }
  await redraw();
  for (const id of ["axis", "smoothing", "log", "events"]) byId(id).addEventListener("input", redraw);
  byId("dark").addEventListener("input", () => { theme(byId("dark").checked); redraw(); });
  document.body.dataset.charts = drawn.length;
  document.body.dataset.took = Math.round(performance.now() - began);
}

main().catch((error) => {
  document.body.dataset.failed = String(error);
  const words = typeof DecompressionStream === "undefined" ? "this browser is too old for the page (it has no DecompressionStream)" : String(error);
  document.querySelector("header").append(make("p", `The curves could not be drawn: ${words}`, "broken"));
  console.error(error);
});
