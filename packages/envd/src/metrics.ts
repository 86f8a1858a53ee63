/**
 * GET /metrics: what the guest uses now. CPU is the mean since the last call
 * (since boot at the first), so nothing has to be sampled while nobody asks.
 */
import { readFileSync, statfsSync } from "node:fs";
import { availableParallelism } from "node:os";

export interface Metrics {
  /** Unix seconds. */
  ts: number;
  cpu_count: number;
  cpu_used_pct: number;
  mem_total: number;
  mem_used: number;
  mem_cache: number;
  mem_total_mib: number;
  mem_used_mib: number;
  disk_used: number;
  disk_total: number;
}

interface CpuTimes {
  busy: number;
  total: number;
}

const MIB = 1024 * 1024;

export class MetricsReader {
  readonly #now: () => number;
  #last: CpuTimes = { busy: 0, total: 0 };

  constructor(now: () => number) {
    this.#now = now;
  }

  read(): Metrics {
    const cpu = parseCpuTimes(readFileSync("/proc/stat", "utf8"));
    const total = cpu.total - this.#last.total;
    const used = total > 0 ? (100 * (cpu.busy - this.#last.busy)) / total : 0;
    this.#last = cpu;
    const memory = parseMemory(readFileSync("/proc/meminfo", "utf8"));
    const disk = statfsSync("/");
    return {
      ts: Math.floor(this.#now() / 1000),
      cpu_count: availableParallelism(),
      cpu_used_pct: Math.round(100 * Math.min(Math.max(used, 0), 100)) / 100,
      mem_total: memory.total,
      mem_used: memory.used,
      mem_cache: memory.cache,
      mem_total_mib: Math.floor(memory.total / MIB),
      mem_used_mib: Math.floor(memory.used / MIB),
      disk_used: (disk.blocks - disk.bfree) * disk.bsize,
      disk_total: disk.blocks * disk.bsize,
    };
  }
}

/** proc(5): user nice system idle iowait irq softirq steal; guest time is part of user time. */
export function parseCpuTimes(stat: string): CpuTimes {
  const fields = /^cpu\s+(.*)$/m.exec(stat)?.[1]?.split(" ").map(Number) ?? [];
  const [user = 0, nice = 0, system = 0, idle = 0, iowait = 0, irq = 0, softirq = 0, steal = 0] = fields;
  const busy = user + nice + system + irq + softirq + steal;
  return { busy, total: busy + idle + iowait };
}

/** In bytes. `used` is what cannot be had without taking it from someone, as free(1) counts it. */
export function parseMemory(meminfo: string): { total: number; used: number; cache: number } {
  const kib = (field: string): number =>
    Number(new RegExp(`^${field}:\\s+(\\d+)`, "m").exec(meminfo)?.[1] ?? 0);
  const total = kib("MemTotal");
  return {
    total: 1024 * total,
    used: 1024 * (total - kib("MemAvailable")),
    cache: 1024 * (kib("Cached") + kib("Buffers") + kib("SReclaimable")),
  };
}
