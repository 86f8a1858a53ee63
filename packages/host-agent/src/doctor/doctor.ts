/**
 * What works on this host, what does not, and why: the drivers' own probes and
 * a few facts, put together for people and programs.
 *
 * A probe that throws or does not end counts as "does not work", with its
 * words: a doctor that dies of the disease helps nobody.
 */
import { RookeryError } from "@rookery/protocol/errors";

export type Verdict = "works" | "limited" | "fails";

export interface Finding {
  /** "vmm", "root disk", … */
  area: string;
  name: string;
  verdict: Verdict;
  /** What it is, or why not and what to do about it. */
  detail: string;
}

export interface Probe {
  area: string;
  name: string;
  /** Sandboxes run only when one probe of each required area works. */
  required: boolean;
  run(signal: AbortSignal): Promise<ProbeResult>;
}

export interface ProbeResult {
  verdict: Verdict;
  detail: string;
  secure?: boolean;
  /** It runs no guests, and only pretends to. */
  simulated?: boolean;
}

export interface Diagnosis {
  /** Can a sandbox run here? */
  ok: boolean;
  /** May hostile tenants' code run here? */
  secure: boolean;
  findings: Finding[];
  /** For people: what follows from the findings. */
  advice: string[];
}

export async function diagnose(
  probes: readonly Probe[],
  options: { probeTimeoutMs: number; signal: AbortSignal },
): Promise<Diagnosis> {
  const findings: Finding[] = [];
  const working = new Map<string, boolean>();
  let secure = false;
  let simulated = false;
  for (const probe of probes) {
    const result = await runProbe(probe, options);
    const { verdict, detail, secure: isSecure } = result;
    simulated ||= result.simulated === true;
    findings.push({ area: probe.area, name: probe.name, verdict, detail });
    if (isSecure === true && verdict !== "fails") secure = true;
    if (probe.required) working.set(probe.area, (working.get(probe.area) ?? false) || verdict !== "fails");
  }
  const broken = [...working].filter(([, works]) => !works).map(([area]) => area);
  const ok = broken.length === 0;
  const advice: string[] = [];
  if (!ok) advice.push(`No sandbox can run on this host: nothing works for ${broken.join(", ")}.`);
  if (simulated) {
    advice.push(
      "SIMULATED: no guest runs here and no command does; for scale and fault tests only, never for production.",
    );
  } else if (ok && !secure) {
    advice.push(
      "Guests run on emulation (QEMU TCG), which QEMU does not call a security boundary: do not run hostile tenants' code on this host.",
    );
  }
  return { ok, secure: ok && secure, findings, advice };
}

async function runProbe(
  probe: Probe,
  { probeTimeoutMs, signal }: { probeTimeoutMs: number; signal: AbortSignal },
): Promise<ProbeResult> {
  const limit = AbortSignal.any([signal, AbortSignal.timeout(probeTimeoutMs)]);
  const late = Promise.withResolvers<never>();
  const onAbort = (): void => late.reject(new RookeryError("timeout", "the probe did not end in time"));
  limit.addEventListener("abort", onAbort, { once: true });
  try {
    return await Promise.race([probe.run(limit), late.promise]);
  } catch (cause) {
    signal.throwIfAborted();
    return { verdict: "fails", detail: cause instanceof Error ? cause.message : String(cause) };
  } finally {
    limit.removeEventListener("abort", onAbort);
  }
}
