"use strict";
// Colours of Okabe and Ito, with dashes, so that neither colour-blind readers nor prints lose a line.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#3a9bd9", "#7a7a7a", "#8c510a"];
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "12 4", "4 2", "1 2", "14 3 3 3"];
const CIVIDIS = [[0,34,78],[18,53,112],[59,73,108],[87,93,109],[112,113,115],[138,134,120],[165,156,116],[195,179,105],[225,204,85],[254,232,56]];
const {parts} = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
let ids = 0;

function el(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "rect", "text", "title", "circle"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.flat().filter(child => child !== null));
  return node;
}
const known = value => value !== null && value !== undefined && value !== "" && !Number.isNaN(value);
function show(value, digits = 4) {
  if (!known(value)) return "–";
  if (typeof value === "number") return Number.isInteger(value) ? value.toLocaleString("en") : String(+value.toPrecision(digits));
  return String(value);
}
const percent = value => known(value) ? (100 * value).toFixed(2) + " %" : "–";
function say(text, x, y) {
  tip.textContent = text; tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(x + 12, innerWidth - box.width - 4)) + "px";
  tip.style.top = Math.max(4, y + 16 + box.height > innerHeight ? y - box.height - 10 : y + 16) + "px";
}
const hush = () => { tip.hidden = true; };
addEventListener("keydown", event => { if (event.key === "Escape") hush(); });
function colour(share) {
  const at = Math.max(0, Math.min(1, share)) * (CIVIDIS.length - 1), low = Math.floor(at), rest = at - low;
  const high = CIVIDIS[Math.min(low + 1, CIVIDIS.length - 1)];
  const rgb = CIVIDIS[low].map((one, i) => Math.round(one + rest * (high[i] - one)));
  return {fill: `rgb(${rgb})`, ink: 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 140 ? "#000" : "#fff"};
}
function ticks(low, high, count = 5) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(one => one * power >= rough);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-6; at += step) found.push(+at.toPrecision(10));
  return found;
}

// A chart of lines. Each: {name, x, y, colour, dash}; the arrow keys move along the rounds and read the values out.
function lines(series, {y, x = "round", range = null, window: span = null, label}) {
  const W = 640, H = 300, L = 56, R = 12, T = 12, B = 40;
  const all = series.flatMap(one => one.y.filter(known));
  if (!all.length) return el("p", {class: "note"}, `${y}: not measured.`);
  let [low, high] = range || [Math.min(...all), Math.max(...all)];
  if (low === high) { low -= 0.5; high += 0.5; }
  const left = Math.min(...series.map(one => one.x[0])), right = Math.max(...series.map(one => one.x.at(-1)), left + 1);
  const px = at => L + (at - left) / (right - left) * (W - L - R), py = at => H - B - (at - low) / (high - low) * (H - T - B);
  const root = el("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", class: "lines", tabindex: 0, "aria-label": `${label}. Arrow keys read the values.`});
  if (span) root.append(el("rect", {class: "window", x: px(Math.max(left, span[0] - 1)), y: T, height: H - T - B,
    width: Math.max(2, px(Math.min(right, span[1])) - px(Math.max(left, span[0] - 1)))}, el("title", {}, `attacked: rounds ${span[0]} to ${span[1]}`)));
  for (const at of ticks(low, high)) root.append(el("line", {class: "grid", x1: L, x2: W - R, y1: py(at), y2: py(at)}),
    el("text", {class: "soft", x: L - 6, y: py(at) + 4, "text-anchor": "end"}, show(at)));
  for (const at of ticks(left, right, 6)) root.append(el("text", {class: "soft", x: px(at), y: H - B + 18, "text-anchor": "middle"}, show(at)));
  root.append(el("text", {x: (L + W - R) / 2, y: H - 4, "text-anchor": "middle"}, x), el("text", {x: 0, y: 0, transform: `translate(13 ${(H - B + T) / 2}) rotate(-90)`, "text-anchor": "middle"}, y));
  for (const one of series) {
    let path = "", pen = false;
    one.y.forEach((value, i) => { if (!known(value)) { pen = false; return; } path += `${pen ? "L" : "M"}${px(one.x[i]).toFixed(1)} ${py(Math.max(low, Math.min(high, value))).toFixed(1)}`; pen = true; });
    root.append(el("path", {d: path, fill: "none", style: `stroke:${one.colour}`, "stroke-width": 2, "stroke-dasharray": one.dash || "", "data-line": one.name}));
  }
  const cross = el("line", {class: "grid", y1: T, y2: H - B, x1: -9, x2: -9}); cross.style.stroke = "currentColor"; root.append(cross);
  const at = series[0].x; let here = at.length - 1;
  function read(i, clientX, clientY) {
    here = Math.max(0, Math.min(at.length - 1, i));
    cross.setAttribute("x1", px(at[here])); cross.setAttribute("x2", px(at[here]));
    const values = series.map(one => { const j = one.x.findIndex(v => v >= at[here]); return `${one.name}: ${j < 0 ? "–" : show(one.y[j])}`; });
    say([`${x} ${show(at[here])}`, ...values].join("\n"), clientX, clientY);
  }
  root.addEventListener("pointermove", event => {
    const box = root.getBoundingClientRect(), value = left + ((event.clientX - box.left) / box.width * W - L) / (W - L - R) * (right - left);
    let best = 0; at.forEach((v, i) => { if (Math.abs(v - value) < Math.abs(at[best] - value)) best = i; });
    read(best, event.clientX, event.clientY);
  });
  root.addEventListener("pointerleave", hush); root.addEventListener("blur", hush);
  root.addEventListener("keydown", event => {
    const move = {ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9, PageUp: -10, PageDown: 10}[event.key];
    if (!move) return;
    event.preventDefault(); const box = root.getBoundingClientRect();
    read(here + move, box.left + box.width / 2, box.top + 20);
  });
  const legend = el("ul", {class: "legend"}, series.map(one => el("li", {}, el("svg", {viewBox: "0 0 34 10", "aria-hidden": "true"}, el("line", {x1: 0, x2: 34, y1: 5, y2: 5, style: `stroke:${one.colour}`, "stroke-width": 3, "stroke-dasharray": one.dash || ""})), " ", one.name)));
  if (span) legend.append(el("li", {}, el("svg", {viewBox: "0 0 34 10", "aria-hidden": "true"}, el("rect", {class: "window", width: 34, height: 10})), " attacked rounds"));
  return el("figure", {style: "margin:0"}, series.length > 1 || span ? legend : null, root);
}

// A heat map; values[row][column] = {value, text, tip, pick}. The arrow keys walk over it.
function heat(rows, columns, values, {x, y, label, low = null, high = null, pick = null}) {
  const wide = Math.max(...rows.map(one => String(one).length), 3), L = Math.min(190, 22 + wide * 7.2), cell = Math.max(34, Math.min(90, (640 - L) / columns.length)), tall = 30;
  const W = L + cell * columns.length + 4, H = 30 + tall * rows.length;
  const found = values.flat().filter(one => one && known(one.value)).map(one => one.value);
  const from = low ?? Math.min(...found), to = high ?? Math.max(...found);
  const root = el("svg", {viewBox: `0 0 ${W} ${H}`, role: "grid", "aria-label": label, style: `max-width:${Math.round(W * 1.35)}px;min-width:${Math.min(W, 900) * 0.75}px`});
  const cells = rows.map((row, i) => columns.map((column, j) => {
    const one = values[i][j], empty = !one || !known(one.value), look = empty ? {fill: "transparent", ink: "currentColor"} : colour((one.value - from) / (to - from || 1));
    const told = `${y} ${row}, ${x} ${column}: ${empty ? "none" : one.tip || show(one.value)}`;
    const rect = el("rect", {x: L + j * cell, y: 26 + i * tall, width: cell - 1, height: tall - 1, fill: look.fill, role: "gridcell", "aria-label": told, tabindex: i + j ? -1 : 0, stroke: empty ? "var(--line)" : null, style: pick && !empty ? "cursor:pointer" : null,
      onpointermove: event => say(told, event.clientX, event.clientY), onpointerleave: hush, onblur: hush,
      onfocus: () => { const box = rect.getBoundingClientRect(); say(told, box.right, box.top); },
      onclick: () => { if (pick && !empty) pick(one); },
      onkeydown: event => {
        const move = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
        if (move) { const next = cells[i + move[0]]?.[j + move[1]]; if (next) { event.preventDefault(); rect.setAttribute("tabindex", -1); next.setAttribute("tabindex", 0); next.focus(); } }
        if ((event.key === "Enter" || event.key === " ") && pick && !empty) { event.preventDefault(); pick(one); }
      }});
    root.append(rect);
    if (!empty && cell >= 34) { const text = el("text", {x: L + (j + 0.5) * cell, y: 26 + (i + 0.5) * tall + 4, "text-anchor": "middle", "pointer-events": "none", "aria-hidden": "true"}, one.text ?? show(one.value, 3)); text.style.fill = look.ink; root.append(text); }
    return rect;
  }));
  const shorten = (text, most) => { text = String(text); return text.length > most ? text.slice(0, most - 1) + "…" : text; };
  rows.forEach((row, i) => root.append(el("text", {x: L - 6, y: 26 + (i + 0.5) * tall + 4, "text-anchor": "end"}, shorten(row, 24))));
  columns.forEach((column, j) => root.append(el("text", {x: L + (j + 0.5) * cell, y: 20, "text-anchor": "middle"}, shorten(column, Math.max(4, Math.floor(cell / 7))))));
  return el("div", {}, el("div", {class: "scroll"}, root), el("p", {class: "note"}, `across: ${x}` + (y ? `; down: ${y}` : "")));
}

function table(names, rows, {text = []} = {}) {
  const body = el("tbody"); let by = null, down = false;
  function fill() {
    const sorted = by === null ? rows : [...rows].sort((a, b) => { const [p, q] = [a[by], b[by]]; const order = !known(p) ? 1 : !known(q) ? -1 : p < q ? -1 : p > q ? 1 : 0; return down ? -order : order; });
    body.replaceChildren(...sorted.map(row => el("tr", {}, names.map((name, i) => el("td", {class: text.includes(name) ? "text" : null}, show(row[i]))))));
  }
  const heads = names.map((name, i) => el("th", {scope: "col"}, el("button", {type: "button", onclick: () => {
    down = by === i && !down; by = i; heads.forEach((head, j) => head.setAttribute("aria-sort", j === i ? (down ? "descending" : "ascending") : "none")); fill(); }}, name)));
  fill();
  return el("div", {class: "scroll", tabindex: 0}, el("table", {}, el("thead", {}, el("tr", {}, heads)), body));
}
const heading = text => el("h3", {}, text);
function command(text) {
  const shown = el("pre", {class: "command"}, text), button = el("button", {type: "button", onclick: async () => {
    try { await navigator.clipboard.writeText(shown.textContent); } catch { getSelection().selectAllChildren(shown); document.execCommand("copy"); }
    button.textContent = "Copied"; setTimeout(() => { button.textContent = "Copy"; }, 1500); }}, "Copy");
  return el("div", {class: "copy"}, shown, button);
}
function choose(name, values, chosen, onchange) {
  const id = `choice${ids++}`, select = el("select", {id, onchange: () => onchange(select.value)}, values.map(([value, text]) => el("option", {value, selected: value === chosen ? "" : false}, text)));
  return el("label", {for: id}, name, select);
}
const facts = pairs => el("ul", {class: "facts"}, pairs.filter(([, value]) => value !== null).map(([name, value]) => el("li", {}, el("b", {}, value), el("span", {}, name))));

const MEASURES = {norm_auc: "AUC of the norm", cosine_auc: "AUC of the cosine", distance_auc: "AUC of the distance"};
function flipsOf(part) {
  const {edges, from, to, counts, left_out: more} = part.flips, place = el("div");
  let [first, last] = [0, counts.length - 1];
  function draw() {
    const sum = from.map((_, i) => to.map((_, j) => { let n = 0; for (let s = first; s <= last; s++) n += counts[s][i][j]; return n; }));
    const total = sum.flat().reduce((a, b) => a + b, 0);
    place.replaceChildren(el("p", {class: "note"}, `Rounds ${edges[first] + 1} to ${edges[last + 1]}: ${show(total)} flips.`),
      heat(from, to, sum.map(row => row.map(n => n ? {value: n, text: n >= 1e4 ? `${Math.round(n / 1e3)}k` : String(n), tip: `${show(n)} flips, ${percent(n / total)}`} : null)),
        {x: "written label", y: "true label", label: "Flips by true label and written label", low: 0}));
  }
  const slider = (name, at, set) => { const id = `range${ids++}`, input = el("input", {id, type: "range", min: 0, max: counts.length - 1, value: at, oninput: () => { set(+input.value); draw(); }}); return el("label", {for: id}, name, input); };
  const controls = el("div", {class: "controls"}, slider("from round", first, at => { first = at; last = Math.max(at, last); }), slider("to round", last, at => { last = at; first = Math.min(at, first); }));
  draw();
  const spans = counts.map((_, s) => edges[s + 1]);
  const byClass = from.map((_, i) => counts.map(span => { const n = span[i].reduce((a, b) => a + b, 0); return n ? {value: n} : null; }));
  return [heading("Flips: who is flipped to what"), counts.length > 1 ? controls : null, place, more ? el("p", {class: "note"}, `${more} more classes are left out.`) : null,
    heading("Flips by true label and round"), heat(from, spans, byClass, {x: "up to round", y: "true label", label: "Flips by true label and span of rounds", low: 0})];
}
function runOf(part) {
  const s = part.summary, columns = part.rounds, window_ = part.attacked ? part.window : null;
  const curve = column => [...(part.honest ? [{name: "honest", x: part.honest.round, y: part.honest[column], colour: "var(--honest)", dash: "7 4"}] : []),
    {name: part.attacked ? "attacked" : "run", x: columns.round, y: columns[column], colour: "var(--attacked)"}];
  const section = el("section", {class: "part", "aria-label": part.name}, el("h2", {}, part.name));
  if (known(s.final_accuracy)) section.append(facts([["final accuracy", percent(s.final_accuracy)], ["without the attack", part.honest_accuracy === null ? null : percent(part.honest_accuracy)],
    ["lowest accuracy", percent(s.minimum_accuracy)], ["write access", show(s.write_access, 3)], ["local budget", show(s.budget, 3)], ["global budget", show(s.global_budget, 3)], ["flips", show(s.flips)], ["malicious of all clients", `${s.malicious_clients} of ${s.clients}`]]));
  else section.append(el("p", {class: "note"}, "The run is not finished: what is measured so far is shown."));
  const place = el("div"), names = {test_accuracy: "test accuracy", test_f1: "F1", test_loss: "test loss (nats)"};
  const drawCurve = column => place.replaceChildren(lines(curve(column), {y: names[column], range: column === "test_loss" ? null : [0, 1], window: window_, label: `${names[column]} by round`}));
  drawCurve("test_accuracy");
  section.append(heading("Honest against attacked"), el("div", {class: "controls"}, choose("measure", Object.entries(names), "test_accuracy", drawCurve)), place);
  if (part.attacked && columns.flips.some(known)) section.append(heading("Flips in each round"), lines([{name: "flips", x: columns.round, y: columns.flips, colour: "var(--attacked)"}, {name: "allowed by the budget", x: columns.round, y: columns.allowed, colour: "var(--honest)", dash: "2 3"}], {y: "labels", label: "Flips by round"}));
  if (part.flips) section.append(...flipsOf(part).filter(Boolean)); else section.append(heading("Flips"), el("p", {class: "note"}, "No label was flipped."));
  if (part.samples.length) section.append(heading("Samples flipped most often"), el("ul", {class: "samples"}, part.samples.map(one => el("li", {},
    one.picture ? el("img", {src: one.picture, alt: `training sample ${one.sample}, truly ${one.label}`}) : null,
    el("div", {}, `${known(one.label) ? one.label : "?"} → ${Object.keys(one.to).join(", ")}`), el("div", {class: "note"}, `${show(one.times)} times, sample ${one.sample}`)))));
  if (Object.keys(MEASURES).some(name => (columns[name] || []).some(known)))
    section.append(heading("Detectability"), el("p", {class: "note"}, "How well a server could tell malicious updates: 1 tells all apart, 0.5 none."),
      lines(Object.entries(MEASURES).map(([name, text], i) => ({name: text, x: columns.round, y: columns[name], colour: COLOURS[i], dash: DASHES[i]})), {y: "AUC", range: [0, 1], window: window_, label: "Detectability by round"}));
  if (part.clients) { const c = part.clients; section.append(heading("Clients"), table(["client", "role", "samples", "labels", "accuracy on its samples", "flips"],
    c.client.map((id, i) => [id, c.malicious[i] ? "malicious" : "honest", c.samples[i], c.labels[i], c.final_accuracy[i], c.flips[i]]), {text: ["role", "labels"]})); }
  section.append(heading("Run it again"), command(part.command), el("details", {}, el("summary", {}, "All settings"), table(["setting", "value"], Object.entries(part.settings).map(([key, value]) => [key, value === null ? "null" : typeof value === "object" ? JSON.stringify(value) : value]), {text: ["value"]})));
  return section;
}

function sweepOf(part) {
  const {columns, varied, results} = part, count = columns.seed.length, place = el("div"), picked = el("div", {"aria-live": "polite"});
  const section = el("section", {class: "part wide", "aria-label": part.name}, el("h2", {}, part.name), facts([["cells", show(part.cells)], ["broken off", show(part.broken_off)], ["seeds", show(new Set(columns.seed).size)], ["varied", varied.map(name => part.labels[name] || name).join(", ") || "the seed"]]));
  const axes = varied.length ? varied : ["seed"], label = name => part.labels[name] || name, factor = name => part.factors[name] || 1;
  const state = {x: axes.find(name => name.includes("budget")) || axes[0], y: null, value: results.includes("final_accuracy") ? "final_accuracy" : results[0], where: {}};
  state.y = axes.find(name => name !== state.x) || null;
  const order = values => [...new Set(values)].sort((a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", {numeric: true}));
  function mean(cells) {
    const bySeed = {};
    for (const i of cells) { const value = columns[state.value][i]; if (known(value) && !columns.error?.[i]) (bySeed[columns.seed[i]] ||= []).push(value); }
    const values = Object.values(bySeed).map(found => found.reduce((a, b) => a + b, 0) / found.length * factor(state.value)), n = values.length;
    if (!n) return null;
    const average = values.reduce((a, b) => a + b, 0) / n, deviation = n > 1 ? Math.sqrt(values.reduce((a, b) => a + (b - average) ** 2, 0) / (n - 1)) : NaN;
    const half = n > 1 ? (part.t[n - 2] ?? 1.96) * deviation / Math.sqrt(n) : NaN;
    return {value: average, half, n, cells, tip: `${show(average)}${n > 1 ? ` ± ${show(half, 2)} (95 %, ${n} seeds)` : " (one seed)"}`, text: show(average, 3) + (n > 1 ? ` ±${show(half, 1)}` : "")};
  }
  function pick(one) {
    const rows = one.cells;
    picked.replaceChildren(heading("Run these cells again"), el("p", {class: "note"}, `${show(rows.length)} cells, ${label(state.value)}: ${one.tip}`), ...rows.slice(0, 12).map(i => command(part.commands[i])), rows.length > 12 ? el("p", {class: "note"}, "and more: see the table") : "");
  }
  function draw() {
    const others = axes.filter(name => name !== state.x && name !== state.y), kept = [];
    for (const name of others) state.where[name] ??= String(order(columns[name])[0]); // averages are over seeds alone
    for (let i = 0; i < count; i++) if (others.every(name => !known(state.where[name]) || String(columns[name][i]) === state.where[name])) kept.push(i);
    const xs = order(columns[state.x]), ys = state.y ? order(columns[state.y]) : ["all"];
    const values = ys.map(row => xs.map(column => mean(kept.filter(i => columns[state.x][i] === column && (!state.y || columns[state.y][i] === row)))));
    const open = others.filter(name => !known(state.where[name])), controls = el("div", {class: "controls"},
      choose("across", axes.map(name => [name, label(name)]), state.x, value => { if (value === state.y) state.y = state.x; state.x = value; draw(); }),
      axes.length > 1 ? choose("down", axes.map(name => [name, label(name)]), state.y, value => { if (value === state.x) state.x = state.y; state.y = value; draw(); }) : "",
      choose("value", results.map(name => [name, label(name)]), state.value, value => { state.value = value; draw(); }),
      others.map(name => choose(label(name), [["", "all (mean)"], ...order(columns[name]).map(value => [String(value), show(value)])], state.where[name] || "", value => { state.where[name] = value; draw(); })));
    place.replaceChildren(controls, heat(ys.map(one => show(one)), xs.map(one => show(one)), values, {x: label(state.x), y: state.y ? label(state.y) : "", label: `${label(state.value)} by ${label(state.x)} and ${state.y ? label(state.y) : "nothing else"}`, pick}),
      el("p", {class: "note"}, `${label(state.value)}; mean over seeds ± half of its 95 % interval.` + (open.length ? ` Averaged over ${open.map(label).join(", ")}.` : "") + " Enter or a click on a cell shows its commands."));
  }
  draw();
  const names = ["cell", ...varied, "seed", ...results].filter((name, i, all) => columns[name] && all.indexOf(name) === i);
  section.append(heading("Heat map"), place, picked, el("details", {}, el("summary", {}, "All cells"), part.cells > count ? el("p", {class: "note"}, `The first ${count} of ${part.cells} cells.`) : "",
    table([...names, "command"], columns.seed.map((_, i) => [...names.map(name => columns[name][i]), part.commands[i]]), {text: ["command"]})));
  return section;
}

function overview(runs) {
  const series = runs.map((part, i) => ({name: part.name, x: part.rounds.round, y: part.rounds.test_accuracy, colour: COLOURS[i % 8], dash: DASHES[i % 8]}));
  return el("section", {class: "part wide", "aria-label": "Side by side"}, el("h2", {}, "Side by side"), lines(series, {y: "test accuracy", range: [0, 1], label: "Test accuracy of all runs by round"}),
    table(["run", "attack", "rule", "global budget", "final accuracy", "without the attack", "flips"], runs.map(part => [part.name, part.settings["attack.name"], part.settings["strategy.name"], part.summary.global_budget, part.summary.final_accuracy, part.honest_accuracy, part.summary.flips]), {text: ["attack", "rule"]}));
}
const runs = parts.filter(part => part.kind === "run"), main = document.getElementById("main");
main.replaceChildren(...(runs.length > 1 ? [overview(runs)] : []), ...parts.map(part => part.kind === "run" ? runOf(part) : sweepOf(part)));
if (parts.length === 1) document.title = `${parts[0].name} · fl-attack`;
const theme = document.getElementById("theme"), root = document.documentElement;
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
const named = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; named(); });
named();
