/**
 * Progress on a terminal or in a log: a line when a step begins, one when it
 * ends with its time, and, while it lasts, what it is doing now.
 */
import { stdout } from "node:process";
import { styleText } from "node:util";

let live = stdout.isTTY === true && !process.env.CI;
const dim = (text) => (live && !process.env.NO_COLOR ? styleText("dim", text) : text);
const mark = (ok) => {
  const sign = ok ? "✓" : "✗";
  return live && !process.env.NO_COLOR ? styleText(ok ? "green" : "red", sign) : sign;
};

/** For work side by side: lines only, for nothing may overwrite another's line. */
export function linesOnly() {
  live = false;
}

/**
 * Runs one step and shows it. `work` gets a function that shows what it does now.
 * @template T
 * @param {string} title
 * @param {(note: (text: string) => void) => Promise<T>} work
 * @returns {Promise<T>}
 */
export async function step(title, work) {
  const begun = performance.now();
  const seconds = () => `${((performance.now() - begun) / 1000).toFixed(1)} s`;
  let latest = "";
  let printed = "";
  const show = () => {
    if (live) stdout.write(`\r\x1b[2K… ${title} ${dim(`${seconds()} ${latest}`.slice(0, 100))}`);
  };
  const timer = live ? setInterval(show, 200) : undefined;
  if (!live) stdout.write(`… ${title}\n`);
  const note = (text) => {
    latest = text.trim().split("\n").at(-1) ?? "";
    if (!live && latest !== "" && latest !== printed) {
      printed = latest;
      stdout.write(`    ${latest}\n`);
    }
  };
  const end = (ok) => {
    clearInterval(timer);
    stdout.write(`${live ? "\r\x1b[2K" : ""}${mark(ok)} ${title} ${dim(`(${seconds()})`)}\n`);
  };
  try {
    const result = await work(note);
    end(true);
    return result;
  } catch (cause) {
    end(false);
    throw cause;
  }
}

/** A fact worth a line of its own. */
export function say(text) {
  stdout.write(`${text}\n`);
}
