// What each crop said, beside the crop itself, and how the mean of them came about.

import { centreSquare, cut } from "./crops.js";
import { element } from "./element.js";
import { percentage } from "./text.js";

/** A disclosure; the crops are cut when it is first opened. */
export function views(file, answer) {
  const details = element("details", {}, [element("summary", { text: summaryOf(answer) })]);
  details.addEventListener("toggle", async () => {
    if (!details.open || details.dataset.drawn) return;
    details.dataset.drawn = "true";
    details.append(...explanation(answer, await centreSquare(file)));
  });
  return details;
}

function summaryOf(answer) {
  const count = answer.views.length;
  return count === 1 ? "The one crop it saw" : `The ${count} crops and their mean`;
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
