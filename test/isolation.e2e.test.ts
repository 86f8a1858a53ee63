/** What a guest and its VMM cannot reach, and what a greedy guest cannot hurt. */
import assert from "node:assert/strict";
import { readFileSync, readdirSync, statSync } from "node:fs";
import { networkInterfaces } from "node:os";
import { afterEach, beforeAll, describe, inject, test } from "vitest";
import { eventually } from "./api.ts";
import type { Api } from "./api.ts";
import { vmmPids } from "./host-inventory.ts";
import { Product } from "./product.ts";

const product = new Product(inject("product"));
let api: Api;

beforeAll(() => {
  api = product.api();
});
afterEach(async () => {
  await api.destroyAll();
});

describe("a guest's network", () => {
  test("reaches neither host, agent, control plane, other guests, metadata nor private addresses", async () => {
    const [guest, other] = await Promise.all([api.create(), api.create()]);
    await api.sh(
      other.id,
      "nohup python3 -m http.server 8000 --bind 0.0.0.0 >/dev/null 2>&1 & until curl -s -o /dev/null http://127.0.0.1:8000; do sleep 0.05; done",
    );
    const { port, agentPort } = product.options;
    const hostAddresses = Object.values(networkInterfaces())
      .flatMap((each) => each ?? [])
      .filter((each) => each.family === "IPv4" && !each.internal)
      .map((each) => each.address);
    const gateway = await api.sh(guest.id, "ip -4 route show default | awk '{print $3}'");
    const targets = [
      ...[gateway, "169.254.0.22", "169.254.169.254", ...hostAddresses].flatMap((address) => [
        `${address}:${port}`,
        `${address}:${agentPort}`,
        `${address}:22`,
        `${address}:80`,
      ]),
      "10.0.0.1:80",
      "10.11.0.0:49983",
      "10.11.0.1:49983",
      "10.11.0.2:49983",
      "10.11.0.3:8000",
      "10.12.0.0:80",
      "10.12.0.1:80",
      "172.16.0.1:80",
      "192.168.0.1:80",
    ];
    const script = [
      "import socket,sys,concurrent.futures as f",
      "def t(a):",
      "  h,p=a.rsplit(':',1)",
      "  s=socket.socket(); s.settimeout(3)",
      "  try: s.connect((h,int(p))); return a",
      "  except OSError: return ''",
      `print(' '.join(filter(None,f.ThreadPoolExecutor(32).map(t,${JSON.stringify(targets)}))))`,
    ].join("\n");
    const answer = await api.exec(guest.id, { cmd: "python3", args: ["-c", script], timeout_sec: 60 });
    assert.equal(answer.exit_code, 0, answer.stderr);
    assert.equal(answer.stdout.trim(), "", "reached from inside a guest");
  });
});

describe("a VMM", () => {
  test("has no root uid, no capabilities, seccomp on, and sees no other sandbox's files", async () => {
    const sandboxes = await Promise.all([api.create(), api.create()]);
    const pids = vmmPids(product.agentDataDir);
    assert.ok(pids.length >= sandboxes.length);
    const uids = new Set<string>();
    for (const pid of pids) {
      const status = Object.fromEntries(
        readFileSync(`/proc/${pid}/status`, "utf8")
          .split("\n")
          .map((line) => line.split(":\t") as [string, string]),
      );
      const [real, effective] = (status["Uid"] ?? "").split("\t");
      assert.notEqual(real, "0");
      assert.notEqual(effective, "0");
      uids.add(real ?? "");
      for (const set of ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"])
        assert.match(status[set] ?? "", /^0+$/);
      assert.equal(status["NoNewPrivs"], "1");
      assert.equal(status["Seccomp"], "2");
      // Its root shows the one run directory that is its own, and nothing of the agent's data.
      const root = `/proc/${pid}/root`;
      assert.throws(() => statSync(root + product.agentDataDir), /ENOENT/);
      assert.throws(() => statSync(`${root}/home`), /ENOENT/);
      assert.throws(() => statSync(`${root}/root`), /ENOENT/);
      assert.ok(!readdirSync(root).some((name) => ["var", "work", "srv", "run"].includes(name)));
    }
    assert.equal(uids.size, pids.length, "two VMMs share a uid");
  });
});

describe("a greedy guest hurts only itself, and the API says what happened", () => {
  test("a fork bomb", async () => {
    const [greedy, neighbour] = await Promise.all([api.create(), api.create()]);
    const bomb = await api.exec(greedy.id, {
      cmd: "python3 -c 'import os\nwhile True:\n try: os.fork()\n except OSError: pass'",
      shell: true,
      timeout_sec: 5,
    });
    assert.ok(bomb.timed_out || bomb.exit_code !== 0);
    assert.equal(await api.sh(neighbour.id, "echo fine"), "fine");
    await eventually("the bombed sandbox takes commands again", 60_000, async () => {
      const answer = await api.call<{ exit_code: number }>("POST", `/v1/sandboxes/${greedy.id}/exec`, {
        cmd: "true",
        timeout_sec: 20,
      });
      return answer.status === 200 && answer.body.exit_code === 0 ? true : undefined;
    });
  });

  test("a memory hog", async () => {
    const [greedy, neighbour] = await Promise.all([api.create(), api.create()]);
    const hog = await api.exec(greedy.id, {
      cmd: "python3",
      args: ["-c", "x=[]\nwhile True: x.append(bytearray(1<<20))"],
      timeout_sec: 60,
    });
    assert.notEqual(hog.exit_code, 0);
    assert.equal(hog.signal, "SIGKILL");
    assert.equal(await api.sh(greedy.id, "echo still here"), "still here");
    assert.equal(await api.sh(neighbour.id, "echo fine"), "fine");
  });

  test("a full disk", async () => {
    const [greedy, neighbour] = await Promise.all([api.create(), api.create()]);
    const fill = await api.exec(greedy.id, {
      cmd: "fallocate -l 100G /home/user/big || dd if=/dev/zero of=/home/user/big bs=1M count=100 status=none; fallocate -l $(($(stat -f -c %a*%S / ) - 4096)) /home/user/rest; dd if=/dev/zero of=/home/user/more bs=1M status=none",
      shell: true,
      timeout_sec: 120,
    });
    assert.notEqual(fill.exit_code, 0);
    assert.match(fill.stderr, /No space left on device/);
    const form = new FormData();
    form.append("path", "/home/user/one-more");
    form.append("file", new Blob([new Uint8Array(4 << 20)]), "one-more");
    const response = await fetch(new URL(`/v1/sandboxes/${greedy.id}/files/write`, api.url), {
      method: "POST",
      headers: { "x-api-key": api.key },
      body: form,
    });
    assert.equal(response.status, 507);
    assert.equal(((await response.json()) as { error: { code: string } }).error.code, "out_of_disk");
    assert.equal(await api.sh(greedy.id, "rm -f /home/user/*; echo mended"), "mended");
    assert.equal(await api.sh(neighbour.id, "echo fine"), "fine");
  });

  test("a guest that crashes its kernel ends as an error that says so", async () => {
    const { id } = await api.create();
    await api
      .call("POST", `/v1/sandboxes/${id}/exec`, {
        cmd: "sudo sh -c 'echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger'",
        shell: true,
        timeout_sec: 10,
      })
      .catch(() => undefined);
    const row = await eventually("the row is final", 60_000, async () => {
      const now = await api.get(id);
      return now.status === "error" || now.status === "stopped" ? now : undefined;
    });
    assert.equal(row.status, "error");
    assert.ok(row.error !== undefined && row.error.message.length > 0, "no reason is given");
  });
});
