// Draws a network: stages from left to right, each with its input (square) and its blocks (circles).
//
// What a block reads enters from the left: straight from the block before, in an arc above from further back, in an arc
// below from another stage. A stage of parallel branches stands in columns, one a module. For a wiring that depends on
// the image, ``show`` opens and closes its edges one after the other, as the signal would pass.

const SVG = "http://www.w3.org/2000/svg";
const RADIUS = 13;
const STEP_MS = 160; // between a node and the next, while the edges of an image are shown
const MOST_PATHS = 1500; // of one kind; more share one path a reader

function element(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const keyOf = (edge) => `${edge.from.join(":")}>${edge.to.join(":")}`;
const px = (number) => Number(number.toFixed(1));

function nameOf(wiring, [s, i]) {
  const stage = wiring.stages[s];
  return i === 0 ? `input of ${stage.name}` : `${stage.name}.${stage.nodes[i].name}`;
}

/** The nodes of a stage by column, or null: blocks named MODULE.BRANCH share a column with their module's others. */
function columnsOf(wiring, s) {
  const heads = wiring.stages[s].nodes.map((node) => node.name.slice(0, Math.max(0, node.name.lastIndexOf("."))));
  const columns = [[0]];
  for (let i = 1; i < heads.length; i++) {
    if (i > 1 && heads[i] && heads[i] === heads[i - 1]) columns.at(-1).push(i);
    else columns.push([i]);
  }
  if (Math.max(...columns.map((column) => column.length)) === 1) return null;
  const number = new Map(columns.flatMap((column, c) => column.map((i) => [i, c])));
  const inside = wiring.edges
    .filter((edge) => edge.to[0] === s)
    .every((edge) => edge.from[0] === s && number.get(edge.from[1]) === number.get(edge.to[1]) - 1);
  return inside ? columns : null;
}

function layoutOf(wiring) {
  const total = wiring.stages.reduce((sum, stage) => sum + stage.nodes.length, 0);
  const layout = { at: [], radius: [], columns: [], bands: [], above: RADIUS + 8, below: RADIUS + 10, width: 0 };
  let x = 8;
  wiring.stages.forEach((stage, s) => {
    const columns = columnsOf(wiring, s);
    const left = x;
    const points = [];
    let step = total <= 24 ? 46 : 38;
    let radius = RADIUS;
    let steps = stage.nodes.length - 1;
    if (columns) {
      const most = Math.max(...columns.map((column) => column.length));
      radius = most <= 12 ? RADIUS : Math.max(3.5, (RADIUS * 12) / most);
      step = Math.min(150, 66 + 4 * most);
      steps = columns.length - 1;
      columns.forEach((column, c) =>
        column.forEach((i, row) => {
          points[i] = { x: left + 28 + c * step, y: (row - (column.length - 1) / 2) * 2.6 * radius };
        }),
      );
      const half = ((most - 1) / 2) * 2.6 * radius + radius;
      layout.above = Math.max(layout.above, half + 20);
      layout.below = Math.max(layout.below, half + 6);
    } else {
      for (let i = 0; i <= steps; i++) points[i] = { x: left + 28 + i * step, y: 0 };
    }
    const right = Math.max(left + 56 + steps * step, left + 16 + 8 * stage.name.length);
    layout.at.push(points);
    layout.radius.push(radius);
    layout.columns.push(columns);
    layout.bands.push([left, right]);
    x = right + 20;
  });
  layout.width = x - 12;
  for (const edge of wiring.edges) {
    const side = edge.from[0] === edge.to[0] ? "above" : "below";
    layout[side] = Math.max(layout[side], lift(layout, edge) + 4);
  }
  return layout;
}

/** How far the arc of an edge rises; 0 for one without an arc. */
function lift(layout, { from, to }) {
  if (from[0] === to[0] && (layout.columns[to[0]] || to[1] - from[1] === 1)) return 0;
  return 16 + 0.75 * (layout.at[to[0]][to[1]].x - layout.at[from[0]][from[1]].x) ** 0.75;
}

function kindOf(layout, edge) {
  if (edge.from[0] !== edge.to[0]) return "across";
  return lift(layout, edge) ? "skip" : "near";
}

function pathOf(layout, edge, middle) {
  const { from, to } = edge;
  const start = layout.at[from[0]][from[1]];
  const end = layout.at[to[0]][to[1]];
  const [before, after] = [layout.radius[from[0]], layout.radius[to[0]]];
  const up = lift(layout, edge);
  if (up) {
    const side = from[0] === to[0] ? -1 : 1;
    const control = px(middle + side * (RADIUS + (up - RADIUS) / 0.75));
    const [x0, x1] = [px(start.x + 4), px(end.x - 4)];
    const [y0, y1] = [px(middle + start.y + side * (before - 1)), px(middle + end.y + side * (after - 1))];
    return `M${x0} ${y0}C${x0} ${control} ${x1} ${control} ${x1} ${y1}`;
  }
  const [x0, x1] = [px(start.x + before), px(end.x - after)];
  const [y0, y1] = [px(middle + start.y), px(middle + end.y)];
  const half = px((start.x + end.x) / 2);
  return y0 === y1 ? `M${x0} ${y0}H${x1}` : `M${x0} ${y0}C${half} ${y0} ${half} ${y1} ${x1} ${y1}`;
}

function says(wiring, edge) {
  const verb = edge.state === "cut" ? "could have read" : "reads";
  const extra = [];
  if (edge.gate !== undefined) extra.push(`gate ${edge.gate.toFixed(2)}`);
  if (edge.share !== undefined) extra.push(`open for ${(edge.share * 100).toFixed(1)} % of the validation images`);
  if (edge.state === "dead") extra.push("dead: no output depends on it");
  const more = extra.length ? ` (${extra.join(", ")})` : "";
  return `${nameOf(wiring, edge.to)} ${verb} ${nameOf(wiring, edge.from)}${more}`;
}

/**
 * Draw a wiring into a container.
 *
 * @param tell called with the name of what the pointer rests on
 * @returns kinds: of the edges that are there; show(edges): the edges that one image opened; clear(): as before
 */
export function drawWiring(container, wiring, tell) {
  const layout = layoutOf(wiring);
  const middle = 30 + layout.above;
  const bottom = middle + layout.below;
  const title = `the wiring of the network: ${wiring.stages.length} stages`;
  const svg = element("svg", {
    class: "wiring", role: "img", "aria-label": title, width: px(layout.width), height: px(bottom + 2),
    viewBox: `0 0 ${px(layout.width)} ${px(bottom + 2)}`,
  });
  wiring.stages.forEach((stage, s) => {
    const [left, right] = layout.bands[s];
    svg.append(element("rect", { class: "band", x: px(left), y: 2, width: px(right - left), height: px(bottom - 2), rx: 8 }));
    svg.append(element("text", { class: "stage", x: px(left + 8), y: 20 }, stage.name));
    const after = layout.at[s + 1];
    if (after) {
      const last = layout.at[s].at(-1);
      svg.append(element("path", { class: "edge host", d: `M${px(last.x + RADIUS)} ${px(middle)}H${px(after[0].x - RADIUS)}` }));
    }
  });

  const paths = new Map();
  const kinds = new Set();
  for (const state of ["cut", "dead", "live"]) {
    const mine = wiring.edges.filter((edge) => edge.state === state);
    const groups = new Map();
    for (const edge of mine) {
      const key = mine.length > MOST_PATHS ? edge.to.join(":") : keyOf(edge);
      groups.set(key, [...(groups.get(key) || []), edge]);
    }
    for (const group of groups.values()) {
      const kind = state === "live" ? kindOf(layout, group[0]) : state;
      kinds.add(kind);
      const d = group.map((edge) => pathOf(layout, edge, middle)).join("");
      const path = element("path", { class: `edge ${kind}`, d });
      const number = group[0].gate ?? group[0].share;
      if (group.length === 1 && number !== undefined && state !== "dead") {
        path.style.strokeWidth = state === "cut" ? 0.6 + number : 0.7 + 4.3 * number;
      }
      const text = group.length === 1 ? says(wiring, group[0]) : `${says(wiring, group[0])} and ${group.length - 1} more`;
      path.append(element("title", {}, text));
      path.addEventListener("pointerenter", () => tell(text));
      svg.append(path);
      for (const edge of group) paths.set(keyOf(edge), path);
    }
  }

  const nodes = new Map();
  wiring.stages.forEach((stage, s) =>
    stage.nodes.forEach((node, i) => {
      const point = layout.at[s][i];
      const radius = layout.radius[s];
      const [x, y] = [px(point.x), px(middle + point.y)];
      const isJoin = i > 0 && i === stage.nodes.length - 1 && !/[0-9]$/.test(node.name);
      const label = i === 0 ? "in" : isJoin ? "out" : node.name.slice(node.name.lastIndexOf(".") + 1);
      const group = element("g", { class: `node ${i === 0 ? "input" : isJoin ? "join" : "block"}${node.live ? "" : " gone"}` });
      const text = node.live ? nameOf(wiring, [s, i]) : `${nameOf(wiring, [s, i])}: removed, no output depends on it`;
      group.append(element("title", {}, text));
      if (i === 0 || isJoin) group.append(element("rect", { x: px(point.x - 14), y: px(y - 11), width: 28, height: 22, rx: 4 }));
      else group.append(element("circle", { cx: x, cy: y, r: px(radius) }));
      if (radius >= 9) group.append(element("text", { x, y: px(y + 4) }, label.length <= 3 ? label : String(i)));
      group.addEventListener("pointerenter", () => tell(text));
      svg.append(group);
      nodes.set(`${s}:${i}`, group);
    }),
  );
  container.replaceChildren(svg);

  let timers = [];
  const clear = () => {
    timers.forEach(clearTimeout);
    timers = [];
    svg.classList.remove("of-image");
    for (const path of paths.values()) path.classList.remove("open", "closed", "passing");
    for (const node of nodes.values()) node.classList.remove("idle");
  };
  return {
    kinds,
    clear,
    /** @param told edges: from, to, weight (0: closed); idle: nodes that this image does not run */
    show(told) {
      clear();
      svg.classList.add("of-image");
      const isStill = matchMedia("(prefers-reduced-motion: reduce)").matches;
      const readers = [...new Set(told.edges.map((edge) => edge.to.join(":")))];
      const idle = new Set(told.idle.map((node) => node.join(":")));
      readers.forEach((reader, turn) => {
        const mine = told.edges.filter((edge) => edge.to.join(":") === reader);
        const turned = () => {
          nodes.get(reader)?.classList.toggle("idle", idle.has(reader));
          for (const edge of mine) {
            const path = paths.get(keyOf(edge));
            if (!path) continue;
            path.classList.add(edge.weight > 0 ? "open" : "closed");
            path.style.strokeWidth = edge.weight > 0 ? 1 + 4 * edge.weight : 2.6;
            const state = edge.weight > 0 ? `open for this image, with a weight of ${edge.weight.toFixed(2)}` : "closed for this image";
            const text = `${nameOf(wiring, edge.to)} reads ${nameOf(wiring, edge.from)}: ${state}`;
            path.querySelector("title").textContent = text;
            path.onpointerenter = () => tell(text);
            if (edge.weight > 0 && !isStill) {
              path.classList.add("passing");
              timers.push(setTimeout(() => path.classList.remove("passing"), 2 * STEP_MS));
            }
          }
        };
        if (isStill) turned();
        else timers.push(setTimeout(turned, turn * STEP_MS));
      });
    },
  };
}
