// The field for an API key: shown when the server answers 401, gone once a key is given.

import { announce, find } from "./element.js";
import { apiKey, rememberKey, sendable } from "./key.js";

/** Asks for a key; a key that was there has been refused. */
export function askForKey() {
  if (!find("door").hidden) return;
  say(apiKey() ? "The server did not accept this key." : "");
  find("door").hidden = false;
  find("key").focus();
  announce("The server wants an API key.");
}

/** `opened` is called when a key was given. */
export function watchDoor(opened) {
  find("door").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = find("key").value.trim();
    if (!sendable(key)) return say("A key is one word of letters, digits and signs.");
    rememberKey(key);
    find("key").value = "";
    find("door").hidden = true;
    find("pick").focus();
    return opened();
  });
}

function say(text) {
  find("key-words").textContent = text;
  find("key").setAttribute("aria-invalid", String(text !== ""));
}
