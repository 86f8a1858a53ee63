/** How many hosts the monitor looked at, and how many of them it had to ask for all that they have. */
import { Counter, type Registry } from "prom-client";
import { COMPARE_REASONS } from "../db/hosts.ts";
import type { MonitorOptions } from "./host-monitor.ts";

export function monitorMetrics(registry: Registry): Pick<MonitorOptions, "onCheck"> {
  const checks = new Counter({
    name: "rookery_host_checks_total",
    help: "Checks of online hosts, by why their sandboxes were compared one by one (not: digests agreed)",
    labelNames: ["compared"],
    registers: [registry],
  });
  for (const compared of ["not", ...COMPARE_REASONS]) checks.inc({ compared }, 0);
  return { onCheck: (compared) => checks.inc({ compared }) };
}
