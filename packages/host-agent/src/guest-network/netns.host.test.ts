import { strict as assert } from "node:assert";
import { once } from "node:events";
import { readFile, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { networkInterfaces } from "node:os";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { run } from "../host/run.ts";
import type { Slot } from "../ids.ts";
import { guestNetworkContract } from "./guest-network.contract.ts";
import type { NetworkLease } from "./guest-network.ts";
import { NetnsNetworks } from "./netns.ts";
import { addressesOfGuest, isInstanceTag, MAX_SLOTS, slotName, slotNetworks, uidOfSlot } from "./slots.ts";
import type { InstanceTag } from "./slots.ts";
import { batch, placeGuest, placeInternet } from "./testing/fake-guest.ts";
import type { Standin } from "./testing/fake-guest.ts";

const PUBLIC = "44.44.44.44";
const RESOLVERS = [PUBLIC, "44.44.44.45"];
const PRIVATE = ["10.200.1.1", "172.20.1.1", "192.168.77.1", "100.66.1.1", "169.254.169.254", "198.18.1.1"];
const ENVD_PORT = 49_983;
const signal = new AbortController().signal;
const networks = slotNetworks({ guestCidr: "10.11.0.0/16", linkCidr: "10.12.0.0/16", slots: 1024 });

/** Of this run alone, and different for each `salt`. */
function makeTag(salt: number): InstanceTag {
  const tag = ((process.pid * 8 + salt) & 0xffff).toString(16).padStart(4, "0");
  assert(isInstanceTag(tag));
  return tag;
}
const open = (tag: InstanceTag, options: { guestCidr?: string; linkCidr?: string } = {}): NetnsNetworks =>
  new NetnsNetworks({ tag, resolvers: RESOLVERS, envdPort: ENVD_PORT, ...options });
const lines = async (...argv: [string, ...string[]]): Promise<string[]> =>
  (await run(argv)).stdout.split("\n");
const exists = (path: string): Promise<boolean> =>
  readFile(path).then(
    () => true,
    () => false,
  );

guestNetworkContract("netns", { open: () => open(makeTag(0)), uidOf: (slot) => uidOfSlot(makeTag(0), slot) });

describe("a guest", () => {
  const tag = makeTag(1);
  const driver = open(tag);
  const plan = (slot: number): NetworkLease => driver.plan(slot as Slot, uidOfSlot(tag, slot as Slot));
  const hostServer = createServer((_request, response) => response.end("host"));
  const started: Standin[] = [];
  let guest: NetworkLease;
  let other: NetworkLease;
  let hostPort: number;
  let internet: Standin;
  const ask = async (lease: NetworkLease, path: string): Promise<string> =>
    (
      await fetch(`http://${lease.envdHost}:${lease.envdPort}${path}`, { signal: AbortSignal.timeout(5000) })
    ).text();
  const reach = (to: string, from = ""): Promise<string> =>
    ask(guest, `/tcp?to=${to}${from && `&from=${from}`}`);

  beforeAll(async () => {
    await driver.prepareHost(signal);
    [guest, other] = [plan(1), plan(2)];
    await Promise.all([driver.up(guest, signal), driver.up(other, signal)]);
    internet = await placeInternet(`rtnet${tag}`, [...RESOLVERS, ...PRIVATE]);
    started.push(internet, ...(await Promise.all([placeGuest(guest), placeGuest(other)])));
    hostServer.listen(0, "0.0.0.0");
    await once(hostServer, "listening");
    hostPort = (hostServer.address() as AddressInfo).port;
  });
  afterAll(async () => {
    hostServer.close();
    for (const standin of started) await standin[Symbol.asyncDispose]();
    for (const lease of [guest, other]) await driver.down(lease, signal);
    await driver.restoreHost(signal);
  });

  test("is reached by the host, and sees its gateway as the caller", async () => {
    assert.equal(await ask(guest, "/who"), "169.254.0.22");
    assert.equal(await ask(other, "/who"), "169.254.0.22");
  });

  test("reaches the public Internet, and is seen there as the host", async () => {
    assert.equal(await reach(`${PUBLIC}:80`), "connected");
    const [, guestNamespace] = started;
    const script = `fetch("http://${PUBLIC}/who").then((r) => r.text()).then(console.log)`;
    assert.equal(await guestNamespace?.exec(process.execPath, "-e", script), "198.51.100.1\n");
  });

  test("gets names from the resolvers of the host's choice, by addresses that never change", async () => {
    const [first = "", second = ""] = driver.addressing.nameservers;
    assert.equal(await ask(guest, `/udp?to=${first}:53`), `hello of 198.51.100.1 from ${first}`);
    assert.equal(await ask(guest, `/udp?to=${second}:53`), `hello of 198.51.100.1 from ${second}`);
    assert.equal(await ask(guest, `/udp?to=${first}:80`), "timeout");
  });

  test("reaches no address of the host", async () => {
    const own = Object.values(networkInterfaces()).flatMap((all) => all ?? []);
    const addresses = own.filter(({ family }) => family === "IPv4").map(({ address }) => address);
    assert(addresses.includes(addressesOfGuest(networks, guest.envdHost).hostLink));
    await Promise.all(
      [...addresses, "169.254.0.22", "198.51.100.1"].map(async (address) => {
        assert.match(await reach(`${address}:${hostPort}`), /timeout|ECONNREFUSED/, address);
      }),
    );
  });

  test("reaches no other guest, by none of its addresses, nor by the host", async () => {
    const { guest: theirs, namespaceLink } = addressesOfGuest(networks, other.envdHost);
    await Promise.all(
      [theirs, namespaceLink, addressesOfGuest(networks, other.envdHost).hostLink].map(async (address) => {
        assert.equal(await reach(`${address}:${ENVD_PORT}`), "timeout", address);
      }),
    );
  });

  test("reaches no private or link-local network that the host does reach", async () => {
    await Promise.all(
      PRIVATE.map(async (address) => {
        assert.equal(
          await (await fetch(`http://${address}/who`)).text(),
          "198.51.100.1",
          "the test's own ground",
        );
        assert.equal(await reach(`${address}:80`), "timeout", address);
      }),
    );
  });

  test("cannot speak as anyone else", async () => {
    const [, guestNamespace] = started;
    for (const address of ["169.254.0.20", "44.1.2.3", "10.9.9.9"]) {
      await guestNamespace?.exec("ip", "addr", "add", `${address}/32`, "dev", "eth0");
      assert.equal(await reach(`${PUBLIC}:80`, address), "timeout", address);
    }
    assert.equal(await reach(`${PUBLIC}:80`, "169.254.0.21"), "connected");
  });

  test("has no IPv6", async () => {
    const slot = slotName(tag, guest.slot);
    for (const where of [["-n", slot], []]) {
      const { stdout } = await run([
        "ip",
        ...where,
        "-j",
        "-6",
        "addr",
        "show",
        ...(where.length > 0 ? [] : ["dev", slot]),
      ]);
      const found = JSON.parse(stdout) as { ifname?: string }[];
      assert.deepEqual(
        found.filter(({ ifname }) => ifname !== undefined && ifname !== "lo"),
        [],
      );
    }
  });

  test("cannot be called from beyond the host", async () => {
    await internet.exec("ip", "route", "add", guest.envdHost, "via", "198.51.100.1");
    const verdict = await fetch(`http://${PUBLIC}/tcp?to=${guest.envdHost}:${ENVD_PORT}`);
    assert.equal(await verdict.text(), "timeout");
  });

  test("that has broken out into its namespace is still held there", async () => {
    const { hostLink } = addressesOfGuest(networks, guest.envdHost);
    const slot = slotName(tag, guest.slot);
    // Root in the namespace, its own rules gone: only the host's table is left.
    await run(["ip", "netns", "exec", slot, "nft", "flush", "ruleset"]);
    const targets = [
      `${hostLink}:${hostPort}`,
      `${other.envdHost}:${ENVD_PORT}`,
      ...PRIVATE.map((ip) => `${ip}:80`),
    ];
    const script = `
      const net = require("node:net");
      const reach = (to) => new Promise((resolve) => {
        const [host, port] = to.split(":");
        const socket = net.connect(port, host, () => resolve(to));
        socket.on("error", () => resolve());
        setTimeout(() => { socket.destroy(); resolve(); }, 700);
      });
      Promise.all(${JSON.stringify([...targets, `${PUBLIC}:80`])}.map(reach)).then((all) => {
        console.log(all.filter(Boolean).join()); process.exit();
      });`;
    assert.equal(
      (await run(["ip", "netns", "exec", slot, process.execPath, "-e", script])).stdout,
      `${PUBLIC}:80\n`,
    );
  });
});

describe("a namespace", () => {
  const tag = makeTag(2);
  const driver = open(tag);
  const name = slotName(tag, 3 as Slot);
  const plan = (): NetworkLease => driver.plan(3 as Slot, uidOfSlot(tag, 3 as Slot));
  const indexOfTap = async (): Promise<unknown> =>
    (
      JSON.parse((await run(["ip", "-n", name, "-j", "link", "show", "tap0"])).stdout) as [
        { ifindex: number },
      ]
    )[0].ifindex;
  beforeAll(() => driver.prepareHost(signal));
  afterAll(() => driver.restoreHost(signal));

  test("has the rules that were reviewed", async () => {
    await driver.up(plan(), signal);
    try {
      const { stdout } = await run(["ip", "netns", "exec", name, "nft", "-s", "list", "ruleset"]);
      const { guest, namespaceLink } = addressesOfGuest(networks, plan().envdHost);
      const portable = stdout.replaceAll(guest, "GUEST").replaceAll(namespaceLink, "NAMESPACE_LINK");
      await expect(portable).toMatchFileSnapshot("golden/namespace.nft");
    } finally {
      await driver.down(plan(), signal);
    }
  });

  test("that is whole is left alone, and one that is not is made anew", async () => {
    await driver.up(plan(), signal);
    const index = await indexOfTap();
    await run(["ip", "-n", name, "link", "set", "tap0", "alias", "first"]);
    await driver.up(plan(), signal);
    assert.equal(await indexOfTap(), index);
    await driver.up({ ...plan(), uid: plan().uid + 1 }, signal);
    assert.equal(
      (await lines("ip", "-n", name, "link", "show", "tap0")).some((line) => line.includes("first")),
      false,
    );
    await driver.down(plan(), signal);

    const halves = [
      () => run(["ip", "netns", "add", name]),
      () => writeFile(`/run/netns/${name}`, ""), // `ip netns add` died between its two steps
      () => run(["ip", "link", "add", name, "type", "veth", "peer", "name", `rt${tag}`]),
    ];
    for (const makeHalf of halves) {
      await makeHalf();
      assert.deepEqual(await driver.listOwnedSlots(signal), [3]);
      await driver.up(plan(), signal);
      await indexOfTap();
      await driver.down(plan(), signal);
      assert.deepEqual(await driver.listOwnedSlots(signal), []);
    }
  });

  test("of a number that this agent does not have, left by one that had more, goes too", async () => {
    const left = (MAX_SLOTS - 1) as Slot;
    assert.throws(() => driver.plan(left, 0), /there are/);
    await run(["ip", "netns", "add", slotName(tag, left)]);
    assert.deepEqual(await driver.listOwnedSlots(signal), [left]);
    await driver.downSlot(left, signal);
    await driver.downSlot(left, signal);
    assert.deepEqual(await driver.listOwnedSlots(signal), []);
  });

  test("whose making is cut off at any moment goes without a trace", async () => {
    for (const afterMs of [1, 3, 6, 12, 25, 50]) {
      await driver
        .up(plan(), AbortSignal.timeout(afterMs))
        .catch((error: Error) => assert.equal(error.name, "TimeoutError"));
      await driver.down(plan(), signal);
      assert.deepEqual(await driver.listOwnedSlots(signal), []);
    }
  });

  test("lets the VMM of its uid open the TAP, and no other", async () => {
    const lease = plan();
    await driver.up(lease, signal);
    // A VMM has a /dev of its own: the host's node may be root's alone.
    const script = `mount -t tmpfs none /dev/net && mknod -m 666 /dev/net/tun c 10 200 && exec "$@"`;
    const open = (uid: number): Promise<unknown> => {
      const confined = ["unshare", "--mount", "sh", "-c", script, "sh"] as const;
      const dropped = [
        "setpriv",
        `--reuid=${uid}`,
        `--regid=${uid}`,
        "--clear-groups",
        "--bounding-set=-all",
        "--inh-caps=-all",
      ];
      const qemu = [
        "qemu-system-x86_64",
        "-M",
        "none",
        "-nodefaults",
        "-display",
        "none",
        "-monitor",
        "stdio",
      ];
      const nic = ["-netdev", "tap,id=n0,ifname=tap0,script=no,downscript=no"];
      return run(["nsenter", `--net=/run/netns/${name}`, ...confined, ...dropped, "--", ...qemu, ...nic], {
        input: "quit\n",
      });
    };
    try {
      await open(lease.uid);
      await assert.rejects(open(lease.uid + 1), /could not configure.*not permitted/);
    } finally {
      await driver.down(lease, signal);
    }
  });

  test("has no larger packets than the host's way out", async () => {
    await driver.up(plan(), signal);
    try {
      const [route] = JSON.parse((await run(["ip", "-j", "route", "show", "default"])).stdout) as {
        dev: string;
      }[];
      const mtuOf = async (device: string): Promise<string> =>
        readFile(`/sys/class/net/${device}/mtu`, "utf8");
      const uplink = route === undefined ? "1500" : (await mtuOf(route.dev)).trim();
      assert.equal((await mtuOf(name)).trim(), `${Math.min(1500, Number(uplink))}`);
    } finally {
      await driver.down(plan(), signal);
    }
  });
});

describe("the host", () => {
  /** What bears one of `tags`: other agents may come and go on this machine meanwhile. */
  const tracesOf = async (...tags: InstanceTag[]): Promise<string[]> => {
    const all = await Promise.all([
      lines("nft", "list", "ruleset"),
      lines("ip", "route", "show", "table", "all"),
      lines("ip", "-br", "link"),
      lines("ip", "netns", "list"),
    ]);
    return all
      .flat()
      .filter((line) => tags.some((tag) => line.includes(`rk${tag}`) || line.endsWith(`_${tag} {`)));
  };
  const forwards = async (): Promise<boolean> =>
    (await readFile("/proc/sys/net/ipv4/ip_forward", "utf8")) === "1\n";
  const countAgents = async (): Promise<number> =>
    (await lines("nft", "list", "tables")).filter((line) => line.includes(" rookery_")).length;

  test("is as it was when the last agent has gone, and only then", async () => {
    const tags = [makeTag(3), makeTag(4)] as const;
    const [before, agents] = [await forwards(), await countAgents()];
    const [one, other] = [open(tags[0]), open(tags[1])];
    await Promise.all([one.prepareHost(signal), other.prepareHost(signal)]);
    const [a, b] = [one.plan(1 as Slot, 1), other.plan(1 as Slot, 2)];
    assert.notEqual(a.envdHost, b.envdHost);
    await Promise.all([one.up(a, signal), other.up(b, signal)]);
    assert.deepEqual([await one.listOwnedSlots(signal), await other.listOwnedSlots(signal)], [[1], [1]]);
    await one.down(a, signal);
    await one.restoreHost(signal);
    assert(await forwards());
    assert.deepEqual(await tracesOf(tags[0]), []);
    assert.deepEqual(await other.listOwnedSlots(signal), [1]);
    await other.down(b, signal);
    await other.restoreHost(signal);
    await other.restoreHost(signal);
    assert.deepEqual(await tracesOf(...tags), []);
    if (agents === 0 && (await countAgents()) === 0) assert.equal(await forwards(), before);
  });

  test("gives an agent that starts again the block that it had", async () => {
    const tag = makeTag(5);
    const first = open(tag);
    await first.prepareHost(signal);
    const lease = first.plan(1 as Slot, 1);
    const second = open(tag);
    await second.prepareHost(signal);
    assert.deepEqual(second.plan(1 as Slot, 1), lease);
    await second.restoreHost(signal);
  });

  test("gets its rules back with the next namespace when someone flushed them", async () => {
    const tag = makeTag(6);
    const driver = open(tag);
    await driver.prepareHost(signal);
    const lease = driver.plan(1 as Slot, 1);
    const isThere = async (): Promise<boolean> =>
      (await lines("nft", "list", "tables")).some((line) => line.endsWith(`_${tag}`));
    assert(await isThere());
    await open(tag).restoreHost(signal);
    assert(!(await isThere()));
    await expect
      .poll(() => driver.up(lease, signal).then(isThere), { timeout: 15_000, interval: 500 })
      .toBe(true);
    await driver.down(lease, signal);
    await driver.restoreHost(signal);
  });

  test("that has routes into all blocks is told so", async () => {
    const dev = `rt${makeTag(7)}`;
    await batch(
      `link add ${dev} type veth peer name ${dev}p\nlink set ${dev} up\nroute add 10.77.0.0/16 dev ${dev}\n`,
    );
    try {
      const driver = open(makeTag(7), { guestCidr: "10.77.0.0/16", linkCidr: "10.78.0.0/16" });
      const reason = /10\.77\.0\.0\/16 on rt.*Configure two other private networks/;
      assert.match((await driver.probe(signal)).reason ?? "", reason);
      await assert.rejects(driver.prepareHost(signal), reason);
      assert.throws(() => driver.plan(1 as Slot, 1), /prepareHost comes before/);
    } finally {
      await run(["ip", "link", "del", dev]);
    }
    assert(!(await exists(`/sys/class/net/${dev}/mtu`)));
  });
});
