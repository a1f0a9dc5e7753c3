// Builders of elements. Every text reaches the page through textContent or a text node, never as markup,
// and text of models, tools and data passes through foreign(), which isolates its direction and shows what is
// invisible.
"use strict";

const CLIP_AT = 4000;

/** An element: attributes by name, `on` a mapping of event to listener, children strings or nodes (null is skipped). */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name === "style") styled(node, value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  append(node, children);
  return node;
}

function styled(node, settings) {
  for (const [property, setting] of Object.entries(settings)) node.style.setProperty(property, setting);
}

function append(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}

function replace(node, ...children) {
  node.replaceChildren();
  return append(node, children);
}

// Controls, direction marks, separators, zero-width marks and lone surrogates: what a reader could not see, or what
// changes how the rest is drawn.
const INVISIBLE = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u180e\\u200b\\u200e\\u200f\\u2028-\\u202e" +
    "\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb\\u{e0000}-\\u{e007f}]|\\p{Cs}",
  "gu",
);

const CONTROL_NAMES = (
  "NUL SOH STX ETX EOT ENQ ACK BEL BS TAB LF VT FF CR SO SI DLE DC1 DC2 DC3 DC4 NAK SYN ETB CAN EM SUB ESC FS GS RS US"
).split(" ");

/** What stands for a character that would not be seen: the name of a control, or its number. */
function pictured(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return `\u2039${CONTROL_NAMES[code]}\u203a`;
  return "\u2039" + "U+" + code.toString(16).toUpperCase().padStart(4, "0") + "\u203a";
}

/** Text as nodes, with invisible characters drawn as marked pictures. */
function visibleNodes(text) {
  const nodes = [];
  let from = 0;
  for (const found of text.matchAll(INVISIBLE)) {
    if (found.index > from) nodes.push(text.slice(from, found.index));
    nodes.push(
      el("span", { class: "control", title: "U+" + found[0].codePointAt(0).toString(16).padStart(4, "0") },
        pictured(found[0]),
      )
    );
    from = found.index + found[0].length;
  }
  if (from < text.length) nodes.push(text.slice(from));
  return nodes;
}

/** Cut between characters, never inside a surrogate pair. */
function cut(text, limit) {
  const code = text.charCodeAt(limit - 1);
  return text.slice(0, code >= 0xd800 && code <= 0xdbff ? limit - 1 : limit);
}

/** Foreign text in an isolated element; beyond `limit` characters it is clipped behind a "show all". */
function foreign(text, { limit = CLIP_AT, more = true, tag = "bdi", label = "foreign" } = {}) {
  const whole = text === null || text === undefined ? "" : String(text);
  const node = el(tag, { class: label, dir: "auto" });
  if (whole.length <= limit) return append(node, visibleNodes(whole));
  append(node, visibleNodes(cut(whole, limit)));
  if (!more) return append(node, ["\u2026"]);
  const button = el("button", { type: "button", class: "link-button show-all" },
    `show all ${whole.length.toLocaleString("en")} characters`,
  );
  button.addEventListener("click", () => {
    // A marked span per control character is a luxury for long texts: there they are replaced in place.
    replace(node, whole.length < 50000 ? visibleNodes(whole) : whole.replace(INVISIBLE, pictured));
  });
  return append(node, ["\u2026 ", button]);
}

/** One line of foreign text, clipped by characters and by the box. */
function foreignLine(text, limit = 160) {
  const flat = String(text ?? "").slice(0, limit * 2).replace(/[\n\t]+/g, " ");
  return el("span", { class: "one-line" },
    foreign(flat.length < String(text ?? "").length ? flat + " " : flat, { limit, more: false }),
  );
}

/** Buttons of which one is pressed. `options` is [[value, label], ...]; `chosen` is called with the value. */
function segmented(label, options, value, chosen) {
  const group = el("div", { class: "segmented", role: "group", "aria-label": label });
  group.choose = (next) => {
    for (const button of group.children) button.setAttribute("aria-pressed", String(button.dataset.value === next));
  };
  for (const [key, text] of options) {
    const press = () => { group.choose(key); chosen(key); };
    group.append(el("button", { type: "button", "data-value": key, on: { click: press } }, text));
  }
  group.choose(value);
  return group;
}

/** A custom property of the page's style, such as "--accent". */
function styleOf(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** What a table of our own says of a key that may come from data: nothing of what every object inherits. */
function own(table, key) {
  return Object.hasOwn(table, key) ? table[key] : undefined;
}

/** Runs `begin`; if it fails the page says so instead of standing empty. */
function guarded(begin) {
  try {
    begin();
  } catch (error) {
    const message = String(error?.message ?? error).slice(0, 300);
    document.querySelector("main").prepend(
      el("p", { class: "notice bad", role: "alert" }, "The page could not be drawn: ", foreign(message))
    );
    throw error;
  }
}
