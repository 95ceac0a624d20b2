// The gateway as this page sees it: facts once at the start, an answer for each picture.

/** A refusal or failure told in words for a person. */
export class Failure extends Error {}

const ADVICE = {
  413: "Choose a smaller picture.",
  415: "Choose a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF picture.",
  422: "The file is damaged or not what its name says; try the original.",
  503: "The server is busy or still loading; try again in a moment.",
  504: "The server took too long; try again.",
};

/** GET a JSON document of this server. */
export async function fetchJson(path) {
  return answer(await reach(() => fetch(path, { headers: { accept: "application/json" } })));
}

/** POST one picture; resolves to the answer with what each crop said. */
export async function classify(file, crops) {
  const body = new FormData();
  body.append("file", file, file.name || "pasted");
  const query = new URLSearchParams({ crops, detail: "true" });
  return answer(await reach(() => fetch(`/classify?${query}`, { method: "POST", body })));
}

async function reach(send) {
  try {
    return await send();
  } catch {
    throw new Failure("The server cannot be reached. Is it still running?");
  }
}

async function answer(response) {
  const body = await response.json().catch(() => null);
  if (response.ok && body) return body;
  const said = body?.detail ?? `the server answered with status ${response.status}`;
  throw new Failure([sentence(said), ADVICE[response.status]].filter(Boolean).join(" "));
}

function sentence(text) {
  const start = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(start) ? start : `${start}.`;
}
