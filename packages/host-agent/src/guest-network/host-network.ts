/**
 * What all guest networks of one agent share on the host: a block of slots, a
 * table of the packet filter, and forwarding between interfaces.
 *
 * The table's name, `rookery_BLOCK_TAG`, is the claim to the block: it stands
 * as long as guests may need it, over restarts of the agent, and goes with the
 * machine's memory as they do. Of two agents that claim one block at once the
 * one with the lesser tag has it.
 *
 * Forwarding is the whole host's setting. Who turns it on leaves a note in
 * /run; whoever removes the last of our tables turns it off again.
 */
import { readFile, rm, writeFile } from "node:fs/promises";
import { z } from "zod";
import { isErrno } from "../host/errno.ts";
import { run } from "../host/run.ts";
import { formatIpv4Block, overlaps, parseIpv4Block } from "./ipv4.ts";
import type { Ipv4Block } from "./ipv4.ts";
import { hostRules } from "./nft-rules.ts";
import { blockRanges, freeBlocks, namePrefix } from "./slots.ts";
import type { InstanceTag, SlotNetworks } from "./slots.ts";

const IP_FORWARD = "/proc/sys/net/ipv4/ip_forward";
const IP_FORWARD_NOTE = "/run/rookery-turned-ip-forward-on";
const DEFAULT_MTU = 1500;
/** Someone may reload the host's firewall without ours: it is put back with the next namespace. */
const REFRESH_MS = 5000;

export interface HostNetworkOptions {
  tag: InstanceTag;
  networks: SlotNetworks;
  resolvers: readonly string[];
}

export interface HostClaim {
  block: number;
  /** Of the way out: no guest packet is larger. */
  mtu: number;
}

const tablesSchema = z.object({
  nftables: z.array(z.object({ table: z.object({ family: z.string(), name: z.string() }).optional() })),
});

const chainsSchema = z.object({
  nftables: z.array(
    z.object({
      chain: z
        .object({
          family: z.string(),
          table: z.string(),
          name: z.string(),
          hook: z.string().optional(),
          policy: z.string().optional(),
        })
        .optional(),
    }),
  ),
});

const routesSchema = z.array(
  z.object({ dst: z.string(), dev: z.string().optional(), table: z.string().optional() }),
);
type Route = z.infer<typeof routesSchema>[number];

export class HostNetwork {
  readonly #options: HostNetworkOptions;
  #claim: HostClaim | undefined;
  #refreshing: Promise<HostClaim> | undefined;
  #refreshedAtMs = Number.NEGATIVE_INFINITY;

  constructor(options: HostNetworkOptions) {
    this.#options = options;
  }

  /** Undefined before the first `ensure`. */
  get claim(): HostClaim | undefined {
    return this.#claim;
  }

  /** Claims a block and puts up the table. Repeated, it mends what others broke. */
  async ensure(signal: AbortSignal): Promise<HostClaim> {
    if (this.#claim !== undefined && performance.now() - this.#refreshedAtMs < REFRESH_MS) return this.#claim;
    // Shared by all callers, so no one of them may abort it; each program in it has a time-out.
    this.#refreshing ??= this.#refresh().finally(() => (this.#refreshing = undefined));
    const claim = await this.#refreshing;
    signal.throwIfAborted();
    return claim;
  }

  /** Removes the table, and turns forwarding off if we had turned it on and no other agent is left. */
  async restore(signal: AbortSignal): Promise<void> {
    this.#claim = undefined;
    this.#refreshedAtMs = Number.NEGATIVE_INFINITY;
    const claims = await listClaims(signal);
    for (const { table, tag } of claims) {
      // Added first: deleting what is not there would be an error.
      if (tag === this.#options.tag) await nft(`table inet ${table}\ndelete table inet ${table}\n`, signal);
    }
    if (
      claims.every(({ tag }) => tag === this.#options.tag) &&
      (await readText(IP_FORWARD_NOTE)) !== undefined
    ) {
      await writeFile(IP_FORWARD, "0");
      await rm(IP_FORWARD_NOTE, { force: true });
    }
  }

  /** Why no block could be claimed, or undefined. Changes nothing. */
  async whyNoBlock(signal: AbortSignal): Promise<string | undefined> {
    const claims = await listClaims(signal);
    if (claims.some(({ tag }) => tag === this.#options.tag)) return undefined;
    const routes = await this.#foreignRoutes(await listRoutes(signal));
    return this.#candidates(claims, routes).length > 0 ? undefined : noBlock(this.#options.networks, routes);
  }

  async #refresh(): Promise<HostClaim> {
    const signal = AbortSignal.timeout(30_000);
    const [claims, routes] = await Promise.all([listClaims(signal), listRoutes(signal)]);
    const mine = claims.find(({ tag }) => tag === this.#options.tag);
    const block = mine?.block ?? (await this.#claimBlock(claims, routes, signal));
    await this.#load(block, signal);
    await turnForwardingOn();
    this.#claim = { block, mtu: await uplinkMtu(routes) };
    this.#refreshedAtMs = performance.now();
    return this.#claim;
  }

  async #claimBlock(
    claims: readonly Claim[],
    routes: readonly Route[],
    signal: AbortSignal,
  ): Promise<number> {
    const foreign = await this.#foreignRoutes(routes);
    for (const block of this.#candidates(claims, foreign)) {
      await this.#load(block, signal);
      const rivals = (await listClaims(signal)).filter((claim) => claim.block === block);
      if (rivals.every(({ tag }) => tag >= this.#options.tag)) return block;
      const table = tableName(block, this.#options.tag);
      await nft(`table inet ${table}\ndelete table inet ${table}\n`, signal);
    }
    throw new Error(noBlock(this.#options.networks, foreign));
  }

  #candidates(claims: readonly Claim[], routes: readonly ForeignRoute[]): number[] {
    const { networks, tag } = this.#options;
    const taken = new Set(claims.map(({ block }) => block));
    return freeBlocks(networks, { tag, taken, routes: routes.map((route) => route.block) });
  }

  async #load(block: number, signal: AbortSignal): Promise<void> {
    const { tag, networks, resolvers } = this.#options;
    const { links } = blockRanges(networks, block);
    const table = tableName(block, tag);
    await nft(hostRules({ table, prefix: namePrefix(tag), links, resolvers }), signal);
  }

  async #foreignRoutes(routes: readonly Route[]): Promise<ForeignRoute[]> {
    return routes
      .filter(({ dst, dev }) => dst !== "default" && dev?.startsWith(namePrefix(this.#options.tag)) !== true)
      .map((route) => ({ block: parseIpv4Block(route.dst), dev: route.dev }));
  }
}

interface ForeignRoute {
  block: Ipv4Block;
  dev: string | undefined;
}

interface Claim {
  table: string;
  block: number;
  tag: string;
}

const tableName = (block: number, tag: InstanceTag): string => `rookery_${block}_${tag}`;

/** All agents' claims on this machine. */
async function listClaims(signal: AbortSignal): Promise<Claim[]> {
  const { stdout } = await run(["nft", "-j", "list", "tables", "inet"], { signal });
  return tablesSchema.parse(JSON.parse(stdout)).nftables.flatMap(({ table }) => {
    const parts = /^rookery_(\d+)_([0-9a-f]{4})$/.exec(table?.name ?? "");
    return parts?.[2] === undefined ? [] : [{ table: parts[0], block: Number(parts[1]), tag: parts[2] }];
  });
}

/** Chains of others, such as Docker's, that drop by default what is forwarded: an accept of ours does not lift that. */
export async function foreignForwardDrops(signal: AbortSignal): Promise<string[]> {
  const { stdout } = await run(["nft", "-j", "list", "chains"], { signal });
  return forwardDrops(stdout);
}

export function forwardDrops(nftJson: string): string[] {
  return chainsSchema
    .parse(JSON.parse(nftJson))
    .nftables.flatMap(({ chain }) =>
      chain?.hook === "forward" && chain.policy === "drop"
        ? [`chain ${chain.family} ${chain.table} ${chain.name}`]
        : [],
    );
}

async function listRoutes(signal: AbortSignal): Promise<Route[]> {
  const { stdout } = await run(["ip", "-j", "-4", "route", "show", "table", "all"], { signal });
  return routesSchema.parse(JSON.parse(stdout));
}

async function nft(rules: string, signal: AbortSignal): Promise<void> {
  await run(["nft", "-f", "-"], { input: rules, signal });
}

async function turnForwardingOn(): Promise<void> {
  if ((await readFile(IP_FORWARD, "utf8")).trim() !== "0") return;
  await writeFile(IP_FORWARD_NOTE, "net.ipv4.ip_forward was 0 before a Rookery host agent needed it.\n");
  await writeFile(IP_FORWARD, "1");
}

/** The least of all ways out, since which one a packet takes is not ours to say. */
async function uplinkMtu(routes: readonly Route[]): Promise<number> {
  const devices = new Set(
    routes.flatMap(({ dst, dev }) => (dst === "default" && dev !== undefined ? [dev] : [])),
  );
  const mtus = await Promise.all([...devices].map((dev) => readText(`/sys/class/net/${dev}/mtu`)));
  return Math.min(DEFAULT_MTU, ...mtus.filter((mtu) => mtu !== undefined).map(Number));
}

function noBlock({ guests, links }: SlotNetworks, routes: readonly ForeignRoute[]): string {
  const inTheWay = routes
    .filter(({ block }) => overlaps(block, guests) || overlaps(block, links))
    .map(({ block, dev }) => `${formatIpv4Block(block)}${dev === undefined ? "" : ` on ${dev}`}`);
  const why =
    inTheWay.length === 0
      ? "other agents have it all"
      : `it has routes to ${inTheWay.slice(0, 5).join(", ")}`;
  return `no part of ${formatIpv4Block(guests)} and ${formatIpv4Block(links)} is free on this host: ${why}. Configure two other private networks for guests`;
}

async function readText(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, "utf8");
  } catch (cause) {
    if (isErrno(cause, "ENOENT")) return undefined;
    throw cause;
  }
}
