/**
 * What is wrong with the network at present: one nftables table for a run,
 * loaded anew as a whole whenever a trouble begins or ends.
 *
 * A cut answers for the other side (RST). Silence drops, in one direction alone
 * or in both. Loss drops packets at random, and now and then resets a
 * connection, after its request went through. This kernel has no netem, so what
 * is late is late by a slow link: a token bucket (tc-tbf) that lets a full
 * packet through in the delay's time.
 */
import { execFile, execFileSync } from "node:child_process";
import { promisify } from "node:util";
import type { Path } from "./paths.ts";
import type { Node } from "./topology.ts";

const exec = promisify(execFile);

export type Trouble = { paths: readonly Path[] } & (
  | { kind: "cut" }
  /** `lost`: what gets lost on the way to the server, from it, or both. */
  | { kind: "silence"; lost: "requests" | "answers" | "both" }
  /** `share` of 1. */
  | { kind: "loss"; share: number }
);

const MILLE = 1_000;
/** Of the lost packets, those that end their connection. */
const RESET_SHARE = 0.1;
const FULL_PACKET_BYTES = 1_514;

export class Filters implements Disposable {
  readonly #table: string;
  readonly #troubles = new Map<Trouble, NodeJS.Timeout>();
  readonly #slow = new Map<Node, NodeJS.Timeout>();
  #loading: Promise<void> = Promise.resolve();

  constructor(slot: number) {
    this.#table = `inet faults${slot}`;
  }

  async begin(trouble: Trouble, ms: number): Promise<void> {
    const end = (): void => {
      this.#troubles.delete(trouble);
      void this.#load();
    };
    this.#troubles.set(trouble, setTimeout(end, ms));
    await this.#load();
  }

  /** A node's link is so slow that a full packet takes `delayMs`, each way. */
  async slowDown(node: Node, delayMs: number, ms: number): Promise<void> {
    clearTimeout(this.#slow.get(node));
    this.#slow.set(
      node,
      setTimeout(() => void this.#speedUp(node), ms),
    );
    const bitsPerSecond = Math.ceil((FULL_PACKET_BYTES * 8 * 1_000) / Math.max(1, delayMs));
    const bucket = ["root", "tbf", "rate", `${bitsPerSecond}bit`, "burst", "1600", "limit", "64kb"];
    await exec("tc", ["qdisc", "replace", "dev", node.link, ...bucket]);
    await exec("nsenter", [`--net=${node.namespace}`, "tc", "qdisc", "replace", "dev", "eth0", ...bucket]);
  }

  async heal(): Promise<void> {
    for (const timer of this.#troubles.values()) clearTimeout(timer);
    this.#troubles.clear();
    await this.#load();
    await Promise.all([...this.#slow.keys()].map((node) => this.#speedUp(node)));
  }

  [Symbol.dispose](): void {
    for (const timer of [...this.#troubles.values(), ...this.#slow.values()]) clearTimeout(timer);
    execFileSync("nft", ["-f", "-"], { input: `table ${this.#table}\ndelete table ${this.#table}\n` });
  }

  async #speedUp(node: Node): Promise<void> {
    clearTimeout(this.#slow.get(node));
    if (!this.#slow.delete(node)) return;
    await exec("tc", ["qdisc", "delete", "dev", node.link, "root"]);
    await exec("nsenter", [`--net=${node.namespace}`, "tc", "qdisc", "delete", "dev", "eth0", "root"]);
  }

  /** One after the other, so that the last one loaded is what is so now. */
  async #load(): Promise<void> {
    const mine = this.#loading.then(async () => {
      const loading = exec("nft", ["-f", "-"]);
      loading.child.stdin?.end(this.#ruleset());
      await loading;
    });
    this.#loading = mine.catch(() => undefined);
    await mine;
  }

  #ruleset(): string {
    const rules = [...this.#troubles.keys()].flatMap((trouble) =>
      trouble.paths.flatMap((path) => rulesOf(trouble, path)),
    );
    const hook = (name: string) => `chain ${name} { type filter hook ${name} priority 0; jump troubles; }`;
    return `table ${this.#table}
delete table ${this.#table}
table ${this.#table} {
  chain troubles {
    ${rules.join("\n    ")}
  }
  ${["input", "output", "forward"].map(hook).join("\n  ")}
}
`;
  }
}

function rulesOf(trouble: Trouble, { client, server, port }: Path): string[] {
  const requests = `ip saddr ${client} ip daddr ${server} tcp dport ${port}`;
  const answers = `ip saddr ${server} ip daddr ${client} tcp sport ${port}`;
  switch (trouble.kind) {
    case "cut":
      return [requests, answers].map((packets) => `${packets} reject with tcp reset`);
    case "silence":
      return [
        ...(trouble.lost === "answers" ? [] : [`${requests} drop`]),
        ...(trouble.lost === "requests" ? [] : [`${answers} drop`]),
      ];
    case "loss": {
      const per = (share: number) => `numgen random mod ${MILLE} < ${Math.ceil(share * MILLE)}`;
      return [
        `${answers} ${per(trouble.share * RESET_SHARE)} reject with tcp reset`,
        ...[requests, answers].map((packets) => `${packets} ${per(trouble.share)} drop`),
      ];
    }
    default:
      return trouble satisfies never;
  }
}
