/** What goes wrong on one machine, and ends by itself. */
import type { Random } from "../random.ts";
import type { Fault } from "../schedule.ts";
import type { RealHost } from "./real-host.ts";

export type HostFault = Exclude<
  Extract<Fault, { host: number }>,
  { kind: "guest-crash" | "stolen-token" | "cut" | "silence" | "loss" }
>;

export interface FaultTools {
  random: Random;
  paced(this: void, ms: number): number;
  /** Waits; not so long once all is to be healed. */
  pass(this: void, ms: number): Promise<void>;
  isHealing(this: void): boolean;
  /** The fault lasts as long as the work. */
  during(work: Promise<void>): void;
}

/** How many steps fail once, where all would fail now and then: so many times the share. */
const TROUBLED_STEPS = 120;

export function beginHostFault(fault: HostFault, host: RealHost, tools: FaultTools): void {
  const { program } = host;
  const { random, paced } = tools;
  const between = (begin: () => void, ms: number, end: () => void): void => {
    begin();
    tools.during(tools.pass(paced(ms)).then(end));
  };
  switch (fault.kind) {
    case "agent-crash":
      if (fault.failpoint === undefined) return tools.during(program.crash(paced(fault.downMs)));
      program.whenKilledStayDown(paced(fault.downMs));
      return host.arm([fault.failpoint], "kill", 1);
    case "agent-stall":
      return tools.during(program.stall(paced(fault.ms)));
    case "host-reboot":
      return tools.during(program.crash(paced(fault.downMs), () => host.endAllVms()));
    case "clock-skew":
      return between(
        () => host.setClock(fault.skewMs),
        fault.ms,
        () => host.setClock(0),
      );
    case "late-commands":
      // Kernels deliver nothing twice: what is left of it is the clock.
      return between(
        () => host.setClock(-fault.behindMs),
        fault.ms,
        () => host.setClock(0),
      );
    case "disk-full":
      return between(
        () => host.fillDisk(),
        fault.ms,
        () => host.emptyDisk(),
      );
    case "trouble": {
      const count = Math.ceil(TROUBLED_STEPS * fault.share);
      const steps = Array.from({ length: count }, () => random.next());
      return between(
        () => host.arm(steps, "error", 1),
        fault.ms,
        () => host.disarm(),
      );
    }
    case "step-fails":
      return host.arm([fault.failpoint], "error", fault.times);
    case "slow":
      return tools.during(stutter(host, fault, tools));
    default:
      return fault satisfies never;
  }
}

/** It gets along only in small steps. */
async function stutter(
  { program }: RealHost,
  { delayMs, ms }: { delayMs: number; ms: number },
  { paced, pass, isHealing }: FaultTools,
): Promise<void> {
  const endAt = performance.now() + paced(ms);
  while (performance.now() < endAt && !isHealing()) {
    await program.stall(paced(delayMs));
    await pass(paced(delayMs) / 2);
  }
}
