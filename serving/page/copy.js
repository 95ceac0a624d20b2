// Copying to the clipboard, and the request as a line for the shell.

import { announce, button } from "./element.js";
import { apiKey } from "./key.js";

const SAID_MS = 1500;

/** A button that copies what `content()` says then. */
export function copyButton(text, content, label) {
  const node = button(text, async () => {
    const said = await copy(content()) ? "Copied" : "The browser does not allow copying";
    announce(said);
    node.textContent = said;
    setTimeout(() => { node.textContent = text; }, SAID_MS);
  }, { label });
  return node;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copySelected(text); // a page that came over plain http has no clipboard
  }
}

function copySelected(text) {
  const area = document.createElement("textarea");
  const focused = document.activeElement;
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return copied;
}

/** The same request as a command; the key stays out of it, for shells keep histories. */
export function curl(name, { crops, top, model }) {
  const query = new URLSearchParams({ crops, top, ...(model && { model }) });
  const part = `file=@"${name.replaceAll(/["\\]/g, "\\$&")}"`; // curl's own quoting of a file name
  const key = apiKey() ? ' -H "Authorization: Bearer $ALEXNET_KEY"' : "";
  return `curl${key} -F ${quoted(part)} ${quoted(`${location.origin}/classify?${query}`)}`;
}

/** One word for a POSIX shell, whatever it holds. */
function quoted(word) {
  return `'${word.replaceAll("'", "'\\''")}'`;
}
