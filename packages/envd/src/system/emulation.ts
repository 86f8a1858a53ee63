/**
 * On an emulated CPU envd makes no machine code at run time.
 *
 * QEMU's TCG translates guest code once and keeps it; code that V8 writes and
 * patches it must throw away and translate anew. What stays is V8's
 * interpreter, which is part of the binary: measured, half the CPU for a small
 * call and 2.5 MB less memory. A real CPU keeps the compilers.
 */
import { readFileSync } from "node:fs";
import { setFlagsFromString } from "node:v8";

export function avoidMachineCodeUnderEmulation(): void {
  if (!/^model name\s*:.*QEMU TCG/m.test(readFileSync("/proc/cpuinfo", "utf8"))) return;
  // Before anything has run often enough to be compiled; V8 asks for them each time.
  for (const compiler of ["sparkplug", "maglev", "turbofan"]) setFlagsFromString(`--no-${compiler}`);
}
