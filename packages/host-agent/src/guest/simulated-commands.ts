/**
 * Commands of a simulated guest: a handful of programs, each a function of its
 * text. What it does not know it repeats, with "simulated:" before it.
 */
import type { Command } from "./process-calls.ts";

export interface SimulatedRun {
  stdout: string | Uint8Array;
  stderr: string;
  exitCode: number;
  /** Files that it took away. */
  removed: readonly string[];
  /** What it left in the guest's memory. */
  remembered: Readonly<Record<string, string>>;
  /** The guest ends by it. */
  ends: "guest_crashed" | "guest_shutdown" | undefined;
  /** How long it would have run, in milliseconds. */
  sleepMs: number;
}

interface GuestFacts {
  hostname: string;
  /** Whose guest it is, as the last `/init` said. */
  sandboxId: string;
  file(path: string): Uint8Array | undefined;
}

/** Nobody takes it for a machine. */
const UNAME = (hostname: string): string =>
  `Simulated ${hostname} 0.0.0-simulated (no machine: rookery's simulated VMM) simulated`;

export function runSimulated(command: Command, guest: GuestFacts): SimulatedRun {
  const text = textOf(command);
  const [program = "", ...args] = text.split(/\s+/);
  const rest = text.slice(program.length).trimStart();
  switch (program) {
    case "true":
      return done("");
    case "false":
      return { ...done(""), exitCode: 1 };
    case "exit":
      return { ...done(""), exitCode: (Number(args[0]) || 0) & 0xff };
    case "uname":
      return done(`${UNAME(guest.hostname)}\n`);
    case "hostname":
      return done(`${guest.hostname}\n`);
    case "echo":
      return done(`${rest.replace(/^(["'])(.*)\1$/s, "$2")}\n`);
    case "sleep":
      return { ...done(""), sleepMs: (Number(args[0]) || 0) * 1000 };
    case "cat": {
      if (args[0] === undefined) return done(command.stdin);
      const content = guest.file(args[0]);
      if (content !== undefined) return done(content);
      return { ...done(""), stderr: `cat: ${args[0]}: No such file or directory\n`, exitCode: 1 };
    }
    case "rm": {
      // Up to the next command of the line: none of those is run.
      const end = args.findIndex((arg) => arg.endsWith(";"));
      const paths = end === -1 ? args : args.slice(0, end + 1);
      return { ...done(""), removed: paths.map((path) => path.replace(/;$/, "")) };
    }
    // For fault tests: a word that must outlive pauses, and whose guest it was that took it.
    case "note":
      return { ...done(guest.sandboxId), remembered: { [`note-${args[0] ?? ""}`]: guest.sandboxId } };
    case "panic":
      return { ...done(""), ends: "guest_crashed" };
    case "poweroff":
      return { ...done(""), ends: "guest_shutdown" };
    default:
      return done(`simulated: ${text}\n`);
  }
}

function done(stdout: string | Uint8Array): SimulatedRun {
  return {
    stdout,
    stderr: "",
    exitCode: 0,
    removed: [],
    remembered: {},
    ends: undefined,
    sleepMs: 0,
  };
}

/** `sh -c TEXT` is TEXT. */
function textOf({ cmd, args }: Command): string {
  const isShell = /^(\/usr)?(\/bin\/)?(ba)?sh$/.test(cmd) && /^-[a-z]*c$/.test(args[0] ?? "");
  return isShell ? (args[1] ?? "") : [cmd, ...args].join(" ");
}
