/**
 * What a guest last wrote to its console, for people to read: printable, few
 * lines. The guest is hostile; the console is its to fill.
 */

/** ESC [ … letter */
const COLOURS = new RegExp(`${String.fromCodePoint(0x1b)}\\[[0-9;?]*[A-Za-z]`, "g");
const SHOWN_LINES = 12;
const SHOWN_LINE_CHARS = 200;

/** Printable lines of the console's last bytes. */
export function consoleLines(raw: Buffer): string[] {
  return raw
    .toString("latin1")
    .replaceAll(COLOURS, "")
    .split(/[\r\n]+/)
    .map((line) =>
      line
        .replaceAll(/[^\u0020-\u007e]/g, "")
        .trim()
        .slice(0, SHOWN_LINE_CHARS),
    )
    .filter((line) => line !== "");
}

/** Did the kernel itself say that it is lost? Printed by panic() (kernel/panic.c) whatever the log level. */
export function saysPanic(lines: readonly string[]): boolean {
  return lines.some((line) => line.includes("Kernel panic - not syncing"));
}

/** The last lines; after a panic those from its message on, because the trace that follows buries it. */
export function consoleTail(lines: readonly string[]): string {
  const panic = lines.findIndex((line) => line.includes("Kernel panic - not syncing"));
  const from = panic >= 0 ? Math.max(0, panic - 1) : Math.max(0, lines.length - SHOWN_LINES);
  return lines.slice(from, from + SHOWN_LINES).join("\n");
}
