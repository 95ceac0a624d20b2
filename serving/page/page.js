// The page: photographs come in by drop, paste or choice; each gets a card, two are asked at a time.

import { classify, Failure, fetchJson } from "./api.js";
import { Card, element } from "./card.js";

const AT_ONCE = 2;
const SEARCHABLE = 30;
const MODEL_RETRY_MS = 2000;
const NOT_PHOTOGRAPHS = /^(text|video|audio|application)\//;

const find = (id) => document.getElementById(id);
const waiting = [];
let working = 0;
let limits = { max_upload_bytes: Infinity };

function add(files) {
  for (const file of files) {
    const card = new Card(file);
    find("answers").prepend(card.node);
    const refused = refusal(file);
    if (refused) {
      card.fail(refused);
      announce(`${card.name}: ${refused}`);
    } else {
      waiting.push(card);
    }
  }
  next();
}

/** Why a file need not be sent at all, or an empty string. */
function refusal(file) {
  if (file.size > limits.max_upload_bytes) {
    return `The file is ${megabytes(file.size)}; the server accepts at most ${megabytes(limits.max_upload_bytes)}.`;
  }
  if (file.size === 0) return "The file is empty.";
  return NOT_PHOTOGRAPHS.test(file.type) ? `This is not a picture but ${file.type}.` : "";
}

async function next() {
  while (working < AT_ONCE && waiting.length > 0) {
    working += 1;
    ask(waiting.shift()).finally(() => {
      working -= 1;
      next();
    });
  }
}

async function ask(card) {
  const crops = document.querySelector("input[name=crops]:checked").value;
  card.sending();
  try {
    const answer = await classify(card.file, crops);
    card.show(answer, crops);
    const [first] = answer.predictions;
    announce(`${card.name}: ${first.label}, ${(100 * first.probability).toFixed(0)} percent`);
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    card.fail(error.message);
  }
}

function announce(text) {
  find("announce").textContent = text;
}

function megabytes(bytes) {
  return bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

async function showModel() {
  try {
    const [model, labels] = await Promise.all([fetchJson("/model"), fetchJson("/labels")]);
    limits = model;
    find("model").textContent = describe(model);
    find("limits").textContent =
      `${model.accepted_formats.join(", ")}; up to ${megabytes(model.max_upload_bytes)} each.`;
    const chosen = document.querySelector(`input[name=crops][value=${model.default_crops}]`);
    if (chosen) chosen.checked = true;
    showClasses(labels);
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    find("model").textContent = error.message;
    setTimeout(showModel, MODEL_RETRY_MS);
  }
}

function describe({ name, version, precision, backend, classes, provenance }) {
  const accuracy = provenance?.accuracy?.top1_ten;
  const measured = accuracy === undefined ? "" :
    `; right first in ${(100 * accuracy).toFixed(1)} % of its validation photographs`;
  return `${name}, version ${version}, ${precision} on ${backend}; ${classes} classes${measured}.` +
    agreed(provenance?.parity);
}

/** The parity gate's verdict: how near this version's answers are to the network that was trained. */
function agreed(parity) {
  if (parity === undefined) return "";
  return ` Compared with PyTorch on ${parity.images} images before it was published: ` +
    `probabilities within ${parity.max_abs_difference.toExponential(0)}, ` +
    `the same first label on ${(100 * parity.top1_agreement).toFixed(1)} %.`;
}

function showClasses(labels) {
  find("classes-title").textContent = `The ${labels.length} classes it knows`;
  const items = labels.map(({ wnid, label }) => element("li", { text: label, title: wnid }));
  find("classes").replaceChildren(...items);
  find("filter").hidden = labels.length <= SEARCHABLE;
  find("filter-text").addEventListener("input", ({ target }) => {
    const wanted = target.value.toLowerCase();
    for (const item of items) item.hidden = !item.textContent.toLowerCase().includes(wanted);
  });
}

find("pick").addEventListener("click", () => find("choose").click());
find("choose").addEventListener("change", ({ target }) => {
  add(target.files);
  target.value = "";
});
document.addEventListener("paste", ({ clipboardData }) => add(clipboardData.files));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  find("drop").classList.add("over");
});
document.addEventListener("dragleave", ({ relatedTarget }) => {
  if (!relatedTarget) find("drop").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  find("drop").classList.remove("over");
  add(event.dataTransfer.files);
});
showModel();
