"use strict";
// What every page does without a network: theme and figures.
const page = (() => {
  const $ = (id) => document.getElementById(id);

  // ---- theme ----
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const remember = (value) => {
    try {
      if (value) localStorage.setItem("demur-theme", value);
      return localStorage.getItem("demur-theme");
    } catch {
      return null; // some browsers give files no storage
    }
  };
  const themed = () => {
    $("theme").textContent = isDark() ? "Light" : "Dark";
    $("theme").setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
    drawAll();
  };

  // ---- figures ----
  const figures = JSON.parse($("figure-data").textContent);
  const probe = Object.assign(document.createElement("span"), { hidden: true });
  document.body.append(probe);
  const ink = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const faint = (name, alpha) => ink(name).replace(/rgba?\(([^)]+)\)/, (_, rgb) => `rgba(${rgb}, ${alpha})`);

  // of traces with a set and notes with a name, those of one group are shown
  let group = "plain";
  const dress = (trace) => {
    const { role, roles, band, set } = trace.meta;
    const colour = ink(role);
    const dressed = { ...trace, meta: undefined };
    if (set) dressed.visible = set === group;
    if (band) return { ...dressed, fillcolor: faint(role, 0.15) };
    const marker = { ...trace.marker, color: roles ? roles.map(ink) : colour };
    if (Array.isArray(marker.symbol)) {
      marker.color = marker.symbol.map((shape) => (shape === "square-open" ? ink("ink") : colour));
    }
    Object.assign(dressed, { marker, textfont: { color: ink("ink") } });
    if (trace.line) dressed.line = { ...trace.line, color: colour };
    for (const bar of ["error_x", "error_y"]) {
      if (trace[bar]) dressed[bar] = { ...trace[bar], color: faint(role, 0.5) };
    }
    return dressed;
  };
  const draw = (id) => {
    const { data, layout } = figures[id];
    const axis = { gridcolor: ink("rule"), linecolor: ink("edge"), tickcolor: ink("edge"), showline: true };
    Plotly.react($(id), data.map(dress), {
      ...layout,
      xaxis: { ...layout.xaxis, ...axis },
      yaxis: { ...layout.yaxis, ...axis },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: ink("muted"), activecolor: ink("ink") },
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: ink("ink") },
      hoverlabel: { bgcolor: ink("paper"), bordercolor: ink("edge"), font: { color: ink("ink") }, align: "left" },
      annotations: (layout.annotations || [])
        .filter((note) => !note.name || note.name === group)
        .map((note) => ({ ...note, arrowcolor: ink("edge") })),
    }, { displaylogo: false, responsive: true, modeBarButtons: [["toImage"]], scrollZoom: false });
  };
  const drawAll = () => Object.keys(figures).forEach(draw);

  $("theme").onclick = () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember(root.dataset.theme);
    themed();
  };
  system.addEventListener("change", themed);
  const kept = remember();
  if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  themed();

  const choose = (name, id) => {
    group = name;
    if (figures[id]) draw(id);
  };
  return { $, figures, choose };
})();
