/**
 * `postgres-main start|stop|status --data-dir DIR --socket-dir DIR [--uid N]
 * [--pid-file FILE] [--binaries DIR]`: the embedded database, for the bootstrap.
 * Prints one JSON object; failures go to stderr, with exit code 1.
 */
import { rename, rm, writeFile } from "node:fs/promises";
import { parseArgs } from "node:util";
import {
  DEFAULT_UID,
  OWNER,
  postgresPid,
  startPostgres,
  stopPostgres,
  urlOf,
} from "./db/embedded-postgres.ts";

const START_TIMEOUT_MS = 60_000;
const STOP_TIMEOUT_MS = 20_000;

async function main(argv: string[]): Promise<unknown> {
  const { positionals, values } = parseArgs({
    args: argv,
    allowPositionals: true,
    options: {
      "data-dir": { type: "string" },
      binaries: { type: "string" },
      "socket-dir": { type: "string" },
      uid: { type: "string" },
      "pid-file": { type: "string" },
    },
  });
  const { "data-dir": home, "socket-dir": socketDir, "pid-file": pidFile, binaries } = values;
  if (!home || !socketDir) throw new Error("--data-dir and --socket-dir are needed");
  switch (positionals[0]) {
    case "start": {
      const uid = parseUid(values.uid);
      const running = await startPostgres({ home, socketDir, uid, binaries, timeoutMs: START_TIMEOUT_MS });
      if (pidFile) {
        await writeFile(`${pidFile}.new`, `${running.pid}\n`);
        await rename(`${pidFile}.new`, pidFile);
      }
      return { ...running, uid: uid ?? process.getuid?.() };
    }
    case "stop":
      await stopPostgres(home, STOP_TIMEOUT_MS);
      if (pidFile) await rm(pidFile, { force: true });
      return { running: false };
    case "status": {
      const pid = await postgresPid(home);
      return { running: pid !== undefined, pid, socketDir, database: OWNER, url: urlOf(socketDir) };
    }
    default:
      throw new Error("say start, stop or status");
  }
}

/** As root another uid must be used, since the server refuses root; else only our own can be. */
function parseUid(text: string | undefined): number | undefined {
  const own = process.getuid?.();
  if (own !== 0) {
    if (text !== undefined && Number(text) !== own) throw new Error("only root can choose --uid");
    return undefined;
  }
  const uid = text === undefined ? DEFAULT_UID : Number(text);
  if (!Number.isInteger(uid) || uid < 1) throw new Error("--uid must be a uid above 0");
  return uid;
}

try {
  console.log(JSON.stringify(await main(process.argv.slice(2))));
} catch (cause) {
  console.error(cause instanceof Error ? cause.message : cause);
  process.exitCode = 1;
}
