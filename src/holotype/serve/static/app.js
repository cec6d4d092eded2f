"use strict";

const $ = (id) => document.getElementById(id);
const DOUBTS = {
  improbable: "its probability is below what this class needs",
  several: "more than one class is possible",
  none: "no class is probable enough",
  unfamiliar: "it is unlike the images that were learned",
};
let info = null;
let model = null; // the one that is asked: name, classes, heat_maps
let stream = null;

function headers() {
  const key = sessionStorage.getItem("key");
  return key ? { "X-API-Key": key } : {};
}

async function ask(path, options = {}) {
  const response = await fetch(path, { ...options, headers: { ...headers(), ...(options.headers || {}) } });
  if (response.status === 401) $("key-form").hidden = false;
  const body = response.headers.get("content-type")?.includes("json") ? await response.json() : null;
  if (!response.ok) throw new Error(body?.detail || `${response.status} ${response.statusText}`);
  return { body, response };
}

const percent = (value, digits = 1) => `${(100 * value).toFixed(digits)} %`;

// Images

async function classify(blob, name) {
  const item = $("result").content.firstElementChild.cloneNode(true);
  $("results").prepend(item);
  const image = item.querySelector("img");
  const url = URL.createObjectURL(blob);
  image.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
  image.src = url;
  image.alt = name;
  item.querySelector(".label").textContent = "…";
  const asked = model;
  const heat = asked && ["cam", "grad-cam"].includes(asked.heat_maps);
  item.querySelector(".show-heat").closest("label").hidden = !heat;
  const began = performance.now();
  try {
    const query = new URLSearchParams({ show_input: true, ...(heat && { explain: true }), ...(asked && { model: asked.name }) });
    const { body, response } = await ask(`predict?${query}`, { method: "POST", body: blob });
    show(item, body.results[0], name, response.headers.get("server-timing"), performance.now() - began, asked?.classes || []);
  } catch (error) {
    item.querySelector(".label").textContent = name;
    const doubt = item.querySelector(".doubt");
    doubt.textContent = error.message;
    doubt.hidden = false;
  }
}

function show(item, result, name, timing, milliseconds, classes) {
  item.querySelector(".label").textContent = result.sure ? result.label : `not sure: perhaps ${result.label}`;
  const doubt = item.querySelector(".doubt");
  doubt.hidden = result.sure;
  doubt.textContent = result.doubts.map((one) => DOUBTS[one] || one).join("; ");
  const list = item.querySelector(".top");
  for (const choice of result.top) {
    const term = document.createElement("dt");
    term.textContent = choice.label;
    const bar = document.createElement("dd");
    const meter = document.createElement("meter");
    meter.value = choice.probability;
    meter.setAttribute("aria-label", `${choice.label} ${percent(choice.probability)}`);
    bar.append(meter);
    const number = document.createElement("dd");
    number.className = "number";
    number.textContent = percent(choice.probability);
    list.append(term, bar, number);
  }
  const spans = Object.fromEntries((timing || "").split(", ").filter(Boolean).map((part) => part.split(";dur=")));
  const told = Object.entries(spans).map(([stage, value]) => `${stage} ${Number(value).toFixed(1)}`);
  item.querySelector(".timing").textContent = `${milliseconds.toFixed(0)} ms in all; on the server, ms: ${told.join(", ")}`;
  const image = item.querySelector("img");
  if (result.input) image.src = `data:image/png;base64,${result.input}`;
  item.querySelector("figcaption").textContent = `${name}, as the model sees it`;
  if (result.heat_map) paint(item, result.heat_map.grid);
  if (result.id) offer(item, result.id, result.label, classes);
}

function paint(item, grid) {
  const canvas = item.querySelector(".heat");
  const small = document.createElement("canvas");
  small.width = grid[0].length;
  small.height = grid.length;
  const context = small.getContext("2d");
  const pixels = context.createImageData(small.width, small.height);
  grid.flat().forEach((value, place) => pixels.data.set([255, 120 + 100 * value, 0, 190 * value], 4 * place));
  context.putImageData(pixels, 0, 0);
  canvas.width = canvas.height = 224;
  const large = canvas.getContext("2d");
  large.imageSmoothingQuality = "high";
  large.drawImage(small, 0, 0, 224, 224);
  const box = item.querySelector(".show-heat");
  box.addEventListener("change", () => { canvas.hidden = !box.checked; });
}

function offer(item, id, label, classes) {
  const form = item.querySelector(".feedback");
  const select = form.querySelector("select");
  for (const name of classes) select.add(new Option(name, name, false, name === label));
  form.hidden = false;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const said = form.querySelector("output");
    try {
      await ask("feedback", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ id, label: select.value }) });
      said.textContent = "kept";
    } catch (error) {
      said.textContent = error.message;
    }
  });
}

async function take(files) {
  for (const file of [...files].reverse()) await classify(file, file.name || "pasted image");
}

$("files").addEventListener("change", (event) => {
  take([...event.target.files]);
  event.target.value = ""; // so that the same file can be chosen again
});
document.addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").classList.remove("over"); });
document.addEventListener("drop", (event) => { event.preventDefault(); $("drop").classList.remove("over"); take(event.dataTransfer.files); });
document.addEventListener("paste", (event) => take(event.clipboardData.files));

// Camera

$("camera").addEventListener("click", async () => {
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    $("video").srcObject = stream;
    await $("video").play();
    $("viewfinder").hidden = false;
    $("shoot").focus();
  } catch (error) {
    $("camera").textContent = "no camera here";
    $("camera").disabled = true;
  }
});
$("shoot").addEventListener("click", () => {
  const video = $("video");
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => classify(blob, "camera"), "image/jpeg", 0.95);
});
$("stop").addEventListener("click", () => {
  stream?.getTracks().forEach((track) => track.stop());
  $("viewfinder").hidden = true;
  $("camera").focus();
});

// Charts

function chart(id, seconds, series) {
  const canvas = $(id);
  const ratio = devicePixelRatio || 1;
  const width = (canvas.width = canvas.clientWidth * ratio);
  const height = (canvas.height = 90 * ratio);
  const context = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const now = Math.floor(Date.now() / 1000);
  const highest = Math.max(1, ...seconds.flatMap((second) => series.map((one) => second[one.name])));
  context.font = `${11 * ratio}px system-ui`;
  context.fillStyle = style.getPropertyValue("--soft");
  context.fillText(highest >= 10 ? highest.toFixed(0) : highest.toFixed(1), 2 * ratio, 11 * ratio);
  for (const one of series) {
    context.strokeStyle = style.getPropertyValue(one.colour);
    context.lineWidth = 1.5 * ratio;
    context.beginPath();
    const byTime = new Map(seconds.map((second) => [second.at, second[one.name]]));
    for (let age = 119; age >= 0; age--) {
      const x = ((119 - age) / 119) * width;
      const y = height - ((byTime.get(now - 1 - age) || 0) / highest) * (height - 16 * ratio) - ratio;
      age === 119 ? context.moveTo(x, y) : context.lineTo(x, y);
    }
    context.stroke();
  }
}

async function look() {
  if (document.hidden) return;
  try {
    const { body } = await ask("stats");
    const last = body.seconds.filter((second) => second.at >= Date.now() / 1000 - 6);
    const images = last.reduce((sum, second) => sum + second.images, 0);
    $("rate").textContent = (images / 5).toFixed(1);
    const spoken = last.filter((second) => second.p50 > 0).pop();
    $("latency").textContent = spoken ? `${spoken.p50.toFixed(1)} / ${spoken.p95.toFixed(1)}` : "–";
    $("waiting").textContent = body.waiting;
    const refused = body.seconds.reduce((sum, second) => sum + second.refused, 0);
    $("refused").textContent = refused ? `${refused} requests were refused or too late.` : "";
    chart("rate-chart", body.seconds, [{ name: "images", colour: "--blue" }]);
    chart("latency-chart", body.seconds, [{ name: "p95", colour: "--orange" }, { name: "p50", colour: "--blue" }]);
    chart("waiting-chart", body.seconds, [{ name: "waiting", colour: "--blue" }]);
    drifted(model && body.drift[model.name]);
    recorded(body.records);
    $("skipped").hidden = !body.shadow_skipped;
    $("skipped").textContent = `The challenger did not answer ${body.shadow_skipped} images, as others were waiting.`;
  } catch (error) {
    $("serving").textContent = error.message;
  }
}

function recorded(records) {
  $("records-section").hidden = !records;
  if (!records) return;
  const size = records.pending_bytes < 1e6 ? `${Math.ceil(records.pending_bytes / 1e3)} kB` : `${(records.pending_bytes / 1e6).toFixed(1)} MB`;
  const said = [];
  if (records.database) said.push(["The database takes answers and labels.", false]);
  else said.push([records.database === null ? "The database has not been asked yet." : "The database is down.", records.database === false]);
  if (!records.journal) said.push([`The journal cannot be written: ${records.in_memory} rows wait in memory${records.database ? "" : ", and labels are refused"}.`, true]);
  if (records.pending_bytes) said.push([`${size} wait in the journal${records.database ? " for their turn" : " until it is back"}.`, false]);
  if (records.dropped) said.push([`${records.dropped} answers or labels are lost.`, true]);
  list("records", said);
}

function list(id, lines) {
  $(id).replaceChildren(...lines.map(([text, wrong]) => {
    const line = document.createElement("li");
    line.textContent = text;
    line.className = wrong ? "moved" : "";
    return line;
  }));
}

function drifted(drift) {
  $("drift-section").hidden = !drift;
  if (!drift) return;
  const moved = drift.movements.filter((one) => one.moved);
  $("drift-said").textContent = !drift.movements.length
    ? `Compared from the 50th image on; ${drift.images} so far.`
    : moved.length ? `The last ${drift.images} images are not like those of validation.` : `The last ${drift.images} images are like those of validation.`;
  list("drift", drift.movements.map((one) => [one.told, one.moved]));
}

async function trial() {
  if (document.hidden || !info?.experiment) return;
  try {
    const { body } = await ask("experiment");
    $("trial-section").hidden = false;
    const found = body.difference;
    const points = (value) => `${value > 0 ? "+" : ""}${(100 * value).toFixed(1)}`;
    $("trial-said").textContent = `${body.advice[0].toUpperCase()}${body.advice.slice(1)}. Challenger against champion: ${points(found.value)} points, between ${points(found.low)} and ${points(found.high)} however often one looks.`;
    $("arms").replaceChildren(...["champion", "challenger"].map((name) => {
      const arm = body[name];
      const row = document.createElement("tr");
      const sure = body[`${name}_accuracy`];
      const accuracy = sure ? `${percent(sure.value)} (${percent(sure.low)} – ${percent(sure.high)})` : "–";
      const cells = [name, arm.answers, arm.labelled, accuracy, arm.p95_ms ? arm.p95_ms.toFixed(1) : "–"];
      cells.forEach((text, place) => {
        const cell = document.createElement("td");
        cell.textContent = text;
        if (place) cell.className = "number";
        row.append(cell);
      });
      return row;
    }));
  } catch (error) {
    $("trial-said").textContent = error.message;
  }
}

async function connect() {
  try {
    info = (await ask("info")).body;
    $("key-form").hidden = true;
    if (!$("model").options.length) for (const name of info.models) $("model").add(new Option(name));
    $("model-choice").hidden = info.models.length < 2;
    await choose($("model").value);
    trial();
  } catch (error) {
    $("serving").textContent = error.message;
    setTimeout(connect, 2000);
  }
}

async function choose(name) {
  const { body } = await ask(`v2/models/${encodeURIComponent(name)}`);
  model = { name, classes: body.parameters.classes, heat_maps: body.parameters.heat_maps };
  $("serving").textContent = `${name}: ${model.classes.length} classes, ${body.platform.replace("holotype_", "")}`;
  $("bundle").textContent = `bundle ${body.parameters.bundle}`;
  if (!["cam", "grad-cam"].includes(model.heat_maps)) $("bundle").textContent += ` · no heat maps: ${model.heat_maps}`;
  look();
}

$("model").addEventListener("change", () => choose($("model").value).catch((error) => { $("serving").textContent = error.message; }));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  connect();
});
setInterval(look, 1000);
setInterval(trial, 5000);
connect();
