/**
 * Makes a template's guest warm: what sandboxes do first was done before it is
 * frozen, so that their pages are in memory and envd's code is compiled.
 *
 * envd serves nobody before `/init`, so the template gets an identity too, with
 * a token that nobody learns; each clone's own `/init` replaces it.
 */
import { setTimeout as delay } from "node:timers/promises";
import { RookeryError } from "@rookery/protocol/errors";
import type { EnvdInit } from "../guest/envd-init.ts";
import type { EnvdClient } from "../guest/envd-client.ts";

/** What is used of envd's client. */
export type WarmGuest = Pick<
  EnvdClient,
  "waitHealthy" | "init" | "exec" | "writeFile" | "readFile" | "release"
>;

/** Part of a warm image's key: another way of priming makes another image. */
export const PRIMING_VERSION = 1;

const COMMAND_MS = 60_000;
const MAX_OUTPUT_BYTES = 64 << 10;
/** Each is run for its effects on memory; a program that an image lacks is none of its programs. */
const COMMANDS: readonly string[] = [
  "true",
  "uname -a; id; ls -la / /home /usr/bin >/dev/null; cat /etc/os-release /proc/uptime >/dev/null",
  "echo a b | grep -o a | sed s/a/b/ | sort | head -1 | tr b c | wc -c; find /etc -maxdepth 1 | xargs -n 50 echo",
  "command -v python3 && python3 -c 'import json, os, re, sys, hashlib, random, subprocess, socket, ssl, tempfile, threading, urllib.request'",
  'command -v node && node -e \'require("fs").readdirSync("/"); require("http"); require("crypto").randomUUID()\'',
  "command -v git && git --version && d=$(mktemp -d) && cd $d && git init -q && echo x > x && git add x && git -c user.name=x -c user.email=x@x commit -qm x && git log --oneline && cd / && rm -rf $d",
  "command -v curl && curl --version",
  "command -v sudo && sudo -n true",
];
/** Enough for V8 to compile what each call runs through. */
const ROUNDS = 8;
const FILE = "/tmp/.rookery-prime";
/** For packets of closed connections, and timers that run out once: what happens after the freeze happens in every clone. */
const SETTLE_MS = 300;

async function* someBytes(): AsyncGenerator<Uint8Array> {
  yield Buffer.alloc(100_000);
}

export interface PrimingTools {
  guest: WarmGuest;
  randomHex(bytes: number): string;
  randomBase64(bytes: number): string;
  nowMs(): number;
}

/** From a guest that was just booted to one that is ready to be frozen. */
export async function primeGuest(
  address: { host: string; port: number },
  tools: PrimingTools,
  signal: AbortSignal,
): Promise<void> {
  const { guest } = tools;
  const target = { ...address, accessToken: tools.randomHex(32) };
  const init = (): EnvdInit => ({
    restoreId: tools.randomHex(16),
    sandboxId: "template",
    hostname: "template",
    machineId: tools.randomHex(16),
    timestamp: new Date(tools.nowMs()).toISOString(),
    entropy: tools.randomBase64(64),
    envVars: {},
    accessToken: target.accessToken,
    defaultUser: "user",
    growRootFs: true,
  });
  const exec = async (command: string, how: { user?: string; shell: boolean }): Promise<void> => {
    const result = await guest.exec(
      target,
      {
        cmd: how.shell ? command : "/bin/sh",
        args: how.shell ? [] : ["-c", command],
        shell: how.shell,
        user: how.user,
        env: {},
        stdin: new Uint8Array(),
        timeoutMs: COMMAND_MS,
      },
      { maxOutputBytes: MAX_OUTPUT_BYTES },
      signal,
    );
    // 127 and the like: not every image has every program. One that never ends is broken.
    if (result.timedOut)
      throw new RookeryError("guest_error", `The template did not get through: ${command}`);
  };

  await guest.init(address, init(), signal);
  // What only booting needed need not be in every sandbox's memory.
  await exec("sync; echo 3 > /proc/sys/vm/drop_caches", { user: "root", shell: false });
  for (const command of COMMANDS) await exec(command, { shell: true });
  for (let round = 0; round < ROUNDS; round += 1) {
    await guest.init(address, init(), signal);
    await exec("true", { shell: false });
    await exec("true", { shell: true });
    await guest.writeFile(target, { path: FILE }, someBytes(), signal);
    await Array.fromAsync(guest.readFile(target, { path: FILE }, signal));
  }
  await exec(`rm -f ${FILE}; find /tmp /var/tmp -mindepth 1 -delete`, { user: "root", shell: false });
  await exec("sync", { user: "root", shell: false });
  await guest.release(address);
  await delay(SETTLE_MS, undefined, { signal });
}
