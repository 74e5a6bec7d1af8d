// Markdown -> DOM nodes. What the model wrote becomes text nodes and nothing else: HTML in it is shown,
// pictures of other sites are links and never loaded, and a link leads to the web or a mailbox or is none.
//
// Every step is linear in the text, or has a limit, so that no answer can hold the page up.

import { copyButton, h } from "./dom.js";
import { mathml } from "./math.js";

const MAX_NESTING = 8; // of lists and quotes
const MAX_DELIMITERS = 400; // of emphasis, in one paragraph
const MAX_ADDRESS = 2000; // characters
const MAX_FORMULA_LINES = 60;

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:( {1,4})(?! )|$| (?= ))/;

/** The nodes of a text. */
export function markdown(text) {
  const fragment = document.createDocumentFragment();
  fragment.append(...blocks(lines(text), 0).map((block) => block.render()));
  return fragment;
}

/** A text that grows: only the blocks that change are made anew. */
export class LiveMarkdown {
  constructor(root) {
    this.root = root;
    this.sources = [];
  }

  show(text) {
    const found = blocks(lines(text), 0);
    const sources = found.map((block) => block.source);
    let same = 0;
    while (same < sources.length && sources[same] === this.sources[same]) same++;
    while (this.root.childNodes.length > same) this.root.lastChild.remove();
    this.root.append(...found.slice(same).map((block) => block.render()));
    this.sources = sources;
  }
}

const lines = (text) => text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n");

// ---- blocks

/** What a text is made of: `{source, render}` each. */
function blocks(all, depth) {
  const found = [];
  let at = 0;
  while (at < all.length) {
    if (all[at].trim() === "") {
      at++;
      continue;
    }
    const read =
      fence(all, at) ??
      formula(all, at) ??
      heading(all, at) ??
      rule(all, at) ??
      (depth < MAX_NESTING ? (quote(all, at, depth) ?? list(all, at, depth)) : null) ??
      table(all, at) ??
      paragraph(all, at, depth);
    found.push({ source: all.slice(at, read.end).join("\n"), ...read });
    at = read.end;
  }
  return found;
}

function fence(all, at) {
  const opening = FENCE.exec(all[at]);
  if (!opening) return null;
  const [, marks, info] = opening;
  const indent = all[at].indexOf(marks);
  let end = at + 1;
  const isClosing = (line) =>
    line.trim().length >= marks.length &&
    line.trim().split(marks[0]).join("") === "" &&
    line.search(/\S/) < 4;
  while (end < all.length && !isClosing(all[end])) end++;
  const code = all
    .slice(at + 1, end)
    .map((line) => line.slice(Math.min(indent, Math.max(0, line.search(/\S|$/)))))
    .join("\n");
  return { end: Math.min(all.length, end + 1), render: () => codeBlock(code, info.trim().split(/\s/)[0]) };
}

function codeBlock(code, language) {
  const head = h(
    "figcaption",
    {},
    h("span", {}, language || "code"),
    copyButton(() => code, "Copy the code"),
  );
  // focusable, so that a keyboard can scroll it
  return h(
    "figure",
    { class: "code" },
    head,
    h("pre", { tabIndex: 0, role: "group", "aria-label": language || "code" }, h("code", {}, code)),
  );
}

function formula(all, at) {
  const start = all[at].trim();
  const closing = start.startsWith("$$") ? "$$" : start.startsWith("\\[") ? "\\]" : null;
  if (closing === null) return null;
  const last = Math.min(all.length, at + MAX_FORMULA_LINES);
  for (let end = at; end < last; end++) {
    const line = end === at ? start.slice(2) : all[end].trim();
    if (!line.includes(closing)) continue;
    if (line.indexOf(closing) !== line.length - 2) return null; // it ends within a line
    const tex = [...(end === at ? [] : [start.slice(2)]), ...all.slice(at + 1, end), line.slice(0, -2)]
      .join("\n")
      .trim();
    return {
      end: end + 1,
      render: () =>
        h(
          "div",
          { class: "formula", tabIndex: 0, role: "group", "aria-label": "formula" },
          formulaNode(tex, true),
        ),
    };
  }
  return null;
}

const formulaNode = (tex, display) => mathml(tex, display) ?? h("code", {}, tex);

function heading(all, at) {
  const found = HEADING.exec(all[at]);
  if (!found) return null;
  const text = all[at].slice(found[0].length).trim();
  let bare = text;
  while (bare.endsWith("#")) bare = bare.slice(0, -1);
  const level = Math.min(6, found[1].length + 1); // the page's own is h1
  return {
    end: at + 1,
    render: () => h(`h${level}`, {}, inline(bare.endsWith(" ") || bare === "" ? bare.trim() : text)),
  };
}

function rule(all, at) {
  return RULE.test(all[at]) ? { end: at + 1, render: () => h("hr") } : null;
}

function quote(all, at, depth) {
  if (!QUOTE.test(all[at])) return null;
  let end = at;
  while (end < all.length && QUOTE.test(all[end])) end++;
  const inner = all.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return {
    end,
    render: () =>
      h(
        "blockquote",
        {},
        blocks(inner, depth + 1).map((block) => block.render()),
      ),
  };
}

function list(all, at, depth) {
  const first = ITEM.exec(all[at]);
  if (!first || RULE.test(all[at])) return null;
  const kind = (mark) => (mark.length === 1 ? mark : mark.slice(-1));
  const items = [];
  let isLoose = false;
  let end = at;
  let width = 0;
  let wasBlank = false;
  for (; end < all.length; end++) {
    const line = all[end];
    if (line.trim() === "") {
      wasBlank = true;
      if (items.length) items[items.length - 1].push("");
      continue;
    }
    const indent = line.search(/\S/);
    const item = items.length === 0 || indent < Math.max(width, 2) ? ITEM.exec(line) : null;
    if (item && !RULE.test(line) && kind(item[2]) === kind(first[2])) {
      isLoose ||= wasBlank;
      width = item[0].length + (item[3] ? 0 : 1);
      items.push([line.slice(item[0].length)]);
    } else if (items.length && indent >= Math.min(width, 2 + first[1].length)) {
      isLoose ||= wasBlank;
      items[items.length - 1].push(line.slice(Math.min(indent, width)));
    } else if (wasBlank || starts(line, depth)) {
      break;
    } else {
      items[items.length - 1].push(line); // goes on without its indent
    }
    wasBlank = false;
  }
  while (all[end - 1].trim() === "") end--; // blank lines after a list are not of it
  const isOrdered = first[2].length > 1;
  const render = () =>
    h(
      isOrdered ? "ol" : "ul",
      isOrdered ? { start: Number.parseInt(first[2], 10) } : {},
      items.map((item) => listItem(item, isLoose, depth)),
    );
  return { end, render };
}

function listItem(item, isLoose, depth) {
  const box = /^\[([ xX])\] /.exec(item[0]);
  const inner = box ? [item[0].slice(4), ...item.slice(1)] : item;
  const nodes = blocks(inner, depth + 1).flatMap((block) =>
    block.words && !isLoose ? inline(block.words) : [block.render()],
  );
  if (!box) return h("li", {}, nodes);
  const done = box[1] !== " ";
  return h(
    "li",
    { class: "task" },
    h("input", { type: "checkbox", checked: done, disabled: true, "aria-label": done ? "done" : "to do" }),
    nodes,
  );
}

function table(all, at) {
  if (at + 1 >= all.length || !all[at].includes("|") || !all[at + 1].includes("-")) return null;
  const rule = cells(all[at + 1]);
  const head = cells(all[at]);
  if (head.length !== rule.length || !rule.every((cell) => /^:?-+:?$/.test(cell))) return null;
  let end = at + 2;
  while (end < all.length && all[end].trim() !== "" && all[end].includes("|")) end++;
  const align = rule.map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : null));
  const row = (tag, line) =>
    h(
      "tr",
      {},
      align.map((side, i) =>
        h(tag, { class: side, scope: tag === "th" ? "col" : null }, inline(line[i] ?? "")),
      ),
    );
  const render = () =>
    h(
      "div",
      { class: "table", tabIndex: 0, role: "group", "aria-label": "table" },
      h(
        "table",
        {},
        h("thead", {}, row("th", head)),
        h(
          "tbody",
          {},
          all.slice(at + 2, end).map((line) => row("td", cells(line))),
        ),
      ),
    );
  return { end, render };
}

/** The cells of a row; a bar within code or after a backslash divides nothing. */
function cells(line) {
  const found = [];
  let cell = "";
  let isCode = false;
  for (let i = 0; i < line.length; i++) {
    if (line[i] === "\\" && line[i + 1] === "|") cell += line[++i];
    else if (line[i] === "|" && !isCode) {
      found.push(cell.trim());
      cell = "";
    } else {
      if (line[i] === "`") isCode = !isCode && line.includes("`", i + 1);
      cell += line[i];
    }
  }
  found.push(cell.trim());
  if (found[0] === "" && found.length > 1) found.shift();
  if (found[found.length - 1] === "" && found.length > 1) found.pop();
  return found;
}

function paragraph(all, at, depth) {
  let end = at + 1;
  while (end < all.length && all[end].trim() !== "" && !starts(all[end], depth) && !table(all, end)) end++;
  const words = all.slice(at, end).join("\n").trim();
  return { end, words, render: () => h("p", {}, inline(words)) };
}

/** Whether a line begins a block that ends a paragraph without a blank line between. */
function starts(line, depth) {
  const item = depth < MAX_NESTING ? ITEM.exec(line) : null;
  return (
    FENCE.test(line) ||
    HEADING.test(line) ||
    RULE.test(line) ||
    (depth < MAX_NESTING && QUOTE.test(line)) ||
    /^ {0,3}(\$\$|\\\[)/.test(line) ||
    (item !== null && item[0].trim() !== line.trim() && (item[2].length === 1 || /^1[.)]$/.test(item[2])))
  );
}

// ---- inline

const PUNCTUATION = /[!-/:-@[-`{-~]/;
const ADDRESS = /\(\s*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/y;
const AUTOLINK = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const BARE_LINK = /https?:\/\/[^\s<>"`]+/y;

/** The nodes of a line or paragraph. */
function inline(text, isLink = false) {
  const scan = new Inline(text, isLink);
  scan.run();
  return scan.nodes();
}

class Inline {
  constructor(text, isLink) {
    this.text = text;
    this.isLink = isLink; // there are no links in links
    this.root = document.createDocumentFragment();
    this.delimiters = [];
    this.plain = "";
    this.absent = new Set();
    this.at = 0;
  }

  nodes() {
    this.flush();
    emphasise(this.delimiters);
    return [...this.root.childNodes];
  }

  run() {
    while (this.at < this.text.length) {
      const read = this.special();
      if (!read) this.plain += this.text[this.at++];
    }
  }

  flush() {
    if (this.plain) this.root.append(this.plain);
    this.plain = "";
  }

  /** Where a mark comes next, -1 if nowhere. What is not there is looked for once. */
  find(mark, from) {
    if (this.absent.has(mark)) return -1;
    const at = this.text.indexOf(mark, from);
    if (at < 0) this.absent.add(mark);
    return at;
  }

  put(node, end) {
    this.flush();
    this.root.append(node);
    this.at = end;
    return true;
  }

  special() {
    switch (this.text[this.at]) {
      case "\\":
        return this.backslash();
      case "`":
        return this.code();
      case "$":
        return this.dollar();
      case "!":
        return this.text[this.at + 1] === "[" && this.link(this.at + 1);
      case "[":
        return this.link(this.at);
      case "<":
        return this.autolink();
      case "h":
        return this.bareLink();
      case "*":
      case "_":
      case "~":
        return this.delimiter();
      case "\n":
        return this.lineEnd();
      default:
        return false;
    }
  }

  backslash() {
    const next = this.text[this.at + 1];
    if (next === "(" || next === "[") {
      const end = this.find(next === "(" ? "\\)" : "\\]", this.at + 2);
      if (end >= 0)
        return this.put(formulaNode(this.text.slice(this.at + 2, end).trim(), next === "["), end + 2);
    }
    if (next === "\n") return this.put(h("br"), this.at + 2);
    if (next === undefined || !PUNCTUATION.test(next)) return false;
    this.plain += next;
    this.at += 2;
    return true;
  }

  code() {
    this.runs ??= backtickRuns(this.text);
    const length = this.runs.lengths.get(this.at);
    const starts = this.runs.starts.get(length);
    while (starts.length && starts[0] <= this.at) starts.shift();
    if (!starts.length) {
      this.plain += "`".repeat(length);
      this.at += length;
      return true;
    }
    let code = this.text.slice(this.at + length, starts[0]).replace(/\n/g, " ");
    if (code.trim() && code.startsWith(" ") && code.endsWith(" ")) code = code.slice(1, -1);
    return this.put(h("code", {}, code), starts[0] + length);
  }

  dollar() {
    const marks = this.text[this.at + 1] === "$" ? "$$" : "$";
    const begin = this.at + marks.length;
    const end = this.find(marks, begin);
    const tex = end < 0 ? "" : this.text.slice(begin, end);
    // "$5 and $6" is money
    const isFormula =
      marks === "$$"
        ? tex.trim() !== ""
        : tex !== "" && tex.trim() === tex && !tex.includes("\n\n") && !/\d/.test(this.text[end + 1] ?? "");
    if (!isFormula) return false;
    return this.put(formulaNode(tex.trim(), marks === "$$"), end + marks.length);
  }

  link(at) {
    this.closings ??= closingBrackets(this.text);
    const closing = this.closings.get(at);
    if (closing === undefined || this.text[closing + 1] !== "(") return false;
    ADDRESS.lastIndex = 0;
    const found = ADDRESS.exec(this.text.slice(closing + 1, closing + 1 + MAX_ADDRESS));
    if (!found) return false;
    const words = this.text.slice(at + 1, closing);
    const end = closing + 1 + found[0].length;
    if (this.isLink) {
      this.plain += words;
      this.at = end;
      return true;
    }
    return this.put(anchor(found[1], inline(words || found[1], true)), end);
  }

  autolink() {
    AUTOLINK.lastIndex = this.at;
    const found = AUTOLINK.exec(this.text);
    return (
      found !== null && !this.isLink && this.put(anchor(found[1], [found[1]]), this.at + found[0].length)
    );
  }

  bareLink() {
    if (this.isLink || /\w/.test(this.text[this.at - 1] ?? "")) return false;
    BARE_LINK.lastIndex = this.at;
    const found = BARE_LINK.exec(this.text);
    if (!found) return false;
    let address = found[0];
    while (/[.,;:!?'*_)\]}]$/.test(address) && !(address.endsWith(")") && address.includes("(")))
      address = address.slice(0, -1);
    return this.put(anchor(address, [address]), this.at + address.length);
  }

  delimiter() {
    const mark = this.text[this.at];
    let end = this.at + 1;
    while (this.text[end] === mark) end++;
    const run = this.text.slice(this.at, end);
    const before = this.text[this.at - 1] ?? " ";
    const after = this.text[end] ?? " ";
    const opensLeft =
      !/\s/.test(after) && (!isPunctuation(after) || /\s/.test(before) || isPunctuation(before));
    const closesRight =
      !/\s/.test(before) && (!isPunctuation(before) || /\s/.test(after) || isPunctuation(after));
    const isWordly = mark === "_";
    const canOpen = opensLeft && (!isWordly || !closesRight || isPunctuation(before));
    const canClose = closesRight && (!isWordly || !opensLeft || isPunctuation(after));
    if (
      (mark === "~" && run.length !== 2) ||
      !(canOpen || canClose) ||
      this.delimiters.length >= MAX_DELIMITERS
    ) {
      this.plain += run;
      this.at = end;
      return true;
    }
    const node = document.createTextNode(run);
    this.put(node, end);
    this.delimiters.push({ mark, node, count: run.length, length: run.length, canOpen, canClose });
    return true;
  }

  lineEnd() {
    this.plain = this.plain.trimEnd();
    let end = this.at + 1;
    while (this.text[end] === " ") end++;
    return this.put(h("br"), end);
  }
}

const isPunctuation = (character) => /[\p{P}\p{S}]/u.test(character);

/** Where runs of backticks are: `lengths` by start, `starts` by length. */
function backtickRuns(text) {
  const lengths = new Map();
  const starts = new Map();
  for (const run of text.matchAll(/`+/g)) {
    const length = run[0].length;
    lengths.set(run.index, length);
    if (!starts.has(length)) starts.set(length, []);
    starts.get(length).push(run.index);
  }
  return { lengths, starts };
}

/** Where the bracket closes that opens at a place. */
function closingBrackets(text) {
  const closings = new Map();
  const open = [];
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\") i++;
    else if (text[i] === "[") open.push(i);
    else if (text[i] === "]" && open.length) closings.set(open.pop(), i);
  }
  return closings;
}

function anchor(address, words) {
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return h("span", { title: address.slice(0, 200) }, words);
  return h("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, words);
}

/** CommonMark's pairing of emphasis: each closing run takes the nearest opening one that fits. */
function emphasise(delimiters) {
  for (let at = 0; at < delimiters.length; at++) {
    const closer = delimiters[at];
    while (closer.canClose && closer.count > 0) {
      let from = at - 1;
      while (from >= 0 && !pairs(delimiters[from], closer)) from--;
      if (from < 0) break;
      const opener = delimiters[from];
      const width = closer.mark === "~" ? 2 : Math.min(2, opener.count, closer.count);
      wrap(opener, closer, width);
      for (const between of delimiters.slice(from + 1, at)) between.count = 0;
    }
  }
}

function pairs(opener, closer) {
  if (!opener.canOpen || opener.count === 0 || opener.mark !== closer.mark) return false;
  const isAmbiguous = opener.canClose || closer.canOpen;
  return (
    !isAmbiguous ||
    (opener.length + closer.length) % 3 !== 0 ||
    (opener.length % 3 === 0 && closer.length % 3 === 0)
  );
}

function wrap(opener, closer, width) {
  const element = h(closer.mark === "~" ? "del" : width === 2 ? "strong" : "em");
  while (opener.node.nextSibling !== closer.node) element.append(opener.node.nextSibling);
  opener.node.after(element);
  for (const run of [opener, closer]) {
    run.count -= width;
    run.node.data = run.mark.repeat(run.count);
  }
}
