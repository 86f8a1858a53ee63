/**
 * The floor: QEMU, a network namespace and envd's wire protocol by hand, and
 * nothing of the product's code. What is left is what the machine itself costs.
 *
 * A clone is spawned beforehand from the same warm image as the product's, and
 * waits (`-incoming defer`), as one in a pool does. No confinement, no journal,
 * no database: memory is mapped from a plain file, devices come by `exec:cat`.
 */
import { execFileSync, spawn, type ChildProcess } from "node:child_process";
import { randomBytes } from "node:crypto";
import { once } from "node:events";
import { closeSync, mkdirSync, openSync, readFileSync, rmSync, writeSync, ftruncateSync } from "node:fs";
import { Agent, request } from "node:http";
import { createConnection, type Socket } from "node:net";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { setTimeout as delay } from "node:timers/promises";

export interface WarmFiles {
  deviceState: string;
  /** The flat memory file that clones map. */
  memory: string;
  memoryMb: number;
  diskLayer: string;
  imageDisk: string;
}

/** Unpacks a warm image of the product's (pages and index) into one flat file. */
export function unpackWarmImage(warmDir: string, workDir: string): WarmFiles {
  const manifest = JSON.parse(readFileSync(join(warmDir, "manifest.json"), "utf8")) as {
    image: { diskPath: string };
    shape: { memoryMb: number };
    disk: { file: string };
  };
  const index = readFileSync(join(warmDir, "memory.index"));
  const pages = readFileSync(join(warmDir, "memory.pages"));
  const memory = join(workDir, "memory");
  const fd = openSync(memory, "w", 0o600);
  ftruncateSync(fd, manifest.shape.memoryMb << 20);
  let from = 0;
  for (let at = 24; at < index.length; at += 8) {
    const first = index.readUInt32LE(at);
    const word = index.readUInt32LE(at + 4);
    if (word >= 0x8000_0000) continue;
    writeSync(fd, pages, from, word * 4096, first * 4096);
    from += word * 4096;
  }
  closeSync(fd);
  return {
    deviceState: join(warmDir, "device.state"),
    memory,
    memoryMb: manifest.shape.memoryMb,
    diskLayer: join(warmDir, manifest.disk.file),
    imageDisk: manifest.image.diskPath,
  };
}

let counter = 0;

export class HandClone {
  readonly #name: string;
  readonly #address: string;
  readonly #dir: string;
  readonly #files: WarmFiles;
  readonly #http = new Agent({ keepAlive: true });
  readonly #token = randomBytes(32).toString("hex");
  #child: ChildProcess | undefined;
  #qmp: Qmp | undefined;

  private constructor(files: WarmFiles, workDir: string, index: number) {
    this.#files = files;
    this.#name = `rkfloor${index}`;
    this.#address = `10.254.${index >> 6}.${(index & 63) * 4 + 2}`;
    this.#dir = join(workDir, this.#name);
  }

  get pid(): number {
    return this.#child?.pid ?? 0;
  }

  /** A waiting clone in a namespace of its own. */
  static async spawn(files: WarmFiles, workDir: string): Promise<HandClone> {
    const clone = new HandClone(files, workDir, counter);
    counter += 1;
    clone.#makeNetwork();
    await clone.#start();
    return clone;
  }

  #makeNetwork(): void {
    const gateway = this.#address.replace(/\d+$/, (last) => String(Number(last) - 1));
    const name = this.#name;
    const inside = `table ip floor {
  chain pre { type nat hook prerouting priority -100; iifname "eth0" ip daddr ${this.#address} dnat to 169.254.0.21; }
  chain post { type nat hook postrouting priority 100; oifname "tap0" snat to 169.254.0.22; }
}`;
    this.#removeNetwork();
    const ip = (...args: string[]): void =>
      void execFileSync("ip", args, { stdio: ["ignore", "ignore", "inherit"] });
    ip("netns", "add", name);
    ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name);
    ip("addr", "add", `${gateway}/30`, "dev", name);
    ip("link", "set", name, "up");
    ip("-n", name, "addr", "add", `${this.#address}/30`, "dev", "eth0");
    ip("-n", name, "link", "set", "eth0", "up");
    ip("netns", "exec", name, "ip", "tuntap", "add", "dev", "tap0", "mode", "tap");
    // The warm guest remembers its gateway's address on the link, and is remembered.
    ip("-n", name, "link", "set", "tap0", "address", "02:72:6b:00:00:fe", "up");
    ip("-n", name, "addr", "add", "169.254.0.22/30", "dev", "tap0");
    ip("-n", name, "neigh", "add", "169.254.0.21", "lladdr", "02:72:6b:00:00:01", "dev", "tap0");
    execFileSync("ip", ["netns", "exec", name, "sysctl", "-qw", "net.ipv4.ip_forward=1"]);
    execFileSync("ip", ["netns", "exec", name, "nft", "-f", "-"], { input: inside });
  }

  #removeNetwork(): void {
    for (const args of [
      ["netns", "del", this.#name],
      ["link", "del", this.#name],
    ]) {
      try {
        execFileSync("ip", args, { stdio: "ignore" });
      } catch {
        // It was not there: nothing to remove.
      }
    }
  }

  async #start(): Promise<void> {
    mkdirSync(this.#dir, { recursive: true });
    const { diskLayer, imageDisk, memory, memoryMb } = this.#files;
    const disk = join(this.#dir, "disk.qcow2");
    execFileSync("qemu-img", ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", diskLayer, disk]);
    const socket = join(this.#dir, "qmp");
    const nodes = [
      { driver: "file", "node-name": "f0", filename: imageDisk, "read-only": true },
      { driver: "raw", "node-name": "n0", file: "f0", "read-only": true },
      { driver: "file", "node-name": "f1", filename: diskLayer, "read-only": true },
      { driver: "qcow2", "node-name": "n1", file: "f1", backing: "n0", "read-only": true },
      { driver: "file", "node-name": "f2", filename: disk },
      { driver: "qcow2", "node-name": "d0", file: "f2", backing: "n1" },
    ];
    this.#child = spawn(
      "ip",
      [
        ...["netns", "exec", this.#name, "qemu-system-x86_64"],
        ...["-M", "microvm,pit=on,pic=on,rtc=on,acpi=on,memory-backend=m,mem-merge=off,dump-guest-core=off"],
        ...[
          "-accel",
          "tcg,thread=multi,tb-size=128",
          "-cpu",
          "max",
          "-smp",
          "cpus=1,maxcpus=1",
          "-m",
          `${memoryMb}M`,
        ],
        ...[
          "-object",
          `memory-backend-file,id=m,size=${memoryMb}M,mem-path=${memory},share=off,merge=off,dump=off`,
        ],
        ...["-nodefaults", "-no-user-config", "-display", "none"],
        ...["-chardev", "ringbuf,id=con,size=65536", "-serial", "chardev:con"],
        ...["-qmp", `unix:${socket},server=on,wait=off`],
        ...nodes.flatMap((node) => ["-blockdev", JSON.stringify(node)]),
        ...["-device", "virtio-blk-device,drive=d0,id=blk0"],
        ...["-netdev", "tap,id=net0,ifname=tap0,script=no,downscript=no"],
        ...["-device", "virtio-net-device,netdev=net0,id=nic0,mac=02:72:6b:00:00:01"],
        ...["-no-reboot", "-S", "-incoming", "defer"],
      ],
      { stdio: ["ignore", "inherit", "inherit"] },
    );
    this.#qmp = await Qmp.connect(socket);
    await this.#qmp.command("migrate-set-capabilities", {
      capabilities: [{ capability: "x-ignore-shared", state: true }],
    });
  }

  /** Waiting → running. */
  async thaw(): Promise<void> {
    const qmp = this.#running();
    await qmp.command("migrate-incoming", { uri: `exec:cat ${this.#files.deviceState}` });
    await qmp.until("paused");
    await qmp.command("cont");
  }

  /** envd serves nobody before it: the least that a user of envd must do. */
  async init(): Promise<void> {
    const body = {
      restoreId: randomBytes(16).toString("hex"),
      sandboxId: "floor",
      hostname: "floor",
      machineId: randomBytes(16).toString("hex"),
      timestamp: new Date().toISOString(),
      entropy: randomBytes(64).toString("base64"),
      envVars: {},
      accessToken: this.#token,
      defaultUser: "user",
      growRootFs: false,
    };
    const { status, data } = await this.#post("/init", "application/json", Buffer.from(JSON.stringify(body)));
    if (status !== 204) throw new Error(`/init: ${status} ${data.toString()}`);
  }

  /** One process through envd, to its end; its standard output. */
  async exec(cmd: string, args: string[]): Promise<string> {
    const message = Buffer.from(JSON.stringify({ process: { cmd, args }, stdin: false }));
    const { status, data } = await this.#post(
      "/process.Process/Start",
      "application/connect+json",
      Buffer.concat([frameHeader(message.length), message]),
    );
    if (status !== 200) throw new Error(`Start: ${status}`);
    let out = "";
    let ended = false;
    for (let at = 0; at < data.length;) {
      const length = data.readUInt32BE(at + 1);
      const event = JSON.parse(data.toString("utf8", at + 5, at + 5 + length)) as {
        event?: { data?: { stdout?: string }; end?: unknown };
        error?: unknown;
      };
      if (event.error) throw new Error(JSON.stringify(event.error));
      out += Buffer.from(event.event?.data?.stdout ?? "", "base64").toString();
      ended ||= event.event?.end !== undefined;
      at += 5 + length;
    }
    if (!ended) throw new Error(`no end of ${cmd}`);
    return out;
  }

  /** POST /files of envd with raw bytes. */
  async upload(path: string, content: Buffer): Promise<void> {
    const { status, data } = await this.#post(
      `/files?path=${encodeURIComponent(path)}`,
      "application/octet-stream",
      content,
    );
    if (status !== 200) throw new Error(`/files: ${status} ${data.toString()}`);
  }

  /** A full `migrate` of the guest to a file, durable: what pausing costs without memory layers. */
  async migrateToFile(path: string): Promise<void> {
    const qmp = this.#running();
    await qmp.command("stop");
    await qmp.command("migrate-set-capabilities", {
      capabilities: [{ capability: "x-ignore-shared", state: false }],
    });
    await qmp.command("migrate-set-parameters", { "max-bandwidth": 2 ** 40 });
    await qmp.command("migrate", { uri: `exec:cat > ${path} && sync ${path}` });
    await qmp.migrated();
  }

  async dispose(): Promise<void> {
    this.#http.destroy();
    this.#qmp?.close();
    const child = this.#child;
    if (child !== undefined && child.exitCode === null && child.signalCode === null) {
      child.kill("SIGKILL");
      await once(child, "exit");
    }
    this.#removeNetwork();
    rmSync(this.#dir, { recursive: true, force: true });
  }

  #running(): Qmp {
    if (this.#qmp === undefined) throw new Error("not started");
    return this.#qmp;
  }

  async #post(path: string, type: string, body: Buffer): Promise<{ status: number; data: Buffer }> {
    // The guest's network answers some milliseconds after `cont`.
    const giveUpAt = Date.now() + 10_000;
    for (;;) {
      try {
        return await this.#postOnce(path, type, body);
      } catch (cause) {
        if (Date.now() > giveUpAt) throw cause;
        await delay(2);
      }
    }
  }

  #postOnce(path: string, type: string, body: Buffer): Promise<{ status: number; data: Buffer }> {
    const { promise, resolve, reject } = Promise.withResolvers<{ status: number; data: Buffer }>();
    const call = request(
      {
        host: this.#address,
        port: 49983,
        method: "POST",
        path,
        agent: this.#http,
        headers: {
          "content-type": type,
          "content-length": body.length,
          "connect-protocol-version": "1",
          "x-access-token": this.#token,
          authorization: `Basic ${Buffer.from("user:").toString("base64")}`,
        },
      },
      (response) => {
        const parts: Buffer[] = [];
        response.on("data", (part: Buffer) => parts.push(part));
        response.on("end", () => resolve({ status: response.statusCode ?? 0, data: Buffer.concat(parts) }));
        response.on("error", reject);
      },
    );
    call.on("error", reject);
    call.end(body);
    return promise;
  }
}

function frameHeader(length: number): Buffer {
  const header = Buffer.alloc(5);
  header.writeUInt32BE(length, 1);
  return header;
}

class Qmp {
  readonly #socket: Socket;
  readonly #answers: ((answer: { return?: unknown; error?: { desc: string } }) => void)[] = [];

  private constructor(socket: Socket) {
    this.#socket = socket;
    createInterface({ input: socket }).on("line", (line) => {
      const message = JSON.parse(line) as { return?: unknown; error?: { desc: string } };
      if ("return" in message || "error" in message) this.#answers.shift()?.(message);
    });
  }

  static async connect(path: string): Promise<Qmp> {
    for (let attempt = 0; ; attempt += 1) {
      const socket = createConnection(path);
      try {
        await once(socket, "connect");
        const qmp = new Qmp(socket);
        await qmp.command("qmp_capabilities");
        return qmp;
      } catch (cause) {
        if (attempt > 2000) throw cause;
        await delay(5);
      }
    }
  }

  async command(execute: string, args: Record<string, unknown> = {}): Promise<unknown> {
    const { promise, resolve } = Promise.withResolvers<{ return?: unknown; error?: { desc: string } }>();
    this.#answers.push(resolve);
    this.#socket.write(`${JSON.stringify({ execute, arguments: args })}\n`);
    const answer = await promise;
    if (answer.error) throw new Error(`${execute}: ${answer.error.desc}`);
    return answer.return;
  }

  async until(status: string): Promise<void> {
    while (((await this.command("query-status")) as { status: string }).status !== status) await delay(1);
  }

  async migrated(): Promise<void> {
    for (;;) {
      const { status } = (await this.command("query-migrate")) as { status: string };
      if (status === "completed") return;
      if (status === "failed" || status === "cancelled") throw new Error(`migration ${status}`);
      await delay(1);
    }
  }

  close(): void {
    this.#socket.destroy();
  }
}
