// The first screen. Charts share one axis, one pointer and one zoom; read-outs stand in the heads of their cards.

const MARKS = "Hover or focus a mark for what it says.";
const NO_MARKS = "Rules watch every step; what they say stands here.";

/** What is drawn: title, lines of series, scale, and the words that say what is healthy. */
function chartSpecs(data, axis) {
  const series = data.series;
  const rows = series.train_step.map((step) => axis.position(step));
  const line = (name, colour, extra = {}) => {
    const demonstrated = (row) => DEMONSTRATED.has(name) && series.stage[row] === "warm_start";
    const values = series[name]?.map((value, row) => (demonstrated(row) ? null : value));
    return values?.some((value) => typeof value === "number") ? { values, positions: rows, colour, ...extra } : null;
  };
  const trend = (name) => {
    const raw = line(name, "--accent");
    if (!raw || rows.length < 160) return [raw];
    return [
      { ...raw, colour: "--faint-line", width: 1 }, { ...raw, values: smoothed(raw.values, series.stage), width: 2 },
    ];
  };
  const evaluations = data.evaluations.filter((one) => typeof one.success === "number");
  const heldOut = evaluations.length ? {
    values: evaluations.map((one) => one.success),
    positions: evaluations.map((one) => axis.position(one.train_step)),
    low: evaluations.map((one) => one.success_low ?? one.success),
    high: evaluations.map((one) => one.success_high ?? one.success),
    colour: "--accent", points: true, width: 1.8,
  } : null;
  const band = data.bands["mismatch/abs_mean"];
  const mismatch = [line("mismatch/abs_max", "--faint-line", { width: 1 }), line("mismatch/abs_mean", "--accent")];
  const healthy = band ? `Healthy: mean in the band, below ${number(band.healthy_max)}.` : "Healthy: small and flat.";
  return [
    {
      key: "success", title: "Held-out success", lines: [line("success", "--faint-line", { width: 1 }), heldOut],
      range: [0, 1], unit: "share", scale: "linear", evaluations,
      words: "Dots: held-out, with 95\u00a0% interval. Thin: training. Healthy: both rise together.",
      none: "No evaluation yet, and the environment names no success.",
    },
    {
      key: "reward", title: "Reward", lines: trend("reward/mean"), scale: "linear", value: "reward/mean",
      words: "Mean of a step\u2019s episodes. Healthy: rises, then settles; noise is normal.",
      none: "No step has been rewarded yet.",
    },
    {
      key: "mismatch", title: "Mismatch", lines: mismatch, scale: "log", fixedScale: true, band, unit: "nats",
      value: "mismatch/abs_mean", words: `Engine against learner; thin: largest. ${healthy}`,
      none: "Nothing has been drawn and compared yet.",
    },
    {
      key: "entropy", title: "Entropy", lines: trend("policy/entropy"), scale: scaleFor(series["policy/entropy"]),
      value: "policy/entropy", unit: "nats",
      words: "Healthy: falls slowly. Near 0 nothing is explored; rising, it unravels.",
      none: "No update has been made yet.",
    },
    {
      key: "gradient", title: "Gradient norm", lines: trend("policy/grad_norm"),
      scale: scaleFor(series["policy/grad_norm"]), value: "policy/grad_norm",
      words: "Before clipping. Healthy: no lasting climb. 0: no group carried a signal.",
      none: "No update has been made yet.",
    },
  ].map((spec) => ({ ...spec, lines: spec.lines.filter(Boolean) }));
}

/** A figure with head, chart and words. `readOut(row)` writes the value at a row, or the newest when row is null. */
function chartCard(spec, data) {
  const value = el("span", { class: "value" });
  const toggle = spec.fixedScale || spec.key === "success" || !spec.lines.length ? null
    : el(
      "button",
      {
        type: "button", class: "scale-toggle", "aria-label": `${spec.title}: ${spec.scale} scale, switch`,
        title: "linear or log scale",
      },
      spec.scale,
    );
  const box = el("div", { class: "chart", tabindex: "0", role: "img" });
  const node = el("figure", { class: "card chart-card", "data-chart": spec.key },
    el("figcaption", {},
      el("h3", {}, spec.title),
      spec.unit === "nats" ? el("span", { class: "muted small" }, "nats") : null,
      toggle,
      value,
    ),
    spec.lines.length ? box : emptyText(spec.none), el("p", { class: "words" }, spec.words));
  const readOut = (row) => replace(
    value,
    spec.key === "success" ? successWords(spec, data, row) : el("b", {}, number(valueAt(data.series[spec.value], row))),
  );
  readOut(null);
  box.setAttribute(
    "aria-label",
    `${spec.title}: ${value.textContent}. ${spec.words} Arrow keys move through the steps, Enter opens one.`,
  );
  return { spec, node, box, toggle, readOut };
}

function valueAt(values, row) {
  if (!values) return null;
  if (row !== null) return values[row];
  return values.findLast((value) => typeof value === "number");
}

function successWords(spec, data, row) {
  const step = row === null ? Infinity : data.series.train_step[row];
  const newest = spec.evaluations.findLast((one) => one.train_step <= step);
  const training = row === null ? null : data.series.success?.[row];
  return [
    typeof training === "number" ? el("span", { class: "muted small" }, `training ${percent(training)} `) : null,
    newest ? el("b", {}, percent(newest.success)) : spec.lines.length && row === null ? el(
      "span",
      { class: "muted small" },
      "not evaluated",
    ) : null,
    newest && typeof newest.success_low === "number" ? el("span", { class: "muted small" },
      ` ${percent(newest.success_low)} \u2013 ${percent(newest.success_high)}`,
    ) : null,
  ];
}

/** Fills the section; returns what a redrawing needs. `before` is what the last call returned: its zoom is kept. */
function buildOverview(section, store, before) {
  const data = store.data;
  const axis = makeAxis(data);
  const cards = chartSpecs(data, axis).map((spec) => chartCard(spec, data));
  const where = el("span", { class: "where" });
  const said = el("p", { class: "words alarm-words" });
  const restWords = () => (data.alarms.length ? MARKS : NO_MARKS);
  const say = (alarm, count) => replace(
    said,
    alarm ? [
      stepWords(alarm), count > 1 ? ` (${count}\u00d7)` : "", ": ", foreign(alarm.text, { limit: 160, more: false }),
    ] : restWords(),
  );
  say(null);
  const timeline = data.alarms.length ? alarmTimeline(axis, data.alarms, store.steps, say) : null;
  const watched = data.series.train_step.length > 0;
  const alarmCard = el("figure", { class: "card chart-card", "data-chart": "alarms" },
    el("figcaption", {},
      el("h3", {}, "Alarms"),
      el("span", { class: "value" }, el("b", {}, number(data.alarms.length))),
    ),
    timeline ? timeline.box : el("p", { class: watched ? "empty-text calm" : "empty-text" },
      watched ? "\u2713 Nothing to report" : "No step has been watched yet.",
    ), said);
  const stages = axis.segments.length > 1 ? stageChoice(
    axis,
    (key) => { view.stage = key; zoom(rangeOfStage(axis, key)); },
  ) : null;
  const bar = el("div", { class: "axis-bar" },
    el("span", { class: "muted" },
      axis.stretched ? "Across: training step; stages not to one scale" : "Across: training step",
    ), where, stages);
  replace(section, verdictPanel(data), bar, el("div", { class: "charts" }, cards.map((card) => card.node), alarmCard),
    invariantsStrip(data.invariants), el("div", { class: "panels" },
      timePanel(data.time),
      episodesPanel(data, (reference) => store.find(reference)),
    ),
    data.sampling ? el("ul", { class: "sampling muted" }, noteItem(data.sampling)) : null,
    data.evaluations.length ? evaluationsPanel(data.evaluations) : null,
    data.worst_tokens.length ? worstPanel(data.worst_tokens) : null);
  const plots = [];
  const zoom = (next) => {
    view.range = next ?? axis.range;
    for (const plot of plots) plot.draw(view.range);
  };
  const dragged = (next) => {
    view.stage = next === null ? "all" : null;
    stages?.choose(view.stage);
    zoom(next);
  };
  const view = { range: axis.range, stage: "all" };
  for (const card of cards) if (card.spec.lines.length) plots.push(armedChart(card, axis, dragged));
  if (timeline) plots.push(timeline);
  const point = pointer(data, axis, cards, plots, where, store);
  plots.forEach((plot) => point.listen(plot));
  if (before && before.stage !== "all") {
    view.stage = before.stage;
    stages?.choose(view.stage);
    zoom(view.stage === null ? before.range : rangeOfStage(axis, view.stage));
  }
  return view;
}

function armedChart(card, axis, zoom) {
  const chart = drawChart(card.box, axis, card.spec, zoom);
  card.toggle?.addEventListener("click", () => {
    card.spec.scale = card.spec.scale === "log" ? "linear" : "log";
    card.toggle.textContent = card.spec.scale;
    card.toggle.setAttribute("aria-label", `${card.spec.title}: ${card.spec.scale} scale, switch`);
    chart.draw();
  });
  return chart;
}

/** "all", or the number of a stage as text: the part of the axis that shows it. */
function rangeOfStage(axis, key) {
  const segment = axis.segments[Number(key)];
  if (key === "all" || !segment) return axis.range;
  const pad = 0.012 * (segment.to - segment.from);
  return [segment.from - pad, segment.to + pad];
}

function stageChoice(axis, chosen) {
  return segmented(
    "Stage shown",
    [["all", "All"], ...axis.segments.map((segment, at) => [String(at), stageWords(segment.stage)])],
    "all",
    chosen,
  );
}

/** One pointer for all charts: cross-hairs, read-outs, arrow keys, and Enter or a click to open the step. */
function pointer(data, axis, cards, plots, where, store) {
  const rows = data.series.train_step.map((step) => axis.position(step));
  let row = null;
  const { stage, step, train_step: trainStep } = data.series;
  const openable = () => row !== null && stage[row] === "reinforcement" && store.readable(String(step[row]));
  const move = (next) => {
    if (next === row) return undefined;
    row = next;
    for (const plot of plots) if (row === null) plot.hide(); else plot.show(rows[row]);
    for (const card of cards) card.readOut(row);
    if (row === null) return replace(where);
    const text = `${stageWords(stage[row])} step ${number(step[row])} \u00b7 training step ${number(trainStep[row])}`;
    return replace(where, text, openable() ? el("span", { class: "muted" }, " \u00b7 click to read it") : null);
  };
  const open = () => { if (openable()) location.hash = `#${step[row]}`; };
  const moveTo = (plot, event) => {
    const near = nearestRow(rows, plot.positionAt(event.clientX));
    move(near >= 0 ? near : null);
  };
  const keys = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 };
  const listen = (plot) => {
    plot.box.addEventListener("pointermove", (event) => moveTo(plot, event));
    plot.box.addEventListener("pointerleave", () => move(null));
    plot.box.addEventListener("blur", () => move(null));
    let pressedAt = null;
    plot.box.addEventListener("pointerdown", (event) => { pressedAt = event.clientX; }, true);
    plot.box.addEventListener("pointerup", (event) => {
      if (pressedAt !== null && Math.abs(event.clientX - pressedAt) < 4 && !event.target.closest("a")) open();
      pressedAt = null;
    }, true);
    plot.box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.target === plot.box) return open();
      if (!(event.key in keys) || !rows.length) return undefined;
      event.preventDefault();
      return move(Math.min(Math.max((row ?? rows.length - 1) + keys[event.key], 0), rows.length - 1));
    });
  };
  return { listen };
}
