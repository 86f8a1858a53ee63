/**
 * When a running sandbox's time is over.
 *
 * Idle time counts from the last activity, and stands still under an open use
 * of envd, and while the guest is held. Absolute time counts from start or resume, or from the last change
 * of the lifetime. What the agent forgets in a crash (the last activity) is to
 * the sandbox's favour: idle time begins anew.
 */
import type { SandboxEntry } from "./core.ts";
import { isHeld } from "./holding.ts";

/** 0: never. */
export function expiresAtMs(entry: SandboxEntry, nowMs: number): number {
  const { spec, lifetimeSinceMs } = entry.record;
  const { timeoutSec, mode } = spec.lifetime;
  if (entry.phase !== "running" || isHeld(entry.record) || timeoutSec === 0) return 0;
  const timeoutMs = timeoutSec * 1000;
  if (mode === "absolute") return lifetimeSinceMs + timeoutMs;
  return (entry.uses.size > 0 ? nowMs : entry.lastActivityMs) + timeoutMs;
}

export function isExpired(entry: SandboxEntry, nowMs: number): boolean {
  const atMs = expiresAtMs(entry, nowMs);
  return atMs !== 0 && atMs <= nowMs;
}
