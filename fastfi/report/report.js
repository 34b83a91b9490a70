// What the reader does on the page: choose, filter, search, switch colours. The plots are made by
// fastfi/report/_figures.py; here the rows that are chosen get their coordinates.
"use strict";
(() => {
  const {
    $, NONE, className, column, count, data, decode, ending, filter, find, fiText, four, height, hovers, idOf,
    isWrong, order, passes, places, plain, share, sheets, state,
  } = rows;
  const CONFIG = {
    responsive: true, displaylogo: false, showTips: false,
    // Named one by one: plotly's own choice has a button that sends the data to its maker.
    modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]],
    plotlyServerURL: "about:blank",
    plotGlPixelRatio: Math.min(devicePixelRatio, 2), // the screen's own, not always 2
  };
  const HALF = data.figures.manhattan.data.length / data.sheets.length / 2; // colours
  Object.assign(state, { chosen: [], shown: 10, theme: "light" });
  const current = { rows: [] }; // rows of the points of each trace

  // x, y and texts of every trace, for the rows that pass the filter.
  function points() {
    const found = { x: [], y: [], text: [] };
    current.rows = [];
    let shown = 0;
    for (const sheet of sheets) {
      const fi = column(sheet, state.measure.column);
      const { x } = places(sheet);
      const of = sheet[state.grouping], text = hovers(sheet);
      const rows = Array.from({ length: 2 * HALF }, () => []);
      for (let row = 0; row < fi.length; row++) {
        if (passes(sheet, row, fi[row])) {
          rows[(isWrong(sheet, row) ? HALF : 0) + (of[row] % HALF)].push(row);
          shown++;
        }
      }
      for (const some of rows) {
        found.x.push(Float64Array.from(some, (row) => x[row]));
        found.y.push(Float64Array.from(some, (row) => height(fi[row])));
        found.text.push(some.map((row) => text(row, fi[row])));
        current.rows.push(some);
      }
    }
    return { found, shown };
  }

  // The theme's keys, for every axis of the plot.
  function themed() {
    const keys = { ...data.styles[state.theme].layout };
    for (const key of Object.keys(keys)) {
      if (sheets.length > 1) keys[key.replace(/^([xy]axis)\./, "$12.")] = keys[key];
    }
    return keys;
  }
  const styled = (name) => {
    const found = {};
    for (const [key, values] of Object.entries(data.styles[state.theme].traces[name])) {
      if (values.some((value) => value !== null)) found[key] = values.map((v) => v ?? undefined);
    }
    return found;
  };

  function draw() {
    const { found, shown } = points();
    Plotly.update("manhattan", found, { ...ranges(), ...marks() });
    report(shown);
  }
  function report(shown) {
    const all = sheets.reduce((n, sheet) => n + sheet.rows, 0);
    const failed = sheets.reduce((n, sheet) => n + sheet.rows - order(sheet).length, 0);
    const without = failed ? `; without a score: ${count(failed)}` : "";
    $("status").textContent = `${count(shown)} of ${count(all)} samples in the plot${without}.`;
    const { zero, infinity } = state.measure;
    const words = [zero !== null && "FI = 0", infinity !== null && "infinite FI"].filter(Boolean);
    $("edges").textContent = words.length
      ? `${words.join(" and ")} stand at the edge${words.length > 1 ? "s" : ""}, on dashed lines: a logarithmic axis has no place for them. `
      : "";
    state.shown = 10;
    list();
  }

  const cell = (row, content, kind = "td") => {
    const made = row.appendChild(document.createElement(kind));
    if (content instanceof Node) made.append(content);
    else made.appendChild(document.createElement("bdi")).textContent = content;
    return made;
  };
  const classCells = (line, sheet, row) => {
    if ($("grouping")) cell(line, className(sheet.label[row]));
    cell(line, className(sheet.predicted[row])).className = isWrong(sheet, row) ? "wrong" : "";
  };

  // The largest of the rows in the plot, merged from all sheets.
  function list() {
    const body = $("top").tBodies[0];
    body.replaceChildren();
    const found = [];
    sheets.forEach((sheet, s) => {
      const fi = column(sheet, state.measure.column);
      let taken = 0;
      for (const row of order(sheet)) {
        if (taken > state.shown) break; // one more than is shown, to know whether there are more
        if (passes(sheet, row, fi[row])) taken = found.push({ s, row, log: fi[row] }) && taken + 1;
      }
    });
    found.sort((a, b) => (a.log === b.log ? 0 : b.log > a.log ? 1 : -1));
    found.slice(0, state.shown).forEach(({ s, row, log }, i) => {
      const line = body.insertRow(), sheet = sheets[s];
      cell(line, String(i + 1));
      if (sheets.length > 1) cell(line, sheet.name);
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = idOf(sheet, row);
      button.setAttribute("aria-label", `show ${idOf(sheet, row)} in the plot`);
      button.addEventListener("click", () => choose([{ s, row }]));
      cell(line, button);
      classCells(line, sheet, row);
      cell(line, fiText(log));
    });
    $("more").hidden = found.length <= state.shown;
  }

  function choose(chosen) {
    state.chosen = chosen;
    const body = $("sample").querySelector("tbody");
    body.replaceChildren();
    $("sample").hidden = !chosen.length;
    for (const { s, row } of chosen) {
      const sheet = sheets[s], line = body.insertRow();
      const { column: name, logProb, rank } = state.measure;
      const log = column(sheet, name)[row];
      const lp = column(sheet, logProb)?.[row], r = column(sheet, rank)?.[row];
      if (sheets.length > 1) cell(line, sheet.name);
      cell(line, String(idOf(sheet, row)), "th").scope = "row";
      classCells(line, sheet, row);
      cell(line, fiText(log));
      cell(line, Number.isNaN(log) ? "–" : share(sheet, log));
      cell(line, lp === undefined || Number.isNaN(lp) ? "–" : four(Math.exp(lp)));
      cell(line, r === undefined || r < 0 ? "–" : String(r));
    }
    for (const button of document.querySelectorAll("#gallery button")) {
      const row = Number(button.dataset.row);
      button.setAttribute("aria-pressed", chosen.some((c) => c.s === 0 && c.row === row));
    }
    $("found").textContent = chosen.map(said).join(" ");
    Plotly.relayout("manhattan", { ...(chosen.some(outside) ? ranges() : {}), ...marks() });
    redraw("layers");
  }
  function said({ s, row }) {
    const sheet = sheets[s], id = idOf(sheet, row), log = column(sheet, state.measure.column)[row];
    const where = sheets.length > 1 ? ` in ${sheet.name}` : "";
    if (sheet.errors.has(row)) return `${id}${where} has no score: ${sheet.errors.get(row)}.`;
    if (Number.isNaN(log)) return `${id}${where} has no score.`;
    const hidden = passes(sheet, row, log) ? "" : " The filter leaves it out; its place is ringed.";
    return `${id}${where}: FI ${fiText(log)}, predicted ${className(sheet.predicted[row])}.${hidden}`;
  }
  function outside({ s, row }) {
    const axes = $("manhattan")._fullLayout, n = s ? String(s + 1) : "";
    const log = column(sheets[s], state.measure.column)[row];
    if (Number.isNaN(log)) return false;
    const x = places(sheets[s]).x[row], y = Math.log10(height(log));
    const [a, b] = axes[`xaxis${n}`].range, [c, d] = axes[`yaxis${n}`].range;
    return x < a || x > b || y < c || y > d;
  }

  function search() {
    const text = $("query").value;
    if (!text.trim()) return choose([]);
    const found = find(text);
    choose(found);
    if (!found.length) $("found").textContent = `No sample has the id “${text.trim()}”. ${example()}`;
  }
  const example = () => `The first is “${idOf(sheets[0], 0)}”, the last “${idOf(sheets[0], sheets[0].rows - 1)}”.`;

  // The other plots: what restyle takes.
  const distribution = (name) => {
    const { x, y } = state.measure[name];
    return { x: x.map(decode), y: y.map(decode) };
  };
  function profile() {
    const bands = data.profiles[state.measure.variant].map(decode);
    const y = [...bands], visible = bands.map(() => true);
    sheets.forEach((_, s) => {
      const one = state.chosen.find((chosen) => chosen.s === s);
      const values = data.blocks.map((block) => {
        const m = data.measures.find((o) => o.block === block && o.variant === state.measure.variant);
        const log = one && m ? column(sheets[s], m.column)[one.row] : NaN;
        return Number.isFinite(log) ? height(log) : null;
      });
      y.push(values);
      visible.push(values.some((v) => v !== null));
    });
    return { y, visible };
  }
  const OTHERS = { histogram: distribution, ecdf: distribution, layers: profile };
  function redraw(...names) {
    for (const name of names) if ($(name)?.data) Plotly.restyle(name, OTHERS[name](name));
  }

  function theme(name) {
    state.theme = name;
    document.documentElement.dataset.theme = name;
    $("theme").setAttribute("aria-pressed", name === "dark");
    if (!$("manhattan").data) return;
    Plotly.update("manhattan", styled("manhattan"), { ...themed(), ...marks() });
    for (const other of Object.keys(OTHERS)) {
      if ($(other)?.data) Plotly.update(other, styled(other), { ...data.styles[name].layout });
    }
  }

  function switchMeasure() {
    const variant = $("variant")?.value ?? data.measures[0].variant;
    const block = $("block")?.value ?? data.measures[0].block;
    const found = data.measures.find((m) => m.variant === variant && m.block === block);
    if (!found || found === state.measure) return;
    state.measure = found;
    for (const table of document.querySelectorAll(".percentiles")) {
      table.hidden = table.dataset.column !== found.column;
    }
    draw();
    redraw("histogram", "ecdf");
    choose(state.chosen);
  }
  function readFilter() {
    const text = $("threshold").value.trim().replace(",", ".");
    const value = text === "" ? 0 : Number(text);
    const good = value >= 0;
    $("threshold").setAttribute("aria-invalid", !good);
    filter.least = good ? Math.fround(Math.log10(value)) : -Infinity;
    filter.class = $("class").value === "" ? null : Number($("class").value);
    filter.wrong = $("wrong")?.checked ?? false;
    state.grouping = $("grouping")?.value ?? "predicted";
    draw();
    if (!good) $("status").textContent = `FI at least: expected a number of at least 0, got “${text}”.`;
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");
  theme(dark.matches ? "dark" : "light");
  $("theme").addEventListener("click", () => theme(state.theme === "dark" ? "light" : "dark"));
  dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
  // On paper: light, and no wider than a sheet.
  let before = null;
  const resize = (keys) =>
    Object.keys(data.figures).forEach((name) => $(name)?.data && Plotly.relayout(name, { ...keys }));
  addEventListener("beforeprint", () => {
    before = state.theme;
    theme("light");
    resize({ width: 680 });
  });
  addEventListener("afterprint", () => {
    theme(before ?? state.theme);
    resize({ width: null, autosize: true });
  });

  // A plot as it is first drawn: what restyle and relayout would take, put in beforehand.
  function set(target, keys) {
    for (const [key, value] of Object.entries(keys)) {
      const path = key.split("."), last = path.pop();
      path.reduce((at, part) => (at[part] ??= {}), target)[last] = value;
    }
  }
  function first(name, traces, layout) {
    const figure = data.figures[name];
    for (const [key, values] of Object.entries({ ...styled(name), ...traces })) {
      figure.data.forEach((trace, i) => values[i] === undefined || set(trace, { [key]: values[i] }));
    }
    set(figure.layout, layout);
    return Plotly.newPlot(name, figure.data, figure.layout, CONFIG);
  }
  const { found, shown } = points();
  first("manhattan", found, { ...themed(), ...ranges(), ...marks() }).then(() => {
    performance.mark("fastfi-first-plot");
    document.documentElement.dataset.drawn = "manhattan";
    $("manhattan").on("plotly_click", ({ points: [point] }) => {
      const s = Math.floor(point.curveNumber / (2 * HALF));
      choose([{ s, row: current.rows[point.curveNumber][point.pointNumber] }]);
    });
    report(shown);
    setTimeout(async () => {
      for (const [name, coordinates] of Object.entries(OTHERS)) {
        if ($(name)) await first(name, coordinates(name), data.styles[state.theme].layout);
      }
      document.documentElement.dataset.drawn = "all";
    });
  });

  for (const id of ["variant", "block"]) $(id)?.addEventListener("change", switchMeasure);
  for (const id of ["grouping", "class", "wrong"]) $(id)?.addEventListener("change", readFilter);
  const soon = (action) => {
    let waiting = 0;
    return () => { clearTimeout(waiting); waiting = setTimeout(action, 250); };
  };
  $("threshold").addEventListener("input", soon(readFilter));
  $("query").addEventListener("input", soon(search));
  $("filter").addEventListener("submit", (event) => { event.preventDefault(); readFilter(); });
  // A reset event comes before the fields change.
  $("filter").addEventListener("reset", () => setTimeout(() => { switchMeasure(); readFilter(); }));
  $("search").addEventListener("submit", (event) => { event.preventDefault(); search(); });
  $("clear").addEventListener("click", () => { $("query").value = ""; choose([]); $("query").focus(); });
  $("more").addEventListener("click", () => { state.shown += 25; list(); });
  $("gallery")?.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    choose([{ s: 0, row: Number(button.dataset.row) }]);
    $("manhattan").scrollIntoView({ block: "center" });
  });
})();
