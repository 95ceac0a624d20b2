// The page: photographs come in, each gets a card and a row, two are asked about at a time.

import { ask } from "./ask.js";
import { Batch } from "./batch.js";
import { Card } from "./card.js";
import { askForKey, watchDoor } from "./door.js";
import { announce, find } from "./element.js";
import { limits, showFacts } from "./facts.js";
import { Failure } from "./failure.js";
import { watchIntake } from "./intake.js";
import { chosen, watchOptions } from "./options.js";
import { Photograph } from "./photograph.js";
import { Queue } from "./queue.js";
import { megabytes } from "./text.js";

const AT_ONCE = 2; // one is on its way while the server looks at the other
const AT_MOST = 500; // cards a browser shows without effort
const FEW = 3; // more are announced together, once
const NOT_PHOTOGRAPHS = /^(text|video|audio|application)\//;

const queue = new Queue(AT_ONCE, ask);
const acts = { cancel, again, whole };
const batch = new Batch({ stop, again: () => every("failed", again), clear });
let photographs = [];
let numbered = 0;

function take(files) {
  const free = AT_MOST - photographs.length;
  find("overflow").textContent = files.length > free ?
    `The first ${free} of ${files.length} were taken: the page holds ${AT_MOST}. Clear it for more.` : "";
  for (const file of files.slice(0, free)) add(new Photograph(file, numbered += 1, chosen()));
  find("answers").classList.toggle("many", photographs.length > FEW);
}

function add(photograph) {
  photographs.push(photograph);
  photograph.addEventListener("change", () => tell(photograph));
  find("answers").prepend(new Card(photograph, acts).node);
  batch.add(photograph);
  const failure = refusal(photograph.file);
  if (failure) photograph.become("failed", { failure });
  else queue.add(photograph);
}

/** Why a file need not be sent at all, or null. */
function refusal({ size, type }) {
  const failure = (what, advice) => new Failure(NaN, { what, advice, hopeless: true });
  if (size === 0) return failure("The file is empty.", "Nothing is in it; choose the original.");
  if (NOT_PHOTOGRAPHS.test(type)) return failure(`This is not a picture but ${type}.`, "Choose a photograph.");
  if (size <= limits.maxBytes) return null;
  return failure(`The file is ${megabytes(size)}; the server accepts at most ${megabytes(limits.maxBytes)}.`,
    "Save it at a lower resolution.");
}

/** What a change means for the ear and for the queue. */
function tell(photograph) {
  const { state, name, answer, failure } = photograph;
  if (state === "locked") lock();
  const open = photographs.some((other) => other.open);
  if (photographs.length > FEW) return open || announce(`${batch.words}.`);
  if (state === "failed" || state === "holding") return announce(`${name}: ${failure.message}`);
  if (state !== "answered") return undefined;
  const [first] = answer.predictions;
  return announce(`${name}: ${first.label}, ${(100 * first.probability).toFixed(0)} percent`);
}

function lock() {
  queue.hold();
  askForKey();
}

function unlock() {
  every("locked", again);
  queue.release();
  showFacts(lock);
}

function every(state, act) {
  for (const photograph of photographs.filter((other) => other.state === state && !other.failure?.hopeless)) {
    act(photograph);
  }
}

function cancel(photograph) {
  queue.remove(photograph);
  photograph.cancel(new Failure(NaN, { what: "Cancelled.", advice: "" }));
}

function again(photograph) {
  photograph.become("waiting", { answer: null, failure: null });
  queue.add(photograph);
}

/** Asked again, and no fewer crops will do. */
function whole(photograph) {
  Object.assign(photograph.options, { degrade: false });
  again(photograph);
}

function stop() {
  for (const photograph of photographs.filter((other) => other.open)) cancel(photograph);
}

function clear() {
  stop();
  photographs = [];
  find("answers").replaceChildren();
  find("overflow").textContent = "";
  batch.reset();
  announce("Cleared.");
  find("pick").focus();
}

watchIntake(take);
watchOptions(() => showFacts(lock));
watchDoor(unlock);
showFacts(lock);
