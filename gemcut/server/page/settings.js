// What the side panel asks: how answers are made, and what of it goes into a request.

import { byId } from "./dom.js";

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const FIELDS = ["system", "thinking", "image_tokens", ...NUMBERS, "tools", "theme"];
const KEPT = "gemcut.settings";
const KEY = "gemcut.key";

/** The panel's fields, kept in this browser. */
export class Settings {
  constructor() {
    const kept = readKept();
    for (const name of FIELDS) {
      const field = this.field(name);
      if (kept[name] !== undefined) write(field, kept[name]);
      field.addEventListener("input", () => this.keep());
    }
    this.showTheme();
    this.field("theme").addEventListener("input", () => this.showTheme());
  }

  field(name) {
    return byId(`set-${name}`);
  }

  /** The key of this server. It is forgotten with the tab. */
  get key() {
    return sessionStorage.getItem(KEY) ?? "";
  }

  set key(value) {
    sessionStorage.setItem(KEY, value);
  }

  /** Fields of a request, without its messages. Throws an Error that names the panel's field. */
  request() {
    const body = {};
    for (const name of NUMBERS) {
      const text = this.field(name).value.trim();
      if (this.field(name).validity.badInput) throw new Error(`${label(this.field(name))} is no number.`);
      if (text !== "") body[name] = Number(text);
    }
    const budget = this.field("image_tokens").value;
    if (budget) body.mm_processor_kwargs = { max_soft_tokens: Number(budget) };
    if (this.field("thinking").checked) body.chat_template_kwargs = { enable_thinking: true };
    const tools = this.tools();
    if (tools.length) body.tools = tools;
    return body;
  }

  get system() {
    return this.field("system").value.trim();
  }

  tools() {
    const text = this.field("tools").value.trim();
    if (text === "") return [];
    let tools;
    try {
      tools = JSON.parse(text);
    } catch (error) {
      throw new Error(`Tools is not valid JSON: ${error.message}`);
    }
    if (!Array.isArray(tools)) throw new Error("Tools must be a list: [{...}].");
    // a bare function is a tool
    return tools.map((tool) => (tool?.function ? tool : { type: "function", function: tool }));
  }

  keep() {
    const values = Object.fromEntries(FIELDS.map((name) => [name, read(this.field(name))]));
    try {
      localStorage.setItem(KEPT, JSON.stringify(values));
    } catch {
      // a browser that keeps nothing: they hold until the page closes
    }
  }

  showTheme() {
    const theme = this.field("theme").value;
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  }
}

const label = (field) => field.labels[0].firstChild.textContent.trim();
const read = (field) => (field.type === "checkbox" ? field.checked : field.value);

function write(field, value) {
  if (field.type === "checkbox") field.checked = value;
  else field.value = value;
}

function readKept() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) ?? {};
  } catch {
    return {};
  }
}
