// Renders openapi.json: every path, what it takes, what it answers; a GET can be tried.

import { ask, byId, make, send, withKey } from "./common.js";

/** A schema in one or a few lines, near to how the JSON itself looks. */
function written(schema, document, depth = 0) {
  if (schema === true || schema === undefined) return "anything";
  if (schema.$ref) {
    const name = schema.$ref.split("/").at(-1);
    return depth > 4 ? name : written(document.components.schemas[name], document, depth + 1);
  }
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const choices = schema.oneOf || schema.anyOf;
  if (choices) {
    const words = [...new Set(choices.slice(0, 3).map((choice) => written(choice, document, depth + 1)))];
    return words.join(" | ") + (choices.length > 3 ? ` | ... (${choices.length} forms)` : "");
  }
  if (schema.type === "array") {
    const size = schema.minItems !== undefined && schema.minItems === schema.maxItems ? `${schema.minItems} x ` : "";
    return `[${size}${schema.items ? written(schema.items, document, depth + 1) : (schema.prefixItems || []).map((item) => written(item, document, depth + 1)).join(", ")}]`;
  }
  if (schema.type === "object" || schema.properties) {
    const indent = "  ".repeat(depth + 1);
    const required = new Set(schema.required || []);
    const members = Object.entries(schema.properties || {})
      .filter(([, value]) => value !== false)
      .map(([name, value]) => `${indent}"${name}"${required.has(name) ? "" : "?"}: ${written(value, document, depth + 1)}`);
    return members.length ? `{\n${members.join(",\n")}\n${"  ".repeat(depth)}}` : "{...}";
  }
  const words = [Array.isArray(schema.type) ? schema.type.join(" | ") : schema.type || "anything"];
  if (schema.format) words.push(schema.format);
  if (schema.minimum !== undefined && schema.minimum > -1e30) words.push(`from ${schema.minimum}`);
  if (schema.maximum !== undefined && schema.maximum < 1e30) words.push(`to ${schema.maximum}`);
  if (schema.maxLength !== undefined) words.push(`at most ${schema.maxLength} characters`);
  return words.join(" ");
}

const follow = (thing, document) =>
  thing.$ref ? thing.$ref.slice(2).split("/").reduce((tree, key) => tree[key], document) : thing;

function parametersOf(operation, document) {
  const rows = (operation.parameters || []).map((parameter) => follow(parameter, document));
  if (!rows.length) return [];
  const line = (row) =>
    make("li", {}, make("code", {}, row.name), ` in ${row.in}${row.required ? "" : ", optional"}: `, make("code", {}, written(row.schema, document)), row.description ? ` - ${row.description}` : "");
  return [make("h3", {}, "Parameters"), make("ul", {}, ...rows.map(line))];
}

function bodyOf(operation, document) {
  if (!operation.requestBody) return [];
  const body = follow(operation.requestBody, document);
  const forms = Object.entries(body.content).map(([type, { schema }]) =>
    make("li", {}, make("code", {}, type), schema && Object.keys(schema).length ? make("pre", {}, written(schema, document)) : ""),
  );
  return [make("h3", {}, "Body"), body.description ? make("p", {}, body.description) : null, make("ul", {}, ...forms)];
}

function answersOf(operation, document) {
  const rows = Object.entries(operation.responses).map(([status, answer]) => {
    const told = follow(answer, document);
    const schema = told.content?.["application/json"]?.schema;
    const isOk = status.startsWith("2");
    return make("li", {}, make("code", {}, status), ` ${told.description}`, isOk && schema ? make("pre", {}, written(schema, document)) : "");
  });
  return [make("h3", {}, "Answers"), make("ul", {}, ...rows)];
}

/** A field for every part of the path, and the answer below. */
function tryOf(path, operation, document) {
  const names = [...path.matchAll(/\{([^}]+)\}/g)].map((match) => match[1]);
  const rows = (operation.parameters || []).map((parameter) => follow(parameter, document));
  const fields = new Map(
    names.map((name) => {
      const schema = rows.find((row) => row.name === name)?.schema ?? {};
      return [name, make("input", { value: schema.enum?.[0] ?? schema.examples?.[0] ?? "", ariaLabel: name, size: 16 })];
    }),
  );
  const output = make("pre", { hidden: true });
  const form = make("form", { className: "try" }, ...fields.values(), make("button", {}, "Try it"));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const filled = path.replace(/\{([^}]+)\}/g, (_, name) => encodeURIComponent(fields.get(name).value));
    output.hidden = false;
    output.textContent = "...";
    try {
      const response = await send(filled.slice(1));
      const text = await response.text();
      let shown = text;
      try {
        shown = JSON.stringify(JSON.parse(text), null, 2);
      } catch {
        // shown as it came
      }
      output.textContent = `${response.status}\n${shown.slice(0, 20000)}`;
    } catch (error) {
      output.textContent = error.message;
    }
  });
  return [form, output];
}

function operationOf(path, method, operation, document) {
  return make(
    "details",
    { className: "operation" },
    make("summary", {}, make("span", { className: `method ${method}` }, method.toUpperCase()), make("code", {}, path), make("span", { className: "quiet" }, operation.summary)),
    operation.description ? make("p", {}, operation.description) : null,
    ...parametersOf(operation, document),
    ...bodyOf(operation, document),
    ...answersOf(operation, document),
    ...(method === "get" ? tryOf(path, operation, document) : []),
  );
}

async function start() {
  const document_ = await ask("openapi.json");
  const parts = [make("p", {}, document_.info.description)];
  for (const { name, description } of document_.tags) {
    const mine = Object.entries(document_.paths).flatMap(([path, item]) =>
      Object.entries(item)
        .filter(([, operation]) => operation.tags?.includes(name))
        .map(([method, operation]) => operationOf(path, method, operation, document_)),
    );
    if (mine.length) parts.push(make("section", {}, make("h2", {}, name), make("p", { className: "quiet" }, description), ...mine));
  }
  byId("docs").replaceChildren(...parts);
}

withKey(start);
