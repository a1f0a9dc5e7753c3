// Alarms on the step axis: one lane per rule, one mark per stretch of steps. Rules and texts come from the run, so
// nothing here goes through plotly.

const SEVERITIES = ["warn", "skip", "stop"];
const LANES_SHOWN = 6; // with one more line for the others

/** Alarms of one rule and severity whose steps follow one another become one stretch. */
function stretchesOf(alarms) {
  const byRule = new Map();
  for (const alarm of [...alarms].sort((a, b) => a.train_step - b.train_step)) {
    const rule = String(alarm.rule ?? "alarm");
    if (!byRule.has(rule)) byRule.set(rule, []);
    const stretches = byRule.get(rule);
    const newest = stretches.at(-1);
    if (newest && newest.severity === alarm.severity && alarm.train_step - newest.last <= 1) {
      newest.last = alarm.train_step;
      newest.count += 1;
    } else {
      stretches.push(
        { rule, severity: alarm.severity, from: alarm.train_step, last: alarm.train_step, count: 1, alarm }
      );
    }
  }
  return byRule;
}

function worst(stretches) {
  return Math.max(...stretches.map((stretch) => SEVERITIES.indexOf(stretch.severity)));
}

function stepWords(alarm) {
  return `${stageWords(alarm.stage)} step ${number(alarm.step)}`;
}

/**
 * The chart of alarms: {node, draw(range), show, hide, positionAt}. `said(alarm, count)` shows an alarm's text,
 * `said(null)` ends it.
 */
function alarmTimeline(axis, alarms, steps, said) {
  const box = el("div", { class: "lanes" });
  const hair = el("div", { class: "hair", hidden: true });
  const byRule = [...stretchesOf(alarms)].sort((a, b) => worst(b[1]) - worst(a[1]) || a[1][0].from - b[1][0].from);
  const shown = byRule.length > LANES_SHOWN ? LANES_SHOWN - 1 : LANES_SHOWN;
  const marks = [];
  for (const [rule, stretches] of byRule.slice(0, shown)) {
    const lane = el("div", { class: "lane" });
    for (const stretch of stretches.slice(0, 200)) {
      const mark = alarmMark(stretch, steps, said);
      marks.push([mark, stretch]);
      lane.append(mark);
    }
    box.append(
      el("div", { class: "lane-row" },
        el("span", { class: "lane-name" }, foreignLine(rule.replaceAll("_", " "), 40)),
        lane,
      )
    );
  }
  if (byRule.length > shown) box.append(
    el("p", { class: "muted small" }, `and ${counted(byRule.length - shown, "other rule")}`)
  );
  box.append(hair);
  const laneLeft = () => (box.querySelector(".lane")?.offsetLeft ?? 0);
  const laneWidth = () => box.querySelector(".lane")?.clientWidth || 1;
  let range = axis.range;
  const shareOf = (position) => (position - range[0]) / (range[1] - range[0]);
  const draw = (next = range) => {
    range = next;
    for (const [mark, stretch] of marks) {
      const from = shareOf(axis.position(stretch.from));
      const to = shareOf(axis.position(stretch.last));
      mark.hidden = to < 0 || from > 1;
      mark.style.left = `${(100 * Math.max(from, 0)).toFixed(3)}%`;
      mark.style.width = `max(7px, ${(100 * (Math.min(to, 1) - Math.max(from, 0))).toFixed(3)}%)`;
    }
  };
  draw();
  return {
    box, draw,
    positionAt: (clientX) => range[0] + (
      (clientX - box.getBoundingClientRect().left - laneLeft()) / laneWidth()
    ) * (range[1] - range[0]),
    show: (position) => {
      hair.hidden = shareOf(position) < 0 || shareOf(position) > 1;
      hair.style.left = `${laneLeft() + shareOf(position) * laneWidth()}px`;
    },
    hide: () => { hair.hidden = true; },
  };
}

function alarmMark(stretch, steps, said) {
  const severity = SEVERITIES.includes(stretch.severity) ? stretch.severity : "warn";
  const { from, last } = stretch;
  const where = from === last ? `training step ${from}` : `training steps ${from} to ${last}`;
  const say = () => said(stretch.alarm, stretch.count);
  const readable = stretch.alarm.stage === "reinforcement" && steps.has(String(stretch.alarm.step));
  const attributes = {
    class: `mark-${severity} alarm-mark`, "aria-label": `${severity}, ${where}`,
    on: { mouseenter: say, focus: say, mouseleave: () => said(null), blur: () => said(null) },
  };
  return readable ? el("a", { ...attributes, href: `#${stretch.alarm.step}` },
  ) : el("button", { ...attributes, type: "button" });
}
