// One photograph is asked about, and again when a busy server says when to come back.

import { Failure } from "./failure.js";
import { classify } from "./server.js";

const TRIES = 8;
const HEIC = /\.hei[cf]$/i;
const HEIC_ADVICE = "It is HEIC, as telephones save it: export or share it as JPEG, and choose that.";
const LONGEST_WAIT_S = 120; // what asks for more is left to the person

/** Runs until the photograph is answered, has failed, is cancelled or waits for a key; never rejects. */
export async function ask(photograph) {
  const { signal } = photograph;
  for (let tries = 1; ; tries += 1) {
    try {
      const answer = await attempt(photograph, signal);
      if (!signal.aborted) photograph.become("answered", { answer, failure: null });
      return;
    } catch (error) {
      if (signal.aborted) return;
      const failure = error instanceof Failure ? error : new Failure(NaN, { what: "This page failed." });
      if (failure !== error) console.error(error);
      if (failure.status === 415 && HEIC.test(photograph.name)) failure.advice = HEIC_ADVICE;
      if (failure.status === 401) return photograph.become("locked", { failure });
      if (!(failure.waitS <= LONGEST_WAIT_S) || tries === TRIES) return photograph.become("failed", { failure });
      photograph.become("holding", { failure, untilMs: Date.now() + 1000 * failure.waitS });
      await passed(photograph, signal);
      if (signal.aborted) return;
    }
  }
}

function attempt(photograph, signal) {
  photograph.become("sending", { sent: 0 });
  const onSent = (bytes, total) => {
    if (!signal.aborted) photograph.become("sending", { sent: bytes / total });
  };
  return classify(photograph.file, queryOf(photograph.options), { signal, onSent });
}

function queryOf({ degrade, ...chosen }) {
  return new URLSearchParams({ ...chosen, detail: "true", ...(degrade ? {} : { degrade: "false" }) });
}

function passed(photograph, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, photograph.untilMs - Date.now());
    const now = () => {
      clearTimeout(timer);
      resolve();
    };
    photograph.addEventListener("hurry", now, { once: true });
    signal.addEventListener("abort", now, { once: true });
  });
}
