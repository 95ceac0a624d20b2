// Many photographs at once: how far they are, a row for each, and all answers as one file.

import { button, element, find } from "./element.js";
import { download, toCsv, toJson } from "./download.js";
import { counted, milliseconds, percentage } from "./text.js";

const STATES = { waiting: "waiting", sending: "on its way", holding: "waiting for the server", locked: "waiting for a key" };

/** The section `#batch`, shown from the second photograph on. */
export class Batch {
  #photographs = [];
  #rows = new Map();

  /** `acts`: `{stop, again, clear}`. */
  constructor(acts) {
    this.stop = button("Stop", acts.stop);
    this.again = button("Try the failed again", acts.again);
    this.csv = button("Download CSV", () => download("answers.csv", "text/csv", toCsv(this.#photographs)));
    this.json = button("Download JSON", () => download("answers.json", "application/json", toJson(this.#photographs)));
    this.clear = button("Clear", acts.clear, { label: "Clear all photographs" });
    find("batch-actions").append(this.stop, this.again, this.csv, this.json, this.clear);
  }

  add(photograph) {
    const row = element("tr");
    this.#photographs.push(photograph);
    this.#rows.set(photograph, row);
    find("rows").append(row);
    photograph.addEventListener("change", () => this.#draw(photograph));
    this.#draw(photograph);
  }

  reset() {
    this.#photographs = [];
    this.#rows.clear();
    find("rows").replaceChildren();
    this.#total();
  }

  /** "12 of 50 photographs answered, 2 failed". */
  get words() {
    const { answered, failed } = this.#counts();
    const all = counted(this.#photographs.length, "photograph");
    const done = answered === this.#photographs.length ? `All ${all} answered` : `${answered} of ${all} answered`;
    return `${done}${failed ? `, ${failed} failed` : ""}`;
  }

  #counts() {
    const answered = this.#photographs.filter(({ state }) => state === "answered").length;
    const open = this.#photographs.filter((photograph) => photograph.open).length;
    const hopeful = this.#photographs.some(({ failure, state }) => state === "failed" && !failure.hopeless);
    return { answered, open, hopeful, failed: this.#photographs.length - answered - open };
  }

  #draw(photograph) {
    const row = this.#rows.get(photograph);
    if (!row || row.dataset.state === photograph.state) return; // progress within a state is the card's
    row.dataset.state = photograph.state;
    row.replaceChildren(...cells(photograph));
    this.#total();
  }

  #total() {
    const { answered, open, hopeful } = this.#counts();
    find("batch").hidden = this.#photographs.length < 2;
    find("batch-words").textContent = this.words;
    const bar = find("batch-bar");
    bar.max = Math.max(1, this.#photographs.length);
    bar.value = this.#photographs.length - open;
    bar.hidden = open === 0;
    this.stop.hidden = open === 0;
    this.again.hidden = !hopeful || open > 0;
    this.csv.hidden = this.json.hidden = answered === 0;
  }
}

function cells({ name, number, state, answer, failure }) {
  const link = element("a", { text: name, href: `#photograph-${number}` });
  const file = element("th", { scope: "row" }, [link]);
  if (state !== "answered") {
    const text = STATES[state] ?? failure.message;
    return [file, element("td", { classes: state === "failed" ? "failed" : "quiet", text, colspan: "3" })];
  }
  const [first] = answer.predictions;
  return [
    file,
    element("td", { text: first.label }),
    element("td", { classes: "number", text: percentage(first.probability) }),
    element("td", { classes: "number quiet", text: milliseconds(answer.timing_ms.total) }),
  ];
}
