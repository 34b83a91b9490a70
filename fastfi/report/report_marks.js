// Axes of the Manhattan plot, the lines of 0 and infinity, and rings around the chosen samples.
"use strict";
const { marks, ranges } = (() => {
  const { column, data, ending, filter, height, idOf, places, plain, sheets, state } = rows;
  // A circle of ten pixels. As a "circle", on a logarithmic axis, plotly would refuse negative pixels.
  const RING =
    "M10,0 C10,5.5 5.5,10 0,10 C-5.5,10 -10,5.5 -10,0 C-10,-5.5 -5.5,-10 0,-10 C5.5,-10 10,-5.5 10,0 Z";


  function marks() {
    const { low, high, zero, infinity } = state.measure;
    const colours = data.styles[state.theme];
    const shapes = [], annotations = [];
    sheets.forEach((sheet, s) => {
      const n = s ? String(s + 1) : "";
      const words = [[zero, "FI = 0"], [infinity, "FI infinite: P underflows"]];
      for (const [at, text] of words.filter(([where]) => where !== null)) {
        shapes.push({
          type: "line", xref: `x${n} domain`, yref: `y${n}`, x0: 0, x1: 1, y0: 10 ** at, y1: 10 ** at,
          line: { color: colours.muted, width: 1, dash: "dash" }, layer: "below",
        });
        annotations.push({
          xref: `x${n} domain`, yref: `y${n}`, x: 1, y: at, text, showarrow: false, xanchor: "right",
          yanchor: "bottom", font: { color: colours.ink, size: 12 }, bgcolor: colours.panel, opacity: 0.9,
        });
      }
      if (sheets.length > 1) {
        annotations.push({
          xref: `x${n} domain`, yref: `y${n} domain`, x: 0, y: 1, xanchor: "left", yanchor: "bottom",
          text: `<b>${plain(sheet.name)}</b>`, showarrow: false, font: { color: colours.ink, size: 14 },
        });
      }
    });
    for (const { s, row } of state.chosen) {
      const log = column(sheets[s], state.measure.column)[row];
      if (Number.isNaN(log)) continue;
      const n = s ? String(s + 1) : "", x = places(sheets[s]).x[row], y = height(log);
      shapes.push({
        type: "path", xref: `x${n}`, yref: `y${n}`, xsizemode: "pixel", ysizemode: "pixel",
        xanchor: x, yanchor: y, path: RING, line: { color: colours.ink, width: 3 },
      });
      annotations.push({
        xref: `x${n}`, yref: `y${n}`, x, y: Math.log10(y), ax: 0,
        text: plain(ending(String(idOf(sheets[s], row)), 32)),
        xanchor: ["left", "center", "right"][Math.min(2, Math.floor((3 * x) / places(sheets[s]).end))],
        ay: log > (low + high) / 2 ? 36 : -36, standoff: 11, arrowhead: 0, arrowcolor: colours.ink, font: { color: colours.ink },
        bgcolor: colours.panel, bordercolor: colours.muted,
      });
    }
    return { shapes, annotations };
  }
  function ranges() {
    const found = {};
    sheets.forEach((sheet, s) => {
      const n = s ? String(s + 1) : "";
      const { gap, starts, sizes, end, ticks, names } = places(sheet);
      const k = filter.class;
      const wide = Math.max(gap, 0.02 * sheet.rows, 0.5);
      found[`xaxis${n}.range`] =
        k === null || !sizes[k] ? [-wide, end] : [starts[k] - gap / 2 - 0.5, starts[k] + sizes[k] + gap / 2];
      found[`xaxis${n}.tickvals`] = ticks;
      found[`xaxis${n}.ticktext`] = names;
      found[`xaxis${n}.title.text`] = state.grouping === "label" ? "true class" : "predicted class";
      found[`yaxis${n}.range`] = [state.measure.low, state.measure.high];
    });
    return found;
  }
  return { marks, ranges };
})();
