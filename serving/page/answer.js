// An answer drawn: the labels with their probabilities, and where the time went.

import { element } from "./element.js";
import { counted, milliseconds, percentage } from "./text.js";

const STAGES = ["read", "decode", "queue", "infer", "post"];

export function labels(predictions) {
  return element("ol", { classes: "labels" }, predictions.map((prediction) => {
    const fill = element("span");
    fill.style.setProperty("width", `${100 * prediction.probability}%`);
    return element("li", { classes: "label", title: prediction.wnid }, [
      element("span", { text: prediction.label }),
      element("span", { classes: "number", text: percentage(prediction.probability) }),
      element("span", { classes: "bar", "aria-hidden": "true" }, [fill]),
    ]);
  }));
}

export function timing({ timing_ms: timings, crops, model }) {
  const bar = element("div", { classes: "stages", "aria-hidden": "true" });
  const list = element("ul", { classes: "stage-list small quiet" });
  for (const stage of STAGES) {
    const part = element("span", { classes: stage });
    part.style.setProperty("flex-grow", String(timings[stage] ?? 0));
    bar.append(part);
    list.append(element("li", { classes: stage, text: `${stage} ${milliseconds(timings[stage] ?? 0)}` }));
  }
  const total = `${milliseconds(timings.total)} in the server, ${counted(crops, "crop")}, ` +
    `${model.name} version ${model.version}`;
  return element("div", { classes: "timing" }, [bar, element("p", { classes: "small quiet", text: total }), list]);
}
