// One photograph and where it is on its way; the card and the table draw it at each `change`.

export const OPEN = new Set(["waiting", "sending", "holding", "locked"]);

export class Photograph extends EventTarget {
  state = "waiting"; // sending, holding (until the server is less busy), locked (a key), answered, failed
  sent = 0; // bytes on their way
  answer = null;
  failure = null;
  #stop = new AbortController();

  /** `options` are those of the page when it was chosen: `{crops, top, model, degrade}`. */
  constructor(file, number, options) {
    super();
    this.file = file;
    this.number = number;
    this.options = options;
    this.name = file.name || "pasted picture";
  }

  get signal() {
    return this.#stop.signal;
  }

  get open() {
    return OPEN.has(this.state);
  }

  become(state, facts = {}) {
    Object.assign(this, facts, { state });
    this.dispatchEvent(new Event("change"));
  }

  /** Whatever is going on with it ends; it can be asked again. */
  cancel(failure) {
    const stop = this.#stop;
    this.#stop = new AbortController();
    this.become("failed", { failure });
    stop.abort();
  }

  /** Ends a countdown before its time. */
  hurry() {
    this.dispatchEvent(new Event("hurry"));
  }
}
