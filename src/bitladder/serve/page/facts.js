// What a run says about itself, in words. The report's facts.py has the same.

import { bytes } from "./format.js";

const BYTES = new Set(["ram_total", "ram_available", "disk_free", "vram_total", "vram_free"]);
const NAMES = {
  cpu: "Processor",
  cores: "Cores",
  features: "Instruction sets",
  ram_total: "Memory",
  ram_available: "Memory free",
  disk_free: "Disk space free",
  gpus: "GPUs",
  unified: "GPU shares the memory",
  text: "Text measured on",
  protocol: "Measured how",
  workload: "Workload",
  engine: "Engine",
  temperature: "Temperature",
  effort: "Search for scales",
  importance: "Importance matrix",
  device: "Computed on",
  endpoints: "Addresses",
  seed: "Seed",
};
const SENTENCES = {
  text: "{documents}; SHA-256 {sha256}",
  workload: "{name}, {inputs} inputs, SHA-256 {sha256}",
  engine: "{engine} {version}, {n_ctx} tokens for each request, requests at once: {n_parallel}, threads: {threads}",
  gpus: "{name}, {vram_total}, of which {vram_free} free",
};

/** Name and text of each value that says something; nested ones in one line. */
export const facts = (values) =>
  Object.entries(values)
    .map(([name, value]) => [nameOf(name), textOf(name, value)])
    .filter(([, text]) => text);

const own = (table, name) => (Object.hasOwn(table, name) ? table[name] : null);
const nameOf = (field) => own(NAMES, field) ?? field.charAt(0).toUpperCase() + field.slice(1).replaceAll("_", " ");

function textOf(name, value) {
  if (value === null || value === false) return "";
  if (value === true) return "yes";
  if (Number.isInteger(value) && BYTES.has(name)) return bytes(value);
  if (Array.isArray(value))
    return value
      .map((one) => textOf(name, one))
      .filter(Boolean)
      .join("; ");
  if (typeof value !== "object") return String(value);
  const texts = new Map(Object.entries(value).map(([key, one]) => [key, textOf(key, one)]));
  const sentence = own(SENTENCES, name);
  const wanted = sentence && [...sentence.matchAll(/\{(\w+)\}/g)].map((found) => found[1]);
  if (wanted?.every((key) => texts.has(key))) return sentence.replace(/\{(\w+)\}/g, (_, key) => texts.get(key));
  return [...texts]
    .filter(([, text]) => text)
    .map(([key, text]) => `${nameOf(key).toLowerCase()} ${text}`)
    .join(", ");
}
