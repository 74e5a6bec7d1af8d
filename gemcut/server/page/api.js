// The server as the page knows it: OpenAI's chat completions, streamed.

/** What the server or the connection said. `status`: 0 if there was no answer at all. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

function headers(key) {
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", credentials: "omit", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Does it still run?");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const wait = response.headers.get("retry-after");
  const message = said?.error?.message ?? `The server answered ${response.status}.`;
  throw new ApiError(wait ? `${message} Try again in ${wait} s.` : message, response.status);
}

/** The model that the server has: `{id, max_model_len}`. */
export async function model(key) {
  const response = await send("/v1/models", { headers: headers(key) });
  return (await response.json()).data[0];
}

/** The chunks of an answer. Throws ApiError if it breaks off, AbortError if `signal` ends it. */
export async function* chat(body, key, signal) {
  const response = await send("/v1/chat/completions", {
    method: "POST",
    headers: headers(key),
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, response.status);
    yield chunk;
  }
  throw new ApiError("The answer broke off: the connection ended before it was complete.");
}

/** The data of server-sent events. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch(brokenOff);
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {}); // the caller has what it wanted
  }
}

function brokenOff(error) {
  if (error.name === "AbortError") throw error;
  throw new ApiError("The answer broke off: the connection was lost.");
}
