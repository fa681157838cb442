// Requests to this server, and the events of its streams.

export class Refused extends Error {}

function headers(key) {
  const own = { "Content-Type": "application/json" };
  return key ? { ...own, Authorization: `Bearer ${key}` } : own;
}

async function check(response) {
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* it was no object of the API */ }
  throw new Refused(message);
}

export async function models(key) {
  const response = await check(await fetch("/v1/models", { headers: headers(key) }));
  return (await response.json()).data.map((model) => model.id);
}

// Yields the chunks of an answer. Aborted, it ends with an AbortError.
export async function* answer(body, key, signal) {
  const request = { method: "POST", headers: headers(key), body: JSON.stringify(body), signal };
  const response = await check(await fetch("/v1/chat/completions", request));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused("the answer broke off");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Refused(chunk.error.message);
      yield chunk;
    }
  }
}

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

// The same request for a shell; the key stays out of it.
export function curl(body, key) {
  return [
    `curl ${location.origin}/v1/chat/completions`,
    `-H ${quoted("Content-Type: application/json")}`,
    ...(key ? ['-H "Authorization: Bearer $MLX_DRIFT_API_KEY"'] : []),
    `-d ${quoted(JSON.stringify(body, null, 2))}`,
  ].join(" \\\n  ");
}
