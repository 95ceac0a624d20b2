// One picture's card: the picture, its labels, its time, and what each crop said.

import { centreSquare, cut } from "./crops.js";

const STAGES = ["read", "decode", "queue", "infer", "post"];

/** An element with classes, text and children; text goes in as text, never as markup. */
export function element(tag, { classes = "", text = "", ...attributes } = {}, children = []) {
  const node = document.createElement(tag);
  if (classes) node.className = classes;
  if (text) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** A card in its waiting state; `show` and `fail` finish it. */
export class Card {
  constructor(file) {
    this.file = file;
    this.name = file.name || "pasted picture";
    this.picture = this.#preview();
    this.result = element("div", {}, [element("p", { classes: "working", text: "Waiting for its turn …" })]);
    this.node = element("li", { classes: "card" }, [
      element("div", { classes: "card-body" }, [this.picture, this.result]),
    ]);
  }

  /** The upload has begun. */
  sending() {
    this.#fill(element("p", { classes: "working", text: "Classifying …" }));
  }

  fail(message) {
    this.#fill(element("p", { classes: "error", text: message, role: "alert" }));
  }

  /** The server's answer. */
  show(answer, crops) {
    this.#fill(
      labels(answer.predictions),
      timing(answer),
      element("div", { classes: "actions" }, [
        copyButton("Copy as JSON", () => JSON.stringify(answer, null, 2)),
        copyButton("Copy as curl", () => curl(this.name, crops)),
      ]),
    );
    this.node.append(this.#views(answer));
  }

  #fill(...children) {
    this.result.replaceChildren(element("h3", { text: this.name }), ...children);
  }

  #preview() {
    const image = element("img", { classes: "picture", alt: `The picture ${this.name}` });
    const address = URL.createObjectURL(this.file);
    image.addEventListener("load", () => URL.revokeObjectURL(address), { once: true });
    image.addEventListener("error", () => {
      URL.revokeObjectURL(address);
      image.replaceWith(element("p", { classes: "no-picture quiet", text: "This browser cannot show the picture." }));
    }, { once: true });
    image.src = address;
    return image;
  }

  #views(answer) {
    const details = element("details", {}, [element("summary", { text: summaryOf(answer) })]);
    details.addEventListener("toggle", async () => {
      if (!details.open || details.dataset.drawn) return;
      details.dataset.drawn = "true";
      const square = await centreSquare(this.file);
      details.append(...explanation(answer, square));
    });
    return details;
  }
}

function labels(predictions) {
  return element("ol", { classes: "labels" }, predictions.map((prediction) => {
    const percent = 100 * prediction.probability;
    const fill = element("span");
    fill.style.setProperty("width", `${percent}%`);
    return element("li", { classes: "label", title: prediction.wnid }, [
      element("span", { text: prediction.label }),
      element("span", { classes: "number", text: percentage(prediction.probability) }),
      element("span", { classes: "bar", "aria-hidden": "true" }, [fill]),
    ]);
  }));
}

function timing({ timing_ms: timings, crops }) {
  const bar = element("div", { classes: "stages", "aria-hidden": "true" });
  const list = element("ul", { classes: "stage-list small quiet" });
  for (const stage of STAGES) {
    const part = element("span", { classes: stage });
    part.style.setProperty("flex-grow", String(timings[stage] ?? 0));
    bar.append(part);
    list.append(element("li", { classes: stage, text: `${stage} ${milliseconds(timings[stage] ?? 0)}` }));
  }
  const total = `${milliseconds(timings.total)} in the server, ${crops} ${crops === 1 ? "crop" : "crops"}`;
  return element("div", {}, [element("p", { classes: "small quiet", text: total }), bar, list]);
}

function summaryOf({ views }) {
  return views.length === 1 ? "The one crop it saw" : `The ${views.length} crops, and how their mean came about`;
}

function explanation(answer, square) {
  const winner = answer.predictions[0];
  const own = (view) => view.predictions.find(({ index }) => index === winner.index).probability;
  const agreeing = answer.views.filter((view) => view.predictions[0].index === winner.index).length;
  const nodes = [
    element("ol", { classes: "views" }, answer.views.map((view) => viewItem(view, winner, square))),
  ];
  if (!square) nodes.unshift(element("p", { classes: "quiet", text: "This browser cannot show the crops." }));
  if (answer.views.length > 1) {
    nodes.push(
      element("p", {
        text: `${agreeing} of ${answer.views.length} crops say “${winner.label}” first. Its probability in each, ` +
          `and the mean of them, ${percentage(winner.probability)}, which is the answer:`,
      }),
      meanChart(answer.views.map(own), winner.probability),
    );
  }
  return nodes;
}

function viewItem(view, winner, square) {
  const [first] = view.predictions;
  const name = view.mirrored ? `${view.position}, mirrored` : view.position;
  const children = [
    element("p", { classes: "said quiet", text: name }),
    element("p", {
      classes: first.index === winner.index ? "said" : "said differs",
      text: `${first.label} ${percentage(first.probability)}`,
    }),
  ];
  if (square) {
    const canvas = cut(square, view);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `The crop: ${name}`);
    children.unshift(canvas);
  }
  return element("li", {}, children);
}

function meanChart(values, mean) {
  const columns = values.map((value) => {
    const column = element("span", { classes: "column", title: percentage(value) });
    column.style.setProperty("height", `${100 * value}%`);
    return column;
  });
  const line = element("span", { classes: "line" }, [element("span", { text: `mean ${percentage(mean)}` })]);
  line.style.setProperty("bottom", `${100 * mean}%`);
  const spoken = `In each crop: ${values.map(percentage).join(", ")}; mean ${percentage(mean)}`;
  return element("div", { classes: "mean", role: "img", "aria-label": spoken }, [...columns, line]);
}

function copyButton(text, content) {
  const button = element("button", { classes: "plain", type: "button", text });
  button.addEventListener("click", async () => {
    let said = "Copied";
    try {
      await navigator.clipboard.writeText(content());
    } catch {
      said = "The browser does not allow copying";
    }
    button.textContent = said;
    setTimeout(() => { button.textContent = text; }, 1500);
  });
  return button;
}

/** The request as a shell command; the file name is quoted for the shell. */
function curl(name, crops) {
  const quoted = `file=@"${name.replaceAll(/["\\]/g, "\\$&")}"`.replaceAll("'", "'\\''");
  return `curl -F '${quoted}' '${location.origin}/classify?crops=${crops}'`;
}

export function percentage(probability) {
  const percent = 100 * probability;
  if (percent > 0 && percent < 0.1) return "< 0.1 %";
  return `${percent.toFixed(1)} %`;
}

function milliseconds(ms) {
  return ms < 10 ? `${ms.toFixed(1)} ms` : `${Math.round(ms)} ms`;
}
