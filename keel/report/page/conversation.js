// An episode as messages: who said what to whom, and what could not be read.

function messageNode(message, jump) {
  const by = message.by === "policy" ? "policy" : "context";
  const turn = Number.isInteger(message.turn) ? message.turn : null;
  const facts = [
    message.channel, message.name ? `from ${message.name}` : null, message.recipient ? `to ${message.recipient}` : null,
  ].filter(Boolean);
  const empty = message.content === null || message.content === undefined || message.content === "";
  return el("li", { class: `message by-${by}${message.malformed ? " malformed" : ""}` },
    el("header", {}, el("b", {}, foreign(message.role, { limit: 40, more: false })),
      facts.map((fact) => el("span", { class: "muted" }, foreign(fact, { limit: 80, more: false }))),
      by === "policy" && turn !== null && jump ? el(
        "button",
        { type: "button", class: "link-button turn", on: { click: () => jump(turn) } },
        `turn ${turn}`,
      ) : null),
    message.malformed ? el("p", { class: "malformed-note" },
      "could not be read: ",
      foreign(message.malformed, { limit: 300 }),
    ) : null,
    empty ? el("p", { class: "muted small" }, "(empty)") : foreign(
      message.content,
      { tag: "div", label: "foreign content" },
    ));
}

/** The conversation of an episode; `jump(turn)` goes to the turn's first token. */
function conversation(trajectory, jump) {
  const messages = trajectory.messages ?? [];
  return el("section", { class: "card conversation", "aria-label": "Conversation", tabindex: "0" },
    el("header", {},
      el("h3", {}, "Conversation"),
      el("span", { class: "muted small" }, counted(messages.length, "message")),
    ),
    trajectory.error ? el("p", { class: "error-note" }, foreign(trajectory.error, { limit: 600 })) : null,
    messages.length ? el("ol", { class: "messages" },
      messages.map((message) => messageNode(message, jump)),
    ) : emptyText("No message was recorded."));
}

/** What the environment and the loop say about an attempt: parts of the reward and metrics. */
function attemptFacts(trajectory) {
  const pairs = [
    ...Object.entries(trajectory.reward_parts ?? {}), ...Object.entries(trajectory.metrics ?? {}),
  ].slice(0, 24);
  if (!pairs.length) return null;
  return el("ul", { class: "facts-list" }, pairs.map(([name, value]) => el("li", {},
    el("span", { class: "muted" },
      foreign(String(name).replaceAll("_", " "), { limit: 40, more: false }),
    ), " ", typeof value === "number" ? number(value) : foreign(value, { limit: 60, more: false }))));
}

function malformedTurns(trajectory) {
  return (trajectory.messages ?? []).filter((message) => message.malformed).length;
}

/** A small link that stands for an attempt: success, reward, and a word where something went wrong. */
function attemptChip(step, trajectory, current) {
  const judged = own({ true: "good", false: "bad" }, String(trajectory.success)) ?? "plain";
  const kind = trajectory.status === "completed" ? judged : "odd";
  const mark = { odd: "!", good: "\u2713", bad: "\u2715", plain: "" }[kind];
  const malformed = malformedTurns(trajectory) > 0;
  const status = kind === "odd" ? String(trajectory.status).slice(0, 40) : null;
  const words = [`attempt ${trajectory.attempt}`, status, malformed ? "malformed" : null].filter(Boolean);
  return el("a", {
    class: `chip ${kind}`, href: `#${step}/${trajectory.trajectory}`, "aria-current": current ? "true" : null,
    "aria-label": `${words.join(", ")}, reward ${number(trajectory.reward)}`,
    title: foreignOption(words.join(", ")),
  },
    el("span", { class: "chip-mark", "aria-hidden": "true" }, mark), number(trajectory.reward, 2),
    malformed ? el("span", { class: "chip-flag", "aria-hidden": "true" }, "\u2260") : null);
}

/** A group's attempts next to one another, each with what the policy said and what it was answered. */
function sideBySide(step, group) {
  return el("div", {
    class: "lanes-scroll", tabindex: "0", role: "region", "aria-label": "Attempts side by side",
  }, group.trajectories.map((trajectory) => el("article", { class: "attempt-lane" },
    el("header", {},
      el("a", { href: `#${step}/${trajectory.trajectory}` }, `attempt ${trajectory.attempt}`),
      rewardPill(trajectory),
    ),
    trajectory.status !== "completed" ? el("p", { class: "warn small" },
      foreign(trajectory.status, { limit: 40, more: false }),
    ) : null,
    el("ol", { class: "messages" },
      (trajectory.messages ?? []).filter((message) => Number.isInteger(message.turn)).map(
        (message) => messageNode({ ...message, content: clipped(message.content) }, null)
      ),
    ))));
}

function clipped(content) {
  const text = String(content ?? "");
  return text.length > 600 ? cut(text, 600) + "\u2026" : text;
}
