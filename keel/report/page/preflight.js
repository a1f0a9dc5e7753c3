// A stack before a run: the verdict, the gap token by token, what explains it, and every check with its fix.

const STATUS_KIND = { pass: "good", warn: "warn", fail: "bad", skip: "" };
const STATUS_WORD = { pass: "passed", warn: "warned", fail: "failed", skip: "skipped" };
const STATUS_ORDER = ["fail", "warn", "pass", "skip"];
const NOTHING = -9; // log10 of what a gap of exactly 0 is drawn at
const SIDE_WORDS = { engine: "in the engine", learner: "in the learner" };
const GAP_WORDS = [
  ["abs_mean", "mean"], ["abs_p50", "median"], ["abs_p99", "99th percentile"], ["abs_max", "largest"],
  ["k1", "k1"], ["k3", "k3"],
];

function plotFont() {
  return { family: styleOf("--sans"), size: 11, color: styleOf("--muted") };
}

function plotAxis(settings) {
  return {
    gridcolor: styleOf("--line"), zeroline: false, linecolor: styleOf("--line-strong"), showline: true,
    fixedrange: true, ticks: "", title: { font: { size: 11 }, standoff: 6 }, automargin: true, ...settings,
  };
}

/** Ticks at whole powers of ten for an axis of log10 values. */
function powerTicks(values) {
  const known = values.filter((value) => typeof value === "number");
  const low = Math.max(Math.floor(Math.min(...known, 0)), NOTHING);
  const high = Math.ceil(Math.max(...known, low + 1));
  const every = Math.max(1, Math.ceil((high - low) / 5));
  const tickvals = [];
  for (let power = high; power >= low; power -= every) tickvals.push(power);
  const ticktext = tickvals.map((power) => (power <= NOTHING ? "0" : powerOfTen(power)));
  return { tickvals, ticktext, range: [low - 0.2, high + 0.2] };
}

/** A chart of our own numbers: {node, draw}. Hidden from assistive technology but for its label. */
function figureOf(title, aside, label, words, traces, layout) {
  const plot = el("div", { class: "plot" });
  const node = el("figure", { class: "card chart-card" },
    el("figcaption", {}, el("h3", {}, title), aside ? el("span", { class: "value small muted" }, aside) : null),
    el("div", { class: "chart", role: "img", "aria-label": label }, plot),
    el("p", { class: "words" }, words));
  const draw = () => Plotly.react(plot, traces(), {
    margin: { l: 52, r: 14, t: 8, b: 36 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    showlegend: false, hovermode: false, dragmode: false, font: plotFont(), ...layout(),
  }, { displayModeBar: false, responsive: true });
  return { node, draw };
}

function noiseLine(noise, vertical) {
  if (!(noise > 0)) return [];
  const at = Math.log10(noise);
  const line = { color: styleOf("--text"), width: 1.5, dash: "dash" };
  return [vertical
    ? { type: "line", xref: "x", yref: "paper", x0: at, x1: at, y0: 0, y1: 1, line }
    : { type: "line", xref: "paper", yref: "y", x0: 0, x1: 1, y0: at, y1: at, line }];
}

function histogramFigure(data) {
  const { center_log10: center, count } = data.sample.histogram;
  const ticks = powerTicks(data.noise > 0 ? [...center, Math.log10(data.noise)] : center);
  return figureOf(
    "How large the gaps are", counted(data.sample.num_tokens, "token"),
    "Histogram of the absolute gap between the engine\u2019s and the learner\u2019s log-probs.",
    "Tokens by size of the gap, in nats. Dashed: what healthy rounding gives on this stack.",
    () => [{ type: "bar", x: center, y: count, width: 0.25, marker: { color: styleOf("--accent") }, hoverinfo: "skip" }],
    () => ({
      bargap: 0.05, shapes: noiseLine(data.noise, true),
      xaxis: plotAxis({ ...ticks, showgrid: false }), yaxis: plotAxis({ rangemode: "tozero" }),
    }),
  );
}

function scatterFigure(data) {
  const { engine, learner } = data.sample;
  const known = [...engine, ...learner].filter((value) => typeof value === "number");
  const low = Math.min(...known, -1);
  return figureOf(
    "Engine against learner", "log-probs, nats",
    "Scatter plot of the engine\u2019s log-prob of each token against the learner\u2019s.",
    "A fit stack lies on the diagonal. Off it, the two put the same token differently.",
    () => [
      { type: "scatter", mode: "lines", x: [low, 0], y: [low, 0], line: { color: styleOf("--line-strong"), width: 1 }, hoverinfo: "skip" },
      { type: "scatter", mode: "markers", x: engine, y: learner, hoverinfo: "skip",
        marker: { size: 4, opacity: 0.55, color: styleOf("--accent") } },
    ],
    () => ({
      xaxis: plotAxis({ range: [low * 1.03, 0.3], title: { text: "engine" } }),
      yaxis: plotAxis({ range: [low * 1.03, 0.3], title: { text: "learner" } }),
    }),
  );
}

function positionFigure(data) {
  const { position, gap_log10: gap } = data.sample;
  const ticks = powerTicks(data.noise > 0 ? [...gap, Math.log10(data.noise)] : gap);
  return figureOf(
    "Where in the sequence", "gap, nats",
    "The absolute gap of each token against its position in the sequence.",
    "A window shows from its width on, a template from the first reply, a lost turn from its boundary.",
    () => [{ type: "scatter", mode: "markers", x: position, y: gap, hoverinfo: "skip",
      marker: { size: 4, opacity: 0.5, color: styleOf("--accent") } }],
    () => ({
      shapes: noiseLine(data.noise, false),
      xaxis: plotAxis({ rangemode: "tozero", title: { text: "position, tokens" } }), yaxis: plotAxis(ticks),
    }),
  );
}

function verdictOf(data) {
  const level = own(STATUS_KIND, data.verdict) || "warn";
  const counts = STATUS_ORDER.map((status) => [status, data.checks.filter((one) => one.status === status).length]);
  return el("section", { class: `verdict ${level}`, "aria-label": "Verdict" },
    el("span", { class: "verdict-mark", "aria-hidden": "true" }, VERDICT_MARK[level]),
    el("div", { class: "verdict-text" }, el("h2", {}, foreign(data.headline, { limit: 600 }))),
    el("div", { class: "tally" }, counts.filter(([, count]) => count > 0).map(
      ([status, count]) => el("span", { class: `pill ${STATUS_KIND[status]}` }, `${count} ${STATUS_WORD[status]}`),
    )));
}

function blameRow(one) {
  const where = [
    own(SIDE_WORDS, one.side), one.group ? ["tensors ", foreign(one.group, { limit: 80, more: false })] : null,
    Number.isInteger(one.layer) ? `layer ${one.layer}` : null,
    typeof one.strength === "number" ? `strength ${number(one.strength)}` : null,
  ].filter(Boolean);
  return el("li", { class: `blame-row ${one.cause === "unexplained" ? "unexplained" : ""}` },
    el("div", { class: "blame-head" },
      el("b", {}, foreign(one.title, { limit: 80, more: false })),
      where.map((part) => el("span", { class: "muted small" }, part)),
      el("span", { class: "number" }, `${percent(one.explained, 0)} \u00b7 ${number(one.gap_before)} \u2192 ${number(one.gap_after)} nats`)),
    el("div", { class: "blame-bar", "aria-hidden": "true" },
      el("span", { style: { width: `${100 * Math.min(Math.max(one.explained ?? 0, 0), 1)}%` } })),
    el("p", { class: "muted" }, foreign(one.text || one.what, { limit: 400 })),
    one.fix ? el("p", { class: "fix" }, foreign(one.fix, { limit: 300 })) : null);
}

function blamePanel(data) {
  const body = data.attribution.length ? el("ol", { class: "blame" }, data.attribution.map(blameRow))
    : emptyText("The gap is no larger than healthy rounding: there is nothing to explain.");
  return panel("What explains the gap", "share that goes away when the cause is undone", body);
}

function gapPanel(data) {
  const rows = GAP_WORDS.filter(([name]) => own(data.gap, name) !== undefined)
    .map(([name, words]) => [words, number(data.gap[name])]);
  if (data.noise !== null) rows.push(["healthy rounding", number(data.noise)]);
  return tableOf("The gap per token, nats", ["", "engine \u2212 learner"], rows, "No gap was measured.");
}

function worstOfSample(data) {
  const rows = data.sample.worst.map((one) => [
    el("bdi", { class: "mono foreign token-text" }, visibleNodes(cut(String(one.text || "\u2013"), 40))),
    `${one.sequence} / ${one.position}`, number(one.engine), number(one.learner), number(one.gap),
  ]);
  return tableOf("Worst tokens", ["token", "sequence / position", "engine", "learner", "gap"], rows, "None.");
}

function checkRow(check) {
  const figure = check.figure === null ? "" : [number(check.figure),
    check.threshold === null ? "" : ` / ${number(check.threshold)}`, check.unit ? ` ${check.unit}` : ""].join("");
  const details = Object.keys(check.details ?? {}).length ? el("details", { class: "check-more" },
    el("summary", {}, "details"),
    el("pre", {}, foreign(JSON.stringify(check.details, null, 1), { limit: 6000 }))) : null;
  return el("li", { class: `check status-${own(STATUS_WORD, check.status) ?? "unknown"}`, id: `check-${check.id}` },
    el("span", { class: `pill ${own(STATUS_KIND, check.status) ?? ""}` }, own(STATUS_WORD, check.status) ?? "?"),
    el("span", { class: "check-title" }, foreign(check.title, { limit: 120, more: false })),
    el("span", {}, foreign(check.reason, { limit: 500 }),
      check.fix && check.status !== "pass" ? el("p", { class: "fix" }, foreign(check.fix, { limit: 400 })) : null),
    el("span", { class: "check-figure" }, foreign(figure, { limit: 60, more: false })), details);
}

function checksPanel(data) {
  const sorted = [...data.checks].sort((a, b) => STATUS_ORDER.indexOf(a.status) - STATUS_ORDER.indexOf(b.status));
  return panel("Checks", `figure / threshold; ${duration(data.duration_s)} in all`,
    el("ul", { class: "checks" }, sorted.map(checkRow)));
}

function pairsPanel(title, pairs) {
  return panel(title, "", el("dl", { class: "pairs" }, pairs.flatMap(([name, value]) => [
    el("dt", {}, foreign(name, { limit: 60, more: false })), el("dd", {}, foreign(value, { limit: 300 })),
  ])));
}

function startPreflight() {
  const data = JSON.parse(document.getElementById("keel-data").textContent);
  if (data.schema_version !== 1) throw new Error(
    `this page shows schema_version 1, the data has ${String(data.schema_version).slice(0, 20)}`
  );
  replace(document.getElementById("run-facts"), data.stack.slice(0, 5).map(
    ([name, value]) => el("span", { class: "fact" }, `${name} `, foreign(value, { limit: 70, more: false }))));
  const sampled = data.sample && data.sample.engine.length > 0;
  const figures = sampled ? [histogramFigure(data), scatterFigure(data), positionFigure(data)] : [];
  replace(document.getElementById("view-preflight"),
    verdictOf(data),
    sampled ? el("div", { class: "gap-plots" }, figures.map((one) => one.node)) : null,
    el("div", { class: "blame-grid" }, blamePanel(data), gapPanel(data)),
    checksPanel(data),
    el("div", { class: "blame-grid" },
      sampled ? worstOfSample(data) : null,
      el("div", { class: "stacked" }, pairsPanel("The stack", data.stack), pairsPanel("Versions", data.versions))));
  const draw = () => { for (const one of figures) one.draw(); };
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

guarded(startPreflight);
