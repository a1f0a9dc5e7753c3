// The step axis that all charts share. Stages stand end to end; a stage that would leave no room to read another is
// drawn
// narrower, and the page says so. Positions run from 0 to 1; every position belongs to one training step.

const SHORTEST_STAGE = 0.16;
const WARM_START_AT_MOST = 0.2;

/** Stages in order: {stage, first, last} in training steps, `first` being where the one before ended. */
function stagesOf(series) {
  const stages = [];
  for (let row = 0; row < series.train_step.length; row += 1) {
    const stage = series.stage[row];
    const newest = stages.at(-1);
    if (newest && newest.stage === stage) newest.last = series.train_step[row];
    else stages.push(
      { stage, first: newest ? newest.last : Math.max(series.train_step[row] - 1, 0), last: series.train_step[row] }
    );
  }
  return stages;
}

/**
 * Shares of the width: by length, no stage below a readable one, the warm start never the larger part beside
 * another.
 */
function sharesOf(stages) {
  const total = stages.reduce((sum, stage) => sum + stage.last - stage.first, 0) || 1;
  const shares = stages.map((stage) => Math.max((stage.last - stage.first) / total, SHORTEST_STAGE));
  const warm = stages.length > 1 ? stages.findIndex((stage) => stage.stage === "warm_start") : -1;
  if (warm >= 0) shares[warm] = Math.min(shares[warm], WARM_START_AT_MOST);
  const others = shares.reduce((sum, share, at) => (at === warm ? sum : sum + share), 0);
  const room = warm >= 0 ? 1 - shares[warm] : 1;
  return shares.map((share, at) => (at === warm ? share : (share / others) * room));
}

function makeAxis(data) {
  const stages = stagesOf(data.series);
  const shares = sharesOf(stages);
  let start = 0;
  const segments = stages.map((stage, at) => {
    const segment = { ...stage, from: start, to: start + shares[at], share: shares[at] };
    start = segment.to;
    return segment;
  });
  const total = stages.reduce((sum, stage) => sum + stage.last - stage.first, 0) || 1;
  const stretched = segments.some((segment) => Math.abs(segment.share - (segment.last - segment.first) / total) > 0.02);
  const last = segments.at(-1)?.last ?? 1;
  return { segments, stretched, last, range: [-0.012, 1.012], position: (step) => positionIn(segments, step) };
}

/** Where a training step stands, from 0 to 1. A step after the last row (an evaluation, say) stands at the end. */
function positionIn(segments, step) {
  if (!segments.length) return 0;
  const segment = segments.find((one) => step <= one.last) ?? segments.at(-1);
  const length = segment.last - segment.first || 1;
  return segment.from + (segment.to - segment.from) * Math.min(Math.max((step - segment.first) / length, 0), 1);
}

/** Tick positions and labels (training steps) for the part of the axis that `range` shows. */
function axisTicks(axis, range, count) {
  const width = range[1] - range[0];
  const values = [];
  const labels = [];
  for (const segment of axis.segments) {
    const shown = (Math.min(segment.to, range[1]) - Math.max(segment.from, range[0])) / width;
    if (shown < 0.06) continue;
    const length = segment.last - segment.first;
    const back = (position) => segment.first + ((position - segment.from) / (segment.to - segment.from)) * length;
    const low = Math.max(segment.first, back(Math.max(range[0], segment.from)));
    const high = Math.min(segment.last, back(Math.min(range[1], segment.to)));
    for (const step of niceTicks(low, high, Math.max(count * shown, 1)).filter(Number.isInteger)) {
      const position = axis.position(step);
      if (values.length && position - values.at(-1) < (0.6 * width) / count) continue;
      values.push(position);
      labels.push(step.toLocaleString("en"));
    }
  }
  return { values, labels };
}

/** The row whose step stands nearest to a position. */
function nearestRow(positions, at) {
  let low = 0;
  let high = positions.length - 1;
  if (high < 0) return -1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (positions[middle] < at) low = middle; else high = middle;
  }
  return Math.abs(positions[low] - at) <= Math.abs(positions[high] - at) ? low : high;
}
