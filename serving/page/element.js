// Nodes of the document: text goes in as text, never as markup.

export const find = (id) => document.getElementById(id);

/** An element with classes, text, other attributes and children. */
export function element(tag, { classes = "", text = "", ...attributes } = {}, children = []) {
  const node = document.createElement(tag);
  if (classes) node.className = classes;
  if (text) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** A button that calls `act`; its accessible name may say more than its text. */
export function button(text, act, { classes = "plain", label = text } = {}) {
  const node = element("button", { classes, type: "button", text });
  if (label !== text) node.setAttribute("aria-label", label);
  node.addEventListener("click", act);
  return node;
}

/** Said by a screen reader once it has finished its sentence. */
export function announce(text) {
  find("announce").textContent = text;
}
