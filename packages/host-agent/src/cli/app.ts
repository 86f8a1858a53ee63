/**
 * The commands of `rookery-agent`. What they do is handed in by `main.ts`.
 *
 * With --json, standard output holds JSON alone, one value a line; progress and
 * words for people go to standard error. Exit codes: 0 done, 1 failed, 3 the
 * registration token was refused, 78 the host was deleted, others (stricli's) not understood.
 */
import { buildApplication, buildCommand, buildRouteMap, text_en } from "@stricli/core";
import type { Application, CommandContext } from "@stricli/core";
import type { ConfigFlags } from "../config.ts";

export interface Actions {
  serve(flags: ConfigFlags): Promise<void>;
  doctor(flags: { data?: string | undefined; json: boolean }): Promise<void>;
  buildImage(flags: { data?: string | undefined; json: boolean }, name: string): Promise<void>;
  listImages(flags: { data?: string | undefined; json: boolean }): Promise<void>;
  destroyAll(flags: { data?: string | undefined; json: boolean }): Promise<void>;
}

const text = (brief: string, placeholder: string) =>
  ({ kind: "parsed", parse: String, optional: true, brief, placeholder }) as const;
const data = text("Data directory (ROOKERY_AGENT_DATA)", "DIR");
const json = { kind: "boolean", brief: "Print JSON", default: false, withNegated: false } as const;

/** stricli hands over undefined for flags that were not given. */
type DataAndJson = { data?: string | undefined; json: boolean };

export function buildAgentApp(
  actions: Actions,
  options: { version: string; exitCodeOf: (error: unknown) => number; wordsOf: (error: unknown) => string },
): Application<CommandContext> {
  const serve = buildCommand({
    docs: { brief: "Run the host agent" },
    parameters: {
      flags: {
        register: text("One-time registration token (ROOKERY_REGISTRATION_TOKEN)", "TOKEN"),
        controlPlane: text("URL of the control plane (ROOKERY_CONTROL_PLANE)", "URL"),
        address: text(
          "Where the control plane finds this host, and where to listen unless ROOKERY_AGENT_LISTEN says (ROOKERY_AGENT_ADDRESS)",
          "HOST:PORT",
        ),
        data,
      },
    },
    func: (flags: ConfigFlags) => actions.serve(flags),
  });
  const doctor = buildCommand({
    docs: { brief: "Tell what works on this host, and why the rest does not" },
    parameters: { flags: { data, json } },
    func: (flags: DataAndJson) => actions.doctor(flags),
  });
  const build = buildCommand({
    docs: { brief: "Build a guest image unless it is there already" },
    parameters: {
      flags: { data, json },
      positional: {
        kind: "tuple",
        parameters: [{ brief: "Name of the image", parse: String, placeholder: "name", default: "base" }],
      },
    },
    func: (flags: DataAndJson, name: string) => actions.buildImage(flags, name),
  });
  const list = buildCommand({
    docs: { brief: "List guest images" },
    parameters: { flags: { data, json } },
    func: (flags: DataAndJson) => actions.listImages(flags),
  });
  const destroyAll = buildCommand({
    docs: {
      brief: "Destroy all sandboxes of this host and all that the agent made outside of its data directory",
      fullDescription:
        "Ends the agent of the data directory first, if one runs. Images, warm images and snapshots stay.",
    },
    parameters: { flags: { data, json } },
    func: (flags: DataAndJson) => actions.destroyAll(flags),
  });
  const root = buildRouteMap({
    routes: {
      serve,
      doctor,
      image: buildRouteMap({ routes: { build, list }, docs: { brief: "Guest images" } }),
      destroyAll,
    },
    // `rookery-agent --register TOKEN …` is how a machine becomes a host.
    defaultCommand: "serve",
    aliases: { cleanup: "destroyAll" },
    docs: { brief: "Rookery's host agent: one per machine, runs its sandboxes" },
  });
  return buildApplication(root, {
    name: "rookery-agent",
    versionInfo: { currentVersion: options.version },
    scanner: { caseStyle: "allow-kebab-for-camel" },
    documentation: { caseStyle: "convert-camel-to-kebab" },
    determineExitCode: options.exitCodeOf,
    localization: {
      loadText: () => ({ ...text_en, exceptionWhileRunningCommand: options.wordsOf }),
    },
  });
}
