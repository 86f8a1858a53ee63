/**
 * The commands of `rookery`: each is a program of this repository, run with the
 * terminal handed through, so that progress, colours (TTY, NO_COLOR) and --json
 * are that program's own.
 */
import { buildApplication, buildCommand, buildRouteMap } from "@stricli/core";
import type { Application, CommandContext } from "@stricli/core";

/** Runs a script of `scripts/`; the answer is its exit code. */
export type RunScript = (script: string, args: readonly string[]) => Promise<number>;

const json = { kind: "boolean", brief: "Print JSON", default: false, withNegated: false } as const;
const argument = (set: boolean, name: string): string[] => (set ? [name] : []);

export function buildRookeryApp(
  runScript: RunScript,
  options: { version: string; exit: (code: number) => void },
): Application<CommandContext> {
  const run = async (script: string, args: readonly string[]): Promise<void> => {
    options.exit(await runScript(script, args));
  };
  const up = buildCommand({
    docs: { brief: "Bring the product up on this machine; what runs already is left alone" },
    parameters: {
      flags: {
        detach: { kind: "boolean", brief: "Return when it is ready", default: false, withNegated: false },
      },
    },
    func: ({ detach }: { detach: boolean }) => run("up.mjs", argument(detach, "--detach")),
  });
  const down = buildCommand({
    docs: { brief: "Stop the product, sandboxes too; data stay" },
    parameters: {},
    func: () => run("down.mjs", []),
  });
  const doctor = buildCommand({
    docs: { brief: "Tell what works on this machine, and why the rest does not" },
    parameters: { flags: { json } },
    func: (flags: { json: boolean }) => run("host.mjs", ["doctor", ...argument(flags.json, "--json")]),
  });
  const build = buildCommand({
    docs: { brief: "Build a guest image unless it is there already" },
    parameters: {
      flags: { json },
      positional: {
        kind: "tuple",
        parameters: [{ brief: "Name of the image", parse: String, placeholder: "name", default: "base" }],
      },
    },
    func: (flags: { json: boolean }, name: string) =>
      run("host.mjs", ["image", "build", name, ...argument(flags.json, "--json")]),
  });
  const list = buildCommand({
    docs: { brief: "List guest images" },
    parameters: { flags: { json } },
    func: (flags: { json: boolean }) => run("host.mjs", ["image", "list", ...argument(flags.json, "--json")]),
  });
  const root = buildRouteMap({
    routes: {
      up,
      down,
      doctor,
      image: buildRouteMap({ routes: { build, list }, docs: { brief: "Guest images" } }),
    },
    docs: { brief: "Rookery: microVM sandboxes on machines of your own" },
  });
  return buildApplication(root, {
    name: "rookery",
    versionInfo: { currentVersion: options.version },
  });
}
