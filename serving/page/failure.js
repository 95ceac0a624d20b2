// What can go wrong, in words for a person: what happened, what helps, what the server itself said.

import { sentence } from "./text.js";

/** Status 0: no answer came at all. */
const WORDS = {
  0: ["The server cannot be reached.", "Check the connection, and whether it is still running."],
  400: ["The server did not understand the request.", "Reload this page: it may be older than the server."],
  401: ["The server wants an API key.", "Type it in above; the photograph is then sent again."],
  403: ["This key does not allow that.", "Ask whoever runs the server."],
  404: ["The server no longer has what was asked for.", "Reload this page and choose a model it has."],
  408: ["The upload was too slow and the server stopped waiting.", "Try again, or choose a smaller picture."],
  413: ["The picture is too large.", "Choose a smaller one, or save this one at a lower resolution."],
  415: ["The server cannot read this kind of file.", "Choose a JPEG, PNG or another of the formats named above."],
  422: ["The picture is damaged.", "Its name may also promise another format; try the original file."],
  429: ["Too many requests in a short time.", ""],
  500: ["Something broke inside the server.", "Try again; if it stays, its log has the reason under this request's id."],
  502: ["The model behind the server failed.", "Try again in a moment."],
  503: ["The server is busy or still loading its model.", ""],
  504: ["The server took too long.", "Try again, or choose fewer views."],
};
const HOPELESS = new Set([413, 415, 422]);
const WAIT_S = { 429: 5, 503: 5 };

export class Failure extends Error {
  /** `said` is the server's own sentence; `waitS` how long it asks to be left alone, if it does. */
  constructor(status, { what, advice, said = "", requestId = "", waitS, hopeless = HOPELESS.has(status) } = {}) {
    const [title, help] = WORDS[status] ?? [`The server answered with status ${status}.`, "Try again."];
    super(what ?? title);
    this.status = status;
    this.advice = advice ?? help;
    this.said = said && sentence(said);
    this.requestId = requestId;
    this.waitS = waitS;
    this.hopeless = hopeless; // the same file would be refused again
  }

  /** From an answer that is not 2xx: its status, its problem document or null, its Retry-After. */
  static of(status, problem, retryAfter) {
    return new Failure(status, {
      said: problem?.detail, requestId: problem?.request_id, waitS: waitOf(status, retryAfter),
    });
  }
}

/** Seconds, from a Retry-After of either form; undefined where waiting does not help. */
function waitOf(status, retryAfter) {
  if (!(status in WAIT_S)) return undefined;
  const stated = retryAfter ? Number(retryAfter) : NaN;
  const waitS = Number.isNaN(stated) ? (Date.parse(retryAfter) - Date.now()) / 1000 : stated;
  return Number.isNaN(waitS) ? WAIT_S[status] : Math.max(1, Math.ceil(waitS));
}
