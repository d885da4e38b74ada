// One question to the plain LLM and to two adapters, through the server's own API; answers stream into their columns.
const $ = (id) => document.getElementById(id);
let key = ""; // in memory only
let models = [];

// ---- the API ----

class Problem extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

/** A response of the API; throws a Problem with the server's own words if it refuses. */
async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const how = body ? { method: "POST", body: JSON.stringify(body) } : {};
  let response;
  try {
    response = await fetch(path, { ...how, headers, signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Problem(0, "The server cannot be reached.");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw new Problem(response.status, told.error?.message ?? `The server answered with status ${response.status}.`);
}

/** The events of a streamed response. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Problem(0, "The connection ended before the answer.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Problem(0, event.error.message);
      yield event;
    }
  }
}

// ---- elements ----

function made(tag, options = {}, ...children) {
  const element = Object.assign(document.createElement(tag), options);
  element.append(...children);
  return element;
}

function drawn(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const two = (number) => number.toFixed(2);
const short = (text) => (text.length > 240 ? `${text.slice(0, 120)} … ${text.slice(-120)}` : text);
const marks = { " ": "␣", "\n": "⏎", "\t": "⇥" };
/** A token with marks or code points in place of what cannot be seen. */
const token = (text) => made("code", {}, text.replace(/[\s\p{C}]/gu, (one) =>
  marks[one] ?? `U+${one.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`));

/** Tell a screen reader. */
function say(text) { $("said").append(made("p", {}, text)); }

function table(caption, heads, rows) {
  const head = made("tr", {}, ...heads.map((name) => made("th", { scope: "col" }, name)));
  const body = rows.map(([layer, ...cells]) =>
    made("tr", {}, made("th", { scope: "row" }, String(layer)), ...cells.map((cell) => made("td", {}, ...cell))));
  const grid = made("table", {}, made("caption", { className: "unseen" }, caption),
    made("thead", {}, head), made("tbody", {}, ...body));
  const scroll = made("div", { className: "scroll", tabIndex: 0, role: "region" }, grid);
  scroll.setAttribute("aria-label", caption);
  return scroll;
}

// ---- why it answered so ----

/** Sentences about how near a query is to training. */
function nearness({ distance, gate }) {
  if (!distance) return ["The adapter has no gate: every query gets its own part of the vectors in full."];
  const far = distance.out_of_domain;
  const lines = [];
  const badge = made("span", { className: far ? "domain far" : "domain" }, far ? "Out of domain" : "In domain");
  lines.push(made("span", {}, badge, ` Nearness to the training queries: ${two(distance.nearness)}. ` +
    `Of the ${distance.threshold_of}, 19 in 20 have ${two(distance.threshold)} or more.`));
  lines.push(gate === 1
    ? "The gate is open (1): the query's own part of the vectors is added in full."
    : gate === 0
      ? "The gate is closed (0): nothing of the query's own part of the vectors is added."
      : `The gate is at ${two(gate)}: that share of the query's own part of the vectors is added.`);
  if (gate < 1) {
    lines.push(`It is the product of ${two(distance.share)} for the distance and ${two(distance.strength)} chosen on ` +
      "the validation rows of its task.");
  }
  return lines;
}

/** The gate by nearness, with the query and the threshold marked. */
function gateChart({ nearness: at, closed, opened, threshold }) {
  const first = Math.min(at, closed, threshold) - 0.05;
  const x = (value) => (300 * (value - first)) / (1 - first);
  const line = (value, className) =>
    drawn("line", { x1: x(value), x2: x(value), y1: 0, y2: 60, class: className });
  const chart = drawn("svg", { class: "gate", viewBox: "0 0 300 60", preserveAspectRatio: "none", "aria-hidden": "true" },
    drawn("polygon", { class: "share", points: `0,60 ${x(closed)},60 ${x(opened)},8 300,8 300,60` }),
    line(threshold, "limit"), line(at, "query"));
  const scale = made("p", { className: "scale note", ariaHidden: "true" }, made("span", {}, two(first)), made("span", {}, "1"));
  const legend = "The gate by nearness. Thick line: this query. Dashed line: queries to its left are out of domain.";
  return [chart, scale, made("p", { className: "note" }, legend)];
}

function neighbours({ nearest, nearest_note: note }) {
  const several = new Set((nearest ?? []).map((near) => near.task)).size > 1;
  const items = (nearest ?? []).map((near) => made("li", {}, made("span", {}, two(near.cosine)),
    made("span", { dir: "auto" }, short(near.query), several ? ` (${near.task})` : "", " → ", made("strong", {}, short(near.answer)))));
  return [
    made("h4", {}, "Nearest training queries and their answers"),
    ...(items.length ? [made("ol", { className: "near" }, ...items)] : []),
    ...(note ? [made("p", { className: "note" }, note)] : []),
  ];
}

function layers({ layers: found, lens }, name) {
  const most = Math.max(...found.map((layer) => layer.norm ?? 0), 1e-9);
  const bar = (norm) => drawn("svg", { class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
    drawn("rect", { width: (100 * norm) / most, height: 10 }));
  const steered = found.filter((layer) => layer.norm !== null).reverse(); // the last layer, which says most, first
  const parts = [
    made("h4", {}, "What each layer's vector promotes"),
    table(`Vectors of ${name} by layer`, ["Layer", "Norm", "Promoted tokens"], steered.map((layer) => [
      layer.layer, [two(layer.norm), bar(layer.norm)],
      layer.promoted.slice(0, 3).map(([text]) => token(text)),
    ])),
  ];
  if (!found.some((layer) => layer.steered.length)) {
    return [...parts, made("p", { className: "note" }, `The layers cannot be read: ${lens}`)];
  }
  const chance = ([[text, value]]) => [token(text), ` ${Math.round(100 * value)}%`];
  return [
    ...parts,
    made("p", { className: "note" }, "Tokens whose logits the vector alone raises most. In low layers a vector acts " +
      "through the layers above it instead."),
    made("details", {},
      made("summary", {}, "Likeliest next token after each layer"),
      table(`Likeliest next token by layer, without and with the vectors of ${name}`, ["Layer", "Without", "With"],
        found.toReversed().map((layer) => [layer.layer, chance(layer.plain), chance(layer.steered)])),
      made("p", { className: "note" }, `If the LLM ended after that layer; read with ${lens}.`)),
  ];
}

function reasons(found, name) {
  return [
    made("h3", {}, "Why it answered so"),
    ...nearness(found).map((line) => made("p", {}, line)),
    ...(found.distance ? gateChart(found.distance) : []),
    ...neighbours(found),
    ...layers(found, name),
  ];
}

// ---- columns ----

class Column {
  constructor(number) {
    this.section = $("column").content.firstElementChild.cloneNode(true);
    const part = (name) => this.section.querySelector(name);
    [this.title, this.button, this.about, this.text, this.state, this.why] =
      ["h2", ".stop", ".about", ".text", ".state", ".why"].map(part);
    this.section.hidden = true;
    this.title.id = `column-${number}`;
    this.section.setAttribute("aria-labelledby", this.title.id);
    this.button.addEventListener("click", () => this.stop());
    $("answers").append(this.section);
  }

  /** Show a model, or nothing if there is none. */
  show(model, about) {
    this.stop();
    this.asked = null;
    this.model = model;
    this.section.hidden = !model;
    this.button.hidden = true;
    this.about.textContent = about;
    this.call(model?.adapter ? model.id : "Plain LLM");
    this.clear();
  }

  /** Give the column its name. */
  call(name) {
    this.title.textContent = name;
    this.button.setAttribute("aria-label", `Stop ${name}`);
    this.text.setAttribute("aria-label", `Answer of ${name}`);
  }

  clear() {
    this.text.classList.remove("problem");
    this.text.textContent = this.state.textContent = "";
    this.why.hidden = true;
    this.why.replaceChildren();
  }

  stop() { this.asked?.abort(); }

  get running() { return Boolean(this.asked); }

  async ask(question, settings, task) {
    this.stop();
    this.clear();
    if (this.model.adapter) this.call(task.task ? `${this.model.id} · ${task.task}` : this.model.id);
    const asked = (this.asked = new AbortController());
    const began = performance.now();
    this.button.hidden = false;
    this.text.setAttribute("aria-busy", "true");
    this.state.textContent = "Waiting …";
    show();
    let end;
    try {
      end = await this.answer(question, settings, task, asked.signal);
    } catch (error) {
      if (asked !== this.asked) return; // a later question has this column
      end = error.name === "AbortError" ? "stopped" : this.fail(error);
    }
    if (asked !== this.asked) return;
    this.flush();
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    this.state.textContent = end && `${end[0].toUpperCase()}${end.slice(1)} after ${seconds} s.`;
    say(`${this.title.textContent}: ${end || "failed"}.`);
    this.text.removeAttribute("aria-busy");
    if (document.activeElement === this.button) this.title.focus();
    this.button.hidden = true;
    if (this.model.adapter && end) await this.explain(question, settings, task, asked);
    if (asked === this.asked) this.asked = null;
    show();
  }

  /** Stream the answer; returns how it ended. */
  async answer(question, settings, task, signal) {
    const steered = this.model.adapter ? { scale: settings.scale, ...task } : {};
    const asChat = this.model.adapter || this.model.chat;
    const body = {
      model: this.model.id, stream: true, stream_options: { include_usage: true },
      max_tokens: settings.tokens, temperature: settings.temperature, ...steered,
      ...(asChat ? { messages: [{ role: "user", content: question }] } : { prompt: question }),
    };
    const response = await call(asChat ? "v1/chat/completions" : "v1/completions", body, signal);
    this.unsaid = "";
    let finish, usage;
    for await (const event of events(response)) {
      const [choice] = event.choices;
      usage = event.usage ?? usage;
      finish = choice?.finish_reason ?? finish;
      let text = choice?.delta?.content ?? choice?.text;
      if (!this.text.textContent) text = text?.trimStart();
      if (!text) continue;
      this.state.textContent = "Answering …";
      this.text.append(text);
      this.unsaid += text;
      const whole = this.unsaid.match(/^[^]*(?:[.!?]\s|\n)/)?.[0];
      if (whole) this.flush(whole);
    }
    const count = usage.completion_tokens;
    const tokens = `${count} token${count === 1 ? "" : "s"}`;
    return finish === "length" ? `cut at ${tokens}` : `finished with ${tokens}`;
  }

  /** Tell a screen reader what has been streamed: whole sentences, with the column's name. */
  flush(text = this.unsaid) {
    if (text?.trim()) say(`${this.title.textContent}: ${text}`);
    this.unsaid = this.unsaid?.slice(text.length) ?? "";
  }

  fail(error) {
    this.text.classList.add("problem");
    this.text.append(this.text.textContent ? `\n\n${error.message}` : error.message);
    say(`${this.title.textContent}: ${error.message}`);
    if (error.status === 401) needKey();
    return "";
  }

  async explain(question, settings, task, asked) {
    this.why.hidden = false;
    this.why.replaceChildren(made("p", { className: "note" }, "Looking at why it answered so …"));
    try {
      const body = { model: this.model.id, query: question, scale: settings.scale, ...task };
      const found = await (await call("v1/steer", body, asked.signal)).json();
      if (asked === this.asked) this.why.replaceChildren(...reasons(found, this.title.textContent));
    } catch (error) {
      if (asked !== this.asked) return;
      this.why.hidden = error.name === "AbortError";
      this.why.replaceChildren(made("p", { className: "problem" }, error.message));
    }
  }
}

// ---- the form ----

const columns = [0, 1, 2].map((number) => new Column(number));

/** Show what runs: the button that stops all answers. */
function show() {
  const running = columns.some((column) => column.running);
  if (!running && document.activeElement === $("stop")) $("ask").focus();
  $("stop").hidden = !running;
}

function tell(message) {
  $("problem").hidden = !message;
  $("problem").textContent = message;
}

function needKey() {
  $("access").hidden = false;
  $("key").focus();
}

/** Show the chosen adapter and its tasks. */
function choose(number) {
  const model = models.find((one) => one.adapter && one.id === $(`adapter-${number}`).value);
  const tasks = model?.tasks ?? [];
  const field = $(`task-${number}`);
  field.parentElement.hidden = tasks.length < 2;
  field.replaceChildren(new Option("none", ""), ...tasks.map((task) => new Option(task)));
  columns[number].show(model, "The LLM with this adapter, asked as in its training.");
  show();
}

async function load() {
  try {
    models = (await (await call("v1/models")).json()).data;
  } catch (error) {
    if (error.status === 401) {
      tell(key ? error.message : "");
      return needKey();
    }
    return tell(error.message);
  }
  tell("");
  $("access").hidden = true;
  const base = models.find((model) => !model.adapter);
  const adapters = models.filter((model) => model.adapter).map((model) => model.id);
  $("llm").textContent = `, ${base.id}`;
  columns[0].show(base, base.chat ? "The LLM without vectors, asked in its chat template."
    : "The LLM without vectors. It has no chat template, so it continues the question as a text.");
  for (const number of [1, 2]) {
    const field = $(`adapter-${number}`);
    field.replaceChildren(new Option("none", ""), ...adapters.map((name) => new Option(name)));
    field.value = adapters[number - 1] ?? "";
    choose(number);
  }
}

function ask() {
  if (!$("form").reportValidity()) return;
  const settings = Object.fromEntries(["scale", "tokens", "temperature"].map((id) => [id, $(id).valueAsNumber]));
  $("said").replaceChildren();
  columns.forEach((column, number) => {
    const task = number ? $(`task-${number}`).value : "";
    if (column.model) column.ask($("question").value, settings, task ? { task } : {});
  });
}

const stopAll = () => columns.forEach((column) => column.stop());

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (document.activeElement === $("key")) $("unlock").click();
  else ask();
});
$("unlock").addEventListener("click", async () => {
  key = $("key").value.trim();
  await load();
  if ($("access").hidden) $("question").focus();
});
$("stop").addEventListener("click", stopAll);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stopAll();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    ask();
  }
});
for (const number of [1, 2]) $(`adapter-${number}`).addEventListener("change", () => choose(number));
load();
