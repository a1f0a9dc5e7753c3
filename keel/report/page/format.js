// Numbers as text. One place, so that a value reads the same wherever it stands.

/** Up to `digits` significant digits; very small and very large numbers in powers of ten; no value is a dash. */
function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "\u2013";
  if (!Number.isFinite(value)) return value > 0 ? "\u221e" : "\u2212\u221e";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return scientific(value, Math.max(digits - 2, 1));
  if (Number.isInteger(value)) return minus(value.toLocaleString("en"));
  return minus(trimmed(value.toPrecision(digits)));
}

/** Two decimals, so that a column of ordinary values lines up. */
function aligned(value) {
  return Math.abs(value) < 1000 ? minus(value.toFixed(2)) : number(value);
}

/** "2.4 x 10^-7" as it is written by hand. */
function scientific(value, digits) {
  const [mantissa, exponent] = value.toExponential(digits).split("e");
  const shown = trimmed(mantissa);
  return minus(shown === "1" ? powerOfTen(Number(exponent)) : `${shown}\u00d7${powerOfTen(Number(exponent))}`);
}

function trimmed(text) {
  return text.includes(".") ? text.replace(/\.?0+(?=e|$)/, "").replace("e+", "e") : text.replace("e+", "e");
}

function minus(text) {
  return text.replaceAll("-", "\u2212");
}

/** Every digit a float32 has, for the details of a token. */
function exact(value) {
  if (value === null || value === undefined) return "\u2013";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return minus(String(value));
  const size = Math.abs(value);
  return size < 1e-4 || size >= 1e7 ? scientific(value, 5) : minus(trimmed(value.toPrecision(7)));
}

function percent(share, digits = 1) {
  if (share === null || share === undefined || !Number.isFinite(share)) return "\u2013";
  const text = (100 * share).toFixed(digits);
  return (share === 1 || share === 0 ? text.replace(/\.0+$/, "") : text) + "\u00a0%";
}

function duration(seconds) {
  if (!Number.isFinite(seconds)) return "\u2013";
  if (seconds < 0.95) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 120) return `${trimmed(seconds.toFixed(1))} s`;
  if (seconds < 600) return `${trimmed((seconds / 60).toFixed(1))} min`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${trimmed((seconds / 3600).toFixed(1))} h`;
  return `${trimmed((seconds / 86400).toFixed(1))} days`;
}

/** "22 Nov 2026, 18:18" in the reader's time zone. */
function moment(unixSeconds) {
  if (!Number.isFinite(unixSeconds)) return "";
  return new Date(unixSeconds * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}

/** "1 step", "65 steps". */
function counted(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

const SUPERSCRIPT = {
  "-": "\u207b", 0: "\u2070", 1: "\u00b9", 2: "\u00b2", 3: "\u00b3", 4: "\u2074",
  5: "\u2075", 6: "\u2076", 7: "\u2077", 8: "\u2078", 9: "\u2079",
};

/** 10 to a whole power: plain between 0.1 and 1000, otherwise with a raised exponent. */
function powerOfTen(exponent) {
  if (exponent >= -1 && exponent <= 3) return String(10 ** exponent);
  return "10" + [...String(exponent)].map((digit) => SUPERSCRIPT[digit]).join("");
}

/** Round numbers between two bounds, about `count` of them. */
function niceTicks(low, high, count) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) ticks.push(
    Number((k * step).toPrecision(12))
  );
  return ticks;
}

const STAGE_WORDS = { warm_start: "warm start", reinforcement: "reinforcement" };

function stageWords(stage) {
  return own(STAGE_WORDS, stage) ?? String(stage).replaceAll("_", " ").slice(0, 40);
}
