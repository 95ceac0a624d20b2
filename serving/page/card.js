// One photograph's card: its picture, where it is on its way, and in the end its answer.

import { labels, timing } from "./answer.js";
import { copyButton, curl } from "./copy.js";
import { button, element } from "./element.js";
import { counted, megabytes, seconds } from "./text.js";
import { thumbnail } from "./thumbnail.js";
import { views } from "./views.js";

const LARGE_BYTES = 1e6; // smaller uploads are over before a bar can be read
const TICK_MS = 250;

/** Draws a photograph at each of its changes; `acts`: `{cancel, again, whole}`, each given the photograph. */
export class Card {
  #drawn = "";
  #ticking;

  constructor(photograph, acts) {
    this.photograph = photograph;
    this.acts = acts;
    this.heading = element("h3", { text: photograph.name, tabindex: "-1", id: `photograph-${photograph.number}` });
    this.frame = element("div", { classes: "frame" });
    this.result = element("div", { classes: "result" });
    this.body = element("div", { classes: "card-body" }, [this.frame, this.result]);
    this.node = element("li", { classes: "card" }, [this.body]);
    photograph.addEventListener("change", () => this.#draw());
    this.#draw();
    this.#preview();
  }

  async #preview() {
    const { file, name } = this.photograph;
    const none = "This browser cannot show the picture.";
    this.frame.append(await thumbnail(file, `The picture ${name}`) ??
      element("p", { classes: "no-picture small quiet", text: file.size ? none : "Nothing to show." }));
  }

  #draw() {
    const { state } = this.photograph;
    if (state === "sending" && this.#drawn === "sending") return this.#progress();
    clearInterval(this.#ticking);
    this.#drawn = state;
    const focused = this.node.contains(document.activeElement);
    this.node.querySelector(":scope > details")?.remove();
    this.node.dataset.state = state;
    this.result.replaceChildren(this.heading, ...this[state]());
    if (focused && !this.node.contains(document.activeElement)) this.heading.focus();
    if (state === "sending") this.#progress();
    return undefined;
  }

  waiting() {
    return [element("p", { classes: "quiet", text: "Waiting for its turn …" }), this.#cancel()];
  }

  sending() {
    this.bar = element("progress", { max: "1", value: "0", "aria-label": `Upload of ${this.photograph.name}` });
    this.words = element("p", { classes: "working" });
    return [this.words, this.bar, this.#cancel()];
  }

  #progress() {
    const { file, sent } = this.photograph;
    this.bar.value = sent;
    this.bar.hidden = file.size < LARGE_BYTES || sent === 1;
    this.words.textContent = this.bar.hidden ? "Classifying …" :
      `Sending ${megabytes(sent * file.size)} of ${megabytes(file.size)} …`;
  }

  holding() {
    const words = element("p", { classes: "soon" });
    const tick = () => {
      const left = Math.max(0, Math.ceil((this.photograph.untilMs - Date.now()) / 1000));
      words.textContent = `${this.photograph.failure.message} Trying again in ${left} s.`;
    };
    tick();
    this.#ticking = setInterval(tick, TICK_MS);
    return [words, this.#actions(button("Try now", () => this.photograph.hurry()), this.#cancelButton())];
  }

  locked() {
    return [element("p", { classes: "soon", text: "Waiting for an API key." }), this.#cancel()];
  }

  failed() {
    const { failure } = this.photograph;
    const later = failure.waitS ? `Try again in about ${seconds(failure.waitS)}.` : "";
    const said = [failure.said && `The server said: ${failure.said}`, failure.requestId && `Request ${failure.requestId}`];
    const error = element("div", { classes: "error" }, [
      element("p", {}, [element("strong", { text: failure.message }), ` ${failure.advice || later}`]),
      ...said.filter(Boolean).map((text) => element("p", { classes: "small", text })),
    ]);
    if (failure.hopeless) return [error];
    return [error, this.#actions(button("Try again", () => this.acts.again(this.photograph),
      { label: `Try ${this.photograph.name} again` }))];
  }

  answered() {
    const { answer, options, file, name } = this.photograph;
    this.node.append(views(file, answer));
    return [
      ...(answer.degraded ? [this.#degraded(answer)] : []),
      labels(answer.predictions),
      timing(answer),
      this.#actions(
        copyButton("Copy as JSON", () => JSON.stringify(answer, null, 2), `Copy the answer for ${name} as JSON`),
        copyButton("Copy as curl", () => curl(name, options), `Copy the request for ${name} as a curl line`),
      ),
    ];
  }

  #degraded({ crops }) {
    return element("div", { classes: "notice" }, [
      element("p", {
        text: `The server was busy and looked at ${counted(crops, "crop")} only, ` +
          "so this answer is a little less sure than usual.",
      }),
      button("Ask again for all of them", () => this.acts.whole(this.photograph)),
    ]);
  }

  #actions(...buttons) {
    return element("div", { classes: "actions" }, buttons);
  }

  #cancelButton() {
    return button("Cancel", () => this.acts.cancel(this.photograph), { label: `Cancel ${this.photograph.name}` });
  }

  #cancel() {
    return this.#actions(this.#cancelButton());
  }
}
