// The page for people: an image in, classes and times out; and what the bundle says of the model.

import { ask, byId, count, make, ms, percent, say, short, show, table, tiny, withKey } from "./common.js";
import { drawWiring } from "./wiring.js";

const PARTS = ["decode", "queue", "compute"];
const state = { models: [], about: null, picture: null, file: null, turn: 0 };

const pathOf = (model) => `v2/models/${encodeURIComponent(model.name)}/versions/${model.version}`;
const chosen = () => state.models[byId("model").selectedIndex];

// ------------------------------------------------------------------------------------------------------- which model

async function start() {
  const { models } = await ask("v2/models");
  const known = await Promise.all(models.map((name) => ask(`v2/models/${encodeURIComponent(name)}`)));
  state.models = known.flatMap(({ name, versions }) => [...versions].reverse().map((version) => ({ name, version })));
  if (!state.models.length) throw new Error("No model is loaded on this server.");
  const isVersioned = known.some(({ versions }) => versions.length > 1);
  byId("model").replaceChildren(
    ...state.models.map(({ name, version }) => make("option", {}, isVersioned ? `${name}, version ${version}` : name)),
  );
  show(byId("choice"));
  await choose();
}

async function choose() {
  const model = chosen();
  const turn = ++state.turn;
  const told = await ask(`${pathOf(model)}/about`);
  if (turn !== state.turn) return; // another one was chosen meanwhile
  state.about = told;
  document.title = `${model.name} - mcdeploy`;
  showWiring(told);
  showCertificate(told);
  showBench(told);
  showFacts(told);
}

// -------------------------------------------------------------------------------------------------------- the answer

async function predict(file) {
  state.file = file;
  const turn = ++state.turn;
  preview(file);
  say(byId("failure"), "");
  show(byId("waiting"));
  byId("waiting").textContent = "Asking the model ...";
  byId("answer").classList.add("busy");
  state.picture?.clear();
  try {
    const body = await file.arrayBuffer(); // read before the clock starts
    const model = chosen();
    const headers = { "Content-Type": file.type || "application/octet-stream" };
    const began = performance.now();
    const answer = await ask(`${pathOf(model)}/predict`, { method: "POST", body, headers });
    const total = performance.now() - began;
    if (turn !== state.turn) return;
    showAnswer(answer, total);
    if (state.about?.wiring?.per_image) await watch(model, body, headers, turn);
  } catch (error) {
    if (turn !== state.turn) return;
    show(byId("result"), false);
    say(byId("failure"), error.message);
  } finally {
    if (turn === state.turn) {
      show(byId("waiting"), false);
      byId("answer").classList.remove("busy");
    }
  }
}

async function watch(model, body, headers, turn) {
  const told = await ask(`${pathOf(model)}/wiring`, { method: "POST", body, headers });
  if (turn !== state.turn) return;
  state.picture?.show(told);
  const open = told.edges.filter((edge) => edge.weight > 0).length;
  const blocks = told.idle.length === 1 ? "1 block" : `${told.idle.length} blocks`;
  const idle = told.idle.length ? `; ${blocks} did not run` : "";
  byId("pointed").textContent = `For this image ${open} of ${told.edges.length} connections opened${idle}.`;
}

function preview(file) {
  const image = byId("preview");
  if (image.src) URL.revokeObjectURL(image.src);
  image.onerror = () => {
    show(image, false); // not an image; the server says so
    show(byId("hint"));
  };
  image.src = URL.createObjectURL(file);
  show(image);
  show(byId("hint"), false);
  byId("file-name").textContent = `${file.name || "pasted image"}, ${short(file.size)}B`;
}

function showAnswer(answer, total) {
  const model = `${answer.model}${state.about?.versions?.length > 1 ? `, version ${answer.version}` : ""}`;
  byId("best").replaceChildren(answer.label, " ", make("small", {}, `${percent(answer.probability)}, says ${model}`));
  byId("classes").replaceChildren(
    ...answer.top.map(({ label, probability }) => {
      const bar = make("span", { className: "bar" });
      bar.style.width = percent(probability, 2).replace(" ", "");
      return make("li", {}, make("span", { className: "label" }, label), make("span", { className: "track" }, bar), make("span", { className: "number" }, percent(probability)));
    }),
  );
  const times = PARTS.map((part) => [part, answer.timing[`${part}_ms`]]);
  const rest = Math.max(0, total - times.reduce((sum, [, time]) => sum + time, 0));
  times.push(["network and the rest", rest]);
  const whole = times.reduce((sum, [, time]) => sum + time, 0) || 1;
  const words = times.map(([part, time]) => `${part} ${ms(time)}`).join(", ");
  byId("split").replaceChildren(
    ...times.map(([, time], number) => {
      const part = make("span", { className: `part part-${number}` });
      part.style.width = `${(100 * time) / whole}%`;
      return part;
    }),
  );
  byId("split").setAttribute("aria-label", words);
  byId("times").replaceChildren(
    ...times.map(([part, time], number) =>
      make("div", {}, make("dt", {}, make("i", { className: `part-${number}` }), part), make("dd", {}, ms(time))),
    ),
  );
  const images = answer.timing.batch;
  byId("times-note").textContent = `${ms(total)} in all, seen from here; run in a batch of ${images}.`;
  show(byId("result"));
}

// -------------------------------------------------------------------------------------------------------- the wiring

const KINDS = {
  near: "reads the block before",
  skip: "reads further back",
  across: "reads another stage",
  cut: "removed: could have been read, was not kept",
  dead: "removed: no output depends on it",
  open: "opened by this image",
  closed: "closed for this image",
};

function showWiring({ wiring }) {
  show(byId("wiring-part"), Boolean(wiring));
  state.picture = null;
  if (!wiring) return;
  const tell = (text) => {
    byId("pointed").textContent = text;
  };
  state.picture = drawWiring(byId("wiring"), wiring, tell);
  byId("legend").replaceChildren(
    ...Object.entries(KINDS)
      .filter(([kind]) => state.picture.kinds.has(kind) || (wiring.per_image && ["open", "closed"].includes(kind)))
      .map(([kind, words]) => make("li", {}, make("i", { className: `swatch ${kind}` }), words)),
  );
  const of = (...states) => wiring.edges.filter((edge) => states.includes(edge.state)).length;
  const gone = wiring.stages.flatMap((stage) => stage.nodes).filter((node) => !node.live).length;
  const removed = of("cut", "dead");
  const offered = wiring.knows_candidates ? "" : " The bundle does not say what else could have been read.";
  const image = wiring.per_image ? " Which of them open depends on the image: send one and watch." : "";
  byId("wiring-says").textContent =
    `${count(of("live"))} connections are live, ${count(removed)} were removed` +
    `${gone ? `, and ${count(gone)} blocks with them` : ""}.${offered}${image}`;
}

// --------------------------------------------------------------------------------------------------- the certificate

function showCertificate({ bundle, certificate }) {
  show(byId("certificate-part"), Boolean(bundle));
  if (!bundle) return;
  byId("sizes").replaceChildren(
    ...[
      change("Parameters", bundle.params, short),
      change("MACs of an image", bundle.macs, short),
      bundle.accuracy.after === null ? null : accuracyCard(bundle.accuracy),
    ].filter(Boolean),
  );
  const parts = [];
  if (certificate && Object.keys(certificate.removed).length) {
    parts.push(make("h3", {}, "What was removed, and why"));
    for (const [reason, names] of Object.entries(certificate.removed)) {
      parts.push(
        make("details", {}, make("summary", {}, `${reason} `, make("span", { className: "number" }, count(names.length))), make("p", { className: "names" }, names.join(", "))),
      );
    }
  }
  if (certificate?.checks.length) {
    parts.push(make("h3", {}, "Proof that compiling kept the function"));
    const rows = certificate.checks.map((check) => [check.step, `batch norm ${check.bn}`, check.must_be, tiny(check.max_relative)]);
    parts.push(make("div", { className: "wide" }, table(["step", "", "must be", "is off by"], rows)));
  }
  parts.push(make("h3", {}, "Parity of every hop, against the trained model"));
  parts.push(make("div", { className: "wide" }, table(["hop", "images", "batches", "largest difference", "smallest cosine", "same class"], hops(bundle.parity))));
  byId("certificate").replaceChildren(...parts);
}

function change(title, { before, after }, written) {
  const bar = make("span", { className: "bar" });
  bar.style.width = `${(100 * after) / Math.max(before, 1)}%`;
  const saved = before > after ? `${percent(1 - after / before)} less` : "unchanged";
  return make(
    "div",
    { className: "card", title: `${count(before)} before, ${count(after)} after` },
    make("h3", {}, title),
    make("p", { className: "big" }, `${written(before)} \u2192 ${written(after)}`),
    make("span", { className: "track" }, bar),
    make("p", { className: "quiet" }, saved),
  );
}

function accuracyCard({ before, after, images }) {
  const was = before === null ? "" : `${percent(before, 2)} \u2192 `;
  return make(
    "div",
    { className: "card" },
    make("h3", {}, "Right at the first guess"),
    make("p", { className: "big" }, `${was}${percent(after, 2)}`),
    make("p", { className: "quiet" }, images === null ? "" : `of ${count(images)} validation images`),
  );
}

function hops(rows) {
  const found = new Map();
  for (const row of rows) {
    const key = `${row.hop}|${row.images}`;
    found.set(key, [...(found.get(key) || []), row]);
  }
  return [...found.values()].map((same) => [
    same[0].hop,
    same[0].images,
    same.map((row) => row.batch).join(", "),
    tiny(Math.max(...same.map((row) => row.max_abs))),
    Math.min(...same.map((row) => row.cosine)).toFixed(6),
    percent(Math.min(...same.map((row) => row.top1_agreement))),
  ]);
}

// ---------------------------------------------------------------------------------------------- the bench, the facts

function showBench({ bundle }) {
  const rows = bundle?.latency ?? [];
  show(byId("bench-part"), rows.length > 0);
  if (!rows.length) return;
  const written = rows.map((row) => [
    row.model,
    String(row.batch),
    `${ms(row.p50_ms)}`,
    `${ms(row.low_ms)} to ${ms(row.high_ms)}`,
    count(Math.round(row.images_per_second)),
    row.threads ? `${row.provider}, ${row.threads} threads` : row.provider,
  ]);
  byId("bench").replaceChildren(table(["model", "batch", "median", "95 % interval", "images a second", "on"], written));
  const machine = Object.entries(rows[0].machine).map(([what, value]) => `${what}: ${value}`).join(", ");
  byId("bench-says").textContent = `Measured when the bundle was made${machine ? ` (${machine})` : ""}; this machine may differ.`;
}

function showFacts({ bundle, served, input, output, limits }) {
  const model = bundle?.models[served.model];
  const rows = [
    ["model", model ? `${served.model}: ${model.backend}, opset ${model.opset}, ${short(model.bytes)}B` : served.model],
    ["backbone", bundle?.backbone],
    ["connectivity", bundle?.connectivity],
    ["input", `${input.name}, ${input.shape.join(" x ")}`],
    ["output", `${output.name}, ${count(output.classes)} classes`],
    ["runs on", served.threads ? `${served.provider}, ${served.threads} threads` : served.provider],
    ["batches", `up to ${limits.images_in_batch} images are run together; a request may hold ${limits.images_in_request}`],
    ["self-test", served.selftest === undefined ? null : `off by ${tiny(served.selftest)}, at most ${tiny(served.selftest_max)} is allowed`],
    ["bundle", bundle?.id],
    ["made", bundle?.created],
    ["licence", bundle?.licences.model],
  ];
  const known = rows.filter(([, value]) => value);
  byId("facts").replaceChildren(
    ...known.map(([name, value]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, value))),
  );
  show(byId("facts-part"));
}

// ----------------------------------------------------------------------------------------------------------- the user

function listen() {
  const drop = byId("drop");
  const take = (files) => {
    if (files?.length && state.models.length) predict(files[0]);
  };
  byId("file").addEventListener("change", (event) => {
    take(event.target.files);
    event.target.value = ""; // the same file may be chosen again
  });
  for (const name of ["dragenter", "dragover"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  for (const name of ["dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.remove("over");
    });
  }
  document.addEventListener("drop", (event) => take(event.dataTransfer?.files));
  document.addEventListener("paste", (event) => take(event.clipboardData?.files));
  drop.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      byId("file").click();
    }
  });
  byId("again").addEventListener("click", () => state.file && predict(state.file));
  byId("model").addEventListener("change", async () => {
    try {
      say(byId("trouble"), "");
      await choose();
      if (state.file) await predict(state.file);
    } catch (error) {
      say(byId("trouble"), error.message);
    }
  });
}

listen();
withKey(start);
