// Starts the page: which view is shown, going back and forth, live refreshes, and colours that follow the system.

function configView(section, run) {
  const known = [
    ["directory", run.directory], ["keel", run.keel_version], ["device", run.device],
    ["started", moment(run.started_unix_s)], ["last sign of life", moment(run.updated_unix_s)],
    ...Object.entries(run.versions ?? {}),
  ];
  const pairs = known.filter(([, value]) => value !== null && value !== undefined && value !== "");
  replace(section, el("div", { class: "config-grid" },
    el("section", { class: "card", "aria-label": "Config" },
      run.config_toml ? foreign(
        run.config_toml,
        { limit: 100000, tag: "pre", label: "config-text" },
      ) : el("p", { class: "empty" }, "config.toml could not be read."),
    ),
    el("section", { class: "card panel", "aria-label": "Made with" }, el("header", {}, el("h3", {}, "Made with")),
      el("dl", { class: "pairs" },
        pairs.map(
          ([name, value]) => [
            el("dt", {}, foreign(name, { limit: 60, more: false })), el("dd", {}, foreign(value, { limit: 300 })),
          ]
        ),
      ))));
}

function start() {
  const store = makeStore(readData());
  const sections = {
    overview: document.getElementById("view-overview"), episodes: document.getElementById("view-episodes"),
    config: document.getElementById("view-config"),
  };
  const scrolled = {};
  let current = null;
  let overview = null;
  let stale = true;
  const head = () => {
    const { run } = store.data;
    replace(document.getElementById("run-name"), foreign(run.name || "run", { limit: 80, more: false }));
    replace(document.getElementById("run-facts"), headerFacts(run));
    document.title = "Keel report: " + foreignOption(run.name || "run");
  };
  const drawOverview = () => {
    const focused = document.activeElement?.closest?.("[data-chart]")?.dataset.chart;
    overview = buildOverview(sections.overview, store, overview);
    stale = false;
    if (focused) sections.overview.querySelector(
      `[data-chart="${CSS.escape(focused)}"] .chart`
    )?.focus({ preventScroll: true });
  };
  const episodes = buildEpisodes(sections.episodes, store);
  const route = () => {
    const place = placeOf(location.hash);
    const view = place ? "episodes" : ["episodes", "config"].find((name) => location.hash === `#${name}`) ?? "overview";
    if (current !== view) {
      if (current) scrolled[current] = scrollY;
      for (const [name, section] of Object.entries(sections)) section.hidden = name !== view;
      for (const link of document.querySelectorAll("nav [data-view]")) {
        if (link.dataset.view === view) link.setAttribute("aria-current", "page");
        else link.removeAttribute("aria-current");
      }
      current = view;
      if (view === "overview" && stale) drawOverview();
      if (view === "config") configView(sections.config, store.data.run);
      scrollTo(0, view === "episodes" ? 0 : scrolled[view] ?? 0);
    }
    if (view === "episodes") episodes.show(place);
  };
  store.changed.push(() => {
    head();
    stale = true;
    if (current === "overview") drawOverview();
    if (current === "config") configView(sections.config, store.data.run);
    episodes.refresh();
  });
  head();
  addEventListener("hashchange", route);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    stale = true;
    if (current === "overview") drawOverview();
  });
  route();
  if (store.data.live) keepFresh(store, (text) => replace(document.getElementById("live"), text));
}

guarded(start);
