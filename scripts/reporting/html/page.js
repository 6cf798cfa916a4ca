"use strict";
// Every number of the payload names its record: a run by `record`, a value by its `place` in it, and a curve by one
// `place` for all its points, in which null stands for the number of the row.
const payload = JSON.parse(document.getElementById("payload").textContent);
const KEYS = { model: "Model", data: "Data", grad: "Estimator", k: "k", lam: "lam", scale: "Scale" };
const VALUES = {
  best: ["best", 1, 2], last: ["last", 1, 2], step_seconds: ["step, ms", 1e3, 1], peak_bytes: ["peak, MB", 1e-6, 0],
};
const COUNTS = { seed: "seed", steps: "steps", parameters: "parameters" };
const COLORS = ["#3b82d0", "#e07b22", "#2fa35a", "#d2484b", "#8b62c9", "#a06a52", "#d873b8", "#8a8f98", "#a9a92c", "#27a9b8"];
const DASHES = ["solid", "dash", "dot", "dashdot"]; // for more lines than there are colours
const TICKS = [1, 10, 100, 1e3, 1e4].flatMap((power) => [power, 2 * power, 5 * power]); // of a logarithmic axis
const SETTINGS = { displayModeBar: false, responsive: true };
const runs = new Map(payload.runs.map((run) => [run.record, run]));
const byId = (id) => document.getElementById(id);

function add(parent, tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  parent.append(made);
  return made;
}

// numbers as numbers: by their digits, 0.1 would come before 0.05
function unique(values) {
  return [...new Set(values)].sort((a, b) => Number(a) - Number(b) || a.localeCompare(b, "en", { numeric: true }));
}

// what each of the commands says that not all of them say
function differing(commands) {
  return commands.map((items) => items.filter((item) => !commands.every((other) => other.includes(item))));
}

function fill(select, names) {
  select.replaceChildren();
  names.forEach((name, i) => add(select, "option", name, { value: String(i) }));
}

// ---- filters

function makeFilters() {
  const form = byId("filters");
  const all = [...payload.runs, ...payload.curves.filter((curve) => curve.model)];
  for (const [key, title] of Object.entries(KEYS)) {
    const label = add(form, "label", title);
    const select = add(label, "select", undefined, { name: key });
    add(select, "option", "all", { value: "" });
    for (const value of unique(all.map((one) => one[key]))) add(select, "option", value, { value });
    select.addEventListener("change", show);
  }
  const reset = add(form, "button", "Show all", { type: "button" });
  reset.addEventListener("click", () => { form.reset(); show(); });
}

function fits(one) {
  const wanted = new FormData(byId("filters"));
  return Object.keys(KEYS).every((key) => !wanted.get(key) || one[key] === wanted.get(key));
}

// ---- the table of runs

function cell(number, factor, digits) {
  return number === undefined ? "--" : (number.value * factor).toFixed(digits);
}

function showTable(shown) {
  const head = byId("table").tHead, body = byId("table").tBodies[0];
  head.replaceChildren();
  body.replaceChildren();
  const names = [...Object.values(VALUES).map((value) => value[0]), ...Object.values(COUNTS), "commit", "record", "command"];
  const row = add(head, "tr");
  for (const name of ["run", ...Object.values(KEYS), "metric", ...names]) add(row, "th", name, { scope: "col" });
  for (const run of shown) {
    const line = add(body, "tr", undefined, { "data-record": run.record });
    add(line, "th", run.label, { scope: "row" });
    for (const key of Object.keys(KEYS)) add(line, "td", run[key]);
    add(line, "td", run.metric);
    for (const [key, [, factor, digits]] of Object.entries(VALUES)) {
      add(line, "td", cell(run.numbers[key], factor, digits), { "data-number": key });
    }
    for (const key of Object.keys(COUNTS)) add(line, "td", cell(run.numbers[key], 1, 0), { "data-number": key });
    add(line, "td", run.commit);
    for (const text of [run.record, run.command]) add(add(line, "td"), "code", text);
  }
  byId("count").textContent = `${shown.length} of ${payload.runs.length} records`;
}

// ---- charts

function layout(more) {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
  const axis = { gridcolor: line, zerolinecolor: line, automargin: true };
  const { xaxis, yaxis, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink },
    margin: { l: 48, r: 12, t: 12, b: 44 }, showlegend: false,
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}

function draw(id, traces, more, says) {
  byId(id).setAttribute("aria-label", says);
  Plotly.react(id, traces, layout(more), SETTINGS);
}

// beside the chart, as text: it wraps on a narrow screen, and a screen reader reads it
function legend(id, traces) {
  document.getElementById(`${id}-legend`)?.remove();
  const list = document.createElement("ul");
  list.id = `${id}-legend`;
  list.className = "legend";
  for (const trace of traces) {
    const item = add(list, "li");
    const color = trace.line?.color ?? trace.marker.color;
    const style = DASHES.indexOf(trace.line?.dash ?? "solid") > 0 ? "dashed" : "solid";
    add(item, "span", undefined, { style: `border-top: 4px ${style} ${color}`, "aria-hidden": "true" });
    add(item, "span", trace.name);
  }
  byId(id).after(list);
}

function curveNames() {
  return unique(payload.curves.map((curve) => curve.name));
}

function showCurves() {
  const name = curveNames()[Number(byId("curve").value)];
  const found = payload.curves
    .map((curve) => ({ ...curve, ...(runs.get(curve.run) ?? {}), record: curve.record }))
    .filter((curve) => curve.name === name && fits(curve));
  const names = lineNames(found);
  const traces = found.map((curve, i) => ({
    x: curve.x, y: curve.y, type: "scatter", mode: "lines", name: names[i],
    line: { color: COLORS[i % COLORS.length], dash: DASHES[Math.floor(i / COLORS.length) % DASHES.length], width: 1.5 },
    hovertemplate: `%{y}<br>${curve.record}<extra></extra>`,
  }));
  const axis = name && name.endsWith("by epoch") ? "epoch" : "step";
  draw("curves", traces, { xaxis: { title: { text: axis } }, yaxis: { title: { text: name } } },
    `${name}: ${found.length} curves against the ${axis}`);
  legend("curves", traces);
  const records = unique(found.map((curve) => curve.record));
  const caption = byId("curves-caption");
  caption.replaceChildren();
  if (!records.length) {
    caption.textContent = "No run here has this curve.";
  } else if (records.length === 1) {
    caption.textContent = `From ${records[0]}`;
  } else {
    const details = add(caption, "details");
    add(details, "summary", `From ${records.length} records`);
    const list = add(details, "ul");
    for (const record of records) add(list, "li", record);
  }
}

// a run's label has its estimator, but neither k, lam nor seed; where names are alike, what else the commands say follows
function lineNames(curves) {
  const names = curves.map((curve) => {
    if (!curve.run) return curve.label;
    const numbers = ["k", "lam"].filter((key) => curve[key] !== "--").map((key) => `${key}=${curve[key]}`);
    return [curve.label, ...numbers, `seed ${curve.numbers.seed.value}`].join(" ");
  });
  return names.map((name, i) => {
    const alike = curves.filter((_, j) => names[j] === name);
    const apart = differing(alike.map((curve) => curve.others ?? []));
    return [name, ...apart[alike.indexOf(curves[i])]].join(" ");
  });
}

// a map per model, data, estimator, scale and whatever else the command says, where it has several points; seeds are
// averaged, and a training that has several records counts once
function showMaps(shown) {
  const key = Object.keys(VALUES)[Number(byId("value").value)], [title, factor, digits] = VALUES[key];
  const groups = new Map();
  for (const run of shown) {
    if (run.k === "--" || run.lam === "--" || !run.numbers[key]) continue;
    const family = [run.model, run.data, run.grad, run.scale, run.metric].join(", ");
    const name = JSON.stringify([family, run.others]);
    if (!groups.has(name)) groups.set(name, { family, others: run.others, trainings: new Map() });
    const { trainings } = groups.get(name);
    if (!trainings.has(run.training)) trainings.set(run.training, run);
  }
  byId("maps").replaceChildren();
  for (const group of groups.values()) {
    const members = [...group.trainings.values()];
    const kin = [...groups.values()].filter((other) => other.family === group.family);
    const apart = differing(kin.map((other) => other.others))[kin.indexOf(group)];
    const name = [group.family, ...apart].join(", ");
    const ks = unique(members.map((run) => run.k)), lams = unique(members.map((run) => run.lam));
    if (ks.length * lams.length < 2) continue;
    const at = (k, lam) => members.filter((run) => run.k === k && run.lam === lam);
    const mean = (some) => some.reduce((sum, run) => sum + factor * run.numbers[key].value, 0) / some.length;
    const z = lams.map((lam) => ks.map((k) => (at(k, lam).length ? mean(at(k, lam)) : null)));
    const from = lams.map((lam) => ks.map((k) => at(k, lam).map((run) => run.record).join("<br>")));
    const figure = add(byId("maps"), "figure");
    const id = `map-${byId("maps").children.length}`;
    add(figure, "div", undefined, { id, class: "chart map", role: "img" });
    add(figure, "figcaption", `${name}: ${title}, means over seeds (${members.length} runs in all)`);
    const text = z.map((row) => row.map((value) => (value === null ? "" : value.toFixed(digits))));
    const trace = { type: "heatmap", x: ks, y: lams, z, text, texttemplate: "%{text}", customdata: from,
      hovertemplate: "k %{x}, lam %{y}: %{z}<br>%{customdata}<extra></extra>", colorscale: "Viridis", hoverongaps: false };
    const axes = { xaxis: { title: { text: "k" }, type: "category" }, yaxis: { title: { text: "lam" }, type: "category" } };
    draw(id, [trace], axes, `${title} over k and lam: ${name}`);
  }
  if (!byId("maps").children.length) add(byId("maps"), "p", "No map: it needs runs that have this value at several k or lam.");
}

function showBars() {
  const found = payload.benchmarks[Number(byId("benchmark").value)];
  if (!found) return;
  const phases = [...new Set(found.bars.flatMap((bar) => Object.keys(bar.phases)))];
  const traces = phases.map((phase, i) => ({
    type: "bar", orientation: "h", name: phase, marker: { color: COLORS[i] }, y: found.bars.map((bar) => bar.label),
    x: found.bars.map((bar) => (bar.phases[phase] ? 1e3 * bar.phases[phase].value : null)),
  }));
  draw("bars", traces, { barmode: "stack", xaxis: { title: { text: "ms per step" } }, yaxis: { autorange: "reversed" } },
    `Milliseconds per step by phase: ${found.title}`);
  legend("bars", traces);
  byId("bars-caption").textContent = `From ${found.record}: ${found.command}`;
}

function showFront() {
  const found = payload.explorations[Number(byId("exploration").value)];
  if (!found) return;
  const families = unique(found.points.map((point) => point.family));
  const traces = families.map((name, i) => {
    const points = found.points.filter((point) => point.family === name);
    return { type: "scatter", mode: "markers", name, text: points.map((point) => point.label), marker: { size: 9, color: COLORS[i] },
      x: points.map((point) => 1e3 * point.seconds.value), y: points.map((point) => point.cosine.value),
      hovertemplate: "%{text}<br>%{x:.0f} ms, cosine %{y:.3f}<extra></extra>" };
  });
  const axes = { xaxis: { title: { text: "attach and backward, ms" }, type: "log", tickvals: TICKS, ticktext: TICKS.map(String) },
    yaxis: { title: { text: "cosine to the exact gradient" } } };
  draw("front", traces, axes, `Cosine against milliseconds of ${found.points.length} estimators: ${found.title}`);
  legend("front", traces);
  byId("front-caption").textContent = `From ${found.record}: ${found.command}`;
}

function show() {
  const shown = payload.runs.filter(fits);
  showTable(shown);
  if (!window.Plotly) return;
  showCurves();
  showMaps(shown);
  showBars();
  showFront();
}

// the library is compressed: it takes a third of its room
async function loadLibrary() {
  const bytes = Uint8Array.from(atob(byId("library").textContent.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  add(document.head, "script", await new Response(stream).text());
}

async function start() {
  makeFilters();
  fill(byId("curve"), curveNames());
  const first = curveNames().findIndex((name) => name.includes("accuracy"));
  byId("curve").value = String(Math.max(0, first));
  fill(byId("value"), Object.values(VALUES).map((value) => value[0]));
  fill(byId("benchmark"), payload.benchmarks.map((one) => one.title));
  fill(byId("exploration"), payload.explorations.map((one) => one.title));
  for (const id of ["curve", "value", "benchmark", "exploration"]) byId(id).addEventListener("change", show);
  show();
  try {
    await loadLibrary();
  } catch {
    byId("count").textContent += ". This browser cannot unpack the charts; the tables are complete.";
    return;
  }
  show();
  document.documentElement.dataset.ready = "yes";
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
}

start();
