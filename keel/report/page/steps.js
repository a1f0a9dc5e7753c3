// The list beside the reader: steps, or the attempts that the filters leave.

const ROWS_AT_ONCE = 250;
const NO_FILTER = { stage: "", success: "", status: "", malformed: false, least: "", most: "", text: "" };

const searched = new WeakMap();

/** Everything an attempt says, in lower case, made once. */
function searchText(group, trajectory) {
  if (!searched.has(trajectory)) {
    const parts = [
      group.task_text, group.group_id, trajectory.error,
      ...(trajectory.messages ?? []).flatMap(
        (message) => [message.content, message.malformed, message.name, message.recipient]
      ),
    ];
    searched.set(trajectory, parts.filter(Boolean).join("\n").toLowerCase());
  }
  return searched.get(trajectory);
}

function matches(filter, group, trajectory) {
  if (filter.success === "yes" && trajectory.success !== true) return false;
  if (filter.success === "no" && trajectory.success !== false) return false;
  if (filter.status && trajectory.status !== filter.status) return false;
  if (filter.malformed && !malformedTurns(trajectory)) return false;
  if (filter.least !== "" && !(trajectory.reward >= Number(filter.least))) return false;
  if (filter.most !== "" && !(trajectory.reward <= Number(filter.most) && trajectory.reward !== null)) return false;
  return !filter.text || searchText(group, trajectory).includes(filter.text.toLowerCase());
}

function narrows(filter) {
  return Object.entries(filter).some(([name, value]) => name !== "stage" && value !== NO_FILTER[name]);
}

/** Rows of the series and recorded steps, newest first: {stage, step, row, readable}. */
function listedSteps(store, filter) {
  const { series } = store.data;
  const alarmed = new Set(store.data.alarms.map((alarm) => `${alarm.stage} ${alarm.step}`));
  const found = series.train_step.map((_, row) => {
    const [stage, step] = [series.stage[row], series.step[row]];
    return {
      stage, step, row, alarmed: alarmed.has(`${stage} ${step}`),
      readable: stage === "reinforcement" && store.readable(String(step)),
    };
  });
  const rows = new Set(found.filter((one) => one.stage === "reinforcement").map((one) => String(one.step)));
  for (const step of store.steps.keys()) if (!rows.has(step)) found.push(
    { stage: "reinforcement", step: Number(step), row: null, alarmed: false, readable: true }
  );
  return found.filter((one) => !filter.stage || one.stage === filter.stage).reverse();
}

function statuses(store) {
  const found = new Set();
  for (const step of store.steps.values()) {
    for (const group of step.groups) for (const { status } of group.trajectories) found.add(String(status));
  }
  return [...found].sort();
}

function field(label, control) {
  return el("label", { class: "field" }, el("span", {}, label), control);
}

function selectOf(name, options, filter, changed) {
  const control = el("select", { name, on: { change: () => { filter[name] = control.value; changed(); } } },
    options.map(([value, text]) => el("option", { value }, foreignOption(text))),
  );
  control.value = filter[name];
  return control;
}

/** An option takes plain text only: what is invisible in it is drawn, and it is kept short. */
function foreignOption(text) {
  return String(text).slice(0, 60).replace(INVISIBLE, pictured);
}

function inputOf(name, filter, changed, attributes) {
  const control = el(
    "input",
    {
      name, ...attributes, value: filter[name],
      on: { input: () => { filter[name] = control.value.trim(); changed(); } },
    },
  );
  return control;
}

function filterForm(store, filter, changed) {
  const stages = [...new Set(store.data.series.stage)];
  const malformed = el(
    "input",
    { type: "checkbox", name: "malformed", on: { change: () => { filter.malformed = malformed.checked; changed(); } } },
  );
  malformed.checked = filter.malformed;
  const number_ = { type: "number", step: "any", inputmode: "decimal" };
  return el("form", { class: "filters", "aria-label": "Filters", on: { submit: (event) => event.preventDefault() } },
    field(
      "Search",
      inputOf(
        "text",
        filter,
        changed,
        { type: "search", placeholder: "task or what was said", autocomplete: "off", spellcheck: "false" },
      ),
    ),
    el("div", { class: "field-row" },
      field("Success", selectOf("success", [["", "any"], ["yes", "yes"], ["no", "no"]], filter, changed)),
      field(
        "Status",
        selectOf(
          "status",
          [["", "any"], ...statuses(store).map((status) => [status, status.replaceAll("_", " ")])],
          filter,
          changed,
        ),
      )),
    el("div", { class: "field-row" },
      field(
        "Reward from",
        inputOf("least", filter, changed, number_),
      ), field("to", inputOf("most", filter, changed, number_))),
    el("div", { class: "field-row" },
      field(
        "Stage",
        selectOf("stage", [["", "all"], ...stages.map((stage) => [stage, stageWords(stage)])], filter, changed),
      ),
      el("label", { class: "field check" }, malformed, el("span", {}, "malformed only"))));
}

function stepRow(store, one, current) {
  const { series } = store.data;
  const reward = one.row === null ? null : series["reward/mean"]?.[one.row];
  const success = one.row === null ? null : series.success?.[one.row];
  const share = typeof success === "number" ? success : null;
  const cells = [
    el("span", { class: "step-number" },
      one.stage === "reinforcement" ? `step ${number(one.step)}` : `${stageWords(one.stage)} ${number(one.step)}`,
    ),
    one.alarmed ? el("span", { class: "alarm-dot", title: "alarm" },
      el("span", { class: "visually-hidden" }, "alarm"),
    ) : null,
    el("span", { class: "step-figures" }, typeof reward === "number" ? aligned(reward) : "\u2013"),
    el("span", { class: "meter", "aria-hidden": "true" },
      share === null ? null : el("span", { style: { width: `${100 * share}%` } }),
    ),
  ];
  return el("li", {}, one.readable
    ? el("a", { class: "step-row", href: `#${one.step}`, "aria-current": current ? "true" : null }, cells)
    : el("span", { class: "step-row unread", title: "no episodes recorded here" }, cells));
}

function attemptRows(store, filter, current) {
  const rows = [];
  let read = 0;
  const steps = [...store.steps].filter(
    () => !filter.stage || filter.stage === "reinforcement"
  ).sort((a, b) => Number(b[0]) - Number(a[0]));
  for (const [step, { groups }] of steps) {
    for (const group of groups) {
      for (const trajectory of group.trajectories) {
        read += 1;
        if (!matches(filter, group, trajectory)) continue;
        const reference = `${step}/${trajectory.trajectory}`;
        rows.push(() => el("li", {}, el("a", {
          class: "attempt-row", href: `#${reference}`, "aria-current": reference === current ? "true" : null,
        },
          el("span", { class: "attempt-head" },
            el("span", {}, reference),
            rewardPill(trajectory),
          ),
          el("span", { class: "muted" }, foreignLine(group.task_text, 90)))));
      }
    }
  }
  return { rows, read };
}

/** The side list: {node, refresh()}. `place()` is {step, trajectory} as shown in the reader. */
function stepList(store, place) {
  const filter = { ...NO_FILTER };
  const list = el("ol", { class: "step-list" });
  const summary = el("p", { class: "muted small list-summary", role: "status" });
  const clear = el("button", { type: "button", class: "link-button", hidden: true }, "clear filters");
  let shown = ROWS_AT_ONCE;
  const fill = () => {
    const { step, trajectory } = place();
    clear.hidden = !narrows(filter) && !filter.stage;
    let rows;
    if (narrows(filter)) {
      const found = attemptRows(store, filter, step === null ? null : `${step}/${trajectory}`);
      rows = found.rows;
      replace(summary, `${counted(rows.length, "attempt")} of the ${found.read.toLocaleString("en")} that are here`);
    } else {
      const steps = listedSteps(store, filter);
      rows = steps.map((one) => () => stepRow(store, one, one.stage === "reinforcement" && String(one.step) === step));
      replace(summary, `${counted(steps.length, "step")}; reward, success`);
    }
    replace(list, rows.slice(0, shown).map((make) => make()));
    if (!rows.length) list.append(
      el("li", { class: "empty-text" }, narrows(filter) ? "Nothing matches." : "No step has been recorded yet.")
    );
    if (rows.length > shown) list.append(
      el("li", {},
        el("button", { type: "button", class: "link-button", on: { click: () => { shown += 1000; fill(); } } },
          `show more of ${rows.length.toLocaleString("en")}`,
        ),
      )
    );
  };
  let soon = null;
  const changed = () => { clearTimeout(soon); soon = setTimeout(() => { shown = ROWS_AT_ONCE; fill(); }, 120); };
  const box = el("div", {});
  const form = () => replace(box, filterForm(store, filter, changed));
  clear.addEventListener("click", () => { Object.assign(filter, NO_FILTER); form(); fill(); });
  form();
  const node = el("aside", { class: "card side", "aria-label": "Steps" },
    box,
    el("div", { class: "list-head" }, summary, clear),
    list,
  );
  return { node, refresh: fill };
}
