// The gateway as this page sees it: facts by GET, an answer for each photograph.

import { Failure } from "./failure.js";
import { headers } from "./key.js";

const SILENCE_MS = 90_000;

/** GET a JSON document of this server. */
export async function fetchJson(path) {
  let response;
  try {
    response = await fetch(path, { headers: headers() });
  } catch {
    throw new Failure(0);
  }
  const body = await response.json().catch(() => null);
  if (response.ok && body) return body;
  throw Failure.of(response.status, body, response.headers.get("retry-after"));
}

/**
 * POST one photograph; `onSent(bytes, total)` is called as it leaves. XMLHttpRequest, because fetch
 * does not tell how much of an upload has left.
 */
export async function classify(file, query, { signal, onSent }) {
  await readable(file);
  if (signal.aborted) throw silent();
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    let silence;
    let sent = false;
    const alive = () => {
      clearTimeout(silence);
      silence = setTimeout(() => request.abort(), SILENCE_MS);
    };
    request.open("POST", `/classify?${query}`);
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", ({ loaded, total }) => {
      alive();
      onSent(loaded, total);
    });
    request.upload.addEventListener("load", () => { sent = true; });
    request.addEventListener("load", () => settle(request, resolve, reject));
    request.addEventListener("error", () => reject(broken(sent)));
    request.addEventListener("abort", () => reject(silent())); // whoever cancelled does not read it
    request.addEventListener("loadend", () => clearTimeout(silence));
    signal.addEventListener("abort", () => request.abort());
    const body = new FormData();
    body.append("file", file, file.name || "pasted");
    alive();
    request.send(body);
  });
}

function settle(request, resolve, reject) {
  const body = parsed(request.responseText);
  if (request.status === 200 && body) return resolve(body);
  return reject(Failure.of(request.status, body, request.getResponseHeader("retry-after")));
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function broken(sent) {
  return sent ? new Failure(0, { what: "The connection broke before the answer came." }) : new Failure(0);
}

function silent() {
  return new Failure(0, { what: "The server has not answered for a long time.", advice: "Try again." });
}

/** A folder, or a file that was moved since it was chosen, fails here and not as a broken connection. */
async function readable(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    throw new Failure(NaN, {
      what: "The file cannot be read.",
      advice: "It may be a folder, or have been moved or changed since; choose it again.",
    });
  }
}
