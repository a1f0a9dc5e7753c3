// Small multiples over the step axis. Plotly draws lines, bands and ticks; it gets numbers and our own words only.
// The cross-hair, the read-outs and the keyboard are ours, so that all charts answer to one pointer.

const MARGIN = { l: 46, r: 12, t: 8, b: 20 };
const ZERO_STANDS_AT = 10; // decades below the largest value shown where an exact 0 is drawn on a log axis, at most

// In a warm start these speak of the demonstrations, not of the policy.
const DEMONSTRATED = new Set(["reward/mean", "success"]);

/** A log scale where most values would otherwise lie flat on the floor. */
function scaleFor(values) {
  const sorted = (values ?? []).filter((value) => typeof value === "number" && value > 0).sort((a, b) => a - b);
  return sorted.length > 4 && sorted.at(-1) > 6 * sorted[sorted.length >> 1] ? "log" : "linear";
}

/** Values as drawn: themselves, or their log10 with 0 put on the floor. */
function drawnValues(values, scale, floor) {
  if (scale !== "log") return values;
  return values.map(
    (value) => (value === null || value === undefined || value < 0 ? null : Math.log10(Math.max(value, floor)))
  );
}

/** Lowest, highest and least positive value of what stands in the part of the axis that is shown. */
function extentOf(lines, range) {
  let low = Infinity;
  let high = -Infinity;
  let least = Infinity;
  for (const line of lines) {
    for (let at = 0; at < line.values.length; at += 1) {
      const value = line.values[at];
      if (typeof value !== "number" || line.positions[at] < range[0] || line.positions[at] > range[1]) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
      if (value > 0) least = Math.min(least, value);
    }
  }
  return { low, high, least };
}

/** Range and ticks of the value axis. */
function valueAxis(spec, scale, range) {
  const limit = spec.band ? [{ values: [spec.band.healthy_max], positions: [range[0]] }] : [];
  const { low, high, least } = extentOf([...spec.lines, ...limit], range);
  if (scale === "log") {
    const top = Math.ceil(Math.log10(high > 0 ? high : 1) + 0.01);
    const bottom = Math.max(
      Math.floor(Math.log10(Number.isFinite(least) ? least : high || 1) - 0.05),
      top - ZERO_STANDS_AT,
    );
    const floor = low <= 0 ? bottom - 1 : bottom;
    const every = Math.max(1, Math.ceil((top - floor) / 4));
    const values = [];
    for (let power = top; power >= bottom; power -= every) values.push(power);
    const labels = values.map(powerOfTen);
    if (low <= 0) { values.push(floor); labels.push("0"); }
    return { range: [floor - 0.08 * (top - floor), top], values, labels, floor: 10 ** floor };
  }
  let [from, to] = spec.range ?? [Math.min(low, 0), high];
  if (!Number.isFinite(from) || !Number.isFinite(to)) [from, to] = [0, 1];
  if (from === to) [from, to] = from === 0 ? [0, 1] : [Math.min(from, 0), Math.max(to, 0)];
  const values = niceTicks(from, to, 4);
  const pad = 0.06 * (to - from);
  const write = spec.unit === "share" ? (value) => `${Math.round(100 * value)}%` : (value) => number(value, 3);
  return { range: [from - pad, to + pad], values, labels: values.map(write), floor: 0 };
}

/** A moving mean over rows of the same stage, as wide as a fortieth of the stage; what is missing is left out. */
function smoothed(values, stages) {
  const lengths = new Map();
  for (const stage of stages) lengths.set(stage, (lengths.get(stage) ?? 0) + 1);
  return values.map((value, row) => {
    if (typeof value !== "number") return null;
    const half = Math.floor(lengths.get(stages[row]) / 80);
    let sum = 0;
    let count = 0;
    for (let at = Math.max(0, row - half); at <= Math.min(values.length - 1, row + half); at += 1) {
      if (typeof values[at] !== "number" || stages[at] !== stages[row]) continue;
      sum += values[at];
      count += 1;
    }
    return sum / count;
  });
}

function traceOf(line, y) {
  const trace = {
    x: line.positions, y, type: "scatter", mode: line.points ? "lines+markers" : "lines",
    connectgaps: false, hoverinfo: "skip",
    line: { color: styleOf(line.colour), width: line.width ?? 1.6, dash: line.dash ?? "solid" },
    opacity: line.opacity ?? 1,
  };
  if (line.points) trace.marker = {
    size: 7, color: styleOf(line.colour), line: { color: styleOf("--card"), width: 1.5 },
  };
  if (line.low) {
    const above = line.values.map((value, at) => Math.max(line.high[at] - value, 0));
    const below = line.values.map((value, at) => Math.max(value - line.low[at], 0));
    trace.error_y = {
      type: "data", symmetric: false, array: above, arrayminus: below, color: `${styleOf(line.colour)}66`,
      thickness: 5, width: 0,
    };
  }
  // A single value between gaps has no line to either side: markers make it seen.
  if (!line.points && y.filter((value) => typeof value === "number").length < 3) {
    trace.mode = "lines+markers";
    trace.marker = { size: 5, color: styleOf(line.colour) };
  }
  return trace;
}

function shapesOf(axis, spec, value) {
  const edge = { color: styleOf("--line-strong"), width: 1, dash: "dot" };
  const shapes = axis.segments.slice(1).map((segment) => (
    {
      type: "line", xref: "x", yref: "paper", x0: segment.from, x1: segment.from,
      y0: 0, y1: 1, line: edge, layer: "below",
    }));
  if (typeof spec.parting === "number") {
    shapes.push(
      {
        type: "line", xref: "x", yref: "paper", x0: spec.parting, x1: spec.parting,
        y0: 0, y1: 1, line: { color: styleOf("--muted"), width: 1.2 }, layer: "below",
      }
    );
  }
  if (spec.band && spec.scale === "log") {
    const top = Math.log10(spec.band.healthy_max);
    shapes.push({
      type: "rect", xref: "paper", yref: "y", x0: 0, x1: 1, y0: value.range[0], y1: top,
      fillcolor: styleOf("--healthy"), line: { width: 0 }, layer: "below",
    });
  }
  return shapes;
}

/** Names of the stages at the top of the plot, where there is room; only names that are our own words. */
function stageNames(axis, range, width) {
  if (axis.segments.length < 2) return [];
  return axis.segments.flatMap((segment) => {
    const from = Math.max(segment.from, range[0]);
    const room = ((Math.min(segment.to, range[1]) - from) / (range[1] - range[0])) * width;
    if (!Object.hasOwn(STAGE_WORDS, segment.stage) || room < 60) return [];
    const font = { size: 10, color: styleOf("--muted") };
    const place = { xref: "x", yref: "paper", x: from, y: 1, xanchor: "left", yanchor: "top", xshift: 2, yshift: 7 };
    return [
      {
        ...place, text: STAGE_WORDS[segment.stage], showarrow: false, font, bgcolor: styleOf("--card"),
        borderpad: 0, captureevents: false,
      }
    ];
  });
}

/** Says what the line at the first difference of two runs is. */
function partingName(spec) {
  if (typeof spec.parting !== "number") return [];
  const left = spec.parting < 0.75;
  const font = { size: 10, color: styleOf("--text") };
  return [{
    xref: "x", yref: "paper", x: spec.parting, y: 0, xanchor: left ? "left" : "right", yanchor: "bottom",
    xshift: left ? 2 : -2, text: "part here", showarrow: false, font, borderpad: 0, captureevents: false,
  }];
}

function layoutOf(axis, spec, value, range, width) {
  const font = { family: styleOf("--sans"), size: 11, color: styleOf("--muted") };
  const ticks = axisTicks(axis, range, Math.max(2, Math.round(width / 75)));
  const grid = styleOf("--line");
  return {
    margin: { ...MARGIN, pad: 0 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    showlegend: false, hovermode: false, font,
    dragmode: matchMedia("(hover: hover)").matches ? "zoom" : false,
    xaxis: {
      range: [...range], tickvals: ticks.values, ticktext: ticks.labels, showgrid: false, zeroline: false,
      ticks: "", tickangle: 0,
      linecolor: styleOf("--line-strong"), linewidth: 1, showline: true, automargin: false,
    },
    yaxis: {
      range: value.range, tickvals: value.values, ticktext: value.labels, gridcolor: grid, gridwidth: 1,
      zeroline: false, fixedrange: true, ticks: "",
      ticklabelstandoff: 4,
    },
    shapes: shapesOf(axis, spec, value), annotations: [...stageNames(axis, range, width), ...partingName(spec)],
  };
}

/**
 * A drawn chart in `box`. Returns {box, draw, show, hide}; `zoomed(range)` is called when the reader drags out a
 * part of the axis.
 */
function drawChart(box, axis, spec, zoomed) {
  const plot = el("div", { class: "plot" });
  const hair = el("div", { class: "hair", hidden: true });
  box.append(plot, hair);
  let range = axis.range;
  const draw = (next = range) => {
    range = next;
    const value = valueAxis(spec, spec.scale, range);
    const traces = spec.lines.map((line) => traceOf(line, drawnValues(line.values, spec.scale, value.floor)));
    const config = {
      displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false,
      showTips: false, showAxisDragHandles: false,
    };
    return Plotly.react(plot, traces, layoutOf(axis, spec, value, range, box.clientWidth || 400), config);
  };
  draw();
  plot.on("plotly_relayout", (change) => {
    if (!("xaxis.range[0]" in change)) return;
    const dragged = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    if (Math.abs(dragged[0] - range[0]) + Math.abs(dragged[1] - range[1]) > 1e-6) zoomed(dragged);
  });
  plot.on("plotly_doubleclick", () => zoomed(null));
  const inner = () => Math.max(box.clientWidth - MARGIN.l - MARGIN.r, 1);
  return {
    box, draw,
    positionAt: (clientX) => range[0] + (
      (clientX - box.getBoundingClientRect().left - MARGIN.l) / inner()
    ) * (range[1] - range[0]),
    show: (position) => {
      const share = (position - range[0]) / (range[1] - range[0]);
      hair.hidden = share < -0.001 || share > 1.001;
      hair.style.left = `${MARGIN.l + share * inner()}px`;
    },
    hide: () => { hair.hidden = true; },
  };
}
