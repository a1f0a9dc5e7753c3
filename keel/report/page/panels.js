// The parts of the first screen that are not charts: verdict, invariants, where time went, episodes to read.

const NOTES_SHOWN = 3;
const VERDICT_MARK = { good: "\u2713", warn: "!", bad: "\u2715", running: "\u25b8" };
const VERDICT_WORD = { good: "Sound", warn: "Look here", bad: "Broken", running: "Running" };
const STATE_KIND = {
  completed: "good", running: "running", starting: "running", stopped: "warn",
  interrupted: "warn", failed: "bad", crashed: "bad",
};

/** Header facts: what was trained, on what, when, and how far it is. */
function headerFacts(run) {
  const state = String(run.state ?? "unknown");
  const done = Number.isFinite(run.steps_done) ? run.steps_done : 0;
  const planned = run.steps_planned ? counted(run.steps_planned, "step") : null;
  const steps = planned ? `${done.toLocaleString("en")} of ${planned}` : counted(done, "step");
  const parts = [run.model, run.env, Number.isFinite(run.seed) ? `seed ${run.seed}` : null].filter(Boolean);
  return [
    el("span", { class: `pill ${own(STATE_KIND, state) ?? ""}` }, foreign(state, { limit: 40, more: false })),
    el("span", {}, steps),
    parts.map((part) => el("span", { class: "fact" }, foreign(part, { limit: 60, more: false }))),
    el("span", { class: "fact-time" }, moment(run.updated_unix_s)),
  ];
}

function verdictPanel(data) {
  const level = own(VERDICT_MARK, data.verdict?.level) ? data.verdict.level : "warn";
  const link = firstBad(data.verdict ?? {});
  const notes = (data.verdict?.notes ?? []).map(noteItem);
  const text = String(data.verdict?.text || "No verdict yet.");
  const reason = data.run?.reason && !text.includes(data.run.reason) ? el("p", { class: "reason" },
    foreign(data.run.reason, { limit: 240 }),
  ) : null;
  return el("section", { class: `verdict ${level}`, "aria-label": "Verdict" },
    el("span", { class: "verdict-mark", "aria-hidden": "true" }, VERDICT_MARK[level]),
    el("div", { class: "verdict-text" },
      el("h2", { class: text.length > 150 ? "long" : "" },
        el("span", { class: "visually-hidden" }, `${VERDICT_WORD[level]}: `),
        foreign(text, { limit: 400 }),
        link ? [" ", link] : null,
      ),
      reason),
    notes.length ? el("ul", { class: "verdict-notes", "aria-label": "Notes" }, shownNotes(notes)) : null);
}

/** The first bad step, as a link where its episodes can be read. */
function firstBad(verdict) {
  const step = verdict.first_bad_step;
  if (!Number.isInteger(step)) return null;
  const stage = verdict.first_bad_stage ?? "reinforcement";
  if (stage !== "reinforcement") return el("span", { class: "first-bad" },
    `First bad step: ${stageWords(stage)} ${step}`,
  );
  return el("a", { class: "first-bad", href: `#${step}` },
    `First bad step: ${step}`,
    el("span", { "aria-hidden": "true" }, " \u2192"),
  );
}

/** A note shows its first sentence; the rest is behind it. */
function noteItem(note) {
  const text = String(note);
  const end = text.search(/[.:;] /);
  if (end < 0 || end > 140 || text.length < 72) return el("li", {}, foreign(text, { limit: 300 }));
  return el("li", {},
    el("details", {},
      el("summary", {}, foreign(text.slice(0, end) + ".")),
      foreign(text.slice(end + 2), { limit: 1200 }),
    ),
  );
}

/** Three lines at most: the notes, or the first two and how many more there are. */
function shownNotes(notes) {
  if (notes.length <= NOTES_SHOWN) return notes;
  const rest = notes.slice(NOTES_SHOWN - 1);
  return [
    notes.slice(0, NOTES_SHOWN - 1),
    el("li", {}, el("details", {}, el("summary", {}, `and ${counted(rest.length, "more note")}`), el("ul", {}, rest))),
  ];
}

/** A strip: one cell an invariant, broken ones first, each with how often it held. */
function invariantsStrip(invariants) {
  const sorted = [...invariants].sort((a, b) => Number(a.ok) - Number(b.ok));
  const cells = sorted.map((one) => {
    const kind = one.of === 0 ? "unchecked" : one.ok ? "held" : "broken";
    const count = one.of === 0 ? "not checked" : `${one.held.toLocaleString("en")} of ${counted(one.of, "step")}`;
    return el("li", { class: `invariant ${kind}` },
      el("span", { class: "invariant-mark", "aria-hidden": "true" },
        { held: "\u2713", broken: "\u2715", unchecked: "\u2013" }[kind],
      ),
      el("span", { class: "invariant-text" },
        foreign(one.text, { limit: 80, more: false }),
      ),
      el("span", { class: "invariant-count" }, count));
  });
  return el("section", { class: "card strip", "aria-label": "Invariants" }, el("h3", {}, "Invariants"),
    cells.length ? el("ul", { class: "invariants" }, cells) : emptyText("No step has been checked yet."));
}

function timePanel(time) {
  const total = time.reduce((sum, one) => sum + (one.seconds ?? 0), 0);
  if (!(total > 0)) return panel("Where time went", "", emptyText("No step has been timed yet."));
  const shown = [...time].filter((one) => one.seconds > 0).sort((a, b) => b.seconds - a.seconds);
  const bar = shown.map(
    (one, at) => el(
      "span",
      { style: { width: `${(100 * one.seconds) / total}%`, background: `var(--phase-${Math.min(at, 5)})` } },
    )
  );
  const rows = shown.slice(0, 6).map((one, at) => el("li", {},
    el("span", { class: "swatch", style: { background: `var(--phase-${Math.min(at, 5)})` }, "aria-hidden": "true" }),
    el("span", { class: "phase" }, foreign(one.phase, { limit: 40, more: false })),
    el("span", { class: "number" }, duration(one.seconds)),
    el("span", { class: "number muted" }, percent(one.seconds / total, 0))));
  return panel(
    "Where time went",
    `${duration(total)} in all`,
    el("div", { class: "time-bar", "aria-hidden": "true" }, bar),
    el("ul", { class: "time-list" }, rows),
  );
}

const EPISODE_WORDS = { best: "Best", worst: "Worst", strangest: "Strangest" };

function episodesPanel(data, find) {
  const cards = Object.entries(EPISODE_WORDS).map(([kind, word]) => {
    const reference = data.episodes?.[kind];
    if (!/^\d+\/\d+$/.test(reference ?? "")) return null;
    const found = find(reference);
    const why = data.episodes.why?.[kind];
    return el("li", {}, el("a", { class: `pick ${kind}`, href: `#${reference}` },
      el("span", { class: "pick-head" },
        el("b", {}, word),
        el("span", { class: "muted" }, `step ${reference.split("/")[0]}`),
        found ? rewardPill(found.trajectory) : null,
      ),
      el("span", { class: "pick-task" }, foreignLine(found?.group.task_text ?? "", 120)),
      el("span", { class: "pick-why muted" }, foreignLine(why ?? "", 120))));
  }).filter(Boolean);
  const body = cards.length ? el("ul", { class: "picks" }, cards) : emptyText("No episode has been recorded yet.");
  return panel("Three episodes to read", "", body);
}

function rewardPill(trajectory) {
  const kind = trajectory.success === true ? "good" : trajectory.success === false ? "bad" : "";
  const mark = trajectory.success === true ? "\u2713 " : trajectory.success === false ? "\u2715 " : "";
  return el("span", { class: `pill ${kind}` }, `${mark}reward ${number(trajectory.reward)}`);
}

function panel(title, aside, ...body) {
  return el("section", { class: "card panel", "aria-label": title },
    el("header", {}, el("h3", {}, title), aside ? el("span", { class: "muted small" }, aside) : null),
    body,
  );
}

function emptyText(text) {
  return el("p", { class: "empty-text" }, text);
}

function tableOf(title, head, rows, none) {
  const cells = (row) => row.map(
    (cell, at) => el(
      at === 0 ? "th" : "td",
      at === 0 ? { scope: "row" } : {},
      cell ?? el("span", { class: "muted" }, "\u2013"),
    )
  );
  const table = el("div", { class: "table-scroll" },
    el("table", { class: "table" },
      el("thead", {}, el("tr", {}, head.map((word) => el("th", { scope: "col" }, word)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, cells(row)))),
    ),
  );
  return panel(title, "", rows.length ? table : emptyText(none));
}

/** "98.8 % (97.5 % to 99.5 %)". */
function withInterval(value, low, high) {
  if (typeof value !== "number") return null;
  return percent(value) + (typeof low === "number" ? ` (${percent(low)} to ${percent(high)})` : "");
}

/** Every evaluation with all it measured; pass@k has a column for each k that some evaluation has. */
function evaluationsPanel(evaluations) {
  const powers = [...new Set(evaluations.flatMap((one) => Object.keys(one.pass_at_k ?? {})))].sort((a, b) => a - b);
  const rows = evaluations.map((one) => [
    foreign(String(one.name).replaceAll("_", " "), { limit: 80, more: false }), number(one.train_step),
    number(one.num_tasks), withInterval(one.success, one.success_low, one.success_high), number(one.reward),
    ...powers.map((k) => {
      const found = own(one.pass_at_k ?? {}, k);
      return found ? withInterval(found.value, found.low, found.high) : null;
    }),
  ]);
  const head = ["", "training step", "tasks", "success", "reward", ...powers.map((k) => `pass@${k}`)];
  return tableOf("Evaluations", head, rows, "Nothing has been evaluated yet.");
}

/** The tokens on which engine and learner differed most; their texts are the model's. */
function worstPanel(tokens) {
  const text = (value) => (value === null ? null : foreign(value, { limit: 80, more: false }));
  const rows = tokens.map((one) => [
    number(one.step), foreign(one.where, { limit: 60, more: false }), number(one.position),
    number(one.engine), number(one.learner), number(one.gap), text(one.text), text(one.before),
  ]);
  const head = ["step", "attempt", "place", "engine", "learner", "difference", "token", "after"];
  return tableOf("Worst tokens, engine against learner", head, rows, "");
}
