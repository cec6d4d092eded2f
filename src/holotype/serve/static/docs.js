"use strict";

// The API as its OpenAPI document has it: what can be asked, how, and what is answered.

const $ = (id) => document.getElementById(id);
const METHODS = ["get", "post", "put", "patch", "delete"];
let api = null;

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

/** A schema with what it refers to in its place. */
function meant(schema) {
  if (!schema?.$ref) return schema || {};
  return api.components.schemas[schema.$ref.split("/").pop()] || {};
}

/** What a value of a schema looks like: its own example, or one made of its parts. */
function example(schema, depth = 0) {
  const found = meant(schema);
  if (found.example !== undefined) return found.example;
  if (found.examples?.length) return found.examples[0];
  if (found.default !== undefined) return found.default;
  if (found.enum) return found.enum[0];
  if (found.anyOf) return example(found.anyOf[0], depth);
  if (depth > 4) return null;
  if (found.type === "object" && found.properties) {
    return Object.fromEntries(Object.entries(found.properties).map(([name, one]) => [name, example(one, depth + 1)]));
  }
  if (found.type === "array") return [example(found.items, depth + 1)];
  return { string: "…", integer: 1, number: 0.5, boolean: true }[found.type] ?? null;
}

function told(schema) {
  const found = meant(schema);
  const parts = (found.anyOf || [found]).map((one) => meant(one).type).filter((type) => type && type !== "null");
  const limits = [["minimum", "≥"], ["maximum", "≤"]].filter(([name]) => found[name] !== undefined).map(([name, sign]) => `${sign} ${found[name]}`);
  const one = found.enum ? `one of ${found.enum.join(", ")}` : "";
  return [parts.join(" or "), ...limits, one].filter(Boolean).join(", ");
}

/** A command that asks it, with the host this page came from. */
function curl(method, path, operation) {
  const key = path.startsWith("/admin") ? ' -H "X-API-Key: $HOLOTYPE_ADMIN_KEY"' : api.locked ? ' -H "X-API-Key: $HOLOTYPE_API_KEY"' : "";
  const named = path.replace(/\{(\w+)\}/g, (_, name) => {
    const known = operation.parameters?.find((one) => one.name === name)?.schema.enum;
    return encodeURIComponent(known ? known[0] : name);
  });
  const url = new URL(named.replace(/^\//, ""), document.baseURI).href;
  const content = operation.requestBody?.content || {};
  let body = "";
  if (content["application/octet-stream"]) body = " --data-binary @image.jpg";
  else if (content["application/json"]) {
    const value = content["application/json"].example ?? example(content["application/json"].schema);
    body = ` -H 'Content-Type: application/json' \\\n  -d '${JSON.stringify(value).replaceAll("'", "'\\''")}'`;
  }
  return `curl${method === "get" ? "" : ` -X ${method.toUpperCase()}`}${key} '${url}'${body}`;
}

function parameters(operation) {
  const table = element("table");
  for (const one of operation.parameters || []) {
    const row = table.insertRow();
    row.append(element("td"), element("td", told(one.schema), "soft"), element("td", one.description || ""));
    row.cells[0].append(element("code", one.name));
    if (one.required) row.cells[1].textContent += ", required";
  }
  const scroll = element("div", "", "scroll");
  scroll.append(table);
  return scroll;
}

function responses(operation) {
  const list = element("ul", "", "plain");
  for (const [status, response] of Object.entries(operation.responses || {})) {
    const line = element("li");
    line.append(element("code", status), ` ${response.description}`);
    const [media] = Object.values(response.content || {});
    const value = media?.example ?? (media?.schema ? example(media.schema) : undefined);
    if (value?.detail) line.append(element("span", ` – ${value.detail}`, "soft"));
    else if (value !== undefined && value !== null) line.append(element("pre", JSON.stringify(value, null, 1)));
    list.append(line);
  }
  return list;
}

function route(method, path, operation) {
  const box = element("details");
  const summary = element("summary");
  const [first, ...rest] = (operation.description || operation.summary || "").split("\n\n");
  summary.append(element("code", `${method.toUpperCase()} ${path}`), ` ${first}`);
  box.append(summary, ...rest.map((text) => element("p", text)));
  if (operation.parameters?.length) box.append(element("h3", "Parameters"), parameters(operation));
  const kinds = Object.keys(operation.requestBody?.content || {});
  if (kinds.length) box.append(element("p", `Body: ${kinds.join(", ")}`));
  box.append(element("pre", curl(method, path, operation)), element("h3", "Answers"), responses(operation));
  return box;
}

function show() {
  const groups = new Map();
  for (const [path, operations] of Object.entries(api.paths)) {
    for (const method of METHODS.filter((name) => operations[name])) {
      const name = operations[method].tags?.[0] || "other";
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(route(method, path, operations[method]));
    }
  }
  $("said").textContent = `${api.info.description} Version ${api.info.version}.`;
  $("routes").replaceChildren(...[...groups].map(([name, boxes]) => {
    const section = element("section");
    section.append(element("h2", name[0].toUpperCase() + name.slice(1)), ...boxes);
    return section;
  }));
}

async function load() {
  const key = sessionStorage.getItem("key");
  try {
    const response = await fetch("openapi.json", { headers: key ? { "X-API-Key": key } : {} });
    const body = await response.json();
    $("key-form").hidden = response.status !== 401;
    if (!response.ok) throw new Error(body.detail);
    api = { ...body, locked: Boolean(key) };
    show();
  } catch (error) {
    $("said").textContent = error.message;
  }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  load();
});
load();
