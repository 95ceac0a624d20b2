// Work in order, a few at once: what runs keeps its place while it waits for a busy server.

export class Queue {
  #waiting = [];
  #running = 0;
  #held = false;

  /** `work(item)` returns a promise that never rejects. */
  constructor(width, work) {
    this.width = width;
    this.work = work;
  }

  add(item) {
    this.#waiting.push(item);
    this.#next();
  }

  /** Nothing new begins until `release`. */
  hold() {
    this.#held = true;
  }

  release() {
    this.#held = false;
    this.#next();
  }

  remove(item) {
    this.#waiting = this.#waiting.filter((other) => other !== item);
  }

  #next() {
    while (!this.#held && this.#running < this.width && this.#waiting.length > 0) {
      this.#running += 1;
      this.work(this.#waiting.shift()).finally(() => {
        this.#running -= 1;
        this.#next();
      });
    }
  }
}
