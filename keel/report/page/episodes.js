// The second view: a step's groups, or one episode with its conversation beside its tokens. The address says what is
// shown: #step/trajectory/token.

const CHOOSE = "Choose a step on the left, or search for what was said.";
const NO_EPISODES = "No episodes have been recorded yet. record.every in the config says how often they are.";

/** {step, trajectory, token} of an address such as "#137/12/40", else null. */
function placeOf(hash) {
  const found = /^#(\d{1,9})(?:\/(\d{1,9})(?:\/(\d{1,9}))?)?$/.exec(hash);
  if (!found) return null;
  return {
    step: String(Number(found[1])), trajectory: found[2] === undefined ? null : Number(found[2]),
    token: found[3] === undefined ? null : Number(found[3]),
  };
}

function stepNeighbours(store, step) {
  const known = store.data.live ? [
    ...new Set([...(store.data.run.recorded_steps ?? []).map(String), ...store.steps.keys()])
  ] : [...store.steps.keys()];
  const sorted = known.map(Number).sort((a, b) => a - b);
  return [sorted.findLast((other) => other < Number(step)), sorted.find((other) => other > Number(step))];
}

function arrowLink(target, text, label) {
  return target === null || target === undefined
    ? el("span", { class: "button arrow off", "aria-hidden": "true" }, text)
    : el("a", { class: "button arrow", href: `#${target}`, "aria-label": label }, text);
}

function groupCard(step, group, memory) {
  const rewards = group.trajectories.map((one) => one.reward).filter((reward) => typeof reward === "number");
  const mean = rewards.length ? rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length : null;
  const differs = rewards.some((reward) => reward !== rewards[0]);
  const total = group.num_trajectories ?? group.trajectories.length;
  const lanes = el("div", { hidden: true });
  const open = () => {
    lanes.hidden = !lanes.hidden;
    button.setAttribute("aria-expanded", String(!lanes.hidden));
    memory.open = lanes.hidden ? null : group.group_id;
    if (!lanes.hasChildNodes()) lanes.append(sideBySide(step, group));
  };
  const button = el("button", { type: "button", class: "button", "aria-expanded": "false", on: { click: open } },
    "Side by side",
  );
  if (memory.open === group.group_id) open();
  return el("article", { class: "card group" },
    el("header", {}, el("h4", {}, foreign(group.task_text, { limit: 280, more: false })), button),
    el("p", { class: "group-facts muted small" },
      el("span", {},
        "group ",
        foreign(group.group_id, { limit: 60, more: false }),
      ),
      el("span", {}, `mean reward ${number(mean)}`),
      el("span", { class: differs ? "" : "muted" },
        differs ? "rewards differ: it teaches" : "rewards alike: it teaches nothing",
      ),
      total > group.trajectories.length ? el("span", {},
        `${group.trajectories.length} of ${counted(total, "attempt")} here`,
      ) : el("span", {}, counted(total, "attempt"))),
    el("nav", { class: "chips", "aria-label": "Attempts" },
      group.trajectories.map((trajectory) => attemptChip(step, trajectory, false)),
    ), lanes);
}

function stepFacts(store, step) {
  const { series } = store.data;
  const row = series.step.findIndex((value, at) => String(value) === step && series.stage[at] === "reinforcement");
  if (row < 0) return null;
  const facts = [["reward", number(series["reward/mean"]?.[row])], ["success", percent(series.success?.[row])], [
    "mismatch", number(series["mismatch/abs_mean"]?.[row]),
  ],
    ["entropy", number(series["policy/entropy"]?.[row])], [
      "gradient norm", number(series["policy/grad_norm"]?.[row]),
    ], ["training step", number(series.train_step[row])]];
  return el("p", { class: "step-facts" },
    facts.map(([name, value]) => el("span", {}, el("span", { class: "muted" }, `${name} `), value)),
  );
}

function leftOut(found) {
  const [out, all] = [found.left_out.toLocaleString("en"), counted(found.num_trajectories, "episode")];
  return `${out} of this step\u2019s ${all} are not in this page; keel report --serve shows all.`;
}

function stepPage(store, step, found, memory) {
  const [before, after] = stepNeighbours(store, step);
  const alarms = store.data.alarms.filter((alarm) => alarm.stage === "reinforcement" && String(alarm.step) === step);
  return [
    el("header", { class: "reader-head" },
      el("div", { class: "reader-title" },
        el("h2", { tabindex: "-1" }, `Step ${step}`),
        arrowLink(before, "\u2190", "Step before"),
        arrowLink(after, "\u2192", "Step after"),
      ),
      stepFacts(store, step),
    ),
    alarms.map(
      (alarm) => el("p", { class: `notice ${alarm.severity === "warn" ? "warn" : "bad"}` },
        foreign(alarm.text, { limit: 300 }),
      )
    ),
    found.left_out > 0 ? el("p", { class: "muted small" }, leftOut(found)) : null,
    found.groups.length ? found.groups.map(
      (group) => groupCard(step, group, memory)
    ) : emptyText("No episode of this step is here."),
  ];
}

function episodeHead(store, step, group, trajectory) {
  const siblings = group.trajectories;
  const at = siblings.indexOf(trajectory);
  const link = (other) => (other ? `${step}/${other.trajectory}` : null);
  const ok = trajectory.status === "completed";
  return el("header", { class: "reader-head" },
    el("div", { class: "reader-title" }, el("a", { href: `#${step}` }, `Step ${step}`), el("h2", { tabindex: "-1" },
      `Attempt ${number(trajectory.attempt)}`,
    ), rewardPill(trajectory),
      ok ? null : el("span", { class: "pill warn" },
        foreign(String(trajectory.status).replaceAll("_", " "), { limit: 40, more: false }),
      ),
      el("span", { class: "muted token-count" }, trajectory.num_tokens ? counted(trajectory.num_tokens, "token") : ""),
      el("span", { class: "push" }), arrowLink(
        link(siblings[at - 1]),
        "\u2190",
        "Attempt before",
      ), arrowLink(link(siblings[at + 1]), "\u2192", "Attempt after")),
    el("p", { class: "reader-task" }, foreign(group.task_text, { limit: 240, more: false })),
    el("nav", { class: "chips", "aria-label": "Attempts of the group" },
      siblings.map((one) => attemptChip(step, one, one === trajectory)),
    ), attemptFacts(trajectory));
}

/** Fills the section once; show(place) draws a place, refresh() the list after new data. */
function buildEpisodes(section, store) {
  const memory = { colouring: "origin", open: null };
  let shown = { step: null, trajectory: null, view: null };
  const reader = el("div", { class: "reader" });
  const list = stepList(store, () => shown);
  replace(section, el("div", { class: "episodes" }, list.node, reader));
  const note = (text) => replace(reader, el("p", { class: "card empty" }, text));
  const drawEpisode = (step, found) => {
    const { group, trajectory } = found;
    const picked = (index) => { location.hash = `#${step}/${trajectory.trajectory}/${index}`; };
    const view = trajectory.tokens ? tokenView(trajectory, group, memory, picked) : null;
    const jump = view ? (turn) => { const first = view.first(turn); if (first >= 0) picked(first); } : null;
    const tokens = view?.node ?? el("section", { class: "card token-card", "aria-label": "Tokens" }, el(
      "header",
      { class: "token-head" },
      el("h3", {}, "Tokens"),
    ),
      emptyText(trajectory.tokens_note || "No token streams are here for this attempt."));
    replace(
      reader,
      episodeHead(store, step, group, trajectory),
      el("div", { class: "side-by-side" }, conversation(trajectory, jump), tokens),
    );
    return view;
  };
  const show = async (place) => {
    section.classList.toggle("reading", place !== null);
    if (place === null) {
      shown = { step: null, trajectory: null, view: null };
      list.refresh();
      return note(store.steps.size ? CHOOSE : NO_EPISODES);
    }
    const same = place.step === shown.step && place.trajectory === shown.trajectory;
    if (same && shown.view) return shown.view.select(place.token, true);
    const asked = (shown = { step: place.step, trajectory: place.trajectory, view: null });
    if (!store.steps.has(place.step) && store.data.live) note(`Reading step ${place.step} \u2026`);
    const step = await store.load(place.step);
    if (shown !== asked) return undefined;
    list.refresh();
    if (!step) return note(`Step ${place.step} is not in this page. keel report --serve shows every recorded step.`);
    if (place.trajectory === null) return replace(reader, stepPage(store, place.step, step, memory));
    const found = findTrajectory(step, place.trajectory);
    if (!found) return note(
      `Episode ${place.trajectory} of step ${place.step} is not in this page. keel report --serve shows every one.`
    );
    shown.view = drawEpisode(place.step, found);
    return shown.view?.select(place.token, place.token !== null);
  };
  return { show, refresh: () => list.refresh() };
}
