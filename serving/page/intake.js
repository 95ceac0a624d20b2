// Where photographs come in: dropped anywhere, pasted, or chosen.

import { find } from "./element.js";

/** `take(files)` is called with a FileList. */
export function watchIntake(take) {
  const over = (is) => find("drop").classList.toggle("over", is);
  find("pick").addEventListener("click", () => find("choose").click());
  find("choose").addEventListener("change", ({ target }) => {
    take([...target.files]);
    target.value = ""; // the same file may be chosen again
  });
  document.addEventListener("paste", ({ clipboardData }) => take([...clipboardData.files]));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    over(true);
  });
  document.addEventListener("dragleave", ({ relatedTarget }) => relatedTarget || over(false));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    over(false);
    take([...event.dataTransfer.files]);
  });
}
