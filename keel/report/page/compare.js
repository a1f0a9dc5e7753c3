// Two runs side by side: what differs, by how much with intervals, and where they part. A is blue and solid, B
// orange and dashed, throughout.

const SIDES = ["a", "b"];
const SIDE_COLOUR = { a: "--accent", b: "--high" };
const COMPARED = [
  ["success", "Training success", "share", "linear", "Of a step\u2019s own episodes; held-out success stands above."],
  ["reward/mean", "Reward", null, "linear", "Mean of a step\u2019s episodes."],
  ["mismatch/abs_mean", "Mismatch", "nats", "log", "Engine against learner, mean. Healthy: in the band, and alike."],
  ["policy/entropy", "Entropy", "nats", "linear", "Healthy: falls slowly, and not far apart."],
  ["policy/grad_norm", "Gradient norm", null, "linear", "Before clipping."],
  ["rollout/episode_tokens", "Tokens an episode", null, "linear", "Context included. Healthy: no sudden change."],
];

function sideName(data, side) {
  return el("span", { class: `side-name side-${side}` },
    el("b", {}, side.toUpperCase()),
    " ",
    foreign(data[side].name || data[side].directory, { limit: 60, more: false }),
  );
}

/** One axis for both: stages end to end, each as long as the longer of the two. */
function commonAxis(series) {
  const lengths = new Map();
  for (const side of SIDES) {
    series[side].stage.forEach(
      (stage, row) => lengths.set(stage, Math.max(lengths.get(stage) ?? 0, series[side].step[row] + 1))
    );
  }
  const starts = new Map();
  const ends = { train_step: [], stage: [] };
  let total = 0;
  for (const stage of [...lengths.keys()].sort((a, b) => Number(b === "warm_start") - Number(a === "warm_start"))) {
    starts.set(stage, total);
    ends.train_step.push(total + 1, total + lengths.get(stage));
    ends.stage.push(stage, stage);
    total += lengths.get(stage);
  }
  const axis = makeAxis({ series: ends });
  return { axis, place: (stage, step) => axis.position((starts.get(stage) ?? 0) + step + 1) };
}

/** Values and positions with a gap between stages: a run that left one early does not cross to the next. */
function parted(values, series, place) {
  const found = { values: [], positions: [] };
  values.forEach((value, row) => {
    const position = place(series.stage[row], series.step[row]);
    if (row > 0 && series.stage[row] !== series.stage[row - 1]) {
      found.values.push(null);
      found.positions.push(position);
    }
    found.values.push(value);
    found.positions.push(position);
  });
  return found;
}

function comparedSpec([name, title, unit, scale, words], data, place) {
  const lines = SIDES.map((side) => {
    const series = data.series[side];
    const values = series[name]?.map(
      (value, row) => (DEMONSTRATED.has(name) && series.stage[row] === "warm_start" ? null : value)
    );
    if (!values?.some((value) => typeof value === "number")) return null;
    const shown = values.length < 160 ? values : smoothed(values, series.stage);
    return {
      ...parted(shown, series, place), colour: SIDE_COLOUR[side], dash: side === "b" ? "4px 2px" : "solid",
      side,
    };
  }).filter(Boolean);
  const band = data.bands.a?.[name] ?? data.bands.b?.[name];
  const wanted = scale === "log" ? "log" : scaleFor(lines.flatMap((line) => line.values));
  return { name, title, unit, scale: wanted, lines, words, band, range: unit === "share" ? [0, 1] : undefined };
}

function comparedCard(spec) {
  const value = el("span", { class: "value small" });
  const box = el(
    "div",
    {
      class: "chart", role: "img", tabindex: "0",
      "aria-label": `${spec.title} of A and B over the steps. ${spec.words}`,
    },
  );
  const node = el("figure", { class: "card chart-card", "data-chart": spec.name },
    el("figcaption", {},
      el("h3", {}, spec.title),
      spec.unit === "nats" ? el("span", { class: "muted small" }, "nats") : null,
      value,
    ),
    spec.lines.length ? box : emptyText("Neither run has it."), el("p", { class: "words" }, spec.words));
  const write = (one) => (spec.unit === "share" ? percent(one) : number(one));
  const readOut = (position) => replace(value, spec.lines.map((line) => {
    const newest = line.values.findLastIndex((one) => typeof one === "number");
    const row = position === null ? newest : nearestRow(line.positions, position);
    return el("span", { class: `side-${line.side}` },
      el("b", {}, line.side.toUpperCase()),
      ` ${write(line.values[row])} `,
    );
  }));
  readOut(null);
  return { node, box, spec, readOut };
}

function divergencePanel(data) {
  const { first, token } = data.divergence;
  const facts = first ? el("table", { class: "table" },
    el("thead", {}, el("tr", {}, ["metric", "A", "B"].map((word) => el("th", { scope: "col" }, word)))),
    el("tbody", {},
      first.metrics.slice(0, 5).map(
        (one) => el("tr", {},
          el("th", { scope: "row" }, foreign(one.metric, { limit: 60, more: false })),
          el("td", {}, exact(one.a)),
          el("td", {}, exact(one.b)),
        )
      ),
    )) : null;
  const spelled = (one) => (
    one ? [
      el("bdi", { class: "mono foreign token-text" }, visibleNodes(cut(String(one.text ?? ""), 60))),
      el("span", { class: "muted" }, ` id ${number(one.id)}`),
    ] : "the sequence ends"
  );
  const tokens = token ? el("div", { class: "parting" },
    el("p", { class: "muted small" },
      `First token that differs: step ${number(token.step)}, attempt ${number(token.attempt)}, `,
      `token ${number(token.position)}`,
    ),
    token.before ? el("p", { class: "mono before" },
      "\u2026",
      foreign(token.before, { limit: 200, more: false }),
    ) : null,
    el("p", {},
      el("b", { class: "side-a" }, "A "),
      spelled(token.a),
    ),
    el("p", {}, el("b", { class: "side-b" }, "B "), spelled(token.b))) : null;
  return panel(
    "Where they part",
    first ? `${stageWords(first.stage)} step ${number(first.step)}` : "",
    el("p", { class: "lead" }, foreign(data.divergence.text, { limit: 600 })),
    facts,
    tokens,
  );
}

function configTable(data) {
  const value = (text) => (text === null || text === undefined ? null : foreign(text, { limit: 120 }));
  return tableOf(
    "Config",
    ["option", "A", "B"],
    data.config.slice(0, 200).map((one) => [foreign(one.option, { limit: 80 }), value(one.a), value(one.b)]),
    "The configs are the same, option for option.",
  );
}

function figuresTable(data) {
  return tableOf(
    "Figures",
    ["", "A", "B"],
    data.figures.map((one) => [foreign(one.text, { limit: 80 }), number(one.a), number(one.b)]),
    "Neither run has finished a step.",
  );
}

function overlay(data) {
  const { axis, place } = commonAxis(data.series);
  const cards = COMPARED.map((row) => comparedCard(comparedSpec(row, data, place)));
  const first = data.divergence.first;
  const parts = first ? place(first.stage, first.step) : null;
  const charts = [];
  const arm = () => {
    const zoom = (range) => { for (const chart of charts) chart.draw(range ?? axis.range); };
    for (const card of cards) if (card.spec.lines.length) charts.push(
      drawChart(card.box, axis, { ...card.spec, parting: parts }, zoom)
    );
    const move = (position) => {
      for (const chart of charts) if (position === null) chart.hide(); else chart.show(position);
      for (const card of cards) card.readOut(position);
    };
    for (const chart of charts) {
      chart.box.addEventListener(
        "pointermove",
        (event) => move(Math.min(Math.max(chart.positionAt(event.clientX), 0), 1)),
      );
      chart.box.addEventListener("pointerleave", () => move(null));
    }
  };
  return {
    node: el("div", { class: "charts" }, cards.map((card) => card.node)), arm,
    redraw: () => { for (const chart of charts) chart.draw(); },
  };
}

function startComparison() {
  const data = JSON.parse(document.getElementById("keel-data").textContent);
  if (data.schema_version !== 1) throw new Error(
    `this page shows schema_version 1, the data has ${String(data.schema_version).slice(0, 20)}`
  );
  replace(document.getElementById("run-name"), "Comparison");
  replace(
    document.getElementById("run-facts"),
    SIDES.map(
      (side) => [
        sideName(data, side), el("span", { class: "pill" }, foreign(data[side].state, { limit: 40, more: false })),
      ]
    ),
  );
  document.title = "Keel comparison";
  const curves = overlay(data);
  replace(document.getElementById("view-compare"),
    el("section", { class: "verdict running", "aria-label": "Summary" },
      el("span", { class: "verdict-mark", "aria-hidden": "true" }, "\u21c4"),
      el("div", { class: "verdict-text" }, el("h2", {}, foreign(data.summary, { limit: 600 }))),
    ),
    el("div", { class: "compare-grid" }, forest(data), divergencePanel(data)), curves.node, el(
      "div",
      { class: "compare-grid" },
      configTable(data),
      figuresTable(data),
    ));
  curves.arm();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => curves.redraw());
}

guarded(startComparison);
