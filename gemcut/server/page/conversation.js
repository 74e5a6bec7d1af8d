// A conversation and what becomes of it: messages as the server takes them, answers as they come in.
//
// A message is one of
//   {id, role: "user", text, pictures: [picture id]}
//   {id, role: "assistant", text, reasoning, calls: [{id, name, arguments}], malformed, state, error, figures}
//   {id, role: "tool", results: [{id, name, text}]}
// An answer's state is "open" while it is written, then "done", "stopped" or "failed".

import { chat as ask } from "./api.js";
import { newId } from "./dom.js";
import { dataUri } from "./pictures.js";

const MAX_TITLE = 60;

export function newChat() {
  const now = Date.now();
  return { id: newId(), created: now, updated: now, messages: [] };
}

export function newAnswer() {
  return {
    id: newId(),
    role: "assistant",
    text: "",
    reasoning: "",
    calls: [],
    malformed: [],
    state: "open",
    error: null,
    figures: null,
  };
}

/** What a chat is called: its first words. */
export function titleOf(chat) {
  const words = chat.messages
    .find((message) => message.role === "user" && message.text)
    ?.text.trim()
    .replace(/\s+/g, " ");
  if (!words)
    return chat.messages.some((message) => message.pictures?.length) ? "Picture" : "New conversation";
  return words.length > MAX_TITLE ? `${words.slice(0, MAX_TITLE - 1)}…` : words;
}

/** The messages of a request. `picture`: resolves an id to its picture, undefined if it is gone. */
export async function requestMessages(messages, system, picture) {
  const sent = system ? [{ role: "system", content: system }] : [];
  for (const message of messages) {
    if (message.role === "user") sent.push({ role: "user", content: await userContent(message, picture) });
    else if (message.role === "tool") {
      for (const { id, name, text } of message.results)
        sent.push({ role: "tool", tool_call_id: id, name, content: text });
    } else sent.push(answerSent(message));
  }
  return sent;
}

async function userContent(message, picture) {
  if (!message.pictures.length) return message.text;
  const parts = [];
  for (const id of message.pictures) {
    const found = await picture(id);
    if (!found)
      throw new Error(
        "A picture of this conversation is no longer kept here. Start anew, or edit the message.",
      );
    parts.push({ type: "image_url", image_url: { url: await dataUri(found.blob) } });
  }
  return message.text ? [...parts, { type: "text", text: message.text }] : parts;
}

function answerSent(message) {
  const sent = { role: "assistant", content: message.text };
  if (message.reasoning) sent.reasoning = message.reasoning;
  if (message.calls.length) {
    sent.tool_calls = message.calls.map(({ id, name, arguments: given }) => ({
      id,
      type: "function",
      function: { name, arguments: given },
    }));
  }
  return sent;
}

/**
 * Fill an answer with what the server says to a request; `body` resolves to it. Calls `changed` after each
 * piece of news. Never throws: how it ended is in the answer's `state` and `error`.
 */
export async function fill(answer, body, key, signal, changed) {
  const began = performance.now();
  let first = null;
  try {
    for await (const chunk of ask(await body(), key, signal)) {
      const now = performance.now();
      first ??= now;
      if (chunk.usage) answer.figures = figures(chunk.usage, (first - began) / 1000, (now - first) / 1000);
      for (const choice of chunk.choices) take(answer, choice);
      changed();
    }
    answer.state = "done";
  } catch (error) {
    if (error.name === "AbortError") answer.state = "stopped";
    else {
      answer.state = "failed";
      answer.error = { message: error.message, status: error.status ?? 0 };
    }
  }
  changed();
}

function take(answer, { delta, finish_reason: reason }) {
  answer.text += delta.content ?? "";
  answer.reasoning += delta.reasoning ?? "";
  answer.malformed.push(...(delta.malformed_tool_calls ?? []));
  for (const { index, id, function: called } of delta.tool_calls ?? []) {
    const call = (answer.calls[index] ??= { id, name: "", arguments: "" });
    call.name += called.name ?? "";
    call.arguments += called.arguments ?? "";
  }
  if (reason === "length") answer.isCut = true;
}

function figures(usage, firstS, restS) {
  const tokens = usage.completion_tokens;
  return {
    tokens,
    firstS,
    // the first token is no interval
    perSecond: tokens > 1 && restS > 0 ? (tokens - 1) / restS : null,
    prompt: usage.prompt_tokens,
    cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
    image: usage.prompt_tokens_details?.image_tokens ?? 0,
    reasoning: usage.completion_tokens_details?.reasoning_tokens ?? 0,
  };
}
