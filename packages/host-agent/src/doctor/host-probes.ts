/** Facts of the machine that no driver asks about. */
import { constants } from "node:fs";
import { access, statfs } from "node:fs/promises";
import { availableParallelism, arch, freemem, release, totalmem } from "node:os";
import { dirname } from "node:path";
import { isErrno } from "../host/errno.ts";
import type { Probe } from "./doctor.ts";

const MIN_MEMORY_MB = 1_024;
const MIN_DISK_MB = 4_096;
const mb = (bytes: number): number => Math.floor(bytes / (1 << 20));

export function hostProbes(options: { dataDir: string; uid: number | undefined }): Probe[] {
  return [
    {
      area: "host",
      name: "system",
      required: false,
      run: async () => {
        const supported = process.platform === "linux" && (arch() === "x64" || arch() === "arm64");
        const detail = `${process.platform} ${arch()}, kernel ${release()}, ${availableParallelism()} CPUs`;
        return { verdict: supported ? "works" : "fails", detail };
      },
    },
    {
      area: "host",
      name: "privileges",
      required: false,
      run: async () =>
        options.uid === 0
          ? { verdict: "works", detail: "root" }
          : {
              verdict: "limited",
              detail: `uid ${options.uid}: no network namespaces, no cgroups, VMMs under the agent's own uid; run as root`,
            },
    },
    {
      area: "host",
      name: "memory",
      required: false,
      run: async () => ({
        verdict: mb(totalmem()) >= MIN_MEMORY_MB ? "works" : "limited",
        detail: `${mb(totalmem())} MB, ${mb(freemem())} MB free`,
      }),
    },
    {
      area: "host",
      name: "disk",
      required: false,
      run: async () => {
        const { bavail, bsize } = await statfsOfNearest(options.dataDir);
        const freeMb = mb(bavail * bsize);
        return {
          verdict: freeMb >= MIN_DISK_MB ? "works" : "limited",
          detail: `${freeMb} MB free for ${options.dataDir}`,
        };
      },
    },
    {
      area: "host",
      name: "/dev/kvm",
      required: false,
      run: async () => {
        try {
          await access("/dev/kvm", constants.R_OK | constants.W_OK);
          return { verdict: "works", detail: "opens; whether guests run on it, the VMM's probe tells" };
        } catch (cause) {
          if (!isErrno(cause, "ENOENT", "EACCES", "EPERM")) throw cause;
          const why = isErrno(cause, "ENOENT") ? "is not there" : "may not be opened";
          return {
            verdict: "limited",
            detail: `${why}: guests are emulated, which is slower and no security boundary`,
          };
        }
      },
    },
  ];
}

/** The directory need not be there yet. */
async function statfsOfNearest(path: string): Promise<{ bavail: number; bsize: number }> {
  for (let dir = path; ; dir = dirname(dir)) {
    try {
      return await statfs(dir);
    } catch (cause) {
      if (!isErrno(cause, "ENOENT") || dir === dirname(dir)) throw cause;
    }
  }
}
