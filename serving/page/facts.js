// What the server is: the model that answers, what it takes, the classes it knows.

import { element, find } from "./element.js";
import { Failure } from "./failure.js";
import { chosenModel, showCrops, showModels, showTops } from "./options.js";
import { fetchJson } from "./server.js";
import { megabytes } from "./text.js";

const SEARCHABLE = 30;
const RETRY_MS = 2000;

/** Until they are known, the server itself says what it does not take. */
export const limits = { maxBytes: Infinity, formats: [] };
let newest = 0;

/** Shows the facts, retrying until the server has them; `locked` is called where it wants a key. */
export async function showFacts(locked) {
  const asked = newest += 1;
  try {
    showModels(await fetchJson("/models"));
    const query = chosenModel() ? `?${new URLSearchParams({ model: chosenModel() })}` : "";
    const [model, labels] = await Promise.all([fetchJson(`/model${query}`), fetchJson(`/labels${query}`)]);
    if (asked === newest) show(model, labels);
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    if (asked !== newest) return;
    find("model").textContent = `${error.message} ${error.said}`;
    if (error.status === 401) locked();
    else setTimeout(() => asked === newest && showFacts(locked), RETRY_MS);
  }
}

function show(model, labels) {
  limits.maxBytes = model.max_upload_bytes;
  limits.formats = model.accepted_formats;
  find("model").replaceChildren(...described(model));
  find("limits").textContent = `${limits.formats.join(", ")}; up to ${megabytes(limits.maxBytes)} each.`;
  showCrops(model.default_crops);
  showTops(labels.length);
  showClasses(labels);
}

function described({ name, version, precision, backend, classes, provenance }) {
  const facts = [name, `version ${version}`, `${precision} on ${backend}`, `${classes} classes`];
  return [
    element("span", { classes: "facts" }, facts.map((text) => element("span", { text }))),
    element("span", { text: [measured(provenance?.accuracy), agreed(provenance?.parity)].join(" ").trim() }),
  ];
}

function measured(accuracy) {
  if (accuracy?.top1_ten === undefined) return "";
  return `Right first in ${(100 * accuracy.top1_ten).toFixed(1)} % of its validation photographs.`;
}

/** The parity gate's verdict: how near this version's answers are to the network that was trained. */
function agreed(parity) {
  if (parity === undefined) return "";
  return `Compared with PyTorch on ${parity.images} images before it was published: ` +
    `probabilities within ${parity.max_abs_difference.toExponential(0)}, ` +
    `the same first label on ${(100 * parity.top1_agreement).toFixed(1)} %.`;
}

function showClasses(labels) {
  find("classes-title").textContent = `The ${labels.length} classes it knows`;
  const items = labels.map(({ wnid, label }) => element("li", { text: label, title: wnid }));
  find("classes").replaceChildren(...items);
  find("filter").hidden = labels.length <= SEARCHABLE;
  find("filter-text").value = "";
}

find("filter-text").addEventListener("input", ({ target }) => {
  const wanted = target.value.toLowerCase();
  for (const item of find("classes").children) item.hidden = !item.textContent.toLowerCase().includes(wanted);
});
