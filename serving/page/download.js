// All answers as one file: CSV with a row for each photograph, or JSON with everything.

import { element } from "./element.js";

const COLUMNS = ["file", "wnid", "label", "probability", "crops", "degraded", "model", "version", "total_ms", "error"];

/** RFC 4180, with the byte order mark without which a spreadsheet takes UTF-8 for something else. */
export function toCsv(photographs) {
  const rows = photographs.map(({ name, answer, failure }) => {
    if (!answer) return [name, "", "", "", "", "", "", "", "", failure?.message ?? "not answered yet"];
    const [first] = answer.predictions;
    const { model, crops, degraded, timing_ms: timings } = answer;
    return [name, first.wnid, first.label, first.probability, crops, degraded, model.name, model.version,
      timings.total, ""];
  });
  return `\uFEFF${[COLUMNS, ...rows].map((row) => row.map(cell).join(",")).join("\r\n")}\r\n`;
}

/** A text that begins like a formula would be run by a spreadsheet: an apostrophe keeps it a text. */
function cell(value) {
  const text = typeof value === "string" ? value.replace(/^[=+\-@\t\r]/, "'$&") : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

export function toJson(photographs) {
  const entries = photographs.map(({ name, answer, failure }) => ({
    file: name,
    ...(answer ?? { error: { status: failure?.status || null, message: failure?.message ?? "not answered yet" } }),
  }));
  return `${JSON.stringify(entries, null, 2)}\n`;
}

export function download(name, type, text) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000); // the browser has it by then
}
