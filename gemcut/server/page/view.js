// Messages as elements. Knows nothing of the server or of what is kept: what the reader does goes to `actions`
// (edit, regenerate, results, and `picture`, which finds a picture by its id).

import { byId, copyButton, h, iconButton } from "./dom.js";
import { LiveMarkdown } from "./markdown.js";
import { pictureUrl } from "./pictures.js";

/** The messages of the chat that is shown. */
export class Transcript {
  constructor(root, actions) {
    this.root = root;
    this.actions = actions;
    this.views = new Map(); // by the id of the message
  }

  /** Show these messages and no others. */
  show(messages) {
    this.views.clear();
    this.root.replaceChildren();
    for (const message of messages) this.add(message);
    this.markLast(messages);
  }

  add(message) {
    const view = new { user: UserView, assistant: AnswerView, tool: ToolView }[message.role](
      message,
      this.actions,
    );
    this.views.set(message.id, view);
    this.root.append(view.element);
    return view;
  }

  /** Show a message as it is now, if it is shown. */
  update(message) {
    this.views.get(message.id)?.update();
  }

  /** Only the last answer waits for results of its calls. */
  markLast(messages) {
    for (const view of this.views.values()) view.setLast?.(view.message === messages[messages.length - 1]);
  }
}

function actionsRow(...children) {
  return h("div", { class: "actions" }, ...children);
}

class UserView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.element = h("article", { class: "message user", "aria-label": "You" });
    this.update();
  }

  update() {
    const { text, pictures } = this.message;
    this.element.replaceChildren(
      ...(pictures.length ? [pictureRow(pictures, this.actions)] : []),
      ...(text ? [h("p", { class: "said" }, text)] : []),
      actionsRow(
        copyButton(() => text, "Copy the message"),
        iconButton("edit", "Edit the message", () => this.edit()),
      ),
    );
  }

  edit() {
    const area = h("textarea", {
      value: this.message.text,
      "aria-label": "Edit the message",
      rows: Math.min(12, this.message.text.split("\n").length + 1),
    });
    const cancel = () => {
      this.update();
      this.element.querySelector(".actions button:last-child").focus();
    };
    const save = () => {
      if (area.value.trim() || this.message.pictures.length)
        this.actions.edit(this.message, area.value.trim());
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.preventDefault(); // it stops nothing else
        cancel();
      }
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
    });
    const row = h(
      "div",
      { class: "row" },
      h("button", { type: "button", class: "plain", onclick: cancel }, "Cancel"),
      h("button", { type: "button", class: "primary", onclick: save }, "Send again"),
    );
    const { pictures } = this.message;
    this.element.replaceChildren(
      ...(pictures.length ? [pictureRow(pictures, this.actions)] : []),
      h("div", { class: "editor" }, area, row),
    );
    area.focus();
  }
}

/** Thumbnails; each opens in full. */
function pictureRow(ids, actions) {
  const row = h("div", { class: "pictures" });
  for (const [i, id] of ids.entries()) {
    const image = h("img", { alt: "", decoding: "async" });
    const open = () => image.src && showPicture(image.src, image.alt);
    const button = h(
      "button",
      { type: "button", class: "picture", "aria-label": `Picture ${i + 1}, open`, onclick: open },
      image,
    );
    row.append(button);
    actions.picture(id).then((picture) => {
      if (picture) {
        image.src = pictureUrl(picture);
        image.alt = picture.name || `Picture ${i + 1}`;
      } else button.replaceChildren("gone");
    });
  }
  return row;
}

function showPicture(src, alt) {
  const dialog = byId("lightbox");
  dialog.querySelector("img").src = src;
  dialog.querySelector("img").alt = alt;
  dialog.showModal();
}

class AnswerView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.thoughts = h("div", { class: "prose" });
    this.summary = h("summary");
    this.details = h("details", { class: "thinking" }, this.summary, this.thoughts);
    this.prose = h("div", { class: "prose" });
    this.calls = h("div", { class: "calls" });
    this.notes = h("div");
    this.foot = h("footer");
    this.element = h(
      "article",
      { class: "message answer", "aria-label": "Answer" },
      this.details,
      this.prose,
      this.calls,
      this.notes,
      this.foot,
    );
    this.liveThoughts = new LiveMarkdown(this.thoughts);
    this.liveProse = new LiveMarkdown(this.prose);
    this.isLast = false;
    this.frame = null;
    this.details.addEventListener("toggle", () => this.draw());
    this.draw();
  }

  /** Draw it with the next frame: many pieces of news make one drawing. */
  update() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.draw();
    });
  }

  setLast(isLast) {
    this.isLast = isLast;
    this.draw();
  }

  draw() {
    const { text, reasoning, state, calls, malformed } = this.message;
    const isOpen = state === "open";
    this.element.classList.toggle("open", isOpen);
    this.element.setAttribute("aria-busy", isOpen);
    this.details.hidden = !reasoning;
    this.summary.textContent = isOpen && !text && !calls.length ? "Thinking…" : "Thoughts";
    if (this.details.open) this.liveThoughts.show(reasoning);
    this.liveProse.show(text);
    this.element.classList.toggle("waiting", isOpen && !text && !calls.length);
    if (isOpen) return;
    this.calls.replaceChildren(...calls.map(callFigure), ...malformed.map(malformedFigure));
    if (this.isLast && calls.length && state === "done") this.calls.append(this.resultsForm());
    this.notes.replaceChildren(...this.noteNodes());
    this.foot.replaceChildren(...this.footNodes());
  }

  noteNodes() {
    const { state, error, isCut, text, calls } = this.message;
    if (state === "failed") {
      const again = h(
        "button",
        { type: "button", class: "plain", onclick: () => this.actions.regenerate(this.message) },
        "Try again",
      );
      return [h("div", { class: "error", role: "alert" }, h("p", {}, error.message), again)];
    }
    if (state === "stopped")
      return [h("p", { class: "note" }, text ? "Stopped." : "Stopped before it began.")];
    if (isCut)
      return [h("p", { class: "note" }, "Cut off: the answer reached the most tokens that it may have.")];
    return text || calls.length ? [] : [h("p", { class: "note" }, "The model said nothing.")];
  }

  footNodes() {
    const { text, figures, state } = this.message;
    return [
      ...(figures && state === "done" ? [figureList(figures)] : []),
      actionsRow(
        ...(text ? [copyButton(() => text, "Copy the answer")] : []),
        iconButton("again", "Answer again", () => this.actions.regenerate(this.message)),
      ),
    ];
  }

  resultsForm() {
    const { calls } = this.message;
    const areas = calls.map((call) =>
      h("textarea", {
        rows: 2,
        required: true,
        "aria-label": `Result of ${call.name}`,
        placeholder: `What ${call.name} returned`,
      }),
    );
    const submit = (event) => {
      event.preventDefault();
      this.actions.results(calls.map(({ id, name }, i) => ({ id, name, text: areas[i].value })));
    };
    return h(
      "form",
      { class: "results", onsubmit: submit },
      areas,
      h("button", { class: "primary" }, calls.length > 1 ? "Send the results" : "Send the result"),
    );
  }
}

const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

/** What an answer took. */
function figureList({ tokens, firstS, perSecond, prompt, cached, image, reasoning }) {
  const share = prompt ? Math.round((100 * cached) / prompt) : 0;
  const items = [
    [
      `${whole.format(tokens)} tokens`,
      reasoning ? `${whole.format(reasoning)} of them thoughts` : "length of the answer",
    ],
    perSecond && [`${short.format(perSecond)} tok/s`, "speed after the first token"],
    [
      `first after ${firstS < 1 ? `${Math.round(1000 * firstS)} ms` : `${short.format(firstS)} s`}`,
      "time from sending to the first token",
    ],
    [
      `prompt ${whole.format(prompt)}`,
      image ? `${whole.format(image)} of them pictures` : "tokens of the question and all before it",
    ],
    cached && [`${share} % cached`, `${whole.format(cached)} prompt tokens were known from before`],
  ];
  return h(
    "ul",
    { class: "figures", "aria-label": "Figures" },
    items.filter(Boolean).map(([text, title]) => h("li", { title }, text)),
  );
}

function callFigure({ name, arguments: given }) {
  let shown = given;
  try {
    shown = JSON.stringify(JSON.parse(given || "{}"), null, 2);
  } catch {
    // shown as it is
  }
  const head = h(
    "figcaption",
    {},
    h("span", {}, "calls ", h("b", {}, name)),
    copyButton(() => shown, "Copy the arguments"),
  );
  return h(
    "figure",
    { class: "code call" },
    head,
    h("pre", { tabIndex: 0, role: "group", "aria-label": `Arguments of ${name}` }, h("code", {}, shown)),
  );
}

function malformedFigure(text) {
  return h(
    "figure",
    { class: "code call" },
    h("figcaption", {}, "a call that cannot be read"),
    h("pre", {}, h("code", {}, text)),
  );
}

class ToolView {
  constructor(message) {
    this.message = message;
    const results = message.results.map(({ name, text }) =>
      h(
        "figure",
        { class: "code call" },
        h("figcaption", {}, h("span", {}, h("b", {}, name), " returned")),
        h("pre", {}, h("code", {}, text)),
      ),
    );
    this.element = h("article", { class: "message tool", "aria-label": "Results of tools" }, results);
  }

  update() {}
}
