// The rows of the page: columns, their order and place in the plot, the filter, texts.
"use strict";
const rows = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const ARRAYS = {
    i1: Int8Array, u1: Uint8Array, i2: Int16Array, u2: Uint16Array, i4: Int32Array,
    u4: Uint32Array, f4: Float32Array, f8: Float64Array,
  };
  function bytes(text) {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const binary = atob(text), found = new Uint8Array(binary.length);
    for (let i = 0; i < found.length; i++) found[i] = binary.charCodeAt(i);
    return found;
  }
  const decode = ({ dtype, bdata }) => new ARRAYS[dtype](bytes(bdata).buffer);
  // plotly takes <b> and &lt; for markup
  const plain = (text) =>
    String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  // The end of an id, and the beginning of a name, tell most.
  const short = (text, n) => (text.length > n ? `${[...text].slice(0, n - 1).join("")}…` : text);
  const ending = (text, n) => (text.length > n ? `…${[...text].slice(1 - n).join("")}` : text);
  const count = (n) => n.toLocaleString("en");
  const NONE = data.classes.length; // the class of samples that have none
  const FARTHEST = 300; // |log10 FI| that is drawn

  const flags = (n, rows) => rows.reduce((all, row) => ((all[row] = 1), all), new Uint8Array(n));

  // Columns are decoded when they are first needed.
  const sheets = data.sheets.map((sheet) => ({
    ...sheet,
    label: decode(sheet.label),
    predicted: decode(sheet.predicted),
    failed: flags(sheet.rows, decode(sheet.failed)),
    errors: new Map(sheet.errors),
    ids: sheet.ids.texts || (sheet.ids.numbers && decode(sheet.ids.numbers)),
    columns: new Map(),
    places: new Map(),
    orders: new Map(),
  }));
  const column = (sheet, name) => {
    if (!sheet.columns.has(name)) {
      sheet.columns.set(name, sheet.numbers[name] ? decode(sheet.numbers[name]) : null);
    }
    return sheet.columns.get(name);
  };
  const idOf = (sheet, row) => (sheet.ids ? sheet.ids[row] : row);
  const className = (k) => (k === NONE ? "–" : data.classes[k]);
  const isWrong = (sheet, row) => {
    const k = sheet.label[row], p = sheet.predicted[row];
    return k !== NONE && p !== NONE && k !== p;
  };
  const four = (v) => {
    if (v === Infinity) return "∞";
    if (v === 0) return "0";
    const text = v.toPrecision(4);
    if (!text.includes("e") && Math.abs(v) >= 1e-4) return String(Number(text));
    return v.toExponential(3).replace(/\.?0+e/, "e");
  };
  // Of a logarithm, which may lie where a double does not reach.
  const fiText = (log) => {
    if (Number.isNaN(log)) return "–";
    if (!Number.isFinite(log) || Math.abs(log) < FARTHEST) return four(10 ** log);
    return `1e${log.toFixed(3)}`;
  };

  const state = { measure: data.measures[0], grouping: "label", chosen: [], };
  if (!$("grouping")) state.grouping = "predicted";
  const filter = { class: null, wrong: false, least: -Infinity };

  // Rows of a sheet, by descending FI; ties in the data's order.
  function order(sheet) {
    const name = state.measure.column;
    if (!sheet.orders.has(name)) {
      const fi = column(sheet, name);
      const rows = Uint32Array.from(fi.keys()).filter((row) => !Number.isNaN(fi[row]));
      sheet.orders.set(name, rows.sort((a, b) => (fi[a] === fi[b] ? a - b : fi[b] > fi[a] ? 1 : -1)));
    }
    return sheet.orders.get(name);
  }

  // Places along the axis: classes side by side, samples in the data's order.
  function places(sheet) {
    if (!sheet.places.has(state.grouping)) {
      const of = sheet[state.grouping];
      const sizes = new Uint32Array(NONE + 1);
      for (let row = 0; row < of.length; row++) if (!sheet.failed[row]) sizes[of[row]]++;
      const used = sizes.reduce((n, size) => n + (size > 0), 0);
      const gap = (0.06 * sheet.rows) / Math.max(used, 1);
      const starts = [];
      let at = 0;
      sizes.forEach((size, k) => { starts.push(at); if (size) at += size + gap; });
      const next = Float64Array.from(starts);
      const x = new Float64Array(of.length);
      for (let row = 0; row < of.length; row++) if (!sheet.failed[row]) x[row] = next[of[row]]++;
      const here = [...sizes.keys()].filter((k) => sizes[k]);
      const room = Math.min(30, Math.floor($("manhattan").clientWidth / 24)); // of names, turned
      const step = Math.ceil(here.length / Math.max(room, 1));
      const named = here.filter((_, i) => i % step === 0);
      sheet.places.set(state.grouping, {
        x, gap, starts, sizes, end: at,
        ticks: named.map((k) => starts[k] + (sizes[k] - 1) / 2),
        names: named.map((k) => (k === NONE ? "none" : plain(short(data.classes[k], 12)))),
      });
    }
    return sheet.places.get(state.grouping);
  }

  // The height of a point: infinity and 0 at the edges.
  function height(log) {
    const { zero, infinity } = state.measure;
    if (log === -Infinity) return 10 ** zero;
    if (log === Infinity) return 10 ** infinity;
    return 10 ** Math.min(Math.max(log, -FARTHEST), FARTHEST);
  }
  const passes = (sheet, row, log) =>
    log >= filter.least && // false for NaN
    (filter.class === null || sheet[state.grouping][row] === filter.class) &&
    (!filter.wrong || isWrong(sheet, row));

  // Texts of the hover labels: what samples of the same classes share is made once.
  function hovers(sheet) {
    const shared = new Map(), set = sheets.length > 1 ? `${plain(sheet.name)}<br>` : "";
    return (row, log) => {
      const k = sheet.label[row], p = sheet.predicted[row], key = k * (NONE + 1) + p;
      if (!shared.has(key)) {
        const label = $("grouping") ? `true class ${plain(className(k))}<br>` : "";
        shared.set(key, `<br>${label}predicted ${plain(className(p))}<br>FI `);
      }
      const id = sheet.ids ? sheet.ids[row] : row;
      return `${set}id ${typeof id === "number" ? id : plain(id)}${shared.get(key)}${fiText(log)}`;
    };
  }

  // Rows larger than a sample's FI come before it in the order.
  function share(sheet, log) {
    const rows = order(sheet), fi = column(sheet, state.measure.column);
    let low = 0, high = rows.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (fi[rows[middle]] >= log) low = middle + 1;
      else high = middle;
    }
    return `${(100 * (1 - low / rows.length)).toFixed(2)} %`;
  }

  let index = null;
  function find(text) {
    if (!index) {
      index = new Map();
      sheets.forEach((sheet, s) => {
        for (let row = 0; row < sheet.rows; row++) {
          const id = String(idOf(sheet, row));
          if (index.has(id)) index.get(id).push({ s, row });
          else index.set(id, [{ s, row }]);
        }
      });
    }
    return index.get(text) || index.get(text.trim()) || [];
  }
  return {
    $, NONE, className, column, count, data, decode, ending, filter, find, fiText, four, height, hovers, idOf,
    isWrong, order, passes, places, plain, share, sheets, state,
  };
})();
