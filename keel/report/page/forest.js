// Success rates of two runs with their intervals on one scale, and the interval of the difference on another.

/** The scale of differences: the least round number of points that holds every interval. */
function differenceBound(shown) {
  const most = Math.max(
    0.01,
    ...shown.flatMap(({ difference }) => (difference ? [Math.abs(difference.low), Math.abs(difference.high)] : [])),
  );
  return [0.02, 0.05, 0.1, 0.2, 0.5, 1].find((bound) => bound >= most) ?? 1;
}

/** Both rates of every evaluation with their intervals on one scale, and the interval of the difference on another. */
function forest(data) {
  const shown = data.evaluations.filter((one) => SIDES.some((side) => typeof one[side]?.success === "number"));
  if (!shown.length) return panel(
    "Held-out success",
    "",
    emptyText("No evaluation of either run says what a success is."),
  );
  const bound = differenceBound(shown);
  const points = Math.round(100 * bound);
  const scale = (ticks) => el("div", { class: "forest-scale", "aria-hidden": "true" },
    ticks.map(([share, text]) => el("span", { style: { left: `${100 * share}%` } }, text)),
  );
  const rows = shown.map((one) => el("li", { class: "forest-row" },
    el("span", { class: "forest-name" }, foreignLine(String(one.name).replaceAll("_", " "), 40)),
    el("div", { class: "forest-bars" }, SIDES.map((side) => forestBar(side, one[side]))),
    el("div", { class: "forest-bars difference" }, differenceBar(one.difference, bound)),
    el("span", { class: one.difference?.differs ? "forest-text" : "forest-text muted" },
      foreign(one.text, { limit: 100 }),
    )));
  const head = el("li", { class: "forest-row forest-foot muted small", "aria-hidden": "true" },
    el("span", {}),
    el("span", {}, "success"),
    el("span", {}, "B less A, in points"),
    el("span", {}),
  );
  const foot = el("li", { class: "forest-row forest-foot" }, el("span", {}), scale(
    [[0, "0"], [0.5, "50"], [1, "100 %"]]
  ),
    scale([[0, `\u2212${points}`], [0.5, "0"], [1, `+${points}`]]), el("span", {}));
  return panel("Held-out success", "with 95\u00a0% intervals", el("ul", { class: "forest" }, head, rows, foot));
}

function forestBar(side, evaluation) {
  if (typeof evaluation?.success !== "number") return el("div", { class: "bar-line muted small" },
    `${side.toUpperCase()}: none`,
  );
  const low = evaluation.success_low ?? evaluation.success;
  const high = evaluation.success_high ?? evaluation.success;
  return el("div", {
    class: `bar-line side-${side}`, role: "img",
    "aria-label": `${side.toUpperCase()} ${percent(evaluation.success)}, ${percent(low)} to ${percent(high)}`,
  },
    el("span", { class: "whisker", style: { left: `${100 * low}%`, width: `${100 * (high - low)}%` } }),
    el("span", { class: "dot", style: { left: `${100 * evaluation.success}%` } }),
    el(
      "span",
      {
        class: "bar-value",
        style: evaluation.success > 0.7 ? { right: `${100 * (1 - low) + 2}%` } : { left: `${100 * high + 2}%` },
      },
      percent(evaluation.success),
    ));
}

function differenceBar(difference, bound) {
  if (!difference) return el("div", { class: "bar-line" });
  const place = (value) => `${50 + (50 * value) / bound}%`;
  const whisker = { left: place(difference.low), width: `${(50 * (difference.high - difference.low)) / bound}%` };
  return el("div", { class: difference.differs ? "bar-line differs" : "bar-line" }, el("span", { class: "zero" }),
    el("span", { class: "whisker", style: whisker }), el(
      "span",
      { class: "dot", style: { left: place(difference.value) } },
    ));
}
