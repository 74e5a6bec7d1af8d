// Puts the page together: what the reader does, the chat that is shown, and what is kept of it.

import { ApiError, model } from "./api.js";
import { fill, newAnswer, newChat, requestMessages, titleOf } from "./conversation.js";
import { byId, h, iconButton, newId } from "./dom.js";
import { dataUri, pictureUrl, prepare } from "./pictures.js";
import { Settings } from "./settings.js";
import { openStore } from "./store.js";
import { Transcript } from "./view.js";

const SAVE_MS = 1500; // while an answer is written
const UNDO_MS = 7000;
const NEAR_PX = 60; // this near to the end the view follows the answer
const MAX_SPOKEN = 1500; // characters of an answer that a screen reader is given at once

const settings = new Settings();
const store = await openStore();
const running = new Map(); // by id, chats that are being answered: {chat, controller}
const transcript = new Transcript(byId("transcript"), {
  edit: (message, text) => edit(message, text),
  regenerate: (message) => regenerate(message),
  results: (results) => sendResults(results),
  picture: (id) => store.picture(id),
});
let served = null; // the model
let chat = newChat();
let draft = []; // pictures to be sent
let follows = true;

// ---- asking

async function send() {
  const text = byId("input").value.trim();
  if (running.has(chat.id) || (!text && !draft.length)) return;
  if (!isAskable()) return;
  for (const picture of draft) await store.savePicture({ ...picture, chat: chat.id });
  push({ id: newId(), role: "user", text, pictures: draft.map((picture) => picture.id) });
  byId("input").value = "";
  draft = [];
  showDraft();
  fitInput();
  await answer();
}

/** Whether the settings make a request; says so if they do not. */
function isAskable() {
  try {
    settings.request();
  } catch (error) {
    open("settings");
    showProblem(error.message);
    return false;
  }
  showProblem(null);
  return true;
}

function push(message) {
  chat.messages.push(message);
  transcript.add(message);
  transcript.markLast(chat.messages);
}

async function answer() {
  const asked = chat; // the reader may turn to another meanwhile
  const before = asked.messages.filter(
    (message) => message.role !== "assistant" || message.text || message.calls.length,
  );
  const reply = newAnswer();
  const controller = new AbortController();
  running.set(asked.id, { chat: asked, controller });
  push(reply);
  follows = true;
  await keep(asked);
  const gone = await store.trim(asked.id);
  if (gone) toast(`The space for conversations is full; the oldest (${gone}) had to go.`);
  if (location.hash.slice(1) !== asked.id) history.replaceState(null, "", `#${asked.id}`);
  await refresh();
  follow();
  say("Answering.");
  let saved = performance.now();
  const body = async () => ({
    ...settings.request(),
    model: served?.id,
    messages: await requestMessages(before, settings.system, (id) => store.picture(id)),
  });
  await fill(reply, body, settings.key, controller.signal, () => {
    transcript.update(reply);
    if (performance.now() - saved < SAVE_MS) return;
    saved = performance.now();
    keep(asked);
  });
  running.delete(asked.id);
  await keep(asked);
  await refresh();
  if (chat.id === asked.id) transcript.markLast(asked.messages);
  say({ done: `Answer: ${reply.text.slice(0, MAX_SPOKEN)}`, stopped: "Stopped.", failed: "" }[reply.state]);
  if (reply.error?.status === 401) askKey(reply.error.message);
}

/** Drop a message and all after it. */
function cut(message) {
  chat.messages.splice(chat.messages.indexOf(message));
  transcript.show(chat.messages);
}

async function edit(message, text) {
  if (running.has(chat.id) || !isAskable()) return;
  cut(message);
  push({ ...message, text });
  await answer();
  byId("input").focus();
}

async function regenerate(message) {
  if (running.has(chat.id) || !isAskable()) return;
  cut(message);
  await answer();
}

async function sendResults(results) {
  if (running.has(chat.id) || !isAskable()) return;
  push({ id: newId(), role: "tool", results });
  await answer();
}

function stop() {
  running.get(chat.id)?.controller.abort();
}

// ---- pictures of the message that is being written

async function addFiles(files) {
  const problems = [];
  for (const file of files) {
    try {
      draft.push({ id: newId(), name: file.name ?? "", blob: await prepare(file) });
    } catch (error) {
      problems.push(error.message);
    }
  }
  showProblem(problems.join(" ") || null);
  showDraft();
  byId("input").focus();
}

function showDraft() {
  byId("draft").hidden = draft.length === 0;
  byId("draft").replaceChildren(
    ...draft.map((picture, i) => {
      const name = picture.name || `Picture ${i + 1}`;
      const remove = iconButton("close", `Remove ${name}`, () => {
        draft = draft.filter((other) => other !== picture);
        showDraft();
        byId("input").focus();
      });
      return h("li", { class: "picture" }, h("img", { src: pictureUrl(picture), alt: name }), remove);
    }),
  );
}

function listenForFiles() {
  for (const [button, field] of [
    ["attach", "files"],
    ["photograph", "camera"],
  ]) {
    byId(button).addEventListener("click", () => byId(field).click());
    byId(field).addEventListener("change", () => {
      addFiles([...byId(field).files]);
      byId(field).value = ""; // the same file may come again
    });
  }
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
    if (!files.length) return;
    event.preventDefault();
    addFiles(files);
  });
  let inside = 0; // elements of the page that a drag is over
  const isFiles = (event) => event.dataTransfer?.types.includes("Files");
  const show = (count) => document.body.classList.toggle("dropping", (inside = Math.max(0, count)) > 0);
  addEventListener("dragenter", (event) => isFiles(event) && show(inside + 1));
  addEventListener("dragleave", (event) => isFiles(event) && show(inside - 1));
  addEventListener("dragover", (event) => isFiles(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!isFiles(event)) return;
    event.preventDefault();
    show(0);
    addFiles([...event.dataTransfer.files]);
  });
}

// ---- conversations

async function keep(kept) {
  kept.updated = Date.now();
  try {
    await store.save(kept);
  } catch (error) {
    showProblem(`The conversation cannot be kept in this browser: ${error.message}`);
  }
}

/** Show the chat of the address, or a new one. */
async function turn() {
  const id = location.hash.slice(1);
  if (id === chat.id) return;
  const kept = id ? await store.chat(id) : null;
  if (id && !kept) history.replaceState(null, "", location.pathname);
  chat = running.get(id)?.chat ?? kept ?? newChat();
  for (const message of chat.messages) {
    // the page was closed while it was written
    if (message.state === "open" && !running.has(id)) message.state = "stopped";
  }
  transcript.show(chat.messages);
  follows = true;
  showProblem(null);
  await refresh();
  follow();
}

/** Bring all that depends on the chat and on what is kept up to date. */
async function refresh() {
  const isRunning = running.has(chat.id);
  byId("send").hidden = isRunning;
  byId("stop").hidden = !isRunning;
  byId("welcome").hidden = chat.messages.length > 0;
  byId("export").hidden = chat.messages.length === 0;
  document.title = chat.messages.length ? `${titleOf(chat)} · gemcut` : "gemcut";
  const chats = await store.chats();
  byId("list").replaceChildren(...chats.map(listItem));
  const { bytes } = await store.size();
  const size = bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
  const count = chats.length === 1 ? "1 conversation" : `${chats.length} conversations`;
  byId("size").textContent = `In this browser: ${count}, ${size} of pictures.`;
  byId("kept").textContent = store.lasts
    ? "Kept in this browser only."
    : "This browser keeps nothing: all is gone when the page closes.";
}

function listItem(listed) {
  const title = titleOf(listed);
  const link = h(
    "a",
    {
      href: `#${listed.id}`,
      title,
      "aria-current": listed.id === chat.id ? "page" : null,
      onclick: () => open(null),
    },
    title,
  );
  return h(
    "li",
    { class: running.has(listed.id) ? "running" : "" },
    link,
    iconButton("delete", `Delete ${title}`, () => remove(listed)),
  );
}

async function remove({ id }) {
  running.get(id)?.controller.abort();
  const kept = await store.remove(id);
  if (chat.id === id) startNew();
  await refresh();
  toast("The conversation is deleted.", "Undo", async () => {
    await store.restore(kept);
    location.hash = id;
    await refresh();
  });
}

function startNew() {
  open(null);
  history.replaceState(null, "", location.pathname);
  chat = newChat();
  transcript.show([]);
  showProblem(null);
  refresh();
  byId("input").focus();
}

async function removeAll() {
  const dialog = byId("ask-delete");
  dialog.returnValue = "no";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  if (dialog.returnValue !== "yes") return;
  for (const { controller } of running.values()) controller.abort();
  await store.removeAll();
  startNew();
}

/** Save chats as one JSON file, pictures within. */
async function exportChats(chats) {
  const whole = [];
  for (const exported of chats) {
    const pictures = {};
    for (const id of exported.messages.flatMap((message) => message.pictures ?? [])) {
      const picture = await store.picture(id);
      if (picture) pictures[id] = { name: picture.name, data: await dataUri(picture.blob) };
    }
    whole.push({ title: titleOf(exported), ...exported, pictures });
  }
  const file = new Blob(
    [JSON.stringify({ format: "gemcut-conversations", version: 1, conversations: whole }, null, 1)],
    { type: "application/json" },
  );
  const url = URL.createObjectURL(file);
  h("a", { href: url, download: `gemcut-${new Date().toISOString().slice(0, 10)}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

// ---- the page around them

async function meet() {
  try {
    served = await model(settings.key);
    byId("model").textContent = served.id.split("/").pop();
    byId("model").title = `${served.id}, ${served.max_model_len.toLocaleString("en")} tokens`;
    showProblem(null);
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) askKey(settings.key ? error.message : "");
    else showProblem(error.message);
  }
}

function askKey(why) {
  byId("key-why").textContent = why;
  byId("key-why").hidden = !why;
  if (!byId("ask-key").open) byId("ask-key").showModal();
}

/** Open a side panel, or none. */
function open(panel) {
  const was = document.body.dataset.open;
  document.body.dataset.open = panel ?? "";
  for (const name of ["chats", "settings"])
    byId(`open-${name}`).setAttribute("aria-expanded", panel === name);
  if (panel) byId(`close-${panel}`).focus();
  else if (was) byId(`open-${was}`).focus();
}

function showProblem(text) {
  byId("problem").hidden = !text;
  byId("problem").textContent = text ?? "";
}

function say(text) {
  byId("status").textContent = text;
}

let toastEnd = null;

function toast(text, undo = null, onundo = null) {
  clearTimeout(toastEnd);
  const hide = () => (byId("toast").hidden = true);
  const button =
    undo && h("button", { type: "button", class: "plain", onclick: () => (hide(), onundo()) }, undo);
  byId("toast").replaceChildren(text, ...(button ? [button] : []));
  byId("toast").hidden = false;
  toastEnd = setTimeout(hide, UNDO_MS);
}

function follow() {
  const scroller = byId("scroller");
  if (follows) scroller.scrollTop = scroller.scrollHeight;
  byId("latest").hidden = follows;
}

function fitInput() {
  const input = byId("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function listen() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("input").addEventListener("input", fitInput);
  byId("input").addEventListener("keydown", (event) => {
    // a touch keyboard's Enter makes a new line, and one that ends a composition sends nothing
    if (
      event.key !== "Enter" ||
      event.shiftKey ||
      event.isComposing ||
      matchMedia("(pointer: coarse)").matches
    )
      return;
    event.preventDefault();
    send();
  });
  byId("stop").addEventListener("click", () => {
    stop();
    byId("input").focus();
  });
  byId("scroller").addEventListener("scroll", () => {
    const { scrollTop, scrollHeight, clientHeight } = byId("scroller");
    follows = scrollHeight - scrollTop - clientHeight < NEAR_PX;
    byId("latest").hidden = follows;
  });
  byId("latest").addEventListener("click", () => {
    follows = true;
    follow();
  });
  for (const panel of ["chats", "settings"]) {
    byId(`open-${panel}`).addEventListener("click", () =>
      open(document.body.dataset.open === panel ? null : panel),
    );
    byId(`close-${panel}`).addEventListener("click", () => open(null));
  }
  byId("scrim").addEventListener("click", () => open(null));
  byId("new").addEventListener("click", startNew);
  byId("export").addEventListener("click", () => exportChats([chat]));
  byId("export-all").addEventListener("click", async () => exportChats(await store.chats()));
  byId("delete-all").addEventListener("click", removeAll);
  byId("key-form").addEventListener("submit", () => {
    settings.key = byId("key").value;
    byId("key").value = "";
    meet();
  });
  byId("lightbox").addEventListener("click", () => byId("lightbox").close());
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]")) return;
    if (running.has(chat.id)) stop();
    else if (document.body.dataset.open) open(null);
  });
  addEventListener("hashchange", turn);
  addEventListener("pagehide", () => {
    if (running.has(chat.id)) store.save(chat);
  });
  // pictures that load, thoughts that unfold and answers that grow
  new ResizeObserver(follow).observe(byId("transcript"));
  listenForFiles();
}

listen();
await turn();
await refresh();
await meet();
if (!matchMedia("(pointer: coarse)").matches) byId("input").focus();
