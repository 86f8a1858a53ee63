/**
 * Loaded into a real agent before its program (`node --import`): the wall clock
 * as JavaScript sees it is off by what a file says, in milliseconds. Monotonic
 * time and timers are the kernel's, as when somebody sets a machine's clock.
 *
 * OpenSSL's and the file system's clocks stay right. libfaketime would bend them
 * too, and is no part of what this product needs on a machine.
 */
import { readFileSync } from "node:fs";

const LOOK_MS = 50;
const path = process.env.ROOKERY_FAULTS_CLOCK;
const RealDate = Date;
let skewMs = 0;

function look() {
  try {
    skewMs = Number(readFileSync(path, "utf8")) || 0;
  } catch {
    skewMs = 0; // no file, no skew
  }
}
look();
setInterval(look, LOOK_MS).unref();

const now = () => RealDate.now() + skewMs;
globalThis.Date = new Proxy(RealDate, {
  construct: (target, args, newTarget) =>
    Reflect.construct(target, args.length === 0 ? [now()] : args, newTarget),
  apply: () => new RealDate(now()).toString(),
  get: (target, name) => (name === "now" ? now : Reflect.get(target, name)),
});
