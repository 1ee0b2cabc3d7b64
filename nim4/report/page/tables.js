// Tables of rates, with their intervals as pictures, and the figures that others report.
"use strict";

const WIDTH = 120; // of an interval's picture
const NOTHING = "-";

/** The tables of one profile, and those that are the same under all. */
function showTables(place, profile) {
  const shown = report.tables.filter((table) => table.profile === profile || table.profile === null);
  const bySet = report.sets.flatMap((set) => shown.filter((table) => table.set === set));
  place.replaceChildren(...bySet.map((table) => tableOf(table, table.header, table.note)));
}

function showReported(place) {
  for (const table of report.reported) {
    const [first, end] = table.reported;
    const kinds = table.header.map((_, i) => (i >= first && i < end ? "reported" : i >= end ? "measured" : ""));
    place.append(tableOf(table, table.header, `Reported: ${table.source}`, kinds));
  }
}

/** A table in a region that scrolls, also by keys; `kinds`, if any, are classes of the columns, told in a row above the names. */
function tableOf({ title, rows }, header, note, kinds = null) {
  const table = make("table", "", make("caption", "", title));
  const head = make("thead");
  if (kinds) head.append(groupsRow(kinds));
  head.append(make("tr", "", ...header.map((name, i) => scoped(make("th", kinds?.[i] ?? "", name), "col"))));
  const body = make("tbody");
  for (const row of rows) body.append(make("tr", "", ...row.map((cell, i) => cellOf(cell, i, kinds?.[i] ?? ""))));
  table.append(head, body);
  const region = make("div", "scrolls", table);
  region.tabIndex = 0;
  region.setAttribute("role", "region");
  region.setAttribute("aria-label", title);
  return make("figure", "", region, make("figcaption", "quiet", note));
}

function groupsRow(kinds) {
  const row = make("tr", "groups");
  for (const kind of new Set(kinds)) {
    const cell = make(kind ? "th" : "td", kind, kind === "reported" ? "reported by others" : kind === "measured" ? "measured here" : "");
    cell.colSpan = kinds.filter((one) => one === kind).length;
    if (kind) cell.scope = "colgroup";
    row.append(cell);
  }
  return row;
}

function scoped(cell, scope) {
  cell.scope = scope;
  return cell;
}

function cellOf(cell, column, kind) {
  if (column === 0) return scoped(make("th", kind, cell), "row");
  if (typeof cell === "string") return make("td", /^([\d.]+|-)$/.test(cell) ? `${kind} number` : kind, cell);
  if (cell.interval) return make("td", kind, intervalOf(cell));
  const shown = make("td", `${kind} ${cell.kind ?? ""}`, cell.text);
  if (cell.kind) shown.append(make("b", "", ` ${cell.kind}`));
  return shown;
}

/** [low, rate, high] as a line and a dot, with the ends as text. */
function intervalOf({ interval, most }) {
  const [low, rate, high] = interval;
  if (rate === null) return NOTHING;
  const x = (value) => 4 + ((WIDTH - 8) * value) / Math.max(most, 1e-9);
  const picture = shape("svg", { viewBox: `0 0 ${WIDTH} 12`, width: WIDTH, height: 12, "aria-hidden": "true" });
  picture.append(shape("line", { x1: x(low), x2: x(high), y1: 6, y2: 6 }), shape("circle", { cx: x(rate), cy: 6, r: 3.5 }));
  return make("span", "interval", picture, `${low.toFixed(2)} to ${high.toFixed(2)}`);
}
