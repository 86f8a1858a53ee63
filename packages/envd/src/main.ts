/**
 * envd: the agent in every guest. It runs as root beside users' processes,
 * listens on all addresses (clients reach it through the host) and serves
 * nobody before /init (init/init-route.ts says how that is safe).
 *
 * What the host relies on: an idle envd does nothing at all; its answers are
 * bounded; and it is not to be trusted, since the guest's root may change it.
 */
import { readConfig } from "./config.ts";
import { GuestState } from "./guest-state.ts";
import { addEntropy } from "./init/apply-init.ts";
import { InitRoute } from "./init/init-route.ts";
import { MetricsReader } from "./metrics.ts";
import { ProcessTable } from "./process/process-table.ts";
import { Reaper } from "./process/reaper.ts";
import { createEnvdServer } from "./server.ts";
import { avoidMachineCodeUnderEmulation } from "./system/emulation.ts";
import { openNative } from "./system/native.ts";
import { protectFromOomKiller } from "./system/oom-score.ts";
import { randomHex } from "./system/random.ts";
import { openUserCgroup } from "./system/user-cgroup.ts";
import { Users } from "./system/users.ts";

const config = readConfig(process.env);
const warn = (message: string) => void process.stderr.write(`envd: ${message}\n`);
const log = (message: string) => {
  if (config.debug) warn(message);
};

avoidMachineCodeUnderEmulation();
if (process.getuid?.() !== 0) throw new Error("envd must run as root: it starts processes of other users");
process.umask(0o022);

const native = openNative(`${import.meta.dirname}/koffi.node`);
const cgroup = openUserCgroup();
if (cgroup.absence !== undefined) warn(`user processes have no cgroup of their own: ${cgroup.absence}`);
const oomScore = protectFromOomKiller();
if (oomScore.absence !== undefined) warn(`not protected from the OOM killer: ${oomScore.absence}`);

// Runs the path of /init once before the template is frozen: in a clone it is then no cold code.
addEntropy(Buffer.from(randomHex(64), "hex"), native);

const now = () => Date.now();
const state = new GuestState();
const users = new Users();
const server = createEnvdServer({
  native,
  cgroup,
  oomScore,
  reaper: new Reaper(native),
  state,
  users,
  table: new ProcessTable(),
  path: config.path,
  now,
  init: new InitRoute({ native, users, state, hostAddresses: config.hostAddresses }),
  metrics: new MetricsReader(now),
  log,
});
server.listen(config.port, config.address, () => {
  log(`listening on ${JSON.stringify(server.address())}`);
});
