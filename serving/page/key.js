// The API key, where the server wants one: kept until the tab is closed, sent to this origin alone.

const SLOT = "alexnet-key";
let held = "";

export function apiKey() {
  try {
    return sessionStorage.getItem(SLOT) ?? held;
  } catch {
    return held; // storage is switched off: the key lasts as long as the page
  }
}

export function rememberKey(key) {
  held = key;
  try {
    sessionStorage.setItem(SLOT, key);
  } catch {
    // `held` has it
  }
}

/** Characters a header can carry and a key has: printable ASCII without spaces. */
export const sendable = (key) => /^[\x21-\x7e]+$/.test(key);

/** Headers for a request of this page. */
export function headers() {
  const key = apiKey();
  return { accept: "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}
