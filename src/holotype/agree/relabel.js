// One image, one answer. An answer counts when the server has written it to its disk; only then does the page go on.

const DROP = -1, SKIP = -2;
// Without the letters that mean something else: d, s, u, z.
const LETTERS = "qwertyiopafghjklxcvbnm";
const AHEAD = 3;

const $ = (id) => document.getElementById(id);

let classes = [], items = [], answers = [];
let version = 0, last = null, pace = null;
let at = 0, shown = false, since = 0, busy = false, over = false;
let rest = [], keys = new Map();

async function start() {
  const queue = await ask("queue");
  if (!queue) return;
  classes = queue.classes;
  items = queue.items;
  answers = new Array(items.length).fill(null);
  $("command").textContent = queue.command;
  take(queue.progress);
  const open = nextOpen(-1);
  show(open === null ? items.length : open);
}

// Talking to the server. What goes wrong is said in the banner; the result is then null.

async function ask(path, body) {
  const request = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  let answer;
  try {
    answer = await fetch(path, request);
  } catch {
    if (path === "finish") return {};  // it has stopped by itself
    complain("The server does not answer" + (body ? ": the last answer is not saved. " : ". ")
      + "Start the command again and open the new address; everything before is kept.");
    return null;
  }
  const text = await answer.text();
  if (!answer.ok) {
    if (answer.status === 409) await refresh();
    complain(`Not done: ${detail(text)}.`);
    return null;
  }
  complain("");
  return text ? JSON.parse(text) : {};
}

function detail(text) {
  try {
    const { detail } = JSON.parse(text);
    return typeof detail === "string" ? detail : JSON.stringify(detail);
  } catch {
    return text;
  }
}

function complain(text) {
  $("alert").textContent = text;
  $("alert").hidden = !text;
}

function take(progress) {
  for (const [index, answer] of progress.changes) answers[index] = answer;
  ({ version, last, pace } = progress);
}

async function refresh() {
  if (over || !items.length) return;
  const progress = await ask(`progress?since=${version}`);
  if (progress) { take(progress); draw(); }
}

// Which image.

const decided = () => answers.filter((answer) => answer !== null).length;

function nextOpen(from) {
  for (let step = 1; step <= items.length; step++) {
    const index = (from + step + items.length) % items.length;
    if (answers[index] === null) return index;
  }
  return null;
}

function show(index) {
  at = index;
  shown = false;
  if (document.activeElement instanceof HTMLElement) document.activeElement.blur();
  $("filter").value = "";
  $("stage").classList.remove("zoomed");
  $("broken").hidden = true;
  if (at < items.length) {
    const image = $("image");
    image.hidden = false;
    image.classList.add("waiting");
    image.src = `image/${at}`;
    image.alt = `Image ${at + 1}`;
  }
  draw();
  $("panel").scrollTop = 0;
}

function arrived() {
  $("image").classList.remove("waiting");
  shown = true;
  since = performance.now();
  prefetch();
}

async function failed() {
  const index = at;
  let why = "it did not arrive";
  try { why = detail(await (await fetch(`image/${index}`)).text()); } catch { /* the banner says it at the next answer */ }
  if (index !== at) return;
  $("image").hidden = true;
  $("broken").textContent = `This image cannot be shown: ${why}.`;
  $("broken").hidden = false;
  shown = true;
  since = performance.now();
  prefetch();
}

function prefetch() {
  let index = at;
  for (let ahead = 0; ahead < AHEAD; ahead++) {
    index = nextOpen(index);
    if (index === null || index === at) return;
    new Image().src = `image/${index}`;
  }
}

// Drawing.

function draw() {
  const count = decided(), total = items.length;
  $("bar").setAttribute("aria-valuemax", total);
  $("bar").setAttribute("aria-valuenow", count);
  $("bar").firstElementChild.style.width = `${total ? 100 * count / total : 0}%`;
  $("count").textContent = `${count} of ${total}`;
  $("pace").textContent = count < total ? paceText(total - count) : "";
  document.title = `${count} of ${total} · relabel`;
  const done = at >= total;
  $("work").hidden = done;
  $("done").hidden = !done;
  if (done) drawDone(); else drawItem();
}

function paceText(left) {
  if (!pace) return "";
  const minutes = left * pace / 60, rate = 60 / pace;
  const time = minutes < 1 ? "less than a minute left"
    : minutes < 60 ? `${Math.round(minutes)} min left`
    : `${Math.floor(minutes / 60)} h ${Math.round(minutes % 60)} min left`;
  return `${rate < 10 ? rate.toFixed(1) : Math.round(rate)} per minute · ${time}`;
}

function drawItem() {
  const { reasons, candidates } = items[at], answer = answers[at];
  const all = classes.map((_, index) => index);
  const large = candidates.length ? candidates.slice(0, 9) : all.length <= LETTERS.length ? all : [];
  rest = all.filter((index) => !large.includes(index));
  keys = new Map();
  rest.forEach((index) => { if (index < LETTERS.length) keys.set(LETTERS[index], index); });
  large.forEach((index, place) => keys.set(place < 9 ? String(place + 1) : LETTERS[index], index));
  $("question").textContent = candidates.length ? "Which one is it?" : "What is it?";
  $("why").textContent = [
    reasons.includes("disagreement") ? "Annotators chose different classes." : "",
    reasons.includes("suspect") ? "Its label is probably wrong." : "",
  ].join(" ").trim();
  $("choices").className = candidates.length ? "" : "many";
  $("choices").replaceChildren(...large.map((index) => choice(index, keyOf(index))));
  $("drop").classList.toggle("chosen", answer === DROP);
  $("skip").classList.toggle("chosen", answer === SKIP);
  $("rest").hidden = !rest.length;
  drawChips();
  const label = last === null ? null : name(answers[last]);
  $("place").textContent = `Image ${at + 1}`;
  $("last").replaceChildren(...(label ? [element("span", `Image ${last + 1}: `), element("b", label)] : []));
  $("undo").disabled = last === null;
  $("back").disabled = at === 0;
  $("forward").disabled = at === items.length - 1 && decided() < items.length;
}

function drawChips() {
  const typed = $("filter").value.trim().toLowerCase();
  const found = matches(typed);
  const chips = found.map((index, place) => choice(index, !typed ? keyOf(index) : place ? "" : "Enter"));
  $("chips").replaceChildren(...chips);
  $("nothing").hidden = !typed || found.length > 0;
}

// All classes when something is typed, so that nobody has to know which are on the large buttons.
function matches(typed) {
  if (!typed) return rest;
  const place = (index) => {
    const label = classes[index].toLowerCase();
    return label === typed ? 0 : label.startsWith(typed) ? 1 : label.includes(typed) ? 2 : 3;
  };
  return classes.map((_, index) => index).filter((index) => place(index) < 3).sort((a, b) => place(a) - place(b) || a - b);
}

const keyOf = (index) => [...keys].find(([, one]) => one === index)?.[0] ?? "";

function choice(index, key) {
  const button = document.createElement("button");
  button.type = "button";
  button.classList.toggle("chosen", answers[at] === index);
  if (key) button.append(element("kbd", key), " ");
  button.append(classes[index]);
  button.addEventListener("click", () => decide("label", index));
  return button;
}

function element(kind, text) {
  const made = document.createElement(kind);
  made.textContent = text;
  return made;
}

const name = (answer) => answer === null ? null : answer === DROP ? "no class fits" : answer === SKIP ? "skipped" : classes[answer];

function drawDone() {
  const skipped = answers.filter((answer) => answer === SKIP).length;
  const dropped = answers.filter((answer) => answer === DROP).length;
  const open = items.length - decided();
  $("verdict").textContent = over ? "Finished. The server has stopped; this page can be closed."
    : open ? `${open} of ${items.length} images are still open.`
    : skipped ? `${items.length - skipped} of ${items.length} images are decided; ${skipped} skipped.`
    : items.length === 1 ? "The image is decided." : `All ${items.length} images are decided.`;
  const rows = [["a class", decided() - skipped - dropped], ["no class fits", dropped], ["skipped", skipped]];
  $("counts").replaceChildren(...rows.map(([title, count]) => {
    const row = document.createElement("tr");
    row.append(element("th", title), element("td", count));
    return row;
  }));
  $("again").hidden = over || !skipped;
  $("reopen").hidden = over || last === null;
  $("finish").hidden = over;
}

// Answering.

async function alone(job) {
  if (busy || over) return;
  busy = true;
  try { await job(); } finally { busy = false; }
}

const decide = (action, label = null) => alone(async () => {
  // Nobody has judged an image that is not on the screen yet.
  if (!shown || at >= items.length) return;
  const index = at, again = answers[at] === SKIP;
  const seconds = (performance.now() - since) / 1000;
  const progress = await ask(`decide?since=${version}`, { index, action, label, seconds });
  if (!progress) return;
  take(progress);
  const next = nextOpen(index) ?? (again ? nextSkipped(index) : null);
  show(next ?? items.length);
});

function nextSkipped(from) {
  const index = answers.indexOf(SKIP, from + 1);
  return index < 0 ? null : index;
}

const undo = () => alone(async () => {
  if (last === null) return;
  const index = last;
  const progress = await ask(`undo?since=${version}`, { index });
  if (!progress) return;
  take(progress);
  show(index);
});

const finish = () => alone(async () => {
  if (await ask("finish", {}) === null) return;
  over = true;
  draw();
});

function move(step) {
  if (busy || over) return;
  const furthest = decided() < items.length ? items.length - 1 : items.length;
  const index = Math.min(Math.max(at + step, 0), furthest);
  if (index !== at) show(index);
}

function zoom() {
  const stage = $("stage");
  stage.classList.toggle("zoomed");
  stage.scrollTo((stage.scrollWidth - stage.clientWidth) / 2, (stage.scrollHeight - stage.clientHeight) / 2);
}

// Keys.

function pressed(event) {
  if ($("keys").open || event.isComposing || event.altKey || event.metaKey && meant(event) !== "z") return;
  if (event.target === $("filter")) return typed(event);
  const key = meant(event);
  const job = (event.ctrlKey || event.metaKey) ? (key === "z" && !event.shiftKey ? undo : null) : jobOf(key);
  if (!job) return;
  // A button that has the focus is pressed by Enter; Space means skip, wherever the focus is.
  if (key === "Enter" && event.target instanceof HTMLButtonElement) return;
  event.preventDefault();
  // A key held down must not answer one image after the other.
  if (!event.repeat || job.repeats) job();
}

// The character; where a keyboard has others than those on the buttons (é for 2, ф for a), the place of the key.
function meant(event) {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const place = /^(?:Digit|Key)(.)$/.exec(event.code);
  return place && !event.shiftKey && !/^[a-z0-9/?]$/.test(key) ? place[1].toLowerCase() : key;
}

function jobOf(key) {
  if (key === "?") return () => $("keys").showModal();
  if (at >= items.length) {
    return { Enter: finish, s: again, u: undo, Backspace: undo, ArrowLeft: () => move(-1) }[key];
  }
  if (keys.has(key)) return () => decide("label", keys.get(key));
  return {
    "0": () => decide("drop"), d: () => decide("drop"), s: () => decide("skip"), " ": () => decide("skip"),
    u: undo, Backspace: undo, z: zoom,
    "/": () => { if (rest.length) $("filter").focus(); },
    ArrowLeft: stepping(-1), ArrowRight: stepping(1),
  }[key];
}

function stepping(step) {
  const job = () => move(step);
  job.repeats = true;
  return job;
}

function typed(event) {
  if (event.key === "Escape") {
    $("filter").value = "";
    $("filter").blur();
    drawChips();
  } else if (event.key === "Enter" && !event.repeat) {
    const [first] = $("filter").value.trim() ? matches($("filter").value.trim().toLowerCase()) : [];
    if (first !== undefined) decide("label", first);
  } else {
    return;
  }
  event.preventDefault();
}

function again() {
  const index = answers.indexOf(SKIP);
  if (index >= 0) show(index);
}

document.addEventListener("keydown", pressed);
document.addEventListener("visibilitychange", () => {
  since = performance.now();
  if (!document.hidden) refresh();
});
$("image").addEventListener("load", arrived);
$("image").addEventListener("error", failed);
$("image").addEventListener("click", zoom);
$("filter").addEventListener("input", drawChips);
$("drop").addEventListener("click", () => decide("drop"));
$("skip").addEventListener("click", () => decide("skip"));
$("undo").addEventListener("click", undo);
$("reopen").addEventListener("click", undo);
$("again").addEventListener("click", again);
$("finish").addEventListener("click", finish);
$("back").addEventListener("click", () => move(-1));
$("forward").addEventListener("click", () => move(1));
$("help").addEventListener("click", () => $("keys").showModal());

start();
