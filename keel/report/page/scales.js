// What a token's colour says. Each colouring sorts tokens into a few bins with fixed bounds, so that a colour means
// the same in every episode,
// and its legend gives the bounds and how many tokens fell into each. Two-sided scales run blue to orange, one-sided
// ones in strength.

const COLOURINGS = [
  ["origin", "Origin"], ["mismatch", "Mismatch"], ["importance_weight", "Weight"], ["advantage", "Advantage"],
  ["entropy", "Entropy"], ["mask_reason", "Mask reason"],
];

const ORIGIN_WORDS = { c: "context", p: "policy", d: "demonstration" };
const CATEGORY_COLOURS = ["--phase-1", "--phase-2", "--phase-3", "--phase-4", "--low", "--high"];

/** A tint of a page colour over the card; `strength` from 0 to 1 keeps text readable in light and dark. */
function tint(name, strength) {
  return `color-mix(in oklab, var(${name}) ${Math.round(14 + 46 * strength)}%, transparent)`;
}

const NEUTRAL = tint("--muted", 0.02);

/** Bins over |value| with rising bounds: below the first, ..., at or above the last. An exact 0 has its own. */
function risingBins(bounds, colour, write) {
  const bins = [{ label: "0", paint: NEUTRAL, holds: (value) => value === 0 }];
  bounds.forEach((bound, at) => bins.push(
    {
      label: `< ${write(bound)}`, paint: tint(colour, (at + 0.3) / (bounds.length + 0.3)),
      holds: (value) => Math.abs(value) < bound,
    }));
  bins.push({ label: `\u2265 ${write(bounds.at(-1))}`, paint: tint(colour, 1), holds: () => true });
  return bins;
}

const WEIGHT_BINS = [
  { label: "< 0.5", paint: tint("--low", 1), holds: (value) => value < 0.5 },
  { label: "< 0.9", paint: tint("--low", 0.66), holds: (value) => value < 0.9 },
  { label: "< 0.99", paint: tint("--low", 0.33), holds: (value) => value < 0.99 },
  { label: "< 1", paint: tint("--low", 0.08), holds: (value) => value < 1 },
  { label: "exactly 1", paint: NEUTRAL, holds: (value) => value === 1 },
  { label: "\u2264 1.01", paint: tint("--high", 0.08), holds: (value) => value <= 1.01 },
  { label: "\u2264 1.1", paint: tint("--high", 0.33), holds: (value) => value <= 1.1 },
  { label: "\u2264 2", paint: tint("--high", 0.66), holds: (value) => value <= 2 },
  { label: "> 2", paint: tint("--high", 1), holds: () => true },
];

/** Seven bins: 0, and to either side thirds of `bound`, the largest advantage in the episode's group. */
function advantageBins(bound) {
  const [third, two] = [bound / 3, (2 * bound) / 3];
  const bin = (label, colour, strength, holds) => ({ label, paint: tint(colour, strength), holds });
  return [
    bin(`\u2264 ${number(-two, 2)}`, "--low", 1, (value) => value <= -two), bin(
      `\u2264 ${number(-third, 2)}`,
      "--low",
      0.6,
      (value) => value <= -third,
    ),
    bin("< 0", "--low", 0.25, (value) => value < 0), { label: "0", paint: NEUTRAL, holds: (value) => value === 0 },
    bin("> 0", "--high", 0.25, (value) => value < third), bin(
      `\u2265 ${number(third, 2)}`,
      "--high",
      0.6,
      (value) => value < two,
    ),
    bin(`\u2265 ${number(two, 2)}`, "--high", 1, () => true),
  ];
}

function categoryBins(values, none) {
  const names = [...new Set(values.filter((value) => value !== null && value !== undefined))];
  const bins = [{ label: none, paint: tint("--accent", 0.5), holds: (value) => value === null || value === undefined }];
  names.forEach(
    (name, at) => bins.push(
      {
        label: name, foreign: true, paint: tint(CATEGORY_COLOURS[at % CATEGORY_COLOURS.length], 0.55),
        holds: (value) => value === name,
      }
    )
  );
  return bins;
}

/** The largest |advantage| among the attempts of a group whose tokens are here. */
function groupAdvantage(group, tokens) {
  let bound = 0;
  for (const values of [tokens.advantage, ...group.trajectories.map((one) => one.tokens?.advantage ?? [])]) {
    for (const value of values ?? []) if (typeof value === "number") bound = Math.max(bound, Math.abs(value));
  }
  return bound || 1;
}

const COLOURING_WORDS = {
  origin: "Who wrote the token. Only policy and demonstration tokens can be trained on.",
  mismatch: "|log-prob of the learner \u2212 of the engine|, in nats. 10\u207b\u2074 and more is an outlier.",
  importance_weight: "What the loss of the token is multiplied by to make up for the mismatch.",
  advantage: "Better (orange) or worse (blue) than the group; bounds are thirds of its largest.",
  entropy: "Of the learner\u2019s distribution before the token, in nats: 0 is certainty.",
  mask_reason: "Why a token is left out of the loss.",
};

/** {bins, binOf(i), words} of a colouring over the tokens of one episode. A token without a value has bin null. */
function colouring(key, tokens, group) {
  const values = key === "origin" ? [...tokens.origin].map(
    (letter) => own(ORIGIN_WORDS, letter) ?? "context"
  ) : tokens[key] ?? [];
  let bins;
  if (key === "origin") {
    const paints = { context: "transparent", policy: tint("--accent", 0.45), demonstration: tint("--phase-2", 0.6) };
    bins = Object.keys(paints).map((name) => ({ label: name, paint: paints[name], holds: (value) => value === name }));
  } else if (key === "mismatch") bins = risingBins(
    [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2],
    "--ramp",
    (bound) => powerOfTen(Math.round(Math.log10(bound))),
  );
  else if (key === "entropy") bins = risingBins([0.001, 0.01, 0.1, 0.5, 1, 2], "--phase-3", (bound) => number(bound));
  else if (key === "importance_weight") bins = WEIGHT_BINS;
  else if (key === "advantage") bins = advantageBins(groupAdvantage(group, tokens));
  else bins = categoryBins(values, "trained on");
  const categorical = key === "origin" || key === "mask_reason";
  const binOf = (index) => {
    const value = values[index];
    if (!categorical && typeof value !== "number") return null;
    return bins.find((bin) => bin.holds(value)) ?? null;
  };
  return { bins, binOf, words: COLOURING_WORDS[key] };
}

/** The legend: every bin with its colour, bounds and count, and how many tokens have no value. */
function legendOf(scale, length) {
  const counts = new Map(scale.bins.map((bin) => [bin, 0]));
  let without = 0;
  for (let index = 0; index < length; index += 1) {
    const bin = scale.binOf(index);
    if (bin) counts.set(bin, counts.get(bin) + 1); else without += 1;
  }
  const entry = (paint, label, count) => el("li", { class: count ? "" : "absent" },
    el("span", { class: "swatch", style: { background: paint } },
    ),
    el("span", {}, label), el("span", { class: "muted" }, count.toLocaleString("en")));
  return el("ul", { class: "legend", "aria-label": "Legend, with the number of tokens" },
    scale.bins.map(
      (bin) => entry(
        bin.paint,
        bin.foreign ? foreign(bin.label, { limit: 40, more: false }) : bin.label,
        counts.get(bin),
      )
    ),
    without ? entry("transparent", el("span", { class: "muted" }, "no value"), without) : null);
}
