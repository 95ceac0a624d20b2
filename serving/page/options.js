// What the person chose: the views of each photograph, how many labels, which model.

import { element, find } from "./element.js";

const TOPS = [1, 3, 5, 10, 20];
const DEFAULT_TOP = 5;

/** `{crops, top, model}` for a request; no model where the server has but one. */
export function chosen() {
  const crops = document.querySelector("input[name=crops]:checked").value;
  const model = chosenModel();
  return { crops, top: find("top").value, ...(model && { model }), degrade: true };
}

/** The chosen model's name, or "" where there is no choice. */
export function chosenModel() {
  return find("model-choice").hidden ? "" : find("models").value;
}

/** The models of GET /models; the choice keeps what was chosen. */
export function showModels(models) {
  const before = chosenModel() || models.find((model) => model.default)?.name;
  find("models").replaceChildren(...models.map(({ name, precision }) => element("option", {
    value: name, text: precision ? `${name} (${precision})` : name,
  })));
  find("models").value = before;
  find("model-choice").hidden = models.length < 2;
}

/** No more labels than the model has classes. */
export function showTops(classes) {
  const before = Number(find("top").value) || DEFAULT_TOP;
  const tops = TOPS.filter((top) => top <= classes);
  find("top").replaceChildren(...tops.map((top) => element("option", { value: String(top), text: String(top) })));
  find("top").value = String(tops.includes(before) ? before : tops.at(-1));
}

/** The server's own default, until the person has chosen. */
export function showCrops(crops) {
  const radio = document.querySelector(`input[name=crops][value=${crops}]`);
  if (radio && !find("crops").dataset.touched) radio.checked = true;
}

/** `changed` is called when another model is chosen. */
export function watchOptions(changed) {
  find("crops").addEventListener("change", () => { find("crops").dataset.touched = "true"; });
  find("models").addEventListener("change", changed);
}
