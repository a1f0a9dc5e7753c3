// The tokens of one episode, exactly as the engine read and drew them: coloured, and each with every stream.

const TOKENS_AT_ONCE = 6000;

/** The UTF-8 bytes of a text; text of other bytes than these was spelled for lack of a character. */
function hexadecimal(text) {
  return Array.from(new TextEncoder().encode(text), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A token as it is shown: breaks and blanks visible, bytes that are no text in hexadecimal. */
function tokenNodes(text, bytes, broken = true) {
  const whole = text ?? "";
  if (whole !== "" && bytes && bytes !== hexadecimal(whole)) return [
    el("span", { class: "control", title: "bytes that are no whole character" }, visibleNodes(whole))
  ];
  if (whole === "") return [
    el("span", { class: "control", title: "bytes" }, bytes ? `\u27e8${bytes}\u27e9` : "\u25a1")
  ];
  if (/^ +$/.test(whole)) return [el("span", { class: "blank" }, "\u00b7".repeat(whole.length))];
  const nodes = [];
  for (const part of whole.split(/([\n\t])/)) {
    if (part === "\n") nodes.push(el("span", { class: "blank" }, "\u23ce"), broken ? "\n" : el("wbr"));
    else if (part === "\t") nodes.push(el("span", { class: "blank" }, "\u21e5"), "\t");
    else if (part) nodes.push(visibleNodes(part));
  }
  return nodes;
}

/** Contiguous tokens of one origin, turn and segment. */
function runsOf(tokens) {
  const runs = [];
  for (let index = 0; index < tokens.id.length; index += 1) {
    const origin = tokens.origin[index];
    const turn = origin === "c" ? null : tokens.turn?.[index] ?? null;
    const segment = tokens.segment?.[index] ?? 0;
    const newest = runs.at(-1);
    const same = newest && newest.origin === origin && newest.turn === turn && newest.segment === segment;
    if (same) newest.end = index + 1;
    else runs.push({ origin, turn, segment, begin: index, end: index + 1 });
  }
  return runs;
}

function streamPairs(tokens, index) {
  const at = (name) => tokens[name]?.[index] ?? null;
  const now = at("logprob");
  const old = at("old_logprob");
  const ratio = typeof now === "number" && typeof old === "number" ? Math.exp(now - old) : null;
  return [
    ["token id", String(tokens.id[index])], ["place", `${index} of ${tokens.id.length}`], [
      "origin", own(ORIGIN_WORDS, tokens.origin[index]) ?? "context",
    ],
    ["turn", exact(at("turn"))], ["segment", exact(at("segment"))], ["version", exact(at("version"))],
    [
      "rollout log-prob", exact(at("rollout_logprob")),
    ], ["old log-prob", exact(old)], ["log-prob", exact(now)], ["ratio", exact(ratio)],
    ["mismatch", exact(at("mismatch"))], [
      "importance weight", exact(at("importance_weight")),
    ], ["advantage", exact(at("advantage"))],
    ["entropy", exact(at("entropy"))], [
      "mask reason",
      at("mask_reason") === null ? (
        tokens.origin[index] === "c" ? "\u2013" : "trained on"
      ) : foreign(at("mask_reason"), { limit: 60, more: false }),
    ],
    ["bytes", (at("bytes") ?? "").replace(/(..)(?=.)/g, "$1 ").slice(0, 1200) || "\u2013"],
  ];
}

/** Every stream of one token, in a fixed grid so that nothing moves from token to token. */
function tokenDetails(tokens, index) {
  if (index === null) return [
    el("p", { class: "muted token-hint" },
      "Hover or focus a token to read all its streams; click it for a link. Arrow keys move.",
    )
  ];
  return [
    el("p", { class: "token-shown" },
      el("span", { class: "muted" }, "Token "),
      el("bdi", { class: "mono foreign" },
        tokenNodes(cut(tokens.text?.[index] ?? "", 120), tokens.bytes?.[index], false),
      ),
    ),
    el("dl", { class: "streams" },
      streamPairs(tokens, index).map(
        ([name, value]) => el("div", { class: name === "bytes" ? "wide" : "" },
          el("dt", {}, name),
          el("dd", { "data-stream": name }, value),
        )
      ),
    ),
  ];
}

/** The token view: {node, select(index, scroll), first(turn)}; `picked(index)` is called on a click. */
function tokenView(trajectory, group, memory, picked) {
  const tokens = trajectory.tokens;
  const legend = el("div", { class: "legend-box" });
  const details = el("div", { class: "token-details", "aria-live": "off" });
  const body = el("div", { class: "tokens", role: "listbox", "aria-label": "Tokens", tabindex: "-1" });
  const nodes = new Array(tokens.id.length);
  let selected = null;
  let tabbable = 0;
  const paint = (key) => {
    memory.colouring = key;
    const scale = colouring(key, tokens, group);
    nodes.forEach((node, index) => {
      const bin = scale.binOf(index);
      node.style.setProperty("--paint", bin?.paint ?? "transparent");
      node.classList.toggle("without", bin === null);
    });
    replace(legend, legendOf(scale, tokens.id.length), el("p", { class: "muted small" }, scale.words));
  };
  const show = (index) => replace(details, tokenDetails(tokens, index));
  const roam = (index) => {
    nodes[tabbable]?.setAttribute("tabindex", "-1");
    tabbable = index;
    nodes[index]?.setAttribute("tabindex", "0");
  };
  const select = (index, scroll) => {
    nodes[selected]?.setAttribute("aria-selected", "false");
    selected = index !== null && index < nodes.length ? index : null;
    if (selected !== null && !nodes[selected]) {
      fill(nodes.length);
      paint(memory.colouring);
    }
    nodes[selected]?.setAttribute("aria-selected", "true");
    if (selected !== null) roam(selected);
    show(selected);
    if (scroll && selected !== null) nodes[selected].scrollIntoView({ block: "nearest" });
  };
  const fill = (until) => {
    fillRuns(body, tokens, nodes, until, () => { fill(nodes.length); paint(memory.colouring); });
  };
  fill(Math.min(tokens.id.length, TOKENS_AT_ONCE));
  const indexOf = (event) => {
    const node = event.target.closest?.(".token");
    return node ? Number(node.dataset.index) : null;
  };
  body.addEventListener("pointerover", (event) => { const index = indexOf(event); if (index !== null) show(index); });
  body.addEventListener("pointerleave", () => show(selected));
  body.addEventListener(
    "focusin",
    (event) => { const index = indexOf(event); if (index !== null) { roam(index); show(index); } },
  );
  body.addEventListener("click", (event) => { const index = indexOf(event); if (index !== null) picked(index); });
  body.addEventListener("keydown", (event) => tokenKey(event, tabbable, nodes, picked));
  const choice = segmented("Tokens coloured by", COLOURINGS, memory.colouring, paint);
  paint(memory.colouring);
  roam(0);
  show(null);
  const node = el("section", { class: "card token-card", "aria-label": "Tokens" },
    el("header", { class: "token-head" },
      el("h3", {}, "Tokens"),
      el("div", { class: "scroll-x" }, choice),
    ), legend, body, details);
  return {
    node, select,
    first: (turn) => tokens.turn.findIndex((value, index) => value === turn && tokens.origin[index] !== "c"),
  };
}

/** Puts the tokens up to `until` into the body, a block a run; what is beyond waits behind a button. */
function fillRuns(body, tokens, nodes, until, all) {
  body.replaceChildren();
  for (const run of runsOf(tokens)) {
    if (run.begin >= until) break;
    const turn = run.turn === null || run.turn < 0 ? "" : ` \u00b7 turn ${run.turn}`;
    const words = run.origin === "c" ? "context" : (own(ORIGIN_WORDS, run.origin) ?? "context") + turn;
    const line = el("div", { class: "run-tokens" });
    for (let index = run.begin; index < Math.min(run.end, until); index += 1) {
      const special = /^<\|[^<>|]{1,40}\|>$/.test(tokens.text?.[index] ?? "");
      nodes[index] ??= el("bdi", {
        class: special ? "token special" : "token", role: "option", "data-index": index,
        "aria-selected": "false", tabindex: "-1",
      },
        tokenNodes(tokens.text?.[index], tokens.bytes?.[index], run.origin !== "c"));
      line.append(nodes[index]);
    }
    body.append(el("div", { class: `run run-${run.origin === "c" ? "context" : "drawn"}`, role: "presentation" },
      el("span", { class: "run-name", "aria-hidden": "true" },
        words,
        run.segment > 0 ? ` (segment ${run.segment})` : "",
      ), line));
  }
  if (until < tokens.id.length) body.append(
    el("button", { type: "button", class: "link-button", on: { click: all } },
      `show all ${tokens.id.length.toLocaleString("en")} tokens`,
    )
  );
}

function tokenKey(event, at, nodes, picked) {
  const moves = {
    ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + 12, ArrowUp: at - 12,
    Home: 0, End: nodes.length - 1,
  };
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); picked(at); return; }
  if (!(event.key in moves)) return;
  event.preventDefault();
  nodes[Math.min(Math.max(moves[event.key], 0), nodes.length - 1)]?.focus();
}
