// The data of the page: what was written into it, steps fetched when served, and live refreshes. Never executed,
// only read.

const POLL_SECONDS = 2;

function readData() {
  const data = JSON.parse(document.getElementById("keel-data").textContent);
  if (data.schema_version !== 1) throw new Error(
    `this page shows schema_version 1, the data has ${String(data.schema_version).slice(0, 20)}`
  );
  return data;
}

/**
 * `data` as written; `steps` maps a step's number (text) to its groups; `changed` listeners are called after a
 * refresh.
 */
function makeStore(data) {
  const store = {
    data, changed: [], steps: new Map(Object.entries(data.steps)), waiting: new Map(),
    /** Is there a record of the step, here or at the server? */
    readable: (step) => store.steps.has(step) || (
      store.data.live === true && (store.data.run.recorded_steps ?? []).includes(Number(step))
    ),
    find: (reference) => {
      const [step, trajectory] = String(reference).split("/");
      return findTrajectory(store.steps.get(step), Number(trajectory));
    },
    /** The step's groups: at once if here, else from the server; null if there is no record of it. */
    load: async (step) => {
      const here = store.steps.get(step);
      const whole = here && !(store.data.live === true && here.left_out > 0);
      if (whole || !store.readable(step) || store.data.live !== true) return here ?? null;
      if (!store.waiting.has(step)) {
        store.waiting.set(step, fetchJson(`step/${Number(step)}.json`).then(
          (found) => { store.steps.set(step, found); return found; }
        )
          .catch(() => here ?? null).finally(() => store.waiting.delete(step)));
      }
      return store.waiting.get(step);
    },
    take: (next) => {
      if (next.schema_version !== 1) return;
      const fetched = [...store.steps].filter(([step]) => !(step in next.steps));
      const grown = [...store.steps].filter(([step, value]) => step in next.steps && !value.left_out);
      store.data = next;
      store.steps = new Map([...Object.entries(next.steps), ...fetched, ...grown]);
      for (const listener of store.changed) listener();
    },
  };
  return store;
}

function findTrajectory(step, index) {
  for (const group of step?.groups ?? []) {
    for (const trajectory of group.trajectories) if (trajectory.trajectory === index) return { group, trajectory };
  }
  return null;
}

async function fetchJson(address) {
  const answer = await fetch(address, { cache: "no-store" });
  if (!answer.ok) throw new Error(`${address}: ${answer.status}`);
  return answer.json();
}

/**
 * Asks the server for newer data while the run goes on and the page is looked at; the slower the answer, the more
 * seldom.
 */
function keepFresh(store, said) {
  let due = 0;
  const ask = async () => {
    if (document.hidden || performance.now() < due || OVER.has(store.data.run.state)) return;
    const began = performance.now();
    due = Infinity;
    try {
      const next = await fetchJson("data.json");
      said(null);
      const [was, is] = [store.data.run, next.run];
      if (is.updated_unix_s !== was.updated_unix_s || is.state !== was.state) store.take(next);
    } catch {
      said("The server does not answer: what is shown is the last that came.");
    } finally {
      due = performance.now() + 4 * (performance.now() - began);
    }
  };
  setInterval(ask, POLL_SECONDS * 1000);
  document.addEventListener("visibilitychange", ask);
}

const OVER = new Set(["completed"]);
