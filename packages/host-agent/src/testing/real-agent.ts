/**
 * The agent's core as `serve` opens it, on real guests, in a data directory of
 * the test's own: what lies between its RPC server and the guests, and nothing else.
 */
import { mkdir, mkdtemp } from "node:fs/promises";
import { join } from "node:path";
import { pino } from "pino";
import { readConfig } from "../config.ts";
import type { CommandResult } from "../guest/commands.ts";
import { removeTree } from "../host/atomic-file.ts";
import type { SandboxId } from "../ids.ts";
import { TEST_DATA_DIR, testImage, testImageStoreOptions } from "../image/testing/test-image.ts";
import { openAgent } from "../open-agent.ts";
import type { Agent } from "../open-agent.ts";
import type { Operation, SandboxSource } from "../sandbox-manager/sandbox.ts";

/** A first guest image takes minutes. */
const IMAGE_MS = 600_000;
/** Anything that takes longer has hung, the building of a warm image among it. */
const PATIENCE_MS = 280_000;
const DISK_MB = 4_096;

export interface RealAgent extends AsyncDisposable {
  readonly agent: Agent;
  /** The answer is there when it runs. */
  create(source?: SandboxSource): Promise<SandboxId>;
  /** A command of the control plane that comes after all others. */
  nextOperation(sandboxId: SandboxId): Operation;
  exec(sandboxId: SandboxId, cmd: string, options?: { user?: string }): Promise<CommandResult>;
  /** Its output; a failure throws. */
  sh(sandboxId: SandboxId, cmd: string): Promise<string>;
}

/**
 * `environment` as `rookery-agent serve` has it; images are shared with the other
 * suites. `warm: false`: nothing is booted before a test asks for it.
 */
export async function openRealAgent(
  environment: Record<string, string>,
  options: { warm?: boolean } = {},
): Promise<RealAgent> {
  await using held = new AsyncDisposableStack();
  const image = await testImage(AbortSignal.timeout(IMAGE_MS));
  const parts = await testImageStoreOptions(join(TEST_DATA_DIR, "images"));
  held.defer(() => removeTree(parts.envdBundleDir));
  await mkdir(TEST_DATA_DIR, { recursive: true });
  // On the images' file system: they are linked.
  const dir = await mkdtemp(join(TEST_DATA_DIR, "agent-"));
  held.defer(() => removeTree(dir));
  const config = readConfig(
    {
      ROOKERY_AGENT_DATA: join(dir, "data"),
      ROOKERY_RUNTIME_DIR: `/run/${dir.slice(dir.lastIndexOf("/") + 1)}`,
      ROOKERY_IMAGE_DIR: parts.imagesDir,
      ROOKERY_ENVD_BUNDLE: parts.envdBundleDir,
      ROOKERY_GUEST_FILES: parts.guestFilesDir,
      ROOKERY_POOL: "0",
      ROOKERY_SLOTS: "16",
      ...environment,
    },
    {},
    join(import.meta.dirname, "../.."),
  );
  held.defer(() => removeTree(config.runtimeDir));
  const logger = pino({ level: environment["ROOKERY_LOG_LEVEL"] ?? "silent" });
  const agent = await openAgent({ config, logger, signal: AbortSignal.timeout(PATIENCE_MS) });
  held.use(agent);
  held.defer(async () => void (await agent.manager.destroyAll()));

  let lastId = 0;
  let generation = 0n;
  const nextOperation = (sandboxId: SandboxId): Operation => {
    generation += 1n;
    return { sandboxId, generation, deadlineUnixMs: Date.now() + PATIENCE_MS };
  };
  const exec: RealAgent["exec"] = (sandboxId, cmd, { user } = {}) =>
    agent.manager.withEnvd(sandboxId, (target, ended) =>
      agent.envd.exec(
        target,
        { cmd, args: [], shell: true, env: {}, user, stdin: new Uint8Array(), timeoutMs: PATIENCE_MS },
        { maxOutputBytes: 1 << 20 },
        AbortSignal.any([ended, AbortSignal.timeout(PATIENCE_MS)]),
      ),
    );
  const create: RealAgent["create"] = async (source = { kind: "image", name: "base" }) => {
    lastId += 1;
    const id = `sb${String(lastId).padStart(18, "0")}` as SandboxId;
    await agent.manager.create(
      {
        id,
        teamId: "team-1",
        source,
        vcpus: 1,
        memoryMb: 512,
        diskMb: Math.max(DISK_MB, Math.ceil(image.rootDisk.sizeBytes / (1 << 20))),
        lifetime: { timeoutSec: 0, onTimeout: "pause", mode: "idle" },
        env: {},
        envdAccessToken: `token-of-${id}`,
      },
      nextOperation(id),
    );
    return id;
  };
  // Its warm image: tests are not to wait for that.
  if (options.warm !== false) await agent.manager.destroy(nextOperation(await create()));
  const resources = held.move();
  return {
    agent,
    nextOperation,
    exec,
    create,
    async sh(sandboxId, cmd) {
      const { exitCode, stdout, stderr } = await exec(sandboxId, cmd);
      const text = Buffer.from(stdout).toString();
      if (exitCode !== 0) throw new Error(`${cmd}: ${exitCode}\n${text}${Buffer.from(stderr).toString()}`);
      return text.trim();
    },
    [Symbol.asyncDispose]: () => resources.disposeAsync(),
  };
}
