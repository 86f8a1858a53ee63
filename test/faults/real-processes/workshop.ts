/** What the runs of one enclosure share: programs that the control plane's uid can reach, a database to copy, a certificate. */
import { chmodSync, cpSync, existsSync, mkdirSync } from "node:fs";
import { join, resolve } from "node:path";
import { furnish, run } from "./enclosure.ts";
import { makeTemplate } from "./database-server.ts";
import { makeAuthority } from "./front-door.ts";
import type { Workshop } from "./real-world.ts";
import { centerOf } from "./topology.ts";

const packages = resolve(import.meta.dirname, "../../../packages");

/** `slots`: runs at once. */
export async function openWorkshop(root: string, slots: number): Promise<Workshop> {
  const agentProgram = join(packages, "host-agent/dist/rookery-agent.mjs");
  const bundle = join(packages, "control-plane/dist");
  for (const path of [agentProgram, bundle]) {
    if (!existsSync(path))
      throw new Error(`${path} is not there: build it with node packages/NAME/build.mjs`);
  }
  furnish(root);
  const node = join(root, "node");
  cpSync(process.execPath, node);
  chmodSync(node, 0o755);
  const programs = join(root, "control-plane");
  cpSync(bundle, programs, { recursive: true });
  run("chmod", "-R", "u=rwX,go=rX", programs);
  const home = join(root, "template");
  mkdirSync(home);
  const addresses = Array.from({ length: slots }, (_, slot) => centerOf(slot));
  return {
    root,
    node,
    agentProgram,
    controlPlane: join(programs, "control-plane.mjs"),
    template: await makeTemplate(home),
    authority: makeAuthority(root, addresses),
  };
}
